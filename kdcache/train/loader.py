"""The order of a training and its loader.

Draw n of a training is sample `permutation(seed, n // N)[n % N]`, augmented by a generator seeded with
(seed, n). Step s takes draws s*B to (s+1)*B: batches straddle epochs, none is short, and a run that resumes at
step s needs no history.
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from kdcache.errors import KDCacheError
from kdcache.train.dataset import DrawnDataset, Sample
from kdcache.train.ring import Ring


class Draws(Dataset[Sample | KDCacheError]):
    """The endless sequence of draws of a dataset, as a map from draw number to item."""

    def __init__(self, dataset: DrawnDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._latest = (-1, np.empty(0, np.int64))

    def sample_index(self, draw: int) -> int:
        wanted, position = divmod(draw, len(self.dataset))
        epoch, order = self._latest  # read and replaced as one: threads may be in different epochs
        if epoch != wanted:
            order = np.random.default_rng((self.seed, wanted)).permutation(len(self.dataset))
            self._latest = (wanted, order)
        return int(order[position])

    def sample_ids(self, step: int, batch_size: int) -> list[str]:
        """Ids of the samples of one step, for messages."""
        draws = range(step * batch_size, (step + 1) * batch_size)
        return [self.dataset.sample_id(self.sample_index(draw)) for draw in draws]

    def __getitem__(self, draw: int) -> Sample | KDCacheError:
        """The draw, or what is wrong with it: DataLoader can raise a worker's error again only as a RuntimeError."""
        # The third word keeps these generators apart from those of the permutations.
        rng = np.random.default_rng((self.seed, draw, 1))
        try:
            return self.dataset.draw(self.sample_index(draw), draw // len(self.dataset), rng)
        except KDCacheError as error:
            return error


class _Steps:
    """Batch sampler: draw numbers of the steps [first, last)."""

    def __init__(self, first: int, last: int, batch_size: int) -> None:
        self.steps = range(first, last)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield list(range(step * self.batch_size, (step + 1) * self.batch_size))

    def __len__(self) -> int:
        return len(self.steps)


def make_loader(
    draws: Draws, *, first: int, last: int, batch_size: int, workers: int, pin_memory: bool
) -> Ring | DataLoader[Sample | KDCacheError]:
    """Batches of the steps [first, last), in order; `next_batch` takes them.

    Args:
        workers: who draws ahead: threads for samples that come from a store, processes for files that must be decoded
            and rendered (forkserver, for CUDA and thread pools do not survive a fork). 0 draws between steps.
    """
    if workers and draws.dataset.threads_suffice:
        return Ring(draws, first=first, last=last, batch_size=batch_size, threads=workers, pin_memory=pin_memory)
    return DataLoader(
        draws,
        collate_fn=_collate,
        batch_sampler=_Steps(first, last, batch_size),
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=pin_memory,
    )


def next_batch(batches: Iterator[Sample | KDCacheError]) -> Sample:
    """The next batch of a loader. Raises: the KDCacheError of a sample that could not be drawn."""
    batch = next(batches)
    if isinstance(batch, KDCacheError):
        raise batch
    return batch


def _collate(items: list[Sample | KDCacheError]) -> Sample | KDCacheError:
    failed = next((item for item in items if isinstance(item, KDCacheError)), None)
    batch: Sample | KDCacheError = default_collate(items) if failed is None else failed
    return batch


def _start_worker(_: int) -> None:
    """Ctrl-C reaches every process of a terminal: the trainer answers it, and ends its workers afterwards."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
