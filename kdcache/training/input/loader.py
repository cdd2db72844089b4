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
    """The endless sequence of a training's draws, as a torch dataset: draw number -> augmented sample, or its error.

    Args:
        dataset: the samples.
        seed: seed of order and augmentation.
        shuffle: `full` shuffles all samples, `window` shuffles within a few shards, `auto` takes `window` for remote
            caches.
        labelled_share: share of every batch that has labels, if only some samples have one. With None, samples are
            drawn equally often, with or without a label.
        rare: an order that prefers samples with rare classes. None draws in shuffled epochs.
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
        """Return the index of the sample that a draw takes, and the epoch of this draw, which chooses a stored view."""
        return self._order.visit(draw)

    def sample_ids(self, step: int, batch_size: int) -> list[str]:
        """Return the ids of the samples of one step, for messages. `batch_size` counts the samples of all processes."""
        draws = range(step * batch_size, (step + 1) * batch_size)
        return [self.dataset.sample_id(self.visit(draw)[0]) for draw in draws]

    def empty(self, *leading: int, pin_memory: bool = False) -> Batch:
        """Return a `Batch` of uninitialised tensors with the shapes and dtypes of the samples.

        `empty()` is for one sample, `empty(B)` for a batch of B samples. `pin_memory` is True for page-locked memory,
        from which copies to a GPU are fast.
        """
        return self.dataset.empty(*leading, pin_memory=pin_memory)

    def draw_into(self, draw: int, out: Row) -> KDCacheError | None:
        """Augment the sample of a draw, and write the result into arrays.

        Args:
            draw: the number of the draw.
            out: name -> the array to fill. `row_of` returns such a dict.
        Returns: None, or the error of a sample that cannot be read. It is not raised, because threads draw ahead.
        """
        # The third word keeps these generators apart from those of the permutations.
        rng = np.random.default_rng((self.seed, draw, 1))
        try:
            self.dataset.draw_into(*self.visit(draw), rng, out)
        except KDCacheError as error:
            return error
        return None

    def __getitem__(self, draw: int) -> Batch | KDCacheError:
        """Return the augmented sample of a draw, or the error of a sample that cannot be read.

        The error is not raised, because DataLoader would turn a worker's error into a RuntimeError.
        """
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
    """Return the loader of a training's batches, in the order of steps. Read it with `next_batch`.

    A batch is valid until the next one is taken.

    Args:
        draws: the augmented samples.
        first: the first step.
        last: the step after the last one.
        batch_size: samples of all processes in a batch, a multiple of `world`.
        workers: number of threads (for a cache) or processes (for image files) that draw ahead. 0 draws between steps.
        pin_memory: True uses pinned memory, for copies to a GPU.
        rank: which of the `world` equal parts of each batch this process takes.
        world: the number of processes.
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
    """Return a loader for your own loop, with the batches that a training with these settings would see.

    Batches continue from one epoch to the next, so all have `batch_size` samples.

    Args:
        dataset: the samples.
        batch_size: samples in a batch.
        iterations: number of batches.
        seed: seed of order and augmentation.
        shuffle: `full` shuffles all samples, `window` shuffles within a few shards, `auto` takes `window` for remote
            caches.
        labelled_share: share of every batch that has labels. None chooses it as a training does: half, if fewer than
            half of the samples have a label.
        workers: number of processes that draw ahead. 0 draws between steps.
    Raises: KDCacheError for a sample that cannot be read. A worker wraps it into a RuntimeError.
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
    """Return the next batch of an iterator over a loader, whose items may be errors.

    Raises: KDCacheError if a sample of the batch could not be read.
    """
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
