"""The ring of buffers: the batches of DataLoader, from threads or the caller, in memory that is used again."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch.utils.data import default_collate

from kdcache.distill import Batch
from kdcache.distill.batch import tensors_of
from kdcache.errors import CorruptError, KDCacheError
from kdcache.store import Cache
from kdcache.training import CacheDataset
from kdcache.training.input.batch import Row
from kdcache.training.input.loader import Draws
from kdcache.training.input.ring_buffer import Items, Ring
from kdcache.training.input.sampler import Steps


def tensors(batch: Batch) -> list[torch.Tensor]:
    return tensors_of(batch)


def copied(batch: Batch | KDCacheError) -> list[torch.Tensor]:
    assert not isinstance(batch, KDCacheError)
    return [part.clone() for part in tensors(batch)]


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_batches_of_a_data_loader(cache: Cache, threads: int, depth: int) -> None:
    draws = Draws(CacheDataset(cache), 5)
    expected = [tensors(default_collate([draws[4 * step + row] for row in range(4)])) for step in range(3, 12)]
    actual = [copied(batch) for batch in Ring(draws, Steps(3, 12, 4), threads=threads, depth=depth)]
    assert len(actual) == len(expected) == 9
    for one, two in zip(actual, expected, strict=True):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("threads", "buffers"), [(2, 3), (0, 1)])
def test_memory_is_used_again(cache: Cache, threads: int, buffers: int) -> None:
    ring = Ring(Draws(CacheDataset(cache), 0), Steps(0, 12, 2), threads=threads, depth=3)
    places = [batch.pixels.data_ptr() for batch in ring if isinstance(batch, Batch)]
    assert len(places) == 12
    assert len(set(places)) == buffers


def test_a_batch_stays_until_the_next_is_asked_for(cache: Cache) -> None:
    draws = Draws(CacheDataset(cache), 0)
    batches = iter(Ring(draws, Steps(0, 6, 2), threads=3, depth=2))
    for step in range(6):
        batch = next(batches)
        assert isinstance(batch, Batch)
        again = [draws[2 * step + row] for row in range(2)]
        assert all(
            isinstance(item, Batch) and torch.equal(item.pixels, batch.pixels[row]) for row, item in enumerate(again)
        )


def test_nothing_to_draw(cache: Cache) -> None:
    assert not list(Ring(Draws(CacheDataset(cache), 0), Steps(4, 4, 2)))


class Faulty:
    """Draws of which one is damaged and one is a mistake of ours."""

    def __init__(self, draws: Draws, damaged: int = -1, mistaken: int = -1) -> None:
        self.draws, self.damaged, self.mistaken = draws, damaged, mistaken

    def empty(self, *leading: int, pin_memory: bool) -> Batch:
        return self.draws.empty(*leading, pin_memory=pin_memory)

    def draw_into(self, draw: int, out: Row) -> KDCacheError | None:
        if draw == self.mistaken:
            raise ArithmeticError("ours")
        if draw == self.damaged:
            return CorruptError("Half of a record is missing", fix="Build it again.")
        return self.draws.draw_into(draw, out)


@pytest.mark.parametrize("threads", [0, 2, 3])
@pytest.mark.parametrize("damaged", [0, 5, 11])
def test_the_error_of_a_sample_comes_in_its_batch_s_place(cache: Cache, damaged: int, threads: int) -> None:
    draws: Items = Faulty(Draws(CacheDataset(cache), 0), damaged=damaged)
    batches = Ring(draws, Steps(0, 6, 2), threads=threads)
    kinds = [isinstance(batch, KDCacheError) for batch in itertools.islice(batches, damaged // 2 + 1)]
    assert kinds == [False] * (damaged // 2) + [True]


def test_a_mistake_is_raised_and_no_thread_stays(cache: Cache) -> None:
    draws: Items = Faulty(Draws(CacheDataset(cache), 0), mistaken=7)
    with pytest.raises(ArithmeticError, match="ours"):
        list(Ring(draws, Steps(0, 6, 2), threads=2))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kdcache-loader")]


def test_leaving_early_ends_the_threads(cache: Cache) -> None:
    batches = iter(Ring(Draws(CacheDataset(cache), 0), Steps(0, 10**9, 2), threads=3))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kdcache-loader")]


def test_threads_in_different_epochs_share_the_order(cache: Cache) -> None:
    """6 samples and batches of 4: buffers ahead are epochs ahead."""
    draws = Draws(CacheDataset(cache), 3)
    ring = Ring(draws, Steps(0, 60, 4), threads=6, depth=6)
    alone = Draws(CacheDataset(cache), 3)
    for step, batch in enumerate(ring):
        assert isinstance(batch, Batch)
        item = alone[4 * step + 3]
        assert isinstance(item, Batch)
        assert torch.equal(item.window, batch.window[3])
        assert torch.equal(item.pixels, batch.pixels[3])
