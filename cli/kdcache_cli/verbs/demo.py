"""`kdcache demo`: the whole way on procedural scenes, as a user would walk it.

The teacher learns from 96 labelled scenes. The student has 96 other scenes with 8 labels, so the teacher has something
to add: over seeds 0, 1 and 2 distillation gained 8.1, 9.8 and 9.1 points of mIoU. With the same 12 labels for teacher
and student it gained 1.4 (one seed).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kdcache.progress import progress_bar, progress_of_steps
from kdcache.settings.shared import MachineSettings
from kdcache_cli.console import ERRORS, OUT, bytes_text, figure_table
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:
    from kdcache.analysis.comparison import Row

THEIRS = "scenes:96x128,train=96,val=32,seed=0"
"""The data that the teacher is trained on."""
YOURS = "scenes:96x128,train=96,val=32,seed=1"
LABELS = 8
"""The number of images in YOURS that have a label."""
SIZE = "96x128"


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder of runs, cache and page; a stopped demo continues there.")
    ] = Path("kdcache-demo"),
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Steps of every training.")] = 500,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every training.")] = 0,
    device: shared_flags.Device = MachineSettings.device,
) -> None:
    """Try every step in about three minutes on two cores: teacher, cache, two students, report page.

    The scenes look like streets and are drawn on the spot. Nothing is downloaded. One student learns from the cache,
    the other one from labels only.
    """
    teacher, cache, none, dist = (out / name for name in ("teacher", "scenes.zarr", "student-none", "student-dist"))
    common = {"iterations": iterations, "seed": seed, "device": device, "lr": 4e-3, "warmup": 20}
    student = {"cache": str(cache), "model": "kdcache:tiny", "val": YOURS, "limit_labels": LABELS, **common}

    _announce(1, "A teacher learns from 96 labelled scenes")
    _train("train-teacher", teacher, **{"data": THEIRS, "val": THEIRS, "model": "kdcache:base", "size": SIZE, **common})
    _announce(2, "The teacher runs once over 96 scenes of yours")
    _build(teacher, cache, device)
    _announce(3, f"A student learns from labels only: {LABELS} of your 96 scenes have one")
    batch = _train("train-student", none, method="none", **student)
    _announce(4, "The same student learns from the cache as well: no teacher is loaded")
    _train("train-student", dist, method="dist", **student)
    _announce(5, "Did it help?")
    rows = _report({"teacher": teacher, "labels only": none, "distilled": dist}, out / "report.html", device)
    OUT.print(
        "\nWhere to look next:\n"
        f"  [bold]{escape(str(out))}/report.html[/]    these results as a page\n"
        f"  [bold]kdcache inspect {escape(str(cache))}[/]    what the cache holds\n"
        f"  [bold]kdcache verify {escape(str(cache))} --teacher {escape(str(teacher))}[/]    whose outputs it holds\n"
        "  [bold]kdcache data check YOUR_FOLDER[/]    your own images: images/<split>/, labels/<split>/, classes.txt\n"
    )
    _show_savings(cache, rows["teacher"], iterations * batch)


def _announce(step: int, title: str) -> None:
    OUT.print(f"\n[bold]{step}/5  {title}[/]")


def _show_command(verb: str, out: Path, settings: dict[str, Any]) -> None:
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    OUT.print(f"[dim]kdcache {verb} {escape(flags)} --out {escape(str(out))}[/]", soft_wrap=True)


def _train(verb: str, run: Path, **settings: Any) -> int:
    """Train into a run folder, or continue there. Return the batch size."""
    from kdcache.metrics import percent
    from kdcache.training import Interrupted, make_config, train
    from kdcache.training.run.training_progress import TrainingProgress

    _show_command(verb, run, settings)
    config = make_config(verb=verb, **settings)
    try:
        with progress_bar() as bar:
            result = train(config, run, resume=run.exists(), observer=TrainingProgress(bar, run.name))
    except Interrupted as stop:
        ERRORS.print(f"Stopped after {stop.step} iterations. Run the same command again to continue.")
        raise typer.Exit(130) from None
    OUT.print(
        f"best mIoU {percent(result['best_miou'])}, {result['seconds']:.0f} s, "
        f"{result['images_per_second']:.1f} images/s, {100 * result['wait_share']:.0f} % of it waiting for data"
    )
    return config.optimizer.batch_size


def _build(teacher: Path, cache: Path, device: str) -> None:
    from kdcache.data import open_split
    from kdcache.store import open_cache, summarise
    from kdcache.teacher import BuildOptions, build_cache, load_teacher
    from kdcache.training import pick_device

    _show_command("build-teacher-cache", cache, {"data": YOURS, "teacher": teacher, "shard_records": 32})
    split = open_split(YOURS, "train")
    loaded = load_teacher(str(teacher), split.classes)
    build_options = BuildOptions(size=(96, 128), shard_records=32, device=pick_device(device))
    with progress_bar() as bar:
        task = bar.add_task("teacher's pass", total=build_options.views * len(split), note="")
        result = build_cache(split, loaded, cache, build_options, lambda done, _: bar.update(task, completed=done))
    summary = summarise(open_cache(cache))
    OUT.print(
        f"{summary.records_written} records, {result.images_per_second:.0f} images/s, "
        f"{bytes_text(summary.target_bytes_per_record)} of targets per record: {summary.saving:.0f} times less than "
        "full-resolution fp16"
    )


def _report(runs: dict[str, Path], page: Path, device: str) -> dict[str, "Row"]:
    """Write the report page and print the table. Return its rows: title -> row, the teacher's first."""
    from kdcache.analysis.compare import CompareOptions
    from kdcache.analysis.report import ReportOptions, make_report
    from kdcache.analysis.stored_evaluations import EvalSettings
    from kdcache.metrics import percent
    from kdcache.training import pick_device
    from kdcache.verbs.report import size_of_cache

    teacher, *students = map(str, runs.values())
    _show_command(f"report {' '.join(map(escape, students))}", page, {"teacher": teacher, "data": YOURS})
    judged = CompareOptions(EvalSettings(device=str(pick_device(device))), teacher)
    with progress_of_steps("comparing") as progress:
        comparison = make_report(
            students,
            YOURS,
            "val",
            page,
            ReportOptions(judged, title="The demo", command="kdcache demo", size_of_cache=size_of_cache),
            progress,
        )
    places = {Path(row.runs[0].run).name: row for row in comparison.rows}
    rows = {title: places[run.name] for title, run in runs.items()}
    table = figure_table("", *rows)
    table.add_row("parameters", *(f"{row.cost.parameters / 1e6:.2f} M" for row in rows.values()))
    table.add_row("mIoU", *(percent(row.miou.mean) for row in rows.values()))
    for place, name in enumerate(comparison.class_names):
        table.add_row(f"IoU {name}", *(percent(row.iou[place].mean) for row in rows.values()))
    OUT.print(table)
    lead, gain = (100 * (rows[title].miou.mean - rows["labels only"].miou.mean) for title in ("teacher", "distilled"))
    OUT.print(
        f"\nDistillation changed the student's mIoU by {gain:+.1f} points. The teacher differs from labels only by "
        f"{lead:+.1f} points.\nThis is one seed on procedural scenes: it says nothing about your data."
    )
    return rows


def _show_savings(cache: Path, teacher: "Row", live: int) -> None:
    """Print teacher forwards and seconds, with the cache and with a live teacher.

    `live` is the number of forwards of a live teacher for each student.
    """
    from kdcache.store import open_cache, summarise

    once, latency = summarise(open_cache(cache)).records_written, teacher.cost.latency
    assert latency is not None
    table: Table = figure_table("teacher forwards", "cache", "live teacher", "saved", title="What the cache saved")
    for students in (1, 10):
        saved = students * live - once
        seconds = f"{saved:,} ({saved * latency.median_ms / 1000:,.0f} s)"
        table.add_row(
            f"for {students} student{'s' if students > 1 else ''}", f"{once:,}", f"{students * live:,}", seconds
        )
    OUT.print(table)
    OUT.print(f"A teacher forward takes {latency.median_ms:.1f} ms per image ({latency.device}).")
