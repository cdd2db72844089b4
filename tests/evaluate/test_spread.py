"""Means, intervals and words, against published tables, arithmetic by hand, and chance itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdcache.evaluate.spread import Difference, Spread, difference, t_quantile

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
    """Variances 0.01 and 0.04 of three runs each: standard error 0.1291, 2.94 degrees of freedom, taken as 2."""
    found = difference(row(0.4, 0.5, 0.6, first=5), row(0.1, 0.3, 0.5), "none")
    assert found.half_width == pytest.approx(4.303 * (0.05 / 3) ** 0.5, rel=1e-3)
    assert found.runs == 6


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
    found = Difference("none", 0.1, math.nan, 1, paired=True).to_json()
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
