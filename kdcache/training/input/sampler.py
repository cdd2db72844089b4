"""The record that a draw takes: a pure function of seed and draw number.

Draw n is at position n % R of epoch n // R, so draws straddle epochs and every record comes once in each. Two orders:

| shuffle | an epoch is | reads |
| --- | --- | --- |
| full | one permutation of all records | any shard at any time |
| window | shards in random order, their records permuted a few shards at a time | shard after shard |

A remote cache is downloaded by shards into a bounded folder, where a full permutation would fetch a shard for every
record. A window mixes several shards: neighbouring records of the build, such as frames of one drive, still spread over
hundreds of batches.

If some samples have no label, labelled and other samples can be two interleaved sequences, each in such an order, so
every batch has its share of labels.

To draw rare classes more often, there are no epochs: a draw takes a class, then a record that shows it.

Legend: R records, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from kdcache.errors import RecipeError, suggest
from kdcache.settings.parse import RARE_TEMPERATURE
from kdcache.training.input.dataset import DrawnDataset

SHUFFLES = ("auto", "full", "window")
WINDOW_RECORDS = 2048
"""Least records of a window: 256 batches of 8, far beyond the memory of batch statistics and of an optimizer."""
WINDOW_SHARDS = 8
"""Least shards of a window, so that large shards are mixed, too."""

LABELLED_SHARE = 0.5
"""Least part of every batch that has labels, where only some samples have one."""

RARE_SHARE = 3000 / (1914 * 1052)
"""A record shows a class in more than this share of its pixels: 3000 of an image of GTA5, as in DAFormer's settings."""

Records = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Order:
    """The order of `records` records over all epochs.

    Args:
        seed: seed of the permutations.
        shard_records: records of a shard, to shuffle in windows. None shuffles all records at once.
    Memory: two epochs, 16 bytes per record, because threads that draw ahead may be in the next one.
    """

    def __init__(self, records: int, seed: int, shard_records: int | None = None) -> None:
        self._records = records
        self._seed = seed
        self._shard_records = shard_records
        self._orders: tuple[tuple[int, Records], ...] = ()

    def visit(self, draw: int) -> tuple[int, int]:
        """Return the record of a draw, and the epoch of that visit. Many threads may call it at once."""
        epoch, position = divmod(draw, self._records)
        for stored_epoch, order in self._orders:  # replaced as one, never changed
            if stored_epoch == epoch:
                return int(order[position]), epoch
        order = epoch_order(self._seed, epoch, self._records, self._shard_records)
        self._orders = ((epoch, order), *self._orders[:1])
        return int(order[position]), epoch


class Interleaved:
    """Labelled and other records interleaved: any run of draws has the same share of labelled records.

    Args:
        labelled: whether each record has a label (R,) bool, with both kinds present.
        share: share of the draws that take a labelled record, in 0..1, rounded to a fraction of at most 1000 parts.
        seed, shard_records: as in `Order`.
    """

    def __init__(self, labelled: Flags, share: float, seed: int, shard_records: int | None = None) -> None:
        self._share = Fraction(share).limit_denominator(1000)
        self._records = np.flatnonzero(labelled), np.flatnonzero(~labelled)
        self._orders = tuple(Order(len(records), seed, shard_records) for records in self._records)

    def visit(self, draw: int) -> tuple[int, int]:
        """Return the record of a draw, and the epoch of that visit in its own sequence."""
        parts, of = self._share.numerator, self._share.denominator
        before = draw * parts // of  # draws of labelled records so far
        stream, own = (0, before) if (draw + 1) * parts // of > before else (1, draw - before)
        position, epoch = self._orders[stream].visit(own)
        return int(self._records[stream][position]), epoch


