"""Means, intervals and words, against published tables, arithmetic by hand, and chance itself."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.analysis import statistics
from kdcache.analysis.statistics import (
    Blocks,
    Difference,
    Spread,
    adjust,
    difference,
    resample,
    t_quantile,
    two_sided_p,
)
from kdcache.metrics.confusion import ImageCounts

# Published two-sided 95 % points of Student's t.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 9: 2.262, 10: 2.228, 29: 2.045, 120: 1.980}


def row(*values: float, first: int = 0) -> dict[tuple[int, None], float]:
    """Runs of the seeds from `first` on."""
    return {(seed, None): value for seed, value in enumerate(values, first)}


@pytest.mark.parametrize(("freedom", "published"), TABLE.items())
def test_the_quantile_is_the_published_one(freedom: int, published: float) -> None:
    assert t_quantile(freedom) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(("freedom", "published"), [(1, 63.657), (2, 9.925), (7, 3.499)])
def test_so_is_that_of_99_percent(freedom: int, published: float) -> None:
    assert t_quantile(freedom, 0.99) == pytest.approx(published, abs=6e-4)


def test_the_spread_of_runs() -> None:
    found = Spread.of([0.5, math.nan, 0.7])
    assert (found.mean, found.std, found.runs) == (pytest.approx(0.6), pytest.approx(0.02**0.5), 2)
    assert math.isnan(Spread.of([0.5]).std)
    assert Spread.of([math.nan]).to_json() == {"mean": None, "std": None, "runs": 0}


def test_runs_of_equal_seeds_are_compared_in_pairs() -> None:
    """Seeds that differ by ten points hide half a point, unless each is compared with its own."""
    found = difference(row(0.505, 0.606, 0.704), row(0.5, 0.6, 0.7), "none")
    assert found.paired
    assert found.mean == pytest.approx(0.005)
    assert found.half_width == pytest.approx(4.303 * 0.001 / 3**0.5, rel=1e-3)
    assert found.verdict == "above noise"
    alone = difference(row(0.505, 0.606, 0.704, first=10), row(0.5, 0.6, 0.7), "none")
    assert not alone.paired
    assert alone.mean == pytest.approx(found.mean)
    assert alone.verdict == "within noise"


def test_welch_by_hand() -> None:
    """Variances 0.01 and 0.04 of three runs each: standard error 0.1291, 2.941 degrees of freedom."""
    found = difference(row(0.4, 0.5, 0.6, first=5), row(0.1, 0.3, 0.5), "none")
    assert found.half_width == pytest.approx(t_quantile(50 / 17) * (0.05 / 3) ** 0.5)
    assert t_quantile(50 / 17) == pytest.approx(3.2185, abs=1e-3)
    assert found.p == pytest.approx(oracle_p(0.2 / (0.05 / 3) ** 0.5, 50 / 17))
    assert (found.runs, found.paired) == (6, False)
    assert (found.unpaired.mean, found.unpaired.half_width) == (found.mean, found.half_width)
    assert math.isnan(found.correlation)


def oracle_p(t: float, freedom: float) -> float:
    """The tails of Student's density, integrated numerically to 15 digits."""
    density = mpmath.gamma((freedom + 1) / 2) / mpmath.gamma(freedom / 2) / mpmath.sqrt(freedom * mpmath.pi)
    tail = mpmath.quad(lambda x: (1 + x * x / freedom) ** (-(freedom + 1) / 2), [abs(t), abs(t) + 5, mpmath.inf])
    return float(2 * density * tail)


@settings(max_examples=60, deadline=None)
@given(t=st.floats(-30, 30), freedom=st.floats(1, 200))
def test_p_values_are_those_of_the_density(t: float, freedom: float) -> None:
    assert two_sided_p(t, freedom) == pytest.approx(oracle_p(t, freedom), rel=1e-7, abs=1e-13)


@pytest.mark.parametrize("freedom", [1, 1.5, 2.94, 7, 400])
def test_the_quantile_leaves_its_share_outside(freedom: float) -> None:
    for confidence in (0.5, 0.95, 0.999):
        assert oracle_p(t_quantile(freedom, confidence), freedom) == pytest.approx(1 - confidence, rel=1e-6)


