"""`kdcache bench-loader`: how fast a store is read and loaded, here."""

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kdcache.errors import RecipeError
from kdcache.settings.shared import ImageSettings, MachineSettings
from kdcache_cli.console import OUT
from kdcache_cli.measuring import MISSING, JsonFile, check_json, contestants, line, stages, write_result
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:  # the verb imports what it needs: --help must not wait for torch
    from kdcache.bench.loader import Measured, Report
    from kdcache.bench.loader import Table as Turns

_Option = typer.Option
EVERYTHING = "memcpy,decoder,direct,tensorstore,zarr,zarrs,fused,files,inline,dataloader,ring,resident,default"
AUGMENTS = {"none": ("none",), "warp": ("none", "warp")}
TITLES = {
    "readers": "Readers: targets of random records, page cache warm",
    "loaders": "Loaders: whole samples, augment {augment}, batches of {batch_size}",
    "steps": "A training step of {student}, augment {augment}, batches of {batch_size}",
}


def bench_loader(
    cache: Annotated[str, _Option("--cache", help="The store to read, a folder or s3://BUCKET/PREFIX.")],
    against: Annotated[
        str,
        _Option(
            "--against",
            help="Readers: memcpy and decoder (the floors: bytes in memory), direct (ours), tensorstore, zarr "
            "(zarr-python's default pipeline), zarrs and fused (faster pipelines of it, where they are installed), "
            "files (a .pt file per sample). Loaders: inline (between steps), dataloader, ring (ours), "
            "resident (ring, records in memory), default (inline, records in memory: what a training on a CPU does).",
        ),
    ] = EVERYTHING,
    records: Annotated[int, _Option("--records", min=1, help="Records per repeat; they are held in memory.")] = 256,
    batch_size: Annotated[int, _Option("--batch-size", min=1, help="Samples per batch of a loader.")] = 16,
    threads: Annotated[int, _Option("--threads", min=1, max=256, help="Threads of the ring.")] = 2,
    workers: Annotated[int, _Option("--workers", min=1, max=256, help="Processes of the DataLoader.")] = 2,
    repeats: Annotated[int, _Option("--repeats", min=1, help="Timings of each of them, in turns.")] = 7,
    augment: Annotated[
        str, _Option("--augment", help="none; warp measures loaders and steps with drawn windows as well.")
    ] = "none",
    student: Annotated[str, _Option("--student", help="Model whose training step is fed.")] = "kdcache:tiny",
    steps: Annotated[
        int, _Option("--steps", min=0, help="Training steps with each of them; 0 leaves the steps out.")
    ] = 70,
    device: shared_flags.Device = MachineSettings.device,
    data: shared_flags.OptionalData = None,
    split: shared_flags.Split = ImageSettings.split,
    json_file: JsonFile = None,
    cache_dir: shared_flags.CacheDir = None,
    cache_bytes: shared_flags.CacheBytes = None,
) -> None:
    """Time readers and loaders of a store side by side on this machine.

    All take turns in one run, on the same records in the same order.
    Before it is timed a reader must give the bytes that zarr-python reads, and a
    loader the batches that its samples drawn one by one make.

    [bold]x decoder[/]  a reader's share of the speed that its codec allows
    [bold]x zarr[/]     what it gains over zarr-python as it is; x zarrs, x fused with a faster pipeline
    [bold]x memory[/]   what loading costs a training step: 1 is nothing
    [bold]CPU[/]        of all threads and worker processes, per sample or step
    [bold]peak[/]       growth of resident memory, worker processes included

    [dim]kdcache bench-loader --cache store.zarr --against decoder,direct,zarr[/]

    [dim]kdcache bench-loader --cache store.zarr --augment warp --json loader.json[/]
    """
    from kdcache.bench.kernels import parse_names
    from kdcache.bench.loader import LOADERS, READERS, Settings, measure
    from kdcache.data import open_split
    from kdcache.store import Records, open_cache
    from kdcache.training import pick_device

    names = parse_names(against, "--against", (*READERS, *LOADERS))
    if not names:
        raise RecipeError("--against lists readers and loaders", received=repr(against), remedy="leave it out for all")
    if augment not in AUGMENTS:
        raise RecipeError("--augment is none or warp", received=repr(augment), remedy="use --augment warp for both")
    check_json(json_file)
    store = open_cache(shared_flags.open_place(cache, cache_dir, cache_bytes))
    for shard in range(store.manifest.shards if store.remote else 0):
        for path in store.specs:
            store.fetch(shard, path)  # other readers know the copies alone
    settings = Settings(
        against=names,
        records=records,
        batch_size=batch_size,
        workers=workers,
        threads=threads,
        repeats=repeats,
        augments=AUGMENTS[augment],
        student=student,
        steps=steps,
        device=pick_device(device),
    )
    source = open_split(data, split) if data and not store.pixels_stored else None
    with stages() as note:
        report = measure(Records(store, source), settings, note)
    _print(report)
    write_result(json_file, "bench-loader", "loader", report.to_json())


def _print(report: "Report") -> None:
    import torch

    facts = report.store
    kib = f"{facts['decoded_bytes'] / 1024:.1f} KiB decoded in {len(facts['arrays'])} arrays"
    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} of them torch's"
    line(f"{facts['records']} records; a target is {kib}; {machine}")
    for table in report.tables:
        OUT.print()
        OUT.print(_table(table, report))
        for row in table.rows:
            if row.problem:
                line(f"  {row.title}: {row.problem}")


def _table(turns: "Turns", report: "Report") -> Table:
    """A line for each that was timed: medians, with the 20th and 80th percentile of the turns."""
    settings = report.settings
    title = TITLES[turns.kind].format(augment=turns.augment, batch_size=settings.batch_size, student=settings.student)
    unit = ["ms/step"] if turns.kind == "steps" else ["samples/s"]
    cpu = "CPU\nms" if turns.kind == "steps" else "CPU\nus"
    peak = ["peak\nMiB"] if turns.kind == "loaders" else []
    columns = [*unit, "p20 to p80", cpu, *(f"x\n{name}" for name in turns.against), *peak]
    table = contestants(*columns, title=title)
    table.padding = 0, 1, 0, 0
    for column in table.columns:
        column.no_wrap = True
    for row in turns.rows:
        if row.pace is not None:
            ours = row.name in ("direct", "ring")
            table.add_row(*_cells(turns, row), style="bold" if ours else None)
    return table


def _cells(turns: "Turns", row: "Measured") -> list[str]:
    pace = row.pace
    assert pace is not None
    slow, fast = pace.time.p80, pace.time.p20
    if turns.kind == "steps":
        cpu = None if pace.cpu is None else pace.cpu.p50
        cells = [_number(pace.time.p50), f"{_number(fast)} to {_number(slow)}", _number(cpu)]
    else:
        cells = [_number(pace.per_second), f"{_number(1e3 / slow)} to {_number(1e3 / fast)}", _number(pace.cpu_us)]
    ratios = [MISSING if ratio is None else f"{_ratio(ratio)}x" for ratio in turns.ratios(row).values()]
    peak = [_number(row.peak_mib)] if turns.kind == "loaders" else []
    return [row.title, *cells, *ratios, *peak]


def _number(value: float | None) -> str:
    """Three digits; thousands with their comma."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float) -> str:
    """Two digits after the point, where 3 % matter."""
    return f"{value:.2f}" if value < 10 else _number(value)
