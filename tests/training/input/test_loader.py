"""The order of a training: a pure function of seed and step, whoever renders."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from kdcache.data import open_split
from kdcache.distill import Batch
from kdcache.distill.batch import tensors_of
from kdcache.errors import CorruptError
from kdcache.store import Cache, Records, open_cache
from kdcache.training import CacheDataset, LabelledDataset
from kdcache.training.input.batch import collate
from kdcache.training.input.loader import Draws, make_loader
from kdcache.training.input.residency import keep_records


def batches(dataset: CacheDataset, first: int, last: int, *, workers: int = 0, seed: int = 5) -> list[Batch]:
    loader = make_loader(Draws(dataset, seed), first=first, last=last, batch_size=4, workers=workers, pin_memory=False)
    return [batch.map(torch.clone) for batch in loader]


def same(one: Batch, two: Batch) -> bool:
    parts = zip(tensors_of(one), tensors_of(two), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in parts)


def test_a_loader_started_in_mid_run_goes_on_with_the_same_batches(cache: Cache) -> None:
    dataset = CacheDataset(cache)
    whole = batches(dataset, 0, 8)
    assert len(whole) == 8
    for first in (1, 3, 7):
        rest = batches(dataset, first, 8)
        assert all(same(a, b) for a, b in zip(rest, whole[first:], strict=True))
    assert not batches(dataset, 8, 8)
    assert not same(whole[0], batches(dataset, 0, 1, seed=6)[0])


def test_the_same_sample_is_drawn_anew_each_epoch(cache: Cache) -> None:
    draws = Draws(CacheDataset(cache), 0)
    first = next(draw for draw in range(6) if draws.visit(draw)[0] == 2)
    second = next(draw for draw in range(6, 12) if draws.visit(draw)[0] == 2)
    assert not torch.equal(draws[first].window, draws[second].window)
    windows = {tuple(draws[draw].window.tolist()) for draw in range(30)}
    assert len(windows) == 30


def test_an_epoch_visits_each_sample_once_and_batches_straddle_epochs(cache: Cache) -> None:
    draws = Draws(CacheDataset(cache), 1)
    steps = [draws.sample_ids(step, 4) for step in range(9)]
    assert all(len(ids) == 4 for ids in steps)
    order = list(itertools.chain.from_iterable(steps))
    epochs = [order[at : at + 6] for at in range(0, 36, 6)]
    assert all(Counter(epoch) == Counter(cache.ids) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_ids_of_a_step_are_those_of_its_samples(cache: Cache) -> None:
    dataset = CacheDataset(cache, augment="none")
    stored = {cache.ids[i]: torch.from_numpy(cache.read(i, ["pixels/image"])["pixels/image"]) for i in range(6)}
    for step, batch in enumerate(batches(dataset, 0, 4)):
        ids = Draws(dataset, 5).sample_ids(step, 4)
        assert all(torch.equal(pixels, stored[name]) for pixels, name in zip(batch.pixels, ids, strict=True))


def test_order_does_not_depend_on_what_was_asked_before(cache: Cache) -> None:
    dataset = CacheDataset(cache)
    forward = [Draws(dataset, 9).visit(draw)[0] for draw in range(24)]
    draws = Draws(dataset, 9)
    backward = [draws.visit(draw)[0] for draw in reversed(range(24))]
    assert forward == backward[::-1]


@pytest.mark.parametrize("seed", [0, 2**32 + 7, 2**63 - 1])
def test_every_seed_gives_an_order(cache: Cache, seed: int) -> None:
    draws = Draws(CacheDataset(cache), seed)
    assert sorted(draws.visit(draw)[0] for draw in range(6)) == list(range(6))
    assert draws[3].pixels.shape == (32, 48, 3)


def test_worker_processes_give_the_same_batches(source_path: Path, scenes: str) -> None:
    """Here those of the second of two ranks."""
    dataset = CacheDataset(Records(open_cache(source_path), open_split(scenes, "train")))
    alone = batches(dataset, 2, 6)
    helped = make_loader(Draws(dataset, 5), first=2, last=6, batch_size=4, workers=2, pin_memory=False, rank=1, world=2)
    for one, two in zip(alone, helped, strict=True):
        assert isinstance(two, Batch)
        assert same(one.rows(2, 2), two)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_draw_together_what_one_draws_alone(cache: Cache, workers: int, world: int) -> None:
    draws = Draws(CacheDataset(cache), 5)
    together = assemble(draws, world, workers)
    assert all(same(a, b) for a, b in zip(together, batches(CacheDataset(cache), 2, 7), strict=True))


def assemble(draws: Draws, world: int, workers: int) -> list[Batch]:
    """Steps 2 to 7, put together from what each rank draws."""
    shares = []
    for rank in range(world):
        loader = make_loader(
            draws, first=2, last=7, batch_size=4, workers=workers, pin_memory=False, rank=rank, world=world
        )
        assert len(loader) == 5
        shares.append([batch.map(torch.clone) for batch in loader])
    return [joined(ranks) for ranks in zip(*shares, strict=True)]


def joined(parts: tuple[Batch, ...]) -> Batch:
    return collate(parts).map(lambda tensor: tensor.flatten(0, 1))


def test_a_labelled_dataset_needs_no_target(scenes: str) -> None:
    batch = batches(LabelledDataset(open_split(scenes, "train"), (32, 48)), 0, 1)[0]
    assert batch.pixels.shape == (4, 32, 48, 3)
    assert batch.targets == {}
    assert batch.window is None


def test_an_ordinary_data_loader_takes_the_datasets(cache: Cache) -> None:
    sizes = [len(batch.label) for batch in DataLoader(CacheDataset(cache), batch_size=4, shuffle=True)]
    assert sizes == [4, 2]


@pytest.mark.parametrize(("workers", "resident"), [(0, "off"), (2, "off"), (0, "ram")])
def test_a_bit_that_flips_during_a_training_is_never_taught(make_cache, workers: int, resident: str) -> None:
    """Through the ring and through DataLoader; records that are kept in memory stay what they were."""
    store = make_cache(codec="none")  # nothing but the checksum would notice
    dataset = CacheDataset(open_cache(store), augment="none")
    keep_records(dataset, resident, torch.device("cpu"), workers=workers)
    first = batches(dataset, 0, 3)  # two epochs: every record was read
    for path in dataset.paths:
        for file in (p for p in (store / path / "c").rglob("*") if p.is_file()):
            spoiled = bytes(255 - byte for byte in file.read_bytes())
            with file.open("r+b") as opened:  # in place: the store has it open
                opened.write(spoiled)
    if resident == "ram":
        assert all(same(a, b) for a, b in zip(first, batches(dataset, 0, 3), strict=True))
        return
    drawn = make_loader(Draws(dataset, 5), first=0, last=3, batch_size=4, workers=workers, pin_memory=False)
    assert len([error for error in drawn if isinstance(error, CorruptError)]) == 3