def test_p_of_what_is_certain() -> None:
    assert (two_sided_p(0, 3), two_sided_p(math.inf, 3)) == (1, 0)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_the_interval_and_its_p_value_say_the_same(values: list[tuple[float, float]]) -> None:
    """Paired or not: p below 0.05 is an interval without zero."""
    found = difference(row(*(one for one, _ in values)), row(*(two for _, two in values)), "none")
    for one in (found, found.unpaired):
        if one.half_width > 1e-9 and abs(abs(one.mean) - one.half_width) > 1e-9:
            assert (one.p < 0.05) == (abs(one.mean) > one.half_width)


def test_both_intervals_and_the_correlation_are_given() -> None:
    """Seeds in common pay when they vary together, and cost degrees of freedom when they do not."""
    together = difference(row(0.505, 0.606, 0.704), row(0.5, 0.6, 0.7), "none")
    assert together.correlation == pytest.approx(np.corrcoef([0.505, 0.606, 0.704], [0.5, 0.6, 0.7])[0, 1])
    assert together.unpaired.mean == pytest.approx(together.mean)
    assert together.unpaired.half_width > 50 * together.half_width
    apart = difference(row(0.52, 0.54, 0.53, 0.55), row(0.51, 0.5, 0.5, 0.51), "none")
    assert apart.correlation == pytest.approx(0, abs=1e-9)
    assert apart.unpaired.half_width < apart.half_width
    said = apart.to_json()
    assert said["correlation"] == apart.correlation
    assert said["unpaired"]["low"] == pytest.approx(apart.mean - apart.unpaired.half_width)
    assert said["unpaired"]["high"] == pytest.approx(apart.mean + apart.unpaired.half_width)


def test_the_unpaired_interval_is_of_all_runs() -> None:
    """Runs without a partner leave the pairs, and nothing else."""
    ours, theirs = row(0.6, 0.7), row(0.5, 0.59, 0.9)
    found = difference(ours, theirs, "none")
    alone = difference(row(0.6, 0.7, first=9), theirs, "none")
    assert found.mean == pytest.approx(0.105)
    assert found.unpaired.mean == alone.mean == pytest.approx(0.65 - 1.99 / 3)
    assert found.unpaired == alone.unpaired
    assert found.unpaired.p == alone.p


def test_runs_of_which_some_pair_are_not_paired() -> None:
    """Leaving out those without a partner on both sides would throw runs away."""
    found = difference(row(0.6, 0.7, 0.8), row(0.5, 0.55, 0.65, first=1), "none")
    assert (found.paired, found.runs) == (False, 6)
    assert found.mean == pytest.approx(0.7 - 1.7 / 3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (row(0.6, 0.7), row(0.5, 0.6)),  # of two pairs it is 1 or -1 by arithmetic
        (row(0.6, 0.6, 0.6), row(0.5, 0.6, 0.7)),
        (row(0.6), row(0.5)),
        (row(0.6, 0.7, 0.8, first=5), row(0.5, 0.6, 0.7)),
    ],
)
def test_no_correlation_where_there_is_none(ours: dict, theirs: dict) -> None:
    found = difference(ours, theirs, "none")
    assert math.isnan(found.correlation)
    assert found.to_json()["correlation"] is None


def test_one_run_has_no_interval_of_either_kind() -> None:
    found = difference(row(0.6), row(0.5, 0.4), "none")
    assert (found.paired, found.runs) == (True, 1)
    assert all(map(math.isnan, (found.half_width, found.p, found.unpaired.half_width, found.unpaired.p)))


def test_runs_without_a_value_are_no_runs() -> None:
    """A class that does not occur in a fold has no IoU there, and its pair is none."""
    found = difference(row(0.6, math.nan, 0.9), row(0.5, 0.2, 0.7), "none")
    assert found == difference(
        {(0, None): 0.6, (2, None): 0.9}, {(0, None): 0.5, (1, None): 0.2, (2, None): 0.7}, "none"
    )
    assert found.runs == 2


def of_p(*values: float) -> list[Difference]:
    return [Difference(0.01, 0.005, p, "none", 5, True, adjusted=p) for p in values]


