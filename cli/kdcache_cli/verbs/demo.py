"""`kdcache demo`: the whole way on procedural scenes, as a user would walk it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kdcache.settings.shared import MachineSettings
from kdcache_cli.console import ERRORS, OUT, bytes_text, progress_bar
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:
    from kdcache.metrics import Metrics

SCENES = "scenes:96x128,train=96,val=32,seed=0"
SIZE = (96, 128)
SETTINGS = {"lr": 4e-3, "warmup": 20}


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Where runs and store go; a demo that was stopped goes on.")
    ] = Path("kdcache-demo"),
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Steps of every training.")] = 400,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every training.")] = 0,
    device: shared_flags.Device = MachineSettings.device,
) -> None:
    """Teacher, cache, student without and with the teacher, one table: about three minutes on two cores.

    Uses street-like scenes made on the spot; nothing is downloaded.
    """
    from kdcache.data import open_split
    from kdcache.metrics import evaluate_model
    from kdcache.models.run import load_run
    from kdcache.train import pick_device

    where = pick_device(device)
    runs = {
        "teacher": out / "teacher",
        "student, labels only": out / "student-none",
        "student, dist": out / "student-dist",
    }
    teacher, none, dist = runs.values()
    store = out / "scenes.zarr"
    common = {"iterations": iterations, "seed": seed, "device": device, "val": SCENES, **SETTINGS}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SETTINGS.items())
    flags = f"--iterations {iterations} {flags}"

    _announce(
        1, "a teacher", f"train-teacher --data {SCENES} --model kdcache:base --size 96x128 {flags} --out {teacher}"
    )
    _train(teacher, verb="train-teacher", data=SCENES, model="kdcache:base", size=SIZE, **common)
    _announce(2, "its one pass over the data", f"build-teacher-cache --data {SCENES} --teacher {teacher} --out {store}")
    _build(teacher, store, device)
    student = {"verb": "train-student", "cache": str(store), "model": "kdcache:tiny", **common}
    command = f"train-student --cache {store} --model kdcache:tiny --val {SCENES} {flags}"
    _announce(3, "a student from the labels alone", f"{command} --method none --out {none}")
    _train(none, method="none", **student)
    _announce(
        4, "the same student, taught from the store: no teacher is loaded", f"{command} --method dist --out {dist}"
    )
    _train(dist, method="dist", **student)
    _announce(5, "who learnt what", f"evaluate {dist} --data {SCENES}")
    split = open_split(SCENES, "val")
    results, sizes = {}, {}
    for title, run in runs.items():
        model, description = load_run(run)
        sizes[title] = sum(p.numel() for p in model.parameters())
        results[title] = evaluate_model(model.to(where), split, description.size, device=where)
    _compare(results, sizes)
    lead, gain = (
        100 * (results[run].miou - results["student, labels only"].miou) for run in ("teacher", "student, dist")
    )
    OUT.print(
        f"\nThe teacher leads the student by {lead:+.1f} points; its targets in the store changed the student by "
        f"{gain:+.1f}.\nOne seed and a short training: a point or two is noise, and a teacher that is hardly better "
        "has little to teach.\n\nWhere to look next:\n"
        f"  [bold]kdcache report {none} {dist} --teacher {teacher}[/]    report.html, a page of these results\n"
        f"  [bold]kdcache inspect {store}[/]    what the store is made of\n"
        f"  [bold]kdcache verify {store} --teacher {teacher}[/]    that it holds the teacher's targets\n"
        f"  {dist}/metrics.jsonl    losses and gradient norms per term\n"
        "  [bold]kdcache train-teacher --data YOUR_FOLDER ...[/]    the same on your images: images/<split>/, "
        "labels/<split>/, classes.txt"
    )


def _announce(step: int, title: str, command: str) -> None:
    OUT.print(f"\n[bold]{step}/5  {title}[/]\n[dim]kdcache {escape(command)}[/]", soft_wrap=True)


def _train(run: Path, **settings: Any) -> None:
    from kdcache.metrics import percent
    from kdcache.train import Interrupted, make_config, train
    from kdcache.train.run.training_progress import TrainingProgress

    try:
        with progress_bar() as bar:
            result = train(make_config(**settings), run, resume=run.exists(), observer=TrainingProgress(bar, run.name))
    except Interrupted as stop:
        ERRORS.print(f"Stopped after {stop.step} iterations; the same command goes on.")
        raise typer.Exit(130) from None
    OUT.print(
        f"best mIoU {percent(result['best_miou'])}, {result['seconds']:.0f} s, "
        f"{result['images_per_second']:.1f} images/s, {100 * result['wait_share']:.0f} % of it waiting for data"
    )


def _build(teacher: Path, store: Path, device: str) -> None:
    from kdcache.data import open_split
    from kdcache.store import open_cache, summarise
    from kdcache.teacher import BuildOptions, build_cache, load_teacher
    from kdcache.train import pick_device

    split = open_split(SCENES, "train")
    loaded = load_teacher(str(teacher), split.classes)
    build_options = BuildOptions(size=SIZE, shard_records=32, device=pick_device(device))
    with progress_bar() as bar:
        task = bar.add_task("teacher's pass", total=build_options.views * len(split), note="")
        result = build_cache(split, loaded, store, build_options, lambda done, _: bar.update(task, completed=done))
    summary = summarise(open_cache(store))
    OUT.print(
        f"{summary.records_written} records, {result.images_per_second:.0f} images/s, "
        f"{bytes_text(summary.target_bytes_per_record)} of targets per record: {summary.saving:.0f} times less than "
        "full-resolution fp16"
    )


def _compare(results: dict[str, "Metrics"], sizes: dict[str, int]) -> None:
    """Runs as columns: a terminal is higher than it is wide."""
    from kdcache.metrics import percent

    table = Table("", *results, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("parameters", *(f"{size / 1e6:.2f} M" for size in sizes.values()))
    for title, name in (("mIoU", "miou"), ("mAcc", "macc"), ("aAcc", "aacc")):
        table.add_row(title, *(percent(getattr(metrics, name)) for metrics in results.values()))
    table.add_section()
    for index, name in enumerate(next(iter(results.values())).class_names):
        table.add_row(f"IoU {name}", *(percent(metrics.iou[index]) for metrics in results.values()))
    OUT.print(table)
