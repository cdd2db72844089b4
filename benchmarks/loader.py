"""How fast are targets read and samples loaded, and what does loading cost a training step?

All contestants take turns in one run, on one cache and a warm page cache:

    readers  the target arrays of random records: by kdcache (direct) and by other libraries
    loaders  whole samples: drawn by the trainer itself (inline), by worker processes (dataloader), by threads (ring),
             by threads from decoded records in memory (resident), by the trainer from these (default, on a CPU)
    steps    a training step that a loader feeds, and the same step on one batch from memory

Before it is timed, a reader must give the bytes that zarr-python reads, and a loader the batches that its samples make
when they are drawn one by one. A library that is not installed stays in the result with the reason.

    python benchmarks/loader.py --cache camvid.zarr --augment warp --json benchmarks/results/loader-cpu.json
"""

import argparse
import gc
import math
import multiprocessing
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch.utils.data import default_collate
from zarr.core import codec_pipeline

from common import header, run, student_step, write
from kdcache.bench.timing import check_repeats
from kdcache.distill import Batch
from kdcache.distill.batch import tensors_of
from kdcache.errors import KDCacheError
from kdcache.store import Cache, open_cache
from kdcache.training.input.cache_dataset import CacheDataset
from kdcache.training.input.device_prefetch import feed
from kdcache.training.input.loader import Draws, make_loader, next_batch
from kdcache.training.input.resident_records import RamRecords
from kdcache.training.input.ring_buffer import DEPTH
from kdcache.training.step.compiled import choose_step, make_step
from turns import Contestant, Pace, in_turn

Rows = Sequence[np.ndarray[Any, Any]]
"""The rows of a record, one per target array."""
WORKERS = 2
"""Processes of the DataLoader, and threads of the ring."""
STUDENT = "kdcache:tiny"
LEAST_BATCHES, LEAST_TURN_S, CHECKED = 4, 0.1, 3
MEMORY = "memory"
BASELINES = {"readers": ("zarr", "zarrs", "fused"), "loaders": ("inline", "dataloader"), "steps": (MEMORY,)}
"""The readers and loaders that each table compares the others with."""


class DifferenceError(Exception):
    """A contestant reads or loads other data than the others."""


# --- readers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The data that the readers read.

    Attributes:
        cache: the cache.
        paths: the arrays to read.
        order: record numbers, which may repeat.
        rows: by record, its target arrays as zarr-python reads them.
    """

    cache: Cache
    paths: tuple[str, ...]
    order: tuple[int, ...]
    rows: dict[int, Rows]


Reader = Callable[[int], Rows]
"""Reads a record; the rows may lie in buffers that the next call overwrites."""


def open_source(cache: Cache, records: int) -> Source:
    """Draw an order of records, epoch after epoch, and read each record once with zarr-python."""
    paths = tuple(cache.target_paths())
    rng = np.random.default_rng(0)
    epochs = [rng.permutation(len(cache)) for _ in range(-(-records // len(cache)))]
    order = tuple(np.concatenate(epochs)[:records].tolist())
    for record in set(order):
        cache.read(record, paths)  # a damaged cache gets our own message
    arrays = [open_zarr(cache.path / path) for path in paths]
    rows = {record: [np.ascontiguousarray(array[record]) for array in arrays] for record in set(order)}
    return Source(cache, paths, order, rows)


def open_zarr(path: Path, pipeline: str = "zarr.core.codec_pipeline.BatchedCodecPipeline") -> Any:
    """Open an array with one of zarr-python's codec pipelines, independently of the user's configuration."""
    with zarr.config.set({"codec_pipeline.path": pipeline, "codec_pipeline.strict": True}):
        return zarr.open_array(path, mode="r")


def direct(source: Source) -> Reader:
    """Return kdcache's own reader, which reuses its buffers."""
    buffers = [np.empty_like(row) for row in source.rows[source.order[0]]]

    def read(record: int) -> Rows:
        for path, buffer in zip(source.paths, buffers, strict=True):
            source.cache.read_into(record, path, buffer)
        return buffers

    return read