def test_holm_by_hand() -> None:
    """Wikipedia's four hypotheses and Holm's steps: 4, 3, 2, 1 times the p-values in order, and never falling."""
    found = adjust(of_p(0.01, 0.04, 0.03, 0.005))
    assert [one.adjusted for one in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [one.verdict for one in found] == ["above noise", "within noise", "within noise", "above noise"]
    assert {one.comparisons for one in found} == {4}
    assert [one.to_json()["p_adjusted"] for one in found] == [one.adjusted for one in found]
    assert [one.p for one in found] == [0.01, 0.04, 0.03, 0.005]
    assert [one.adjusted for one in adjust(of_p(0.6, 0.9))] == [1, 1]


def test_what_was_not_tested_makes_no_verdict_harder() -> None:
    """One run has no p-value: it is said to be unknown, and counts as no comparison."""
    unknown = Difference(0.01, math.nan, math.nan, "none", 1, paired=True)
    first, last = adjust([of_p(0.03)[0], unknown])
    assert (first.comparisons, first.adjusted, first.verdict) == (1, 0.03, "above noise")
    assert last == unknown
    assert last.verdict == "one run: unknown"
    assert adjust([]) == []


def test_one_comparison_is_judged_by_its_interval() -> None:
    assert adjust([alone := difference(row(0.6, 0.61, 0.62), row(0.5, 0.52, 0.51), "none")]) == [alone]
    assert alone.comparisons == 1
    assert alone.adjusted == alone.p


def test_one_lucky_row_of_many_is_rare() -> None:
    """Rows that are all alike: unadjusted, some row is above noise most of the time; adjusted, once in 20."""
    rng = np.random.default_rng(5)
    luck = adjusted = 0
    for _ in range(120):
        plain = [difference(row(*rng.normal(size=5)), row(*rng.normal(size=5)), "none") for _ in range(12)]
        luck += any(one.verdict == "above noise" for one in plain)
        adjusted += any(one.verdict == "above noise" for one in adjust(plain))
    assert luck > 25
    assert adjusted <= 12


def test_more_runs_on_one_side_still_pair() -> None:
    found = difference(row(0.6, 0.7), row(0.5, 0.59, 0.9), "none")
    assert (found.paired, found.runs) == (True, 2)
    assert found.mean == pytest.approx(0.105)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (row(0.6), row(0.5), "one run: unknown"),
        (row(0.6), row(0.5, 0.4, first=3), "one run: unknown"),
        (row(0.6, 0.7), row(0.6, 0.7), "within noise"),
        (row(0.6, 0.6), row(0.5, 0.5), "above noise"),
        (row(0.4, 0.4), row(0.5, 0.5), "above noise"),
        (row(0.6, 0.6, first=2), row(0.5, 0.5), "above noise"),
        (row(math.nan), row(0.5), "unknown"),
        (row(), row(0.5), "unknown"),
    ],
)
def test_words(ours: dict, theirs: dict, verdict: str) -> None:
    found = difference(ours, theirs, "none")
    assert found.verdict == verdict
    assert found.to_json()["verdict"] == verdict


def test_nothing_of_json_is_nan() -> None:
    found = Difference(0.1, math.nan, math.nan, "none", 1, paired=True).to_json()
    assert (found["mean"], found["low"], found["high"]) == (0.1, None, None)


