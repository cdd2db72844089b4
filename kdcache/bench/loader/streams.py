"""Ways to load whole samples (pixels, label, target), batch after batch.

| name | who draws |
| --- | --- |
| inline | the trainer itself, between steps |
| dataloader | `DataLoader` with worker processes |
| ring | threads of this process, into buffers used again (`kdcache.training.input.ring_buffer`) |
| resident | the same from records that stay decoded in memory (`--resident ram`) |
| default | the trainer itself, from such records: what a training on a CPU does |

Each is endless and stays open, for worker processes take seconds to start. Before one is timed, its batches must be
those that the draws give one by one.
"""

import gc
import multiprocessing
from collections.abc import Callable, Generator
from typing import Any

import psutil
import torch
from torch.utils.data import default_collate

from kdcache.bench.kernels.memory import peak_in_process
from kdcache.distill import Batch
from kdcache.distill.batch import tensors_of
from kdcache.errors import KDCacheError, StoreError
from kdcache.store import Cache, Records
from kdcache.training.input.cache_dataset import CacheDataset
from kdcache.training.input.device_prefetch import feed
from kdcache.training.input.loader import Draws, make_loader, next_batch
from kdcache.training.input.resident_records import RamRecords
from kdcache.training.input.ring_buffer import DEPTH

ENDLESS = 2**40
CPU = torch.device("cpu")
CHECKED = 3
"""Batches that are compared."""


class _ByProcesses(CacheDataset):
    """Drawn ahead by processes, whatever would be faster."""

    @property
    def threads_suffice(self) -> bool:
        return False


class _ByThreads(CacheDataset):
    """Drawn ahead by threads, whatever would be faster."""

    @property
    def threads_suffice(self) -> bool:
        return True


class _Resident(_ByThreads):
    """Drawn from records in memory."""

    def __init__(self, source: Cache | Records, **options: Any) -> None:
        super().__init__(source, **options)
        self.records = RamRecords(self.cache, self.paths)


LOADERS: dict[str, tuple[str, type[CacheDataset]]] = {
    "inline": ("inline", CacheDataset),
    "dataloader": ("DataLoader, {workers} workers", _ByProcesses),
    "ring": ("ring, {threads} threads", _ByThreads),
    "resident": ("ring, {threads} threads, records in memory", _Resident),
    "default": ("inline, records in memory", _Resident),
}
"""Name -> title, the dataset that `make_loader` loads in that way."""


class Stream:
    """A loader that is open: batches in order, from draw 0.

    Args:
        make: the dataset, of one of the types of LOADERS.
        workers, threads: numbers for the loaders that have them.
        device: where the batches go.
    Attributes:
        processes: ids of its workers.
        ahead: batches that it holds ready at most.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[type[CacheDataset]], CacheDataset],
        *,
        batch_size: int,
        workers: int,
        threads: int,
        device: torch.device = CPU,
    ) -> None:
        title, kind = LOADERS[name]
        self.name, self.title = name, title.format(workers=workers, threads=threads)
        self._batch_size = batch_size
        drawing = {"dataloader": workers, "ring": threads, "resident": threads}.get(name, 0)
        loader = make_loader(
            Draws(make(kind), 0),
            first=0,
            last=ENDLESS,
            batch_size=batch_size,
            workers=drawing,
            pin_memory=device.type == "cuda",
        )
        before = set(multiprocessing.active_children())
        self._batches: Generator[Batch | KDCacheError, None, None] | None = feed(loader, device)
        self._step = 0
        started = set(multiprocessing.active_children()) - before
        self.processes = tuple(child.pid for child in started if child.pid is not None)
        self.ahead = {"dataloader": 2 * workers, "ring": DEPTH - 1, "resident": DEPTH - 1}.get(name, 0)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        """End its threads and processes."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()
        del batches  # a DataLoader's iterator ends its workers when it goes
        gc.collect()

    def take(self) -> Batch:
        """The next batch, valid until the one after. Raises: what the sample raises."""
        assert self._batches is not None
        self._step += 1
        return next_batch(self._batches)

    def skip(self, count: int) -> None:
        for _ in range(count):
            self.take()

    def verify(self, draws: Draws) -> None:
        """Check that the next batches are those of `draws`.

        Raises: StoreError for other batches: a benchmark must not time the wrong thing.
        """
        for _ in range(CHECKED):
            step = self._step
            drawn = [part.cpu() for part in tensors_of(self.take())]
            expected = tensors_of(reference_batch(draws, step, self._batch_size))
            pairs = zip(drawn, expected, strict=True)
            if not all(a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in pairs):
                raise StoreError(
                    "loaders are timed when they give the same batches",
                    received=f"{self.title}: batch {step} differs from its samples drawn one by one",
                    remedy="run kdcache verify on the store; if it is sound, report this",
                )


def reference_batch(draws: Draws, step: int, batch_size: int) -> Batch:
    """A batch, sample by sample. Raises: what a sample raises."""
    items = [draws[draw] for draw in range(step * batch_size, (step + 1) * batch_size)]
    for item in items:
        if isinstance(item, KDCacheError):
            raise item
    batch: Batch = default_collate(items)
    return batch


def open_and_weigh(make: Callable[[], Stream], batches: int) -> tuple[Stream, float | None]:
    """Open a stream and take some batches: by how many MiB that raised the peak of the resident set.

    Its worker processes count with their proportional share of memory after the last batch, most of which are the
    libraries that each of them loads. None where the system does not report it.
    """
    opened: list[Stream] = []

    def work() -> None:
        opened.append(make())
        opened[0].skip(batches)

    try:
        grown = peak_in_process(work)
        # Shared pages count in equal parts.
        shares = [psutil.Process(process).memory_full_info().pss for process in opened[0].processes]
    except (OSError, psutil.Error):
        if not opened:
            work()
        return opened[0], None
    except BaseException:
        for stream in opened:
            stream.__exit__()
        raise
    return opened[0], grown + sum(shares) / 2**20


def _bits(tensor: torch.Tensor) -> Any:
    """Bytes, so that NaN equals itself; shapes count."""
    flat = tensor.contiguous()
    return flat.unsqueeze(-1).view(torch.uint8) if flat.dtype != torch.bool else flat
