"""A part of a training set: fewer samples, fewer labels, or without a fold that other runs are judged on.

Samples are ranked by a hash of their ids and the first ones are taken. So a larger part holds every smaller one, and
labelled samples are among the used ones. Labels can also be listed by the ids of their samples.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdcache.data import Fold, id_hash
from kdcache.errors import RecipeError
from kdcache.files import read_ids
from kdcache.settings.parse import count_of


class Selection(NamedTuple):
    """The samples that a training uses.

    Attributes:
        samples: numbers of the used samples, in order.
        labelled: numbers of the used samples whose labels are used.
    """

    samples: Sequence[int]
    labelled: Collection[int]


@dataclass(frozen=True)
class Part:
    """The settings that restrict a training to a part of its samples and labels.

    Attributes:
        samples: number of samples to use, or their share of all available samples if below 1. None is all.
        labels: number of samples whose labels are used, or their share of the used samples if below 1. 0 uses no
            label, None all.
        labels_from: a file with the ids of the samples whose labels are used, one id a line. None uses `labels`.
        without: the fold that is left out, or None.
        held_out: the share of the samples that is held out for validation, in 0..1. None holds out nothing.
        judging: True takes the held-out samples instead of the others.
        views: number of views of a sample to replay. None is all.
    """

    samples: float | None = None
    labels: float | None = None
    labels_from: Path | None = None
    without: Fold | None = None
    held_out: float | None = None
    judging: bool = False
    views: int | None = None

    @property
    def whole(self) -> bool:
        """True if all samples and labels are used, also if `views` limits the views."""
        parts = (self.samples, self.labels, self.labels_from, self.without, self.held_out)
        return all(part is None for part in parts)

    def choose(self, ids: Sequence[str]) -> Selection:
        """Return the numbers of the samples in this part, and the numbers of the samples whose labels are used.

        `ids` are the ids of all samples of the cache or data set, in order. A number is a position in `ids`.

        Raises: RecipeError if no sample is left, if the fold does not exist, or if the file in the attribute
            `labels_from` is invalid.
        """
        numbers = range(len(ids))
        if self.whole:
            return Selection(numbers, numbers)
        candidates = numbers if self.without is None else np.flatnonzero(~self.without.holds(ids)).tolist()
        if self.held_out is not None:
            flags = held_out([ids[number] for number in candidates], self.held_out)
            candidates = [number for number, flag in zip(candidates, flags, strict=True) if flag == self.judging]
            if not candidates:
                raise RecipeError(
                    f"No sample is left to train on: --val-share {self.held_out:g} holds out all {len(flags)} samples",
                    fix="Give a smaller share, or leave --val-share out.",
                )
        ranked = sorted(candidates, key=lambda number: (id_hash(ids[number]), ids[number]))
        used = ranked[: count_of("--limit-samples", self.samples, len(ranked))]
        labelled = used[: count_of("--limit-labels", self.labels, len(used))] if self.labels != 0 else []
        if self.labels_from is not None:
            listed = read_ids(self.labels_from, ids)
            labelled = [number for number in used if ids[number] in listed]
        return Selection(sorted(used), frozenset(labelled))


def held_out(ids: Sequence[str], share: float) -> list[bool]:
    """Return for each sample whether it is held out for validation, as a list of bools.

    The samples with the largest hashes of their ids are held out, at least one. `--limit-samples` uses the samples with
    the smallest hashes, so both settings work together.

    Args:
        ids: the ids of the samples.
        share: the share to hold out, in 0..1.
    """
    hashes = [id_hash(sample) for sample in ids]
    least = min((1 - share) * 2**64, max(hashes, default=0))
    return [number >= least for number in hashes]