@pytest.mark.parametrize(("shift", "counts"), [(0, (4, 4)), (10, (4, 5))])
def test_the_interval_holds_the_truth_19_times_in_20(shift: int, counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(2000):
        noise = rng.normal(size=counts[1])  # what runs of a seed have in common
        ours = row(*(1 + noise[: counts[0]] + 0.3 * rng.normal(size=counts[0])), first=shift)
        found = difference(ours, row(*(noise if not shift else rng.normal(size=counts[1]))), "none")
        held += abs(found.mean - 1) <= found.half_width
    assert 0.935 < held / 2000 < 0.985 if shift else 0.935 < held / 2000 < 0.965


# --- over images and sequences -----------------------------------------------------------------------------


def counts(images: int, classes: int, seed: int, ids: list[str] | None = None) -> ImageCounts:
    """Random counts of images, some of which lack some classes."""
    rng = np.random.default_rng(seed)
    unions = rng.integers(0, 50, (images, classes)) * rng.integers(0, 2, (images, classes))
    names = ids or [f"{number // 3}_{number % 3}" for number in range(images)]
    return ImageCounts(tuple(names), rng.integers(0, 51, unions.shape) * unions // 50, unions)


def blocks_of(ids: tuple[str, ...], by_sequence: bool) -> Blocks:
    names = {sample: sample.partition("_")[0] if by_sequence else sample for sample in ids}
    return Blocks.of(names, "sequences" if by_sequence else "images")


def miou(images: ImageCounts, times: list[int]) -> float:
    """The mIoU of some images, each as often as it was drawn; by loops."""
    ious = []
    for number in range(images.hits.shape[1]):
        hits = sum(n * int(hit) for n, hit in zip(times, images.hits[:, number], strict=True))
        union = sum(n * int(pixels) for n, pixels in zip(times, images.unions[:, number], strict=True))
        ious += [hits / union] if union else []
    return sum(ious) / len(ious) if ious else math.nan


@pytest.mark.parametrize("by_sequence", [False, True])
def test_draws_are_those_of_a_loop(by_sequence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 40)
    monkeypatch.setattr(statistics, "AT_ONCE", 20)
    ours, theirs = [counts(7, 4, seed) for seed in (0, 1)], [counts(7, 4, seed) for seed in (2, 3, 4)]
    blocks = blocks_of(ours[0].ids, by_sequence)
    assert blocks.count == (3 if by_sequence else 7)
    found = resample(ours, theirs, blocks)
    rng, gaps = np.random.default_rng(0), []
    for _ in range(2):
        for drawn in rng.multinomial(blocks.count, [1 / blocks.count] * blocks.count, 20):
            times = [int(drawn[blocks.number_of[sample]]) for sample in ours[0].ids]
            means = [np.nanmean([miou(images, times) for images in row]) for row in (ours, theirs)]
            gaps.append(means[0] - means[1])
    assert [found.low, found.high] == pytest.approx(np.nanquantile(gaps, [0.025, 0.975]).tolist(), abs=1e-12)
    assert found == resample(ours, theirs, blocks)


def test_the_interval_over_images_is_that_of_a_mean_and_that_over_copies_wider() -> None:
    """Images of one pixel and one class: IoU is a mean of zeros and ones, whose interval is known."""
    rng, size = np.random.default_rng(5), 400
    right, none = rng.integers(0, 2, (size, 1)), np.zeros((size, 1), np.int64)
    frames = [f"{number}_{frame}" for number in range(size) for frame in range(4)]
    rows = [ImageCounts(tuple(frames), hits.repeat(4, 0), np.ones((4 * size, 1), np.int64)) for hits in (right, none)]
    half = 1.96 * float(right.std()) / size**0.5
    over_sequences = resample(rows[:1], rows[1:], blocks_of(rows[0].ids, by_sequence=True))
    assert (over_sequences.over, over_sequences.count) == ("sequences", size)
    assert over_sequences.low == pytest.approx(right.mean() - half, abs=0.1 * half)
    assert over_sequences.high == pytest.approx(right.mean() + half, abs=0.1 * half)
    over_images = resample(rows[:1], rows[1:], blocks_of(rows[0].ids, by_sequence=False))
    assert over_images.high - over_images.low == pytest.approx(half, rel=0.1)  # of four times as many


def test_the_same_images_give_both_rows_the_same_draws() -> None:
    """What is hard for both rows alike widens no interval."""
    one = counts(30, 3, 0)
    better = ImageCounts(one.ids, np.minimum(one.hits + one.unions // 10, one.unions), one.unions)
    blocks = blocks_of(one.ids, by_sequence=False)
    paired, alone = resample([better], [one], blocks), resample([better], [counts(30, 3, 9)], blocks)
    assert 0 < paired.low < paired.high < 0.11
    assert alone.high - alone.low > 3 * (paired.high - paired.low)


def test_runs_of_folds_have_images_of_their_own() -> None:
    whole = counts(8, 3, 1)
    parts = [ImageCounts(whole.ids[k::2], whole.hits[k::2], whole.unions[k::2]) for k in (0, 1)]
    found = resample(parts, parts[::-1], blocks_of(whole.ids, by_sequence=False))
    assert found.low == pytest.approx(0, abs=1e-12)
    assert found.high == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("ids", [["a_0"] * 1, ["a_0", "a_1"]])
def test_one_block_has_no_interval(ids: list[str]) -> None:
    images = counts(len(ids), 2, 0, ids)
    found = resample([images], [images], blocks_of(images.ids, by_sequence=True))
    assert found.to_json() == {"over": "sequences", "count": 1, "low": None, "high": None}
