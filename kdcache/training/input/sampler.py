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
    """An order of records over all epochs. Each epoch is another permutation of all records.

    Args:
        records: number of records.
        seed: seed of the permutations.
        shard_records: number of records in a shard, to shuffle within a few shards. None shuffles all records at once.
    Memory: two epochs, 16 bytes per record, because threads that draw ahead may be in the next epoch.
    """

    def __init__(self, records: int, seed: int, shard_records: int | None = None) -> None:
        self._records = records
        self._seed = seed
        self._shard_records = shard_records
        self._orders: tuple[tuple[int, Records], ...] = ()

    def visit(self, draw: int) -> tuple[int, int]:
        """Return the number of the record that a draw takes, and the epoch of this draw.

        Many threads may call it at once.
        """
        epoch, position = divmod(draw, self._records)
        for stored_epoch, order in self._orders:  # replaced as one, never changed
            if stored_epoch == epoch:
                return int(order[position]), epoch
        order = epoch_order(self._seed, epoch, self._records, self._shard_records)
        self._orders = ((epoch, order), *self._orders[:1])
        return int(order[position]), epoch


class Interleaved:
    """An order that mixes labelled and unlabelled records evenly, so every batch has the same share of labelled ones.

    Args:
        labelled: (R,) bool, True for records with a label. There must be labelled and unlabelled records.
        share: share of the draws that take a labelled record, in 0..1, rounded to a fraction with a denominator up to
            1000.
        seed: seed of the permutations.
        shard_records: number of records in a shard, to shuffle within a few shards. None shuffles all at once.
    """

    def __init__(self, labelled: Flags, share: float, seed: int, shard_records: int | None = None) -> None:
        self._share = Fraction(share).limit_denominator(1000)
        self._records = np.flatnonzero(labelled), np.flatnonzero(~labelled)
        self._orders = tuple(Order(len(records), seed, shard_records) for records in self._records)

    def visit(self, draw: int) -> tuple[int, int]:
        """Return the number of the record that draw number `draw` takes, and the epoch of this draw.

        Records with a label, and records without one, have separate epochs. A new epoch of one kind begins when all its
        records were taken.
        """
        parts, of = self._share.numerator, self._share.denominator
        before = draw * parts // of  # draws of labelled records so far
        stream, stream_draw = (0, before) if (draw + 1) * parts // of > before else (1, draw - before)
        position, epoch = self._orders[stream].visit(stream_draw)
        return int(self._records[stream][position]), epoch


class Rare:
    """An order that prefers rare classes. Each draw takes a class, then one of the records that show the class.

    Class c has the probability softmax((1 - f_c) / T), where f_c is its share among all labelled pixels. All records
    that show the class are equally probable. A record shows a class that has more than RARE_SHARE (0.15 %) of the
    record's pixels. If no record has so many, any pixel is enough. Classes without any label are never drawn.

    Args:
        counts_RC: number of pixels of each class in each record.
        pixels_R: number of all pixels of each record, including void.
        seed: draw n depends only on the seed and n.
        temperature: T, above 0. Higher temperatures draw classes more evenly.

    Attributes:
        probabilities_C: the probability of each class.

    Source: Hoyer et al. 2022, DAFormer, arXiv 2111.14887, equations 6 and 7, and the authors' code. Their code also
        draws up to ten crops of the sample until one shows half of the class's pixels. Here crops do not depend on
        labels.
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
        """Return the number of the record that a draw takes, and a random number from 0 to 2^31 - 1.

        The random number chooses one of the sample's stored views. In other orders, the epoch of the draw chooses it.
        """
        # The third word keeps these generators apart from those of the augmentation.
        rng = np.random.default_rng((self._seed, draw, 2))
        place = np.searchsorted(self._upto_C, rng.random() * self._upto_C[-1], side="right")
        records = self._records[int(place)]
        return int(records[rng.integers(len(records))]), int(rng.integers(2**31))


def choose_labelled_share(share: float | None, labelled: Flags | None) -> float | None:
    """Return the share of every batch that shall have labels, or None to draw all samples with equal probability.

    A fixed share keeps a batch from having no label at all. The result is None if all samples have a label or none has.

    Args:
        share: the user's choice, in 0..1. None chooses half if fewer than half of the samples have a label, else no
            share.
        labelled: (N,) bool, True for samples with a label. None if all have one.
    """
    if labelled is None or not labelled.any() or labelled.all():
        return None
    own_share = float(labelled.mean())
    return share if share is not None else LABELLED_SHARE if own_share < LABELLED_SHARE else None


def epoch_order(seed: int, epoch: int, records: int, shard_records: int | None = None) -> Records:
    """Return a permutation (R,) int64 of all R records, for one epoch.

    Args:
        seed: seed of the order, the same for all epochs.
        epoch: number of the epoch.
        records: number of records, R.
        shard_records: number of records in a shard, to shuffle within a few shards. None shuffles all records at once.
    """
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
    """Return `shuffle`, with `auto` replaced by `window` for a remote cache and by `full` otherwise.

    Raises: RecipeError for an unknown order, and for `window` with a data folder, which has no shards.
    """
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
    """The draw numbers of the steps from `first` to before `last`, for one of several processes.

    Step s of all processes has the draws s*B to (s+1)*B - 1. Iterating yields a range of draw numbers for each step.

    Args:
        first: the first step.
        last: the step after the last one.
        batch_size: B, the samples of a batch of all processes, a multiple of `world`.
        rank: which of the `world` equal parts of each step this process takes.
        world: the number of processes.
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
