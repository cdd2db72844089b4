"""The loader of a training: the batches of its steps, drawn by threads or processes.

Draw n is the record that the order gives (sampler.py), augmented by a generator seeded with (seed, n). Step s takes
draws s*B to (s+1)*B. So batches straddle epochs, none is short, a resumed run needs no history, and processes that
share a batch draw together what one process would draw.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from kdcache.distill import Batch
from kdcache.errors import KDCacheError
from kdcache.training.input.batch import Row, row_of
from kdcache.training.input.dataset import DrawnDataset
from kdcache.training.input.ring_buffer import Ring
from kdcache.training.input.sampler import Interleaved, Order, Rare, Steps, choose_labelled_share, choose_shuffle
from kdcache.training.input.shard_prefetch import Ahead, reads_ahead

T = TypeVar("T")


class Draws(Dataset[Batch | KDCacheError]):
    """The endless sequence of draws of a dataset, as a map from draw number to item.

    Args:
        seed: seed of order and augmentation.
        shuffle: auto, full or window (sampler.py). auto reads a remote cache by windows.
        labelled_share: share of every batch that has labels, if only some samples have one. None ignores labels.
        rare: an order by rare classes, instead of epochs.
    """

    def __init__(
        self,
        dataset: DrawnDataset,
        seed: int,
        shuffle: str = "auto",
        labelled_share: float | None = None,
        rare: Rare | None = None,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.by_window = choose_shuffle(shuffle, dataset) == "window"
        shard_records, labelled = dataset.shard_records if self.by_window else None, dataset.label_flags
        self._order: Order | Interleaved | Rare = rare or Order(len(dataset), seed, shard_records)
        if rare is None and labelled_share is not None and labelled is not None:
            self._order = Interleaved(labelled, labelled_share, seed, shard_records)

    def visit(self, draw: int) -> tuple[int, int]:
        """Return the sample that a draw takes, and how often it was taken before."""
        return self._order.visit(draw)

    def sample_ids(self, step: int, batch_size: int) -> list[str]:
        """Return the ids of the samples of one step, for messages."""
        draws = range(step * batch_size, (step + 1) * batch_size)
        return [self.dataset.sample_id(self.visit(draw)[0]) for draw in draws]

    def empty(self, *leading: int, pin_memory: bool = False) -> Batch:
        """Allocate memory for draws, as `DrawnDataset.empty`."""
        return self.dataset.empty(*leading, pin_memory=pin_memory)

    def draw_into(self, draw: int, out: Row) -> KDCacheError | None:
        """Draw into memory. Return a sample's error instead of raising it, for threads that work ahead."""
        # The third word keeps these generators apart from those of the permutations.
        rng = np.random.default_rng((self.seed, draw, 1))
        try:
            self.dataset.draw_into(*self.visit(draw), rng, out)
        except KDCacheError as error:
            return error
        return None

    def __getitem__(self, draw: int) -> Batch | KDCacheError:
        """Return the draw, or its error: DataLoader can raise a worker's error again only as a RuntimeError."""
        sample = self.empty()
        return self.draw_into(draw, row_of(sample)) or sample


def make_loader(
    draws: Draws,
    *,
    first: int,
    last: int,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world: int = 1,
) -> Ring | DataLoader[Batch | KDCacheError] | Ahead[Batch | KDCacheError]:
    """Return the batches of the steps [first, last) in order, for `next_batch`. A batch is valid until the next.

    `batch_size` counts the samples of all processes together, a multiple of `world`. `workers` are threads that draw
    ahead samples of a cache, or processes for files that must be decoded and rendered (forkserver, because CUDA and
    thread pools do not survive a fork). 0 draws between steps. This process takes the `rank`-th of `world` equal parts
    of each batch.
    """
    steps = Steps(first, last, batch_size, rank, world)
    loader: Ring | DataLoader[Batch | KDCacheError]
    if not workers or draws.dataset.threads_suffice:
        loader = Ring(draws, steps, threads=workers, pin_memory=pin_memory)
    else:
        loader = _data_loader(draws, steps, _collate, workers, pin_memory)
    if draws.by_window and reads_ahead(draws.dataset):
        return Ahead(loader, draws.visit, draws.dataset, steps)
    return loader


def sample_loader(
    dataset: DrawnDataset,
    *,
    batch_size: int,
    iterations: int,
    seed: int = 0,
    shuffle: str = "auto",
    labelled_share: float | None = None,
    workers: int = 0,
) -> DataLoader[Batch]:
    """Return a loader with the batches that a training with these settings sees, in its order, for your own loop.

    `iterations` is the number of batches. They straddle epochs, and none is short. `seed` decides order and
    augmentation, and `shuffle` is auto, full or window (sampler.py). `labelled_share` is the share of labelled samples
    in every batch (None: a training's default). `workers` are processes that draw ahead. 0 draws between steps.

    Raises: KDCacheError for a sample that could not be drawn, wrapped into a RuntimeError by a worker.
    """
    draws = Draws(dataset, seed, shuffle, choose_labelled_share(labelled_share, dataset.label_flags))
    return _data_loader(draws, Steps(0, iterations, batch_size), _collate_or_raise, workers)


def _data_loader(
    draws: Draws, steps: Steps, collate: Callable[[list[Batch | KDCacheError]], T], workers: int, pin: bool = False
) -> DataLoader[T]:
    return DataLoader(
        draws,  # type: ignore[arg-type] # `collate` makes batches of samples and errors
        collate_fn=collate,
        batch_sampler=steps,  # type: ignore[arg-type] # ranges of draws are as good as lists
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pin,
    )


def next_batch(batches: Iterator[T | KDCacheError]) -> T:
    """Return the next batch of a loader. Raises: the KDCacheError of a sample that could not be drawn."""
    return _raised(next(batches))


def _collate(items: list[Batch | KDCacheError]) -> Batch | KDCacheError:
    failed = next((item for item in items if isinstance(item, KDCacheError)), None)
    batch: Batch | KDCacheError = default_collate(items) if failed is None else failed
    return batch


def _collate_or_raise(items: list[Batch | KDCacheError]) -> Batch:
    return _raised(_collate(items))


def _raised(batch: T | KDCacheError) -> T:
    if isinstance(batch, KDCacheError):
        raise batch
    return batch


def _start_worker(_: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal. The trainer handles it and ends its workers.

    Workers also end if the trainer is killed. The process that forks them lives as long as one of them does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    trainer = multiprocessing.parent_process()
    if trainer is not None:  # whoever forked this process: the pipe that is watched is the trainer's
        threading.Thread(target=_end_with, args=(trainer,), name="kdcache-orphan", daemon=True).start()


def _end_with(trainer: BaseProcess) -> None:
    trainer.join()
    os._exit(1)  # no process is left to take a batch or an error
