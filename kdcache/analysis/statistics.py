"""Means over runs, and whether two rows differ by more than their noise.

Two runs of one recipe with different seeds differ by a point of mIoU or more on small data sets. A difference of means
therefore comes with its 95 % interval by Student's t, and a verdict. Runs with the same seed (and fold) start from the
same weights and see the same pixels in the same order. Rows with matching runs are compared pair by pair, which is
always valid but helps only if the pairs correlate. So the correlation of the pairs is given as well, and Welch's
interval, which takes all runs for independent.

Several rows are several chances to be lucky. Verdicts therefore follow Holm (1979): one false "above noise" among all
rows is as rare as for a single row. Intervals are not adjusted.

Folds share most of their training samples, so an interval over folds is too narrow (Nadeau and Bengio 2003). An
interval over seeds covers training only, not other images.

The effect of other images is measured by a block bootstrap (Kuensch 1989): the trained runs stay, and images, or
sequences of them, are drawn with replacement, the same for both rows. Frames of a video are similar, so an interval
over single frames is too narrow.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.data import Split
from kdcache.data.sequences import sequences_of
from kdcache.errors import RecipeError
from kdcache.metrics.evaluators import Images
from kdcache.tasks import SEGMENTATION

Key = tuple[Any, ...]
"""The key of a run in its row: seed and fold."""
CONFIDENCE = 0.95
RESAMPLES = 10_000
"""Draws of the bootstrap."""
AT_ONCE = 500
LEAST_PAIRS = 3
"""Pairs that have a correlation; that of two pairs is 1 or -1, whatever they are."""


@dataclass(frozen=True)
class Spread:
    """The mean and the standard deviation `std` (divided by n - 1) of a value over a number of runs.

    The deviation is NaN for one run. Without runs, both are NaN. Runs whose value is NaN do not count.
    """

    mean: float
    std: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return mean and sample standard deviation of values, without NaN values.

        The mean of no values and the deviation of fewer than two are NaN.
        """
        finite = [value for value in values if not math.isnan(value)]
        mean = statistics.fmean(finite) if finite else math.nan
        return cls(mean, statistics.stdev(finite) if len(finite) > 1 else math.nan, len(finite))

    def to_json(self) -> dict[str, Any]:
        """Return `mean`, `std` and `runs` as JSON values under these keys. NaN becomes null."""
        return {"mean": plain(self.mean), "std": plain(self.std), "runs": self.runs}


@dataclass(frozen=True)
class Interval:
    """A difference of two means with its 95 % interval. NaN stands for unknown values.

    Attributes:
        mean: the difference.
        half_width: half the width of its 95 % interval.
        p: the two-sided p-value of the hypothesis that the difference is zero.
    """

    mean: float
    half_width: float
    p: float

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width

    def to_json(self) -> dict[str, Any]:
        """Return a dict with `mean`, `low`, `high` and `p` as JSON values: a number, or None if it is unknown."""
        return {"mean": plain(self.mean), "low": plain(self.low), "high": plain(self.high), "p": plain(self.p)}


@dataclass(frozen=True)
class Blocks:
    """The blocks of images that the bootstrap resamples: single images, or sequences.

    Attributes:
        over: "images" or "sequences".
        number_of: the block of each image, from 0, by the image's id.
    """

    over: str
    number_of: Mapping[str, int]

    @classmethod
    def of(cls, names: Mapping[str, str], over: str) -> "Blocks":
        """Return blocks from a name for each image: images with equal names form one block.

        `names` maps the image's id to the name of its block. `over` says what a block is: "images" for single images,
        or "sequences".
        """
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()))}
        return cls(over, {sample: numbers[name] for sample, name in names.items()})

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(set(self.number_of.values()))

    def totals(self, images: Images) -> npt.NDArray[np.float64]:
        """Return the sums of the counts in `images` over the images of each block, float64 (2, blocks, C).

        Index 0 of the first axis is the hits of each class, and index 1 is the unions. For depth, index 0 is the sum of
        the images' rmse, index 1 is the number of images, and C is 1.
        """
        parts = images.parts
        totals = np.zeros((2, self.count, parts[0].shape[1]))
        places = np.array([self.number_of[sample] for sample in images.ids], np.int64)
        for total, counts in zip(totals, parts, strict=True):
            np.add.at(total, places, counts)
        return totals


@dataclass(frozen=True)
class Resampled:
    """The 95 % interval of a difference, from the bootstrap over blocks of images.

    Attributes:
        over: "images" or "sequences".
        count: the number of blocks.
        low, high: the ends of the interval. NaN for fewer than two blocks.
    """

    over: str
    count: int
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """Return the kind and number of blocks and the ends of the interval as JSON values."""
        return {"over": self.over, "count": self.count, "low": plain(self.low), "high": plain(self.high)}


UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Difference(Interval):
    """The difference of a row's mean score from another row's (its baseline or control), with its 95 % interval.

    Attributes:
        baseline: the name of the other row.
        runs: number of pairs of runs. If they are not paired, the number of runs of both rows together.
        paired: True if each run is compared with the other row's run of the same seed and fold.
        correlation: correlation of the paired scores, or NaN for fewer than three pairs or constant scores.
        unpaired: the difference and its interval by Welch's test, which takes all runs of both rows and ignores pairs.
        comparisons: number of differences whose p-values were adjusted together, this one included.
        adjusted: the p-value after Holm's adjustment for these comparisons.
        over: what distinguishes the runs of a row: "seeds", or "seeds and folds".
        resampled: the interval over images or sequences, or None if per-image counts are not known.
    """

    baseline: str
    runs: int
    paired: bool
    correlation: float = math.nan
    unpaired: Interval = UNKNOWN
    comparisons: int = 1
    adjusted: float = math.nan
    over: str = "seeds"
    resampled: Resampled | None = None

    @property
    def verdict(self) -> str:
        """The verdict: "above noise", "within noise", "one run: unknown" (no interval) or "unknown" (no difference).

        A gain or a loss is above noise if the 95 % interval excludes zero. With several comparisons, it is above noise
        if the adjusted p-value is below 0.05.
        """
        if math.isnan(self.mean):
            return "unknown"
        if math.isnan(self.half_width):
            return "one run: unknown"
        above = abs(self.mean) > self.half_width if self.comparisons == 1 else self.adjusted < 1 - CONFIDENCE
        return "above noise" if above else "within noise"

    def to_json(self) -> dict[str, Any]:
        """Return the difference with its intervals, p-values and verdict as JSON values."""
        return {
            "baseline": self.baseline,
            **super().to_json(),
            "over": self.over,
            "runs": self.runs,
            "paired": self.paired,
            "correlation": plain(self.correlation),
            "unpaired": self.unpaired.to_json(),
            "comparisons": self.comparisons,
            "p_adjusted": plain(self.adjusted),
            "verdict": self.verdict,
            "resampled": None if self.resampled is None else self.resampled.to_json(),
        }


def difference(ours: Mapping[Key, float], theirs: Mapping[Key, float], baseline: str) -> Difference:
    """Return the difference of the mean score of `ours` from the mean score of `theirs`, with its 95 % intervals.

    Both map (seed, fold) of a run to its score. Runs are paired if every run of the smaller row has a partner with the
    same seed and fold. Otherwise Welch's test compares all runs. `baseline` is the name of the other row.
    """
    ours, theirs = ({key: value for key, value in row.items() if not math.isnan(value)} for row in (ours, theirs))
    if not ours or not theirs:
        return Difference(math.nan, math.nan, math.nan, baseline, 0, paired=False)
    welch = _welch(Spread.of(ours.values()), Spread.of(theirs.values()))
    common = ours.keys() & theirs.keys()
    if len(common) < min(len(ours), len(theirs)):
        runs = len(ours) + len(theirs)
        result, correlation = welch, math.nan
    else:
        runs, pairs = len(common), [(ours[key], theirs[key]) for key in sorted(common, key=str)]
        gaps = Spread.of(our_score - their_score for our_score, their_score in pairs)
        result = _interval(gaps.mean, gaps.std / math.sqrt(runs), runs - 1)
        correlation = _correlation(pairs)
    return Difference(
        result.mean,
        result.half_width,
        result.p,
        baseline,
        runs,
        paired=result is not welch,
        correlation=correlation,
        unpaired=welch,
        adjusted=result.p,
    )


def resample(ours: Sequence[Images], theirs: Sequence[Images], blocks: Blocks) -> Resampled:
    """Return the bootstrap interval of the difference of two rows' scores, over blocks of images.

    `ours` and `theirs` have the per-image counts of each run of a row. A row's score is the mean over its runs. The
    random numbers are always the same. If no image of a resample has a class, the mIoU of this resample leaves it out.
    """
    if blocks.count < 2 or not ours or not theirs:
        return Resampled(blocks.over, blocks.count, math.nan, math.nan)
    rows = [np.stack([blocks.totals(images) for images in row]) for row in (ours, theirs)]
    generator, gaps = np.random.default_rng(0), list[npt.NDArray[np.float64]]()
    for _ in range(RESAMPLES // AT_ONCE):
        times = generator.multinomial(blocks.count, np.full(blocks.count, 1 / blocks.count), AT_ONCE).astype(float)
        gaps.append(_mean_score(rows[0], times) - _mean_score(rows[1], times))
    drawn = np.concatenate(gaps)
    tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, tails).tolist() if known.size else (math.nan, math.nan)
    return Resampled(blocks.over, blocks.count, low, high)


