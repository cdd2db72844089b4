"""One benchmark of reading and loading: everything on one store, in one run.

A contestant that cannot run (not installed, another layout) stays in the result with the reason. One that reads
something else than the others ends the benchmark.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdcache.bench.kernels.rivals import UnavailableError
from kdcache.bench.loader.feeding import FED_BY, make_student_step, step_contestants
from kdcache.bench.loader.readers import READERS, Reader, Source, open_source, verify
from kdcache.bench.loader.report import MEMORY, Measured, Report, Settings, Table
from kdcache.bench.loader.streams import CPU, LOADERS, Stream, open_and_weigh, reference_batch
from kdcache.bench.loader.turns import Contestant, in_turn
from kdcache.store import Cache, Records
from kdcache.training.input.cache_dataset import CacheDataset
from kdcache.training.input.loader import Draws
from kdcache.training.input.residency import free_bytes
from kdcache.training.input.resident_records import decoded_bytes

Note = Callable[[str], None]
LEAST_BATCHES = 4
"""Smallest number of batches in a turn of a loader, whatever --records is."""
WEIGHED_BATCHES = 8
WARM_UP_RECORDS = 32
LEAST_TURN_S = 0.1


def measure(source: Cache | Records, settings: Settings, note: Note = lambda text: None) -> Report:
    """Run a benchmark.

    Args:
        source: an open store, or its records, of which a store that keeps no pixels has its data set for the loaders.
        note: called with a line at every stage.
    Raises: StoreError when a contestant reads other bytes than it should; what opening and reading raise.
    """
    assert settings.against
    assert {*settings.against} <= {*READERS, *LOADERS}
    records = Records.of(source)
    cache = records.cache
    readers = [name for name in READERS if name in settings.against]
    loaders = [name for name in LOADERS if name in settings.against]
    if "resident" in loaders and decoded_bytes(cache, tuple(cache.specs)) > free_bytes() // 2:
        note("resident: left out, the decoded records are more than half of what is free")
        loaders = [name for name in loaders if name not in ("resident", "default")]
    fed_by = [name for name in FED_BY if name in loaders and settings.steps]

    def dataset(kind: type[CacheDataset], *, augment: str) -> CacheDataset:
        return kind(records, augment=augment)

    # Wrong input is refused before anything is measured.
    for augment in settings.augments if loaders else ():
        dataset(CacheDataset, augment=augment)
    student = make_student_step(cache, settings.student, settings.device) if fed_by else None

    tables = [_measure_readers(cache, readers, settings, note)] if readers else []
    tables += [
        _measure_loaders(partial(dataset, augment=augment), augment, loaders, settings, note)
        for augment in (settings.augments if loaders else ())
    ]
    if student is not None:
        tables.append(_measure_steps(partial(dataset, augment=settings.augments[-1]), fed_by, student, settings, note))
    return Report(_described(cache), settings, tuple(tables))


def _measure_readers(cache: Cache, names: Sequence[str], settings: Settings, note: Note) -> Table:
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        note(f"readers: {settings.records} records, read once by zarr-python")
        source = open_source(cache, settings.records, Path(folder))
        ready, problems = [], {}
        for name in names:
            title, make = READERS[name]
            note(f"readers: {title}: every record compared")
            try:
                read = make(source)
            except UnavailableError as error:
                problems[name] = str(error)
                continue
            verify(title, read, source)
            ready.append(_reading(name, read, source))
        note(f"readers: {settings.repeats} repeats in turn")
        paces = in_turn(ready, settings.repeats)
    rows = [Measured(name, READERS[name][0], paces.get(name), problem=problems.get(name, "")) for name in names]
    pipelines = tuple(name for name in ("zarrs", "fused") if name in paces)
    return Table("readers", ("decoder", "zarr", *pipelines), tuple(rows))


def _reading(name: str, read: Reader, source: Source) -> Contestant:
    """A turn is one pass over the records, or as many as take long enough for a clock."""

    def work(passes: int) -> None:
        for _ in range(passes):
            for record in source.order:
                read(record)

    def warm_up() -> None:
        for record in source.order[:WARM_UP_RECORDS]:
            read(record)

    began = time.perf_counter()
    work(1)
    passes = math.ceil(LEAST_TURN_S / (time.perf_counter() - began))
    return Contestant(name, READERS[name][0], partial(work, passes), passes * len(source.order), before=warm_up)


def _measure_loaders(
    dataset: Callable[[type[CacheDataset]], CacheDataset],
    augment: str,
    names: Sequence[str],
    settings: Settings,
    note: Note,
) -> Table:
    batches = max(LEAST_BATCHES, settings.records // settings.batch_size)
    draws = Draws(dataset(CacheDataset), 0)
    reference_batch(draws, 0, 1)  # what a first sample imports is no loader's memory
    with ExitStack() as open_streams:
        contestants, peaks = [], {}
        for name in names:
            note(f"loaders, augment {augment}: {name}: opening, weighing, comparing")
            stream, peaks[name] = open_and_weigh(partial(_open, name, dataset, settings), WEIGHED_BATCHES)
            open_streams.enter_context(stream)
            stream.verify(draws)
            one = Contestant(
                name,
                stream.title,
                partial(stream.skip, batches),
                batches * settings.batch_size,
                before=partial(stream.skip, stream.ahead + 1),
                processes=stream.processes,
            )
            contestants.append(one)
        note(f"loaders, augment {augment}: {settings.repeats} repeats in turn")
        paces = in_turn(contestants, settings.repeats)
    rows = [Measured(one.name, one.title, paces[one.name], peaks[one.name]) for one in contestants]
    return Table("loaders", ("inline", "dataloader"), tuple(rows), augment)


def _measure_steps(
    dataset: Callable[..., CacheDataset],
    names: Sequence[str],
    student: Callable[..., Any],
    settings: Settings,
    note: Note,
) -> Table:
    draws, device = Draws(dataset(CacheDataset), 0), settings.device
    with ExitStack() as open_streams:
        streams = [open_streams.enter_context(_open(name, dataset, settings, device)) for name in names]
        for stream in streams:
            stream.verify(draws)
        step = student(reference_batch(draws, 0, settings.batch_size), note)
        rounds = min(settings.repeats, settings.steps)
        contestants = step_contestants(
            step,
            draws,
            streams,
            batch_size=settings.batch_size,
            steps=-(-settings.steps // rounds),
            device=device,
        )
        note(f"steps of {settings.student}: {rounds} repeats in turn")
        for one in contestants:
            one.before()
        paces = in_turn(contestants, rounds)
    rows = [Measured(one.name, one.title, paces[one.name]) for one in contestants]
    return Table("steps", (MEMORY,), tuple(rows), settings.augments[-1])


def _open(name: str, dataset: Callable[..., CacheDataset], settings: Settings, device: torch.device = CPU) -> Stream:
    return Stream(
        name,
        dataset,
        batch_size=settings.batch_size,
        workers=settings.workers,
        threads=settings.threads,
        device=device,
    )


def _described(cache: Cache) -> dict[str, Any]:
    """A description of the store that was read, for comparisons of figures."""
    arrays = {
        path: {"shape": list(cache.specs[path].shape), "dtype": cache.specs[path].dtype}
        for path in cache.target_paths()
    }
    decoded = sum(row.nbytes for row in cache.read(0, cache.target_paths()).values())
    return {"records": len(cache), "arrays": arrays, "decoded_bytes": decoded, "view": list(cache.view_size)}
