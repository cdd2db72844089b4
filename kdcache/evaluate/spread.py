"""Means over runs, and whether two rows differ by more than their noise.

Two runs of one recipe that differ in their seed differ by a point of mIoU or more on small data sets. A difference of
means is therefore given with its 95 % interval by Student's t, and a word. Runs with the same seed (and fold) start
from the same weights and see the same pixels in the same order: what they have in common cancels in their difference,
so they are compared pair by pair wherever they pair.

Folds share most of their training samples, so an interval over folds is narrower than it should be (Nadeau and Bengio
2003); over seeds it speaks of training alone, not of other images.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Key = tuple[Any, ...]
"""What tells the runs of a row apart: seed and fold."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over runs; the deviation is NaN for one run, all is NaN for none."""

    mean: float
    std: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """NaN (a class that does not occur in a fold) is left out."""
        known = [value for value in values if not math.isnan(value)]
        mean = statistics.fmean(known) if known else math.nan
        return cls(mean, statistics.stdev(known) if len(known) > 1 else math.nan, len(known))

    def to_json(self) -> dict[str, Any]:
        return {"mean": plain(self.mean), "std": plain(self.std), "runs": self.runs}


@dataclass(frozen=True)
class Difference:
    """How far a row is from its baseline.

    Attributes:
        mean: row minus baseline.
        half_width: of the 95 % interval around it; NaN where there are too few runs for one.
        runs: pairs, or runs of the row and the baseline together when they do not pair.
        paired: whether runs of equal seed and fold were compared one by one.
    """

    baseline: str
    mean: float
    half_width: float
    runs: int
    paired: bool

    @property
    def verdict(self) -> str:
        """A word on the interval: does it leave out zero?"""
        if math.isnan(self.mean):
            return "unknown"
        if math.isnan(self.half_width):
            return "one run: unknown"
        return "above noise" if abs(self.mean) > self.half_width else "within noise"

    def to_json(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "mean": plain(self.mean),
            "low": plain(self.mean - self.half_width),
            "high": plain(self.mean + self.half_width),
            "runs": self.runs,
            "paired": self.paired,
            "verdict": self.verdict,
        }


def difference(ours: Mapping[Key, float], theirs: Mapping[Key, float], baseline: str) -> Difference:
    """The difference of two rows of runs with its interval.

    Paired when every run of the smaller row has its partner in the other; by Welch's test otherwise, its degrees of
    freedom rounded down.
    """
    ours, theirs = ({key: value for key, value in row.items() if not math.isnan(value)} for row in (ours, theirs))
    if not ours or not theirs:
        return Difference(baseline, math.nan, math.nan, 0, paired=False)
    common = ours.keys() & theirs.keys()
    if len(common) == min(len(ours), len(theirs)):
        gaps = Spread.of(ours[key] - theirs[key] for key in common)
        half = t_quantile(gaps.runs - 1) * gaps.std / math.sqrt(gaps.runs) if gaps.runs > 1 else math.nan
        return Difference(baseline, gaps.mean, half, gaps.runs, paired=True)
    one, two = Spread.of(ours.values()), Spread.of(theirs.values())
    return Difference(baseline, one.mean - two.mean, _welch_half_width(one, two), one.runs + two.runs, paired=False)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Half-width of Student's two-sided interval in standard errors: 12.706 for 1 degree of freedom, 1.96 for many."""
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _inside(theta: float, freedom: int) -> float:
    """P(|t| < tan(theta) sqrt(freedom)). Source: Abramowitz and Stegun 26.7.3 and 26.7.4, exact for whole numbers."""
    sin, cos = math.sin(theta), math.cos(theta)
    if freedom % 2:
        term, total = cos, cos if freedom > 1 else 0.0
        for power in range(3, freedom - 1, 2):
            term *= cos * cos * (power - 1) / power
            total += term
        return 2 / math.pi * (theta + sin * total)
    term = total = 1.0
    for power in range(2, freedom - 1, 2):
        term *= cos * cos * (power - 1) / power
        total += term
    return sin * total


def _welch_half_width(one: Spread, two: Spread) -> float:
    """NaN when a row has one run; 0 when neither spreads."""
    if min(one.runs, two.runs) < 2:
        return math.nan
    first, second = (row.std**2 / row.runs for row in (one, two))
    if first + second == 0:
        return 0.0
    freedom = (first + second) ** 2 / (first**2 / (one.runs - 1) + second**2 / (two.runs - 1))
    return t_quantile(max(1, int(freedom))) * math.sqrt(first + second)


def plain(value: float) -> float | None:
    """For JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
