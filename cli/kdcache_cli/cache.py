"""`kdcache build-teacher-cache`, `inspect`, `verify`: the store's verbs."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kdcache.errors import RecipeError
from kdcache_cli import options
from kdcache_cli.console import ERRORS, OUT, bytes_text, progress_bar

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.evaluate import Metrics

_Option = typer.Option


def build_teacher_cache(
    data: options.Data,
    teacher: Annotated[
        str,
        _Option("--teacher", help="A run folder, SPEC@FILE (weights trained elsewhere) or SPEC@default (downloads)."),
    ],
    out: Annotated[Path, _Option("--out", help="Store to write; an interrupted one is continued.")],
    split: options.Split = "train",
    size: options.Size = None,
    top_k: Annotated[
        str,
        _Option("--top-k", help="Classes kept per pixel: auto (all up to 32, else as many as it takes) or a number."),
    ] = "auto",
    features: Annotated[str, _Option("--features", help="Comma-separated taps to store; see kdcache models.")] = "",
    pixels: Annotated[
        str,
        _Option(
            "--pixels", help="stored: images and labels go into the store, which then needs no data set; or source."
        ),
    ] = "stored",
    class_map: Annotated[
        Path | None, _Option("--class-map", help="Which class of the data each teacher class becomes.")
    ] = None,
    mean: Annotated[
        str | None, _Option("--mean", metavar="R,G,B", help="Normalisation, if not the model's own.")
    ] = None,
    std: Annotated[str | None, _Option("--std", metavar="R,G,B", help="Normalisation, if not the model's own.")] = None,
    precision: Annotated[str, _Option("--precision", help="float32, bf16 or fp16.")] = "float32",
    batch_size: Annotated[int, _Option("--batch-size", min=1, help="Images per forward pass.")] = 8,
    shard_records: Annotated[int, _Option("--shard-records", min=1, max=65536, help="Records per shard file.")] = 64,
    render_threads: Annotated[
        int | None,
        _Option("--render-threads", min=0, help="Threads that decode and resize [default: the cores, at most 8]."),
    ] = None,
    threads: options.Threads = 0,
    device: options.Device = "auto",
) -> None:
    """Run a teacher over a split once and keep what it said.

    Interrupted, the same command continues; a finished store is checked and left as it is.

    [dim]kdcache build-teacher-cache --data camvid --teacher runs/teacher --out camvid.zarr[/]
    """
    import torch

    from kdcache.data import open_split
    from kdcache.store import open_cache, summarise
    from kdcache.teacher import BuildOptions, build_cache, load_teacher, score_cache
    from kdcache.train import pick_device

    if threads:
        torch.set_num_threads(threads)
    source = open_split(data, split)
    loaded = load_teacher(
        teacher,
        source.classes,
        class_map=class_map,
        mean=options.parse_rgb(mean, "--mean"),
        std=options.parse_rgb(std, "--std"),
    )
    for note in loaded.notes:
        ERRORS.print(f"note: {note}")
    chosen = options.parse_size(size) or loaded.size
    if chosen is None:
        raise RecipeError(
            "a teacher that is no run of kdcache needs the size of its images",
            received="no --size",
            remedy="add --size HxW, for instance --size 288x384",
        )
    build_options = BuildOptions(
        size=chosen,
        top_k=_top_k(top_k),
        features=tuple(tap for tap in features.split(",") if tap),
        pixels=_one_of("--pixels", pixels, ("stored", "source")),  # type: ignore[arg-type]
        batch_size=batch_size,
        shard_records=shard_records,
        precision=_one_of("--precision", precision, ("float32", "bf16", "fp16")),  # type: ignore[arg-type]
        device=pick_device(device),
        **({} if render_threads is None else {"render_threads": render_threads}),
    )
    with progress_bar() as bar:
        task = bar.add_task("teacher's pass", total=len(source), note="")
        result = build_cache(
            source,
            loaded,
            out,
            build_options,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    cache = open_cache(out)
    summary = summarise(cache)
    kept = f" ({result.kept} were there)" if result.kept else ""
    speed = f" in {result.seconds:.1f} s, {result.images_per_second:.1f} images/s" if result.records else ""
    OUT.print(f"[bold]{out}[/]: {len(cache)} records{kept}{speed}")
    OUT.print(
        f"{bytes_text(summary.bytes_on_disk)} on disk, {bytes_text(summary.bytes_per_record)} per record, "
        f"of which targets {bytes_text(summary.target_bytes_per_record)}; full-resolution fp16 logits would be "
        f"{bytes_text(summary.full_resolution_bytes)} per record, {summary.saving:.1f} times the targets"
    )
    _print_score(score_cache(cache, source))


def inspect(
    store: Annotated[Path, typer.Argument(help="A store.")],
    json: Annotated[bool, _Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what a store is: from what, how big, complete or not, compression, top-k mass."""
    from kdcache.store import inspect_store

    report = inspect_store(store)
    if json:
        typer.echo(json_module.dumps(report.to_json(), indent=1))
        return
    facts = Table(box=None, show_header=False)
    facts.add_column(style="dim")
    for name, value in report.facts():
        facts.add_row(name, value)
    OUT.print(facts)
    table = Table("array", "record", "type", "on disk", "per record", "ratio", box=None, header_style="dim")
    for array in report.arrays:
        per_record = bytes_text(array.bytes_on_disk / max(report.records_written, 1))
        shape = "x".join(map(str, array.shape)) or "1"
        table.add_row(array.path, shape, array.dtype, bytes_text(array.bytes_on_disk), per_record, f"{array.ratio:.2f}")
    OUT.print(table)