def by_zarr(source: Source, *pipeline: str) -> Reader:
    """Return zarr-python's `z[i]`."""
    arrays = [open_zarr(source.cache.path / path, *pipeline) for path in source.paths]
    return lambda record: [array[record] for array in arrays]


def by_zarrs(source: Source) -> Reader:
    """Return zarr-python's `z[i]` with the pipeline of the package zarrs. Raises: ImportError."""
    import zarrs  # noqa: F401  # zarr would only name the pipeline that it cannot find

    return by_zarr(source, "zarrs.ZarrsCodecPipeline")


def by_fused(source: Source) -> Reader:
    """Return zarr-python's `z[i]` with its own faster pipeline. Raises: ImportError."""
    if not hasattr(codec_pipeline, "FusedCodecPipeline"):
        raise ImportError(f"zarr {zarr.__version__} has none (3.3 and later do, on Python 3.12 or later)")
    return by_zarr(source, "zarr.core.codec_pipeline.FusedCodecPipeline")


def by_tensorstore(source: Source) -> Reader:
    """Return TensorStore's `z[i]`. Raises: ImportError."""
    import tensorstore

    places = [f"{(source.cache.path / path).resolve()}/" for path in source.paths]
    specs = [{"driver": "zarr3", "kvstore": {"driver": "file", "path": place}} for place in places]
    arrays = [tensorstore.open(spec, read=True).result() for spec in specs]
    return lambda record: [array[record].read().result() for array in arrays]


READERS: dict[str, tuple[str, Callable[[Source], Reader]]] = {
    "direct": ("direct", direct),
    "tensorstore": ("tensorstore z[i]", by_tensorstore),
    "zarr": ("zarr-python z[i]", by_zarr),
    "zarrs": ("zarr-python, zarrs", by_zarrs),
    "fused": ("zarr-python, fused", by_fused),
}
"""Name -> title, what makes the reader."""


def check_reader(title: str, read: Reader, source: Source) -> None:
    """Read every record once. Raises: DifferenceError if the bytes differ from zarr-python's."""
    for record in source.order:
        for path, array, expected in zip(source.paths, read(record), source.rows[record], strict=True):
            same = array.shape == expected.shape and array.dtype == expected.dtype
            if not same or array.tobytes() != expected.tobytes():
                raise DifferenceError(f"{title} reads other bytes of {path}, record {record}, than zarr-python")


