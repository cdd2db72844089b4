"""Orders of epochs: every record once, a function of seed and epoch alone, and windows that stay in their shards."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.store import Cache
from kdcache.training import CacheDataset, LabelledDataset
from kdcache.training.input.loader import Draws
from kdcache.training.input.sampler import (
    WINDOW_RECORDS,
    WINDOW_SHARDS,
    Interleaved,
    Order,
    Rare,
    Steps,
    choose_labelled_share,
    choose_shuffle,
    epoch_order,
)
from kdcache.training.input.subset import Part


@given(
    records=st.integers(1, 6000),
    shard_records=st.none() | st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_record_once(records: int, shard_records: int | None, seed: int, epoch: int) -> None:
    order = epoch_order(seed, epoch, records, shard_records)
    assert np.array_equal(np.sort(order), np.arange(records))
    assert np.array_equal(order, epoch_order(seed, epoch, records, shard_records))


def test_full_is_the_permutation_that_runs_were_begun_with() -> None:
    assert np.array_equal(epoch_order(7, 3, 500), np.random.default_rng((7, 3)).permutation(500))


@pytest.mark.parametrize(
    ("records", "shard_records", "shards_of_window"),
    [(20_000, 128, 16), (20_001, 128, 16), (40_000, 1024, WINDOW_SHARDS), (9000, 32, 64), (5000, 1, 2048)],
)
def test_a_window_reads_a_few_shards_and_all_of_them(records: int, shard_records: int, shards_of_window: int) -> None:
    order = epoch_order(1, 2, records, shard_records)
    shards = order // shard_records
    first, last = np.full(-(-records // shard_records), -1), np.full(-(-records // shard_records), -1)
    for position, shard in enumerate(shards):
        first[shard] = position if first[shard] < 0 else first[shard]
        last[shard] = position
    longest = 2 * shards_of_window * shard_records  # windows are of equal length, at least that of one
    assert (last - first).max() < longest
    open_at_once = max(((first <= at) & (last >= at)).sum() for at in range(0, records, 97))
    assert open_at_once <= 2 * shards_of_window
    beginning = shards[: WINDOW_RECORDS // 2]
    assert len(np.unique(beginning)) >= min(shards_of_window, len(beginning)), "mixed from the start"


def test_windows_mix_what_shards_hold() -> None:
    order = epoch_order(0, 0, 16_384, 128)
    neighbours = np.abs(np.diff(order)) == 1
    assert neighbours.sum() < 40
    batches = (order // 128)[:8192].reshape(-1, 8)
    assert np.mean([len(set(batch.tolist())) for batch in batches]) > 5.5


def test_a_store_of_few_records_is_one_window() -> None:
    order = epoch_order(0, 0, 300, 32)
    assert len(np.unique(order[:40] // 32)) >= 8


@pytest.mark.parametrize("shard_records", [None, 4])
def test_epochs_and_seeds_differ_and_draws_find_their_epoch(shard_records: int | None) -> None:
    orders = [epoch_order(seed, epoch, 90, shard_records).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    order = Order(90, 1, shard_records)
    assert [order.visit(draw)[0] for draw in range(90, 180)] == orders[4]
    assert order.visit(90 * 10**6 + 3)[0] == epoch_order(1, 10**6, 90, shard_records)[3]


def test_epochs_that_are_drawn_from_in_turns_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(
        "kdcache.training.input.sampler.epoch_order",
        lambda seed, epoch, *_: made.append(epoch) or epoch_order(seed, epoch, 10),
    )
    order = Order(10, 0)
    for _ in range(5):
        order.visit(9)
        order.visit(10)
    order.visit(25)
    assert made == [0, 1, 2]


def test_threads_in_different_epochs_get_their_own(cache: Cache) -> None:
    order = Order(6, 3, 2)
    draws = np.random.default_rng(0).integers(0, 600, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(order.visit, draws))
    assert drawn == [(int(epoch_order(3, draw // 6, 6, 2)[draw % 6]), draw // 6) for draw in draws]


@given(
    labelled=st.lists(st.booleans(), min_size=2, max_size=60).filter(lambda flags: any(flags) and not all(flags)),
    share=st.integers(1, 999).map(lambda parts: parts / 1000),
    shard_records=st.none() | st.integers(1, 20),
    first=st.integers(0, 10**9),
    batch_size=st.integers(1, 16),
)
@settings(max_examples=100, deadline=None)
def test_every_batch_has_its_share_of_labels(
    labelled: list[bool], share: float, shard_records: int | None, first: int, batch_size: int
) -> None:
    flags = np.array(labelled)
    woven = Interleaved(flags, share, 5, shard_records)
    batch = [woven.visit(draw)[0] for draw in range(first, first + batch_size)]
    assert abs(flags[batch].sum() - share * batch_size) < 1


@given(labelled=st.lists(st.booleans(), min_size=2, max_size=30).filter(lambda flags: any(flags) and not all(flags)))
@settings(max_examples=30, deadline=None)
def test_each_stream_visits_all_of_its_records_in_every_epoch(labelled: list[bool]) -> None:
    flags = np.array(labelled)
    woven = Interleaved(flags, 0.5, 9)
    visits = [woven.visit(draw) for draw in range(240)]
    for stream in (flags, ~flags):
        records = np.flatnonzero(stream)
        own = [visit for visit in visits if stream[visit[0]]]
        assert len(own) == 120
        for epoch in range(120 // len(records)):
            visited = [record for record, of in own if of == epoch]
            assert visited == records[epoch_order(9, epoch, len(records))].tolist()


def test_half_of_a_batch_has_labels_where_fewer_samples_have() -> None:
    few, many = np.arange(8) < 2, np.arange(8) < 6
    assert choose_labelled_share(None, few) == 0.5
    assert choose_labelled_share(None, many) is None
    assert choose_labelled_share(None, np.arange(8) < 4) is None
    assert choose_labelled_share(0.1, few) == choose_labelled_share(0.1, many) == 0.1
    for one_stream in (None, np.ones(8, np.bool_), np.zeros(8, np.bool_)):
        assert choose_labelled_share(0.3, one_stream) is None


def test_draws_of_a_partly_labelled_store(cache: Cache) -> None:
    dataset = CacheDataset(cache, part=Part(labels=2))
    assert dataset.label_flags is not None
    assert dataset.label_flags.sum() == 2
    draws = Draws(dataset, 3, labelled_share=0.5)
    labelled = [bool((draws[draw].label != 255).any()) for draw in range(12)]  # type: ignore[union-attr]
    assert labelled == [False, True] * 6
    assert sorted({draws.visit(draw) for draw in range(1, 8, 2)}) == sorted(
        (record, epoch) for record in np.flatnonzero(dataset.label_flags) for epoch in (0, 1)
    )
    assert CacheDataset(cache).label_flags is None
    assert CacheDataset(cache, part=Part(labels=2), labelled_only=True).label_flags is None


def test_auto_reads_a_remote_store_by_windows(cache: Cache) -> None:
    near, far = CacheDataset(cache), CacheDataset(cache)
    assert not near.remote
    far.remote = True
    assert (choose_shuffle("auto", near), choose_shuffle("auto", far)) == ("full", "window")
    assert (choose_shuffle("window", near), choose_shuffle("full", far)) == ("window", "full")

    def epoch(dataset: CacheDataset, shuffle: str) -> list[int]:
        draws = Draws(dataset, 2, shuffle)
        return [draws.visit(draw)[0] for draw in range(6, 12)]

    assert epoch(near, "auto") == epoch(far, "full") == epoch_order(2, 1, 6).tolist()
    assert epoch(far, "auto") == epoch(near, "window") == epoch_order(2, 1, 6, near.shard_records).tolist()


def test_a_store_s_own_word_on_where_it_is(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(cache), "remote", True, raising=False)
    assert CacheDataset(cache).remote


def test_what_has_no_shards_has_no_windows(scenes: str, cache: Cache) -> None:
    labelled = LabelledDataset(open_split(scenes, "train"), (32, 48))
    assert choose_shuffle("auto", labelled) == "full"
    with pytest.raises(RecipeError, match="Cannot use --shuffle window for a data folder: it has no shards"):
        choose_shuffle("window", labelled)
    with pytest.raises(RecipeError, match="one of auto"):
        choose_shuffle("some", CacheDataset(cache))


@given(world=st.integers(1, 8), rows=st.integers(1, 5), first=st.integers(0, 10**9), count=st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_ranks_share_every_step(world: int, rows: int, first: int, count: int) -> None:
    batch_size, last = world * rows, first + count
    alone = [list(draws) for draws in Steps(first, last, batch_size)]
    ranks = [[list(draws) for draws in Steps(first, last, batch_size, rank, world)] for rank in range(world)]
    assert all(len(steps) == count for steps in (alone, *ranks, Steps(first, last, batch_size)))
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone  # noqa: RUF017


COUNTS = np.array([[900, 100, 0, 0], [950, 40, 0, 0], [0, 0, 0, 0], [990, 0, 1, 0], [700, 200, 60, 0]])
"""Pixels of four classes in five records of 1000 or, with void, more; one has too few of the third, none the fourth."""
PIXELS = np.array([1000, 1000, 1000, 1000, 1000])


@pytest.mark.parametrize("temperature", [0.01, 0.3, 5.0])
def test_rare_classes_are_drawn_as_often_as_their_formula_says(temperature: float) -> None:
    """Beside DAFormer's equations in exact fractions: 40,000 draws within five standard deviations."""
    totals = [int(total) for total in COUNTS.sum(0)]
    odds = [math.exp((totals[0] - n) / (temperature * sum(totals))) if n else 0.0 for n in totals]
    probabilities = [one / sum(odds) for one in odds]
    rare = Rare(COUNTS, PIXELS, 3, temperature)
    assert rare.probabilities_C == pytest.approx(probabilities, rel=1e-9)
    shown = [[0, 1, 3, 4], [0, 1, 4], [4]]  # the fourth record has one pixel of the third class: not enough
    expected = np.zeros(5)
    for probability, records in zip(probabilities, shown, strict=False):
        expected[records] += probability / len(records)
    visits = np.array([rare.visit(draw)[0] for draw in range(40_000)])
    share = np.bincount(visits, minlength=5) / len(visits)
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(visits)) + 1e-12).all()


def test_a_class_of_few_pixels_everywhere_is_drawn_where_it_is() -> None:
    counts = COUNTS.copy()
    counts[4, 2] = 0
    rare = Rare(counts, PIXELS, 3)
    assert rare.probabilities_C[2] > 0.99
    assert np.bincount([rare.visit(draw)[0] for draw in range(200)]).argmax() == 3


def test_a_rare_draw_depends_on_seed_and_number_alone() -> None:
    """So two processes draw what one does, and a run that resumes needs no history."""
    whole = [Rare(COUNTS, PIXELS, 3, 0.3).visit(draw) for draw in range(32)]
    parts = {}
    for rank in (1, 0):
        rare = Rare(COUNTS, PIXELS, 3, 0.3)
        parts |= {draw: rare.visit(draw) for draws in Steps(0, 4, 8, rank, 2) for draw in draws}
    assert [parts[draw] for draw in range(32)] == whole
    assert [Rare(COUNTS, PIXELS, 4, 0.3).visit(draw) for draw in range(32)] != whole
    assert len({epoch for _, epoch in whole}) == 32  # any of a sample's views