def _mean_score(runs: npt.NDArray[np.float64], times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean over runs of the mIoU, or of the rmse, of each draw, (draws,).

    `runs` are totals of blocks, (runs, 2, blocks, C). `times` counts the draws of each block, (draws, blocks).
    """
    hits, unions = np.moveaxis(np.tensordot(times, runs, (1, 2)), 2, 0)  # (draws, runs, C) each
    return _nan_mean(_nan_mean(np.divide(hits, unions, out=np.full_like(hits, np.nan), where=unions > 0)))


def _nan_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean over the last axis without NaN, or NaN if there is nothing else."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0.0).sum(-1), known.sum(-1)
    means: npt.NDArray[np.float64] = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return means


def adjust(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with p-values adjusted for multiple comparisons by Holm's method.

    Differences without a p-value are unchanged and do not count as comparisons.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    tested = sorted((gap.p, place) for place, gap in enumerate(differences) if not math.isnan(gap.p))
    adjusted, largest = list(differences), 0.0
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        adjusted[place] = replace(differences[place], comparisons=len(tested), adjusted=largest)
    return adjusted


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Return half the width of Student's two-sided interval, in standard errors.

    For example, a 95 % interval with 1 degree of freedom gives 12.706. `freedom` is the degrees of freedom, which may
    be fractional. `confidence` is the interval's probability, such as 0.95.
    """
    t = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    # Student's is larger, and the tails are convex: Newton's steps climb to it and never beyond.
    for _ in range(100):
        step = (two_sided_p(t, freedom) - (1 - confidence)) / (2 * _density(t, freedom))
        t += step
        if step <= 1e-12 * t:
            break
    return t


def two_sided_p(t: float, freedom: float) -> float:
    """Return the two-sided p-value P(|T| > |t|) of Student's t distribution. `freedom` may be fractional."""
    return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def _density(t: float, freedom: float) -> float:
    """Return the density of Student's distribution at t."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return scale * math.exp(-(freedom + 1) / 2 * math.log1p(t * t / freedom))


def plain(value: float) -> float | None:
    """Return a number for JSON, or None for NaN and infinity."""
    return value if math.isfinite(value) else None


def _interval(mean: float, error: float, freedom: float) -> Interval:
    """Return the interval of a mean with a standard error, NaN without degrees of freedom, exact at error 0."""
    if math.isnan(error) or freedom <= 0:
        return Interval(mean, math.nan, math.nan)
    if error == 0:
        return Interval(mean, 0.0, 1.0 if mean == 0 else 0.0)
    return Interval(mean, t_quantile(freedom) * error, two_sided_p(mean / error, freedom))


def _welch(ours: Spread, theirs: Spread) -> Interval:
    """Return difference of the means of independent rows of other variances. Source: Welch 1947."""
    mean, least = ours.mean - theirs.mean, min(ours.runs, theirs.runs)
    if least < 2:
        return Interval(mean, math.nan, math.nan)
    first, second = (row.std**2 / row.runs for row in (ours, theirs))
    total = first + second
    if total == 0:
        return _interval(mean, 0.0, 1)
    share = first / total  # squares of tiny variances would be 0
    freedom = 1 / (share**2 / (ours.runs - 1) + (1 - share) ** 2 / (theirs.runs - 1))
    return _interval(mean, math.sqrt(total), freedom)


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    if len(pairs) < LEAST_PAIRS:
        return math.nan
    try:
        return statistics.correlation(*zip(*pairs, strict=True))
    except statistics.StatisticsError:  # a side does not vary
        return math.nan


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return i_x(a, b), by its continued fraction. Source: Press et al., Numerical Recipes, 6.4 (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the other side converges
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / (1 + step * d)
            c = 1 + step / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def choose_blocks(split: Split, by: str | None, task: str = SEGMENTATION) -> Blocks:
    """Return the blocks of a split for an interval over images: single images, or sequences if `by` is not None.

    `by` is a pattern that finds the sequence in a sample's id. Only samples with a label for `task` count.

    Raises: RecipeError for an invalid pattern, one that does not fit every id, or one that finds a single sequence.
    """
    ids = [split.ids[number] for number in split.labelled(task)]
    if by is None:
        return Blocks.of({sample: sample for sample in ids}, "images")
    blocks = Blocks.of(dict(zip(ids, sequences_of(ids, by, "--blocks-by"), strict=True)), "sequences")
    if blocks.count < 2:
        raise RecipeError(
            f"--blocks-by {by!r} finds a single sequence in the {len(ids)} ids of {split.data}, split {split.split!r}",
            fix="Give a pattern that names shorter sequences, or leave it out for an interval over images.",
        )
    return blocks
