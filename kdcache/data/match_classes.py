"""The labels of a data set in the classes of a model trained on another one, matched by name."""

from __future__ import annotations

import numpy as np

from kdcache.data.sample import ClassList, DerivedSplit, Pixels, Split
from kdcache.errors import MismatchError
from kdcache.tasks import IGNORE_INDEX


class ClassesByName(DerivedSplit):
    """The samples of a split with labels mapped by name to other classes. Classes without an equal name are void.

    Names are compared without case, unless a list has two that differ only in case.

    Args:
        classes: the target classes, such as a model's.

    Attributes:
        shared: names that both lists have, in the order of `classes`.
        missing: names of `classes` that the split does not have.
        void: names of the split's classes that `classes` do not have.

    Raises: MismatchError if no name is shared.
    """

    def __init__(self, whole: Split, classes: ClassList) -> None:
        own = whole.classes.names
        self.data, self.split, self.ids, self.classes = whole.data, whole.split, whole.ids, classes
        class_of = {
            i: number for i, name in enumerate(own) if (number := _number_of(name, own, classes.names)) is not None
        }
        self.shared = tuple(name for number, name in enumerate(classes.names) if number in class_of.values())
        self.missing = tuple(name for name in classes.names if name not in self.shared)
        self.void = tuple(name for i, name in enumerate(own) if i not in class_of)
        if not self.shared:
            raise MismatchError(
                f"No common class: {', '.join(own)} in {whole.data}, split {whole.split!r}, "
                f"and {', '.join(classes.names)} in the model",
                fix="Rename the classes in the data's classes.txt, or name the model's with --class-map.",
            )
        table = np.full(256, IGNORE_INDEX, np.uint8)
        table[list(class_of)] = list(class_of.values())
        self._whole, self._table = whole, table
        files = whole.label_map
        self.label_map = table if files is None else table.take(files)

    def _at(self, index: int) -> tuple[Split, int]:
        return self._whole, index

    def raw_label(self, index: int) -> Pixels | None:
        """Return the unchecked label, mapped to the target classes."""
        label = self._whole.raw_label(index)
        return None if label is None else self._table.take(label)

    def _segmentation(self, index: int) -> Pixels | None:
        label = self._whole.label(index)
        return None if label is None else self._table.take(label)


def classes_by_name(split: Split, classes: ClassList) -> Split:
    """Return a split in the classes of a model, unchanged if names are equal or one of the two has no classes.

    Raises: MismatchError if no name is shared.
    """
    if not len(classes) or split.classes.names in (classes.names, ()):
        return split
    return ClassesByName(split, classes)


def _number_of(name: str, own: tuple[str, ...], others: tuple[str, ...]) -> int | None:
    """Return the place of a name of `own` among others, in any case where both lists have it once, or None without."""
    if name in others:
        return others.index(name)
    lowered = [other.lower() for other in others]
    once = lowered.count(name.lower()) == 1 == [other.lower() for other in own].count(name.lower())
    return lowered.index(name.lower()) if once else None