def measure_readers(cache: Cache, names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the readers in milliseconds per record."""
    contestants, results = [], {}
    source = open_source(cache, arguments.records)
    for name in names:
        title, make = READERS[name]
        try:
            read = make(source)
        except ImportError as error:
            results[name] = str(error)
            continue
        check_reader(title, read, source)
        contestants.append(reading(name, read, source.order))
    results |= in_turn(contestants, arguments.repeats)
    return table("readers", {name: READERS[name][0] for name in names}, results)


def reading(name: str, read: Reader, order: Sequence[int]) -> Contestant:
    """Return a contestant whose turn is one pass over the records, or more if a pass is too short to time."""

    def work(passes: int) -> None:
        for _ in range(passes):
            for record in order:
                read(record)

    began = time.perf_counter()
    work(1)
    passes = math.ceil(LEAST_TURN_S / (time.perf_counter() - began))
    return Contestant(name, partial(work, passes), passes * len(order), partial(read, order[0]))


# --- loaders -----------------------------------------------------------------------------------------------


class ByProcesses(CacheDataset):
    """A data set whose batches are always prepared in advance by processes."""

    threads_suffice = False  # type: ignore[assignment]


class ByThreads(CacheDataset):
    """A data set whose batches are always prepared in advance by threads."""

    threads_suffice = True  # type: ignore[assignment]


class Resident(ByThreads):
    """A data set whose batches come from decoded records in memory."""

    def __init__(self, cache: Cache, **options: Any) -> None:
        super().__init__(cache, **options)
        self.records = RamRecords(self.cache, self.paths)


LOADERS: dict[str, tuple[str, type[CacheDataset], int, int]] = {
    "inline": ("inline", CacheDataset, 0, 0),
    "dataloader": (f"DataLoader, {WORKERS} workers", ByProcesses, WORKERS, 2 * WORKERS),
    "ring": (f"ring, {WORKERS} threads", ByThreads, WORKERS, DEPTH - 1),
    "resident": (f"ring, {WORKERS} threads, records in memory", Resident, WORKERS, DEPTH - 1),
    "default": ("inline, records in memory", Resident, 0, 0),
}
"""Name -> title, data set, workers, and how many batches it holds ready at most."""


class Stream:
    """An open loader: endless batches in order, some of which were compared."""

    def __init__(self, name: str, cache: Cache, augment: str, batch_size: int, device: torch.device) -> None:
        self.title, kind, workers, self.ahead = LOADERS[name]
        before = set(multiprocessing.active_children())
        loader = make_loader(
            Draws(kind(cache, augment=augment), 0),
            first=0,
            last=2**40,
            batch_size=batch_size,
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        self.batches: Generator[Batch | KDCacheError, None, None] | None = feed(loader, device)
        expected = Draws(CacheDataset(cache, augment=augment), 0)
        for step in range(CHECKED):
            found, right = (map(bits, tensors_of(b)) for b in (self.take(), drawn(expected, step, batch_size)))
            if list(found) != list(right):
                raise DifferenceError(f"{self.title}: batch {step} differs from its samples drawn one by one")
        self.processes = tuple(child.pid or 0 for child in set(multiprocessing.active_children()) - before)

    def take(self, count: int = 1) -> Batch:
        """Take the next `count` batches and return the last one. It is valid until the next call."""
        assert self.batches is not None
        for _ in range(count):
            batch = next_batch(self.batches)
        return batch

    def close(self) -> None:
        """End the loader's threads and processes."""
        batches, self.batches = self.batches, None
        if batches is not None:
            batches.close()
        del batches  # a DataLoader's iterator ends its workers when it goes
        gc.collect()


def drawn(draws: Draws, step: int, batch_size: int) -> Batch:
    """Return a batch, drawn sample by sample."""
    batch: Batch = default_collate([draws[draw] for draw in range(step * batch_size, (step + 1) * batch_size)])
    return batch


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return type, shape and bytes of a tensor, which are equal for equal tensors, also with NaN."""
    return tensor.dtype, tensor.shape, tensor.cpu().contiguous().numpy().tobytes()


def measure_loaders(cache: Cache, names: Sequence[str], augment: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the loaders in milliseconds per sample, on the CPU."""
    size = arguments.batch_size
    batches = max(LEAST_BATCHES, arguments.records // size)
    with ExitStack() as stack:
        contestants = []
        for name in names:
            stream = stack.enter_context(closing(Stream(name, cache, augment, size, torch.device("cpu"))))
            work, before = partial(stream.take, batches), partial(stream.take, stream.ahead + 1)
            contestants.append(Contestant(name, work, batches * size, before, stream.processes))
        paces = in_turn(contestants, arguments.repeats)
    return table("loaders", {name: LOADERS[name][0] for name in names}, paces, augment)


# --- steps -------------------------------------------------------------------------------------------------


def measure_steps(cache: Cache, names: Sequence[str], augment: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the step of one student. All loaders feed it in turns."""
    device = torch.device(arguments.device)
    batch = drawn(Draws(CacheDataset(cache, augment=augment), 0), 0, arguments.batch_size)
    kind = choose_step("auto", device)
    step = make_step(kind, student_step(cache, STUDENT, device, capturable=kind == "graphed"), (batch,), print)
    memory = feed(repeat(batch.pin_memory() if device.type == "cuda" else batch), device)

    def learn(take: Callable[[], Batch], count: int) -> None:
        losses = [step((take(),)) for _ in range(count)]
        losses[-1].tolist()  # waits for a GPU

    rounds = min(arguments.repeats, arguments.steps)
    count = -(-arguments.steps // rounds)

    def contestant(name: str, take: Callable[[], Batch], warm_up: int) -> Contestant:
        return Contestant(name, partial(learn, take, count), count, partial(learn, take, warm_up))

    with ExitStack() as stack:
        contestants = [contestant(MEMORY, partial(next_batch, memory), 1)]
        for name in names:
            stream = stack.enter_context(closing(Stream(name, cache, augment, arguments.batch_size, device)))
            contestants.append(contestant(name, stream.take, stream.ahead + 1))
        for entrant in contestants:
            entrant.before()
        paces = in_turn(contestants, rounds)
    titles = {MEMORY: "one batch from memory", **{name: f"fed by {LOADERS[name][0]}" for name in names}}
    return table("steps", titles, paces, augment)


# --- the result --------------------------------------------------------------------------------------------


def table(kind: str, titles: dict[str, str], paces: Mapping[str, Pace | str], augment: str = "none") -> dict[str, Any]:
    """Print a table and return it as numbers: milliseconds per sample (or step), and ratios of medians.

    A ratio is the baseline's time divided by the contestant's, and the inverse for steps. `paces` has the measurement
    of each name, or the reason why it was not measured.
    """
    print(f"\n{kind}, augment {augment}")
    medians = {name: pace.time.p50 for name, pace in paces.items() if isinstance(pace, Pace)}
    rows: list[dict[str, Any]] = []
    for name, title in titles.items():
        pace = paces[name]
        if isinstance(pace, str):
            rows.append({"name": name, "title": title, "problem": pace})
            print(f"  {title}: {pace}")
            continue
        ratio = {over: medians[over] / medians[name] for over in BASELINES[kind] if over in medians}
        if kind == "steps":
            ratio = {over: 1 / value for over, value in ratio.items()}
        cpu_us = None if pace.cpu is None else 1e3 * pace.cpu.p50
        figures = {"per_second": 1e3 / medians[name], "cpu_us": cpu_us, "ratio": ratio}
        rows.append({"name": name, "title": title, "pace": asdict(pace), **figures})
        spent = "-" if cpu_us is None else f"{cpu_us:.1f}"
        shown = ", ".join(f"{value:.2f} x {over}" for over, value in ratio.items())
        print(f"  {title}: {figures['per_second']:,.1f}/s, {spent} us of CPU; {shown}")
    return {"kind": kind, "augment": augment, "rows": rows}


def main() -> None:
    """Measure readers, loaders and steps on a cache in turns, print their tables, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="a local cache that stores its pixels")
    parser.add_argument("--against", nargs="+", choices=(*READERS, *LOADERS), default=(*READERS, *LOADERS))
    parser.add_argument("--augment", choices=("none", "warp"), default="none", help="warp measures both")
    parser.add_argument("--records", type=int, default=256, help="of a turn; they are held in memory")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=70, help="training steps of each, over all turns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for count, flag in ((arguments.repeats, "--repeats"), (arguments.steps, "--steps")):
        check_repeats(count, flag)
    cache = open_cache(arguments.cache)
    readers = [name for name in READERS if name in arguments.against]
    loaders = [name for name in LOADERS if name in arguments.against]
    tables = [measure_readers(cache, readers, arguments)] if readers else []
    if loaders:
        augments = dict.fromkeys(("none", arguments.augment))
        tables += [measure_loaders(cache, loaders, augment, arguments) for augment in augments]
        feeding = [name for name in loaders if name != "dataloader"]  # its processes would share the step's cores
        tables.append(measure_steps(cache, feeding, arguments.augment, arguments))
    if arguments.json:
        store = {
            "records": len(cache),
            "view": cache.view_size,
            "arrays": {p: cache.specs[p].shape for p in cache.target_paths()},
        }
        settings = {name: value for name, value in vars(arguments).items() if name not in ("cache", "json")}
        rivals = [name for name in ("tensorstore", "zarr", "zarrs") if find_spec(name)]
        versions = {name: metadata.version(name) for name in rivals}
        write(
            arguments.json,
            {**header("loader"), "store": store, "settings": settings, "libraries": versions, "tables": tables},
        )


if __name__ == "__main__":
    run(main)