def verify(
    store: Annotated[Path, typer.Argument(help="A store.")],
    teacher: Annotated[str | None, _Option("--teacher", help="Run this teacher again on a sample of records.")] = None,
    records: Annotated[int, _Option("--records", min=1, help="How many records to run it on.")] = 16,
    data: options.OptionalData = None,
    split: Annotated[str | None, _Option("--split", help="Which split of it [default: the store's].")] = None,
    class_map: Annotated[Path | None, _Option("--class-map", help="As at the build.")] = None,
    device: options.Device = "auto",
) -> None:
    """Check every byte of a store; with --teacher, also that it holds what that teacher says.

    Exits with 1 when something is off.
    """
    from kdcache.data import ClassList, open_split
    from kdcache.store import open_cache, read_manifest, verify_files
    from kdcache.teacher import compare_teacher, load_teacher
    from kdcache.train import pick_device

    with progress_bar() as bar:
        task = bar.add_task("checking files", total=None, note="")
        report = verify_files(store, lambda done, total: bar.update(task, completed=done, total=total))
    OUT.print(f"{report.files} files, {bytes_text(report.bytes)} of shards: ", end="")
    OUT.print("[green]as written[/]" if not report.damaged else f"[red]{len(report.damaged)} damaged[/]")
    for name in report.damaged:
        OUT.print(f"  [red]damaged[/] {store / name}")
    if report.damaged:
        OUT.print("Run the same build-teacher-cache command again: it redoes these shards and keeps the rest.")
        raise typer.Exit(1)
    if teacher is None:
        return
    dataset = read_manifest(store).dataset
    source = open_split(data, split or dataset.split) if data else None
    loaded = load_teacher(teacher, ClassList(dataset.class_names, dataset.class_colours), class_map=class_map)
    agreement = compare_teacher(open_cache(store), loaded, source, pick_device(device), records)
    for line in agreement.fingerprint:
        OUT.print(f"  [red]another teacher[/] {line}")
    for name in agreement.drifted:
        OUT.print(f"  [red]drifted pixels[/] {name}")
    OUT.print(
        f"{agreement.records} records against the teacher: argmax agreement {100 * agreement.argmax:.3f} %, "
        f"KL {agreement.kl:.2e} nats, largest logit error {agreement.largest_error:.2e}"
    )
    OUT.print("[green]the store holds what this teacher says[/]" if agreement.ok else "[red]it does not[/]")
    if not agreement.ok:
        raise typer.Exit(1)


def _print_score(metrics: "Metrics | None") -> None:
    from kdcache.evaluate import percent

    if metrics is None:
        OUT.print("no labels: the teacher's mIoU is unknown")
        return
    OUT.print(
        f"the teacher on these labels, read back from the store: mIoU {percent(metrics.miou)}, "
        f"aAcc {percent(metrics.aacc)}"
    )


def _top_k(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit():
        raise RecipeError("--top-k is auto or a number of classes", received=repr(text), remedy="use --top-k auto")
    return int(text)


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise RecipeError(
            f"{flag} is one of {', '.join(allowed)}", received=repr(value), remedy=f"use {flag} {allowed[0]}"
        )
    return value
