"""Batches on their way to the device. Without a GPU, its streams are of paper and write down what they are given."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kdcache.data import open_split
from kdcache.distill import SEGMENTATION, Batch
from kdcache.distill.batch import tensors_of
from kdcache.errors import CorruptError, KDCacheError
from kdcache.store import Cache, Records, open_cache
from kdcache.training import CacheDataset
from kdcache.training.input.device_prefetch import SLOTS, feed, feed_over_side_stream
from kdcache.training.input.loader import Draws, make_loader
from kdcache.training.input.resident_records import DeviceTargets
from kdcache.training.input.sampler import Steps

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batch_number(number: int) -> Batch:
    numbers = [torch.full((2, 3), number, dtype=torch.int64) for _ in range(3)]
    return Batch(pixels=numbers[0], labels={SEGMENTATION: numbers[1]}, window=numbers[2])


class PaperEvent:
    """Of what its stream was given, it marks all that was given until now."""

    def __init__(self, of: str, at: int) -> None:
        self.of, self.at = of, at


class PaperStream:
    """A stream that runs at once, and notes what was queued, and behind what."""

    def __init__(self, name: str, log: list[tuple[Any, ...]]) -> None:
        self.name, self._log = name, log
        self._events = 0

    def record_event(self) -> PaperEvent:
        self._events += 1
        self._log.append((self.name, "marks", self._events))
        return PaperEvent(self.name, self._events)

    def wait_event(self, event: PaperEvent) -> None:
        self._log.append((self.name, "waits for", event.of, event.at))

    def wait_stream(self, other: PaperStream) -> None:
        self._log.append((self.name, "waits for", other.name))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The CPU in CUDA's place; returns what streams were given, which tests may add to."""
    notes: list[tuple[Any, ...]] = []
    current = [PaperStream("compute", notes)]

    @contextmanager
    def use(stream: PaperStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: PaperStream("side", notes))
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1])
    return notes


def test_on_a_cpu_batches_pass_as_they_are() -> None:
    batches = [batch_number(0), batch_number(1)]
    assert [id(batch) for batch in feed(batches, CPU)] == [id(batch) for batch in batches]
    assert not list(feed([], CPU))


def test_copies_and_steps_wait_for_each_other(log: list[tuple[Any, ...]]) -> None:
    def loader() -> Iterator[Batch]:
        for number in range(5):
            log.append(("loader", number, torch.cuda.current_stream().name))
            yield batch_number(number)

    for number, batch in enumerate(feed_over_side_stream(loader(), CPU, None)):
        assert isinstance(batch, Batch)
        assert batch.pixels[0, 0] == number
        log.append(("step", number))
    events: list[tuple[Any, ...]] = []
    for number in range(5):
        events.append(("loader", number, "side"))
        if number == 0:
            events.append(("side", "waits for", "compute"))
        if number >= SLOTS:  # the mark of the step that read this slot
            events.append(("side", "waits for", "compute", number - SLOTS + 1))
        events += [("compute", "waits for", "side"), ("step", number), ("compute", "marks", number + 1)]
    assert log == events


@pytest.mark.usefixtures("log")
def test_two_slots_take_turns_and_the_loader_s_memory_is_left() -> None:
    batches = [batch_number(number) for number in range(6)]
    seen = [
        (batch.pixels.data_ptr(), batch.label.data_ptr())
        for batch in feed_over_side_stream(iter(batches), CPU, None)
        if isinstance(batch, Batch)
    ]
    assert len(set(seen)) == SLOTS
    assert all(here != following for here, following in itertools.pairwise(seen))
    assert not {place for pair in seen for place in pair} & {
        part.data_ptr() for one in batches for part in tensors_of(one)
    }


@pytest.mark.parametrize("over_side_stream", [False, True])
def test_errors_come_in_their_place(log: list[tuple[Any, ...]], over_side_stream: bool) -> None:
    error = CorruptError("Half of a record is missing", fix="Build it again.")
    batches: list[Batch | KDCacheError] = [error, batch_number(1), error, batch_number(3)]
    fed = feed_over_side_stream(iter(batches), CPU, None) if over_side_stream else feed(batches, CPU)
    for number, batch in enumerate(fed):
        if number % 2:
            assert isinstance(batch, Batch)
            assert batch.label[1, 1] == number
        else:
            assert batch is error


@pytest.mark.parametrize("over_side_stream", [False, True])
def test_leaving_early_ends_the_loader_s_threads(
    cache: Cache, log: list[tuple[Any, ...]], over_side_stream: bool
) -> None:
    draws = Draws(CacheDataset(cache), 0)
    ring = make_loader(draws, first=0, last=10**9, batch_size=2, workers=3, pin_memory=False)
    batches = feed_over_side_stream(iter(ring), CPU, None) if over_side_stream else feed(ring, CPU)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kdcache-loader")]


def test_a_data_loader_takes_its_number_before_the_first_batch(cache: Cache) -> None:
    """A run that resumes puts the generator back in between."""
    torch.manual_seed(0)
    at_first = torch.get_rng_state()
    batches = feed(DataLoader(Draws(CacheDataset(cache), 0), batch_sampler=Steps(0, 2, 2)), CPU)
    before = torch.get_rng_state()
    assert not torch.equal(at_first, before)
    assert len(list(batches)) == 2
    assert torch.equal(before, torch.get_rng_state())


def test_targets_are_gathered_on_the_side_stream(cache: Cache, log: list[tuple[Any, ...]]) -> None:
    dataset = CacheDataset(cache)
    dataset.on_device = DeviceTargets.load(cache, CPU)
    loader = make_loader(Draws(dataset, 0), first=0, last=4, batch_size=3, workers=0, pin_memory=False)
    order = Draws(dataset, 0)
    for step, batch in enumerate(feed_over_side_stream(iter(loader), CPU, dataset.on_device)):
        assert isinstance(batch, Batch)
        for row in range(3):
            record = order.visit(3 * step + row)[0]
            path = "targets/segmentation/values"
            assert np.array_equal(batch.target.values[row], cache.read(record, [path])[path])


@gpu
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_what_a_gpu_gets_is_what_was_drawn(
    make_cache: Callable[..., Path], scenes: str, workers: int, gathered: bool, pixels: str
) -> None:
    """Also by a step so slow that copies would overtake it, and threads that draw faster than it reads."""
    device = torch.device("cuda")
    cache = open_cache(make_cache(top_k=3, pixels=pixels))
    split = open_split(scenes, "train")
    dataset = CacheDataset(Records(cache, split))
    if gathered:
        dataset.on_device = DeviceTargets.load(cache, device)
    loader = make_loader(Draws(dataset, 0), first=0, last=24, batch_size=4, workers=workers, pin_memory=True)
    fed = []
    for batch in feed(loader, device, dataset.on_device):
        assert isinstance(batch, Batch)
        torch.cuda._sleep(20_000_000)
        fed.append([part.clone() for part in tensors_of(batch)])
    draws = Draws(CacheDataset(Records(cache, split)), 0)
    assert len(fed) == 24
    for step, parts in enumerate(fed):
        for row in range(4):
            expected = draws[4 * step + row]
            assert isinstance(expected, Batch)
            assert all(torch.equal(part[row].cpu(), one) for part, one in zip(parts, tensors_of(expected), strict=True))
