"""Reading ahead: a remote store's shards are here before a step needs them, within bounds, and threads end with it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptError
from kdcache.training import CacheDataset
from kdcache.training.input import shard_prefetch
from kdcache.training.input.sampler import Steps, epoch_order
from kdcache.training.input.shard_prefetch import Ahead, check_room, reads_ahead

SHARD_RECORDS, RECORDS, BYTES = 4, 48, 1000
PATHS = ("targets/segmentation/values", "pixels/image")


class FarCache:
    """Notes what is fetched; every file of an array has BYTES bytes."""

    def __init__(self, room: int | None = None, broken: tuple[int, ...] = ()) -> None:
        self.fetched: list[tuple[int, str]] = []
        self.broken = broken
        self.place = SimpleNamespace(room=room)
        self.manifest = SimpleNamespace(build=SimpleNamespace(shard_records=SHARD_RECORDS))
        self.ledger = self

    def __len__(self) -> int:
        return RECORDS // SHARD_RECORDS

    def record(self, shard: int) -> Any:
        return SimpleNamespace(files={f"{path}/c/{shard}/0": SimpleNamespace(bytes=BYTES) for path in PATHS})

    def fetch(self, shard: int, path: str) -> None:
        self.fetched.append((shard, path))
        if shard in self.broken:
            raise CorruptError("this", fix="that")


class FarDataset(CacheDataset):
    """As much of a dataset as reading ahead asks for."""

    remote = True
    shard_records = SHARD_RECORDS
    paths = PATHS  # type: ignore[assignment]
    target_paths = PATHS[:1]

    def __init__(self, cache: FarCache) -> None:
        self.cache = self.records = cache  # type: ignore[assignment]
        self.on_device = None

    def __len__(self) -> int:
        return RECORDS

    def record(self, index: int, epoch: int) -> int:
        return index


def visit(draw: int) -> tuple[int, int]:
    """Windows of 8 records: two shards."""
    epoch, position = divmod(draw, RECORDS)
    return int(epoch_order(0, epoch, RECORDS, SHARD_RECORDS)[position]), epoch


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch) -> None:
    for module in (shard_prefetch, __import__("kdcache.training.input.sampler", fromlist=["order"])):
        monkeypatch.setattr(module, "WINDOW_RECORDS", 8)
        monkeypatch.setattr(module, "WINDOW_SHARDS", 2)


def shards_of(steps: range) -> set[int]:
    return {visit(draw)[0] // SHARD_RECORDS for step in steps for draw in range(2 * step, 2 * step + 2)}


def arrive(cache: FarCache, shards: set[int]) -> bool:
    """Whether all these shards are fetched, on a machine however busy."""
    until = time.monotonic() + 60
    while missing := shards - {shard for shard, _ in cache.fetched}:
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return not missing


def settled(cache: FarCache) -> set[int]:
    """The shards that were fetched, once nothing more seems to come."""
    count = -1
    while count != len(cache.fetched):
        count = len(cache.fetched)
        time.sleep(0.03)
    return {shard for shard, _ in cache.fetched}


def ended() -> bool:
    for _ in range(3000):
        if not [thread for thread in threading.enumerate() if thread.name.startswith("kdcache-ahead")]:
            return True
        time.sleep(0.02)
    return False


def test_it_stays_one_window_ahead_of_the_trainer() -> None:
    cache = FarCache()
    batches = iter(Ahead(range(100), visit, FarDataset(cache), Steps(0, 100, 2)))
    for step in range(12):
        assert next(batches) == step
        # Four steps are a window: those of the next four are here, and nothing beyond the fifth.
        assert arrive(cache, shards_of(range(step + 5)))
        assert len(settled(cache)) <= len(shards_of(range(step + 6)))
    assert {path for _, path in cache.fetched} == set(PATHS)
    batches.close()
    assert ended()


def test_a_shard_is_asked_for_again_in_the_next_epoch_only() -> None:
    cache = FarCache()
    steps = Steps(0, 2 * RECORDS // 2, 2)
    for step in Ahead(range(len(steps)), visit, FarDataset(cache), steps):
        assert arrive(cache, shards_of(range(step, step + 1)))
    assert ended()
    counts = np.bincount([shard for shard, path in cache.fetched if path == PATHS[0]])
    assert set(counts) <= {1, 2}
    assert len(counts) == RECORDS // SHARD_RECORDS


def test_records_that_stay_in_memory_are_fetched_once() -> None:
    cache = FarCache()
    dataset = FarDataset(cache)
    dataset.records = object()  # type: ignore[assignment]
    steps = Steps(0, 5 * RECORDS // 2, 2)
    for step in Ahead(range(len(steps)), visit, dataset, steps):
        if step < RECORDS // 2:
            assert arrive(cache, shards_of(range(step, step + 1)))
    assert ended()
    assert len(cache.fetched) == len(set(cache.fetched)) == len(PATHS) * RECORDS // SHARD_RECORDS


def test_targets_on_the_device_are_not_fetched() -> None:
    cache = FarCache()
    dataset = FarDataset(cache)
    dataset.on_device = object()  # type: ignore[assignment]
    batches = iter(Ahead(range(8), visit, dataset, Steps(0, 8, 2)))
    next(batches)
    assert arrive(cache, shards_of(range(1)))
    assert {path for _, path in cache.fetched} == {"pixels/image"}
    batches.close()


def test_what_goes_wrong_is_left_to_the_reader() -> None:
    cache = FarCache(broken=tuple(range(12)))
    batches = iter(Ahead(range(24), visit, FarDataset(cache), Steps(0, 24, 2)))
    assert next(batches) == 0
    assert arrive(cache, shards_of(range(4)))
    assert list(batches) == list(range(1, 24))
    assert ended()


def test_a_loader_that_is_left_early_ends_it() -> None:
    closed = []

    def loader():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    batches = iter(Ahead(loader(), visit, FarDataset(FarCache()), Steps(0, 100, 2)))
    next(batches)
    batches.close()
    assert closed == [True]
    assert ended()


def test_leaving_while_fetches_wait_for_their_turn_ends_it() -> None:
    """More fetches than threads: some are cancelled before they begin, and nobody may wait for them."""
    slow = threading.Event()

    class SlowCache(FarCache):
        def fetch(self, shard: int, path: str) -> None:
            slow.wait(0.05)
            super().fetch(shard, path)

    class Wide(FarDataset):
        paths = tuple(f"features/{tap}" for tap in range(12))  # type: ignore[assignment]

    for _ in range(5):
        batches = iter(Ahead(range(100), visit, Wide(SlowCache()), Steps(0, 100, 2)))
        next(batches)
        time.sleep(0.02)
        batches.close()
        assert ended()


@pytest.mark.parametrize(("room", "ahead_too"), [(None, True), (12_000, True), (11_999, False)])
def test_only_where_there_is_room(room, ahead_too) -> None:
    """Three windows of 8 of 48 records are half of 24,000 bytes."""
    dataset = FarDataset(FarCache(room))
    assert reads_ahead(dataset) is ahead_too


@pytest.mark.parametrize(("shuffle", "room", "told"), [("window", 8_000, False), ("window", 7_999, True),
                                                       ("full", 24_000, False), ("full", 23_999, True)])  # fmt: skip
def test_too_little_room_is_told(shuffle, room, told) -> None:
    notes: list[str] = []
    check_room(FarDataset(FarCache(room)), shuffle, notes.append)
    assert ["--cache-bytes" in note for note in notes] == [True] * told
