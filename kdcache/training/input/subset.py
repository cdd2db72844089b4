"""A part of a training set: fewer samples, fewer labels, or without a fold that others are judged on.

Samples are ranked by a hash of their ids and the first ones are taken, so a larger part holds every smaller one, and
the labelled ones are among those that are used.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kdcache.data import Fold, id_hash
from kdcache.errors import RecipeError


class Selection(NamedTuple):
    """Numbers of samples, in their order, and the numbers of the samples whose labels are used."""

    samples: Sequence[int]
    labelled: Collection[int]


@dataclass(frozen=True)
class Part:
    """The part of a training set that is used.

    Attributes:
        samples, labels: a number, or below 1 a share; None is all. Labels may be 0, none.
        without: the fold that is left out.
        views: replays the first `views` views of a store; None is all.
    """

    samples: float | None = None
    labels: float | None = None
    without: Fold | None = None
    views: int | None = None

    @property
    def whole(self) -> bool:
        """Whether all samples and labels are used, a choice that takes no ids."""
        return self.samples is None and self.labels is None and self.without is None

    def choose(self, ids: Sequence[str]) -> Selection:
        """Select samples by their ids. Raises: RecipeError when nothing is left, or for folds that do not exist."""
        numbers = range(len(ids))
        if self.whole:
            return Selection(numbers, numbers)
        seen = numbers if self.without is None else np.flatnonzero(~self.without.holds(ids)).tolist()
        ranked = sorted(seen, key=lambda number: (id_hash(ids[number]), ids[number]))
        used = ranked[: _count("--limit-samples", self.samples, len(ranked))]
        labelled = used[: _count("--limit-labels", self.labels, len(used))] if self.labels != 0 else []
        return Selection(sorted(used), frozenset(labelled))


def _count(flag: str, limit: float | None, available: int) -> int:
    if limit is None:
        return available
    count = round(limit * available) if limit < 1 else int(limit)
    if not 1 <= count <= available:
        raise RecipeError(
            f"{flag} leaves at least one sample, and no more than there are",
            received=f"{limit:g} of {available} samples",
            remedy="give a number of samples, or a share between 0 and 1",
        )
    return count