class Rare:
    """Draws a class with P(c) = softmax((1 - f_c) / T), then uniformly one of the records that show it.

    f_c is the share of c among all labelled pixels. A record shows a class if it has more than RARE_SHARE of its
    pixels, or any if no record does. Classes without any label are never drawn.

    Args:
        counts_RC: pixels of each class.
        pixels_R: all pixels, including void.
        seed: draw n depends only on it and n.
        temperature: T, above 0. Higher temperatures draw more evenly.

    Attributes:
        probabilities_C: P.

    Source: Hoyer et al. 2022, DAFormer, arXiv 2111.14887, equations 6 and 7, and the authors' code. Their code also
    draws up to ten crops of the sample until half of those pixels are inside. Here crops do not depend on labels.
    """

    def __init__(self, counts_RC: Records, pixels_R: Records, seed: int, temperature: float = RARE_TEMPERATURE) -> None:
        counts_C = counts_RC.sum(0)
        logits_C = np.where(counts_C > 0, (1 - counts_C / counts_C.sum()) / temperature, -np.inf)
        odds_C = np.exp(logits_C - logits_C.max())
        self.probabilities_C = odds_C / odds_C.sum()
        self._upto_C = np.cumsum(self.probabilities_C)
        self._seed = seed
        shown_CR = (counts_RC > RARE_SHARE * pixels_R[:, None]).T
        self._records = [
            np.flatnonzero(shown_R if shown_R.any() else any_R > 0)
            for shown_R, any_R in zip(shown_CR, counts_RC.T, strict=True)
        ]

    def visit(self, draw: int) -> tuple[int, int]:
        """Return the record of a draw, and a random number instead of an epoch, so any of its views may come."""
        # The third word keeps these generators apart from those of the augmentation.
        rng = np.random.default_rng((self._seed, draw, 2))
        place = np.searchsorted(self._upto_C, rng.random() * self._upto_C[-1], side="right")
        records = self._records[int(place)]
        return int(records[rng.integers(len(records))]), int(rng.integers(2**31))


def choose_labelled_share(share: float | None, labelled: Flags | None) -> float | None:
    """Return the share of a batch that has labels, or None if labels do not affect the draws.

    A few labels among many images would be drawn too rarely, and some batches would have none: a step's cross-entropy
    is the mean over its labels. (Mean teachers draw from two streams as well: 1703.01780.)

    Args:
        share: the user's choice. None is the samples' share, at least half.
        labelled: whether each sample has a label (N,) bool, or None if all have.
    """
    if labelled is None or not labelled.any() or labelled.all():
        return None
    own_share = float(labelled.mean())
    return share if share is not None else LABELLED_SHARE if own_share < LABELLED_SHARE else None


def epoch_order(seed: int, epoch: int, records: int, shard_records: int | None = None) -> Records:
    """Return a permutation of all records (R,) int64, by windows of shards unless `shard_records` is None."""
    rng = np.random.default_rng((seed, epoch))
    if shard_records is None:
        return rng.permutation(records)
    shards = rng.permutation(-(-records // shard_records))
    by_shard = (shards[:, None] * shard_records + np.arange(shard_records)).reshape(-1)
    order = by_shard[by_shard < records]  # the last shard may be shorter
    # Windows of as equal a length as there are shards for: a short one at the end would hardly be shuffled.
    windows = max(1, len(shards) // max(WINDOW_SHARDS, -(-WINDOW_RECORDS // shard_records)))
    lengths = np.minimum(shard_records, records - shards * shard_records)
    ends = [int(lengths[part].sum()) for part in np.array_split(np.arange(len(shards)), windows)]
    for window in np.split(order, np.cumsum(ends)[:-1]):
        rng.shuffle(window)  # a view: in place
    return order


def choose_shuffle(shuffle: str, dataset: DrawnDataset) -> str:
    """Resolve to `full` or `window`. Raises: RecipeError for an unknown order, or windows without shards."""
    if shuffle == "auto":
        return "window" if dataset.remote else "full"
    if shuffle not in SHUFFLES:
        raise RecipeError(
            f"Unknown --shuffle {shuffle!r}", fix=suggest(str(shuffle), SHUFFLES, f"Use one of {', '.join(SHUFFLES)}.")
        )
    if shuffle == "window" and dataset.shard_records is None:
        raise RecipeError(
            "Cannot use --shuffle window for a data folder: it has no shards",
            fix="Leave --shuffle out, or train from a cache.",
        )
    return shuffle


@dataclass(frozen=True)
class Steps:
    """Draw numbers of the steps [first, last) for one of several processes: step s takes draws s*B to (s+1)*B.

    Args:
        batch_size: B, the samples of a batch over all processes, a multiple of `world`.
        rank, world: this process takes draws [rank*B/world, (rank+1)*B/world) of each step.
    """

    first: int
    last: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world
        assert self.batch_size % self.world == 0  # by World.check_batch_size

    @property
    def rows(self) -> int:
        """The number of this process's draws in a step."""
        return self.batch_size // self.world

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[range]:
        for step in range(self.first, self.last):
            first = step * self.batch_size + self.rank * self.rows
            yield range(first, first + self.rows)
