"""A part of a training set: fewer samples, fewer labels, or without a fold that others are judged on.

Samples are ranked by a hash of their ids and the first ones are taken, so a larger part holds every smaller one, and
the labelled ones are among those that are used.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kdcache.data import folds_of, id_hash
from kdcache.errors import RecipeError


class Chosen(NamedTuple):
    """Numbers of samples, in their order, and those of them whose labels are used."""

    samples: Sequence[int]
    labelled: Collection[int]


@dataclass(frozen=True)
class Part:
    """What is used of a training set.

    Attributes:
        samples, labels: how many: a number, or below 1 a share; None is all.
        without: (i, K) leaves out fold i of K.
        views: of a store's views for replay, the first so many; None is all.
    """

    samples: float | None = None
    labels: float | None = None
    without: tuple[int, int] | None = None
    views: int | None = None

    @property
    def whole(self) -> bool:
        """Whether all samples and labels are used, for which nobody needs to know ids."""
        return self.samples is None and self.labels is None and self.without is None

    def choose(self, ids: Sequence[str]) -> Chosen:
        """Raises: RecipeError when nothing is left, or for folds that cannot be."""
        there = range(len(ids))
        if self.whole:
            return Chosen(there, there)
        if self.without is not None:
            fold, folds = self.without
            there_of = folds_of(ids, folds)
            ranked = [number for number in there if there_of[number] != fold]
        else:
            ranked = list(there)
        ranked.sort(key=lambda number: (id_hash(ids[number]), ids[number]))
        used = ranked[: _count("--limit-samples", self.samples, len(ranked))]
        labelled = used[: _count("--limit-labels", self.labels, len(used))]
        return Chosen(sorted(used), frozenset(labelled))


def _count(flag: str, limit: float | None, there: int) -> int:
    if limit is None:
        return there
    count = round(limit * there) if limit < 1 else int(limit)
    if not 1 <= count <= there:
        raise RecipeError(
            f"{flag} leaves at least one sample, and no more than there are",
            received=f"{limit:g} of {there} samples",
            remedy="give a number of samples, or a share between 0 and 1",
        )
    return count
