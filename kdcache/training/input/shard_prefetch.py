"""Download shards of a remote cache while earlier steps still train.

A window of an epoch (sampler.py) begins with all of its shards at once. Without reading ahead, its first step waits for
a download. The loader's order is known, so a thread walks over it, one window ahead of the trainer, and downloads the
shards. Errors there are dropped, because the read meets and raises them again.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from kdcache.errors import KDCacheError
from kdcache.store import Cache
from kdcache.training.input.dataset import DrawnDataset
from kdcache.training.input.sampler import WINDOW_RECORDS, WINDOW_SHARDS, Steps

T = TypeVar("T")
THREADS = 4
"""Files under way at once."""


class Ahead(Iterable[T]):
    """Iterates over the batches of a loader, and meanwhile downloads the shards of later batches.

    Args:
        loader: gives the batches of `steps`.
        visit: function from a draw's number to (index of its sample, epoch).
        dataset: the samples, from a remote cache.
        steps: the draw numbers of each step.
    """

    def __init__(
        self, loader: Iterable[T], visit: Callable[[int], tuple[int, int]], dataset: DrawnDataset, steps: Steps
    ) -> None:
        self._loader = loader
        self._visit = visit
        assert dataset.cache is not None
        self._dataset, self._cache = dataset, dataset.cache
        self._steps = steps
        self._ahead = max(1, window_samples(dataset) // steps.batch_size)

    def __len__(self) -> int:
        assert isinstance(self._loader, Sized)
        return len(self._loader)

    def __iter__(self) -> Iterator[T]:
        return self._read(iter(self._loader))  # here, not at the first batch: see device_prefetch.py

    def _read(self, batches: Iterator[T]) -> Iterator[T]:
        free, ended = threading.Semaphore(self._ahead), threading.Event()
        pool = ThreadPoolExecutor(1 + THREADS, thread_name_prefix="kdcache-ahead")
        pool.submit(self._walk, pool, free, ended)
        try:
            for batch in batches:
                free.release()
                yield batch
        finally:
            ended.set()
            free.release()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(batches, Generator):
                batches.close()

    def _walk(self, pool: ThreadPoolExecutor, free: threading.Semaphore, ended: threading.Event) -> None:
        met: dict[int, int] = {}  # shard -> the last step that reads it
        for step, draws in enumerate(self._steps):
            free.acquire()
            for shard in map(self._shard, draws):
                if ended.is_set():
                    return
                if self._is_due(met.get(shard), step):
                    fetches = [pool.submit(self._fetch, shard, path) for path in read_paths(self._dataset)]
                    with suppress(CancelledError):  # at the end; `wait` would not see it, and wait for ever
                        for fetch in fetches:
                            fetch.result()
                met[shard] = step

    def _is_due(self, last: int | None, step: int) -> bool:
        """Return True if a shard was never read, or may have been evicted since. Records in memory need no shard."""
        resident = self._dataset.records is not self._cache
        return last is None or (step - last > self._ahead and not resident)

    def _shard(self, draw: int) -> int:
        record = self._dataset.record(*self._visit(draw))
        return record // self._cache.manifest.build.shard_records

    def _fetch(self, shard: int, path: str) -> None:
        with suppress(KDCacheError):
            self._cache.fetch(shard, path)


def reads_ahead(dataset: DrawnDataset) -> bool:
    """Return True if the local copies of a remote cache have room to download shards ahead.

    There must be room for three times the samples that `--shuffle window` shuffles together. Otherwise new shards would
    evict shards that are in use. The result is False for a local cache.
    """
    cache = dataset.cache
    if cache is None or not dataset.remote:
        return False
    room = cache.place.room
    return room is None or _bytes(dataset, cache, 3 * window_samples(dataset)) <= room


def check_room(dataset: DrawnDataset, shuffle: str, note: Callable[[str], None]) -> None:
    """Tell the user if the local copies have too little room, so that shards are downloaded again and again.

    Args:
        dataset: the samples to train on. Nothing is checked unless they come from a remote cache.
        shuffle: the order of the samples, `full` or `window`.
        note: called with the message.
    """
    cache = dataset.cache
    if cache is None or not dataset.remote:
        return
    room = cache.place.room
    needed = _bytes(dataset, cache, 2 * window_samples(dataset) if shuffle == "window" else len(dataset))
    if room is not None and needed > room:
        note(
            f"--cache-bytes keeps {room:,} bytes of shards, but the training reads {needed:,} bytes in turn, so "
            "shards are downloaded again and again. Fix: increase --cache-bytes"
        )


def window_samples(dataset: DrawnDataset) -> int:
    """Return the least number of samples that `--shuffle window` shuffles together.

    `--shuffle window` may shuffle up to twice as many.
    """
    return min(len(dataset), max(WINDOW_RECORDS, WINDOW_SHARDS * (dataset.shard_records or 1)))


def read_paths(dataset: DrawnDataset) -> tuple[str, ...]:
    """Return the paths of the cache's arrays that draws read. Targets that a GPU keeps are left out."""
    resident = () if dataset.on_device is None else dataset.target_paths
    return tuple(path for path in dataset.paths if path not in resident)


def _bytes(dataset: DrawnDataset, cache: Cache, samples: int) -> int:
    """Return the stored bytes of the shards of `samples` samples."""
    ledger = cache.ledger
    if ledger is None:
        return 0
    prefixes = tuple(f"{path}/c/" for path in read_paths(dataset))
    files = [file for shard in range(len(ledger)) for file in ledger.record(shard).files.items()]
    total = sum(file.bytes for key, file in files if key.startswith(prefixes))
    return -(-total * min(samples, len(dataset)) // len(dataset))
