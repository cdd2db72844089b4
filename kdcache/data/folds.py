"""Folds of a split: equal parts, each predicted by a teacher that has not seen it (cross-fitting).

A teacher is almost always right on the labels that it was trained on, with a confidence that it has nowhere else. Its
targets are more honest on labels that it has not seen: K teachers, each trained without one of K folds, predict that
fold. Folds by id scatter the frames of a video, so each frame's teacher has seen its neighbours. Folds by sequence keep
them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.data.prefetch import prefetch
from kdcache.data.sample import Pixels, Split
from kdcache.data.sequences import folds_of
from kdcache.errors import RecipeError
from kdcache.tasks import SEGMENTATION


class Fold(NamedTuple):
    """One fold of a split.

    Attributes:
        number: the fold's number, from 0 to `folds` - 1.
        folds: the number of folds of the split.
        by: a regular expression whose match in an id names a sequence that stays in one fold, or None.
    """

    number: int
    folds: int
    by: str | None = None

    def __str__(self) -> str:
        return f"{self.number}/{self.folds}" + ("" if self.by is None else f" by {self.by}")

    def holds(self, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return whether each sample is in this fold, bool (N,). `ids` are all ids of the split.

        Raises: RecipeError unless there are 2 to 255 folds, with a sample or sequence for each. Also for an invalid
            pattern.
        """
        held: npt.NDArray[np.bool_] = folds_of(ids, self.folds, self.by) == self.number
        return held


def parse_fold(text: str, by: str | None = None, flag: str = "--fold") -> Fold:
    """Parse a fold: "1/4" is fold 1 of 4, counted from 0.

    Args:
        text: the fold.
        by: a regular expression whose match in an id names a sequence that stays in one fold, or None.
        flag: the command-line flag, for error messages.

    Raises: RecipeError for another form.
    """
    first, _, second = text.partition("/")
    numbers = first.isdecimal() and second.isdecimal()
    if not numbers or not int(first) < int(second) or int(second) < 2:
        last = f", beyond the last one, {int(second) - 1}/{second}" if numbers and int(second) > 1 else ""
        raise RecipeError(
            f"Invalid value of {flag}: {text!r}{last}",
            fix=f"Give the fold, counted from 0, and the number of folds, from 2: {flag} 0/4",
        )
    return Fold(int(first), int(second), by)


def fold_alone(split: Split, number: int, folds: int, by: str | None = None) -> Split:
    """Return a split with only the samples of one fold, to evaluate a model that was trained without that fold.

    Args:
        split: the whole split.
        number: the fold, counted from 0.
        folds: the number of folds.
        by: a regular expression whose match in an id names a sequence that stays in one fold. None divides samples.

    Raises: RecipeError unless there are 2 to 255 folds and a sample or sequence for each, or if `by` is invalid.
    """
    return subset(split, np.flatnonzero(split.folds(folds, by) == number).tolist())


def check_folds(split: Split, folds: int, by: str | None = None) -> None:
    """Check that every class has labelled pixels in at least two folds.

    Otherwise, a teacher that is trained without one fold may never see a class. The check reads every label.

    Args:
        split: the split.
        folds: the number of folds.
        by: a regular expression whose match in an id names a sequence that stays in one fold, or None.

    Raises:
        RecipeError: a class has pixels in one fold only, or the split cannot have these folds.
        DataError: a label cannot be read.
    """
    fold_of = split.folds(folds, by)
    labelled = split.labelled(SEGMENTATION)
    labels = prefetch(split.label, labelled, threads=2, ahead=8)
    check_fold_labels([zip(fold_of[labelled].tolist(), labels, strict=True)], folds, split.classes.names)


def check_fold_labels(
    rounds: Iterable[Iterable[tuple[int, Pixels | None]]], folds: int, class_names: Sequence[str]
) -> None:
    """Check that every class has labelled pixels in at least two folds. The caller reads the labels.

    Args:
        rounds: the labels in several rounds, each an iterable of (fold number, label). A label is uint8 (H, W) or None.
            The check ends early after a round if every class found so far occurs in at least two folds.
        folds: the number of folds.
        class_names: the classes in the order of their ids.

    Raises: RecipeError if a class has pixels in one fold only.
    """
    counts, faults = np.zeros((folds, 256), np.int64), list[str]()
    for labels in rounds:
        for fold, label in labels:
            if label is not None:
                counts[fold] += np.bincount(label.reshape(-1), minlength=256)
        of_class = counts[:, : len(class_names)]
        in_one_fold = np.argwhere((of_class == of_class.sum(0)) & (of_class > 0)).tolist()
        faults = [f"{class_names[c]} is only in fold {fold}" for fold, c in in_one_fold]
        if not faults:
            return
    if faults:
        raise RecipeError(
            f"A teacher trained without a fold would miss a class: {', '.join(faults[:5])} of {folds}"
            + (f", and {len(faults) - 5} more" if len(faults) > 5 else ""),
            fix="Use another number of folds or another --folds-by, or label more images of the class.",
        )


def subset(split: Split, numbers: Iterable[int]) -> Split:
    """Return a split with the samples at the positions `numbers`, in that order.

    The digest and folds of the new split depend only on these samples. Use `excerpt` to keep the whole split's folds.
    """
    samples = tuple(split.samples[number] for number in numbers)
    return Split(split.data, split.split, split.classes, samples, split.label_map, split.match)


def excerpt(split: Split, numbers: Iterable[int]) -> Split:
    """Return a split with the samples at the positions `numbers`, in that order.

    Each sample keeps the fold that it has in the whole split.
    """
    return replace(subset(split, numbers), fold_ids=split.fold_ids or split.ids)
