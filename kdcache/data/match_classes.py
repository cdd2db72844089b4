"""The labels of a data set in the classes of a model trained on another one, matched by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kdcache.data.sample import ClassList, ClassMatch, FileDigest, Pixels, Source, Split
from kdcache.errors import MismatchError
from kdcache.tasks import IGNORE_INDEX, SEGMENTATION


@dataclass(frozen=True, slots=True, eq=False)
class Mapped(Source[Pixels]):
    """A label with its class ids mapped by a table, uint8 (256,). Its digest is the label's."""

    label: Source[Pixels]
    table: Pixels

    def read(self) -> Pixels:
        """Return the mapped label."""
        return self.table.take(self.label.read())

    def raw(self) -> Pixels:
        """Return the mapped label, not checked."""
        return self.table.take(self.label.raw())

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the label's digest."""
        return self.label.digest(of_file)


def classes_by_name(split: Split, classes: ClassList) -> Split:
    """Return a split with labels mapped by name to a model's classes. Classes without an equal name are void.

    Names are compared without case, unless a list has two that differ only in case. The split is unchanged if names are
    equal or one of the two has no classes.

    Raises: MismatchError if no name is shared.
    """
    if not len(classes) or split.classes.names in (classes.names, ()):
        return split
    own = split.classes.names
    class_of = {i: number for i, name in enumerate(own) if (number := _number_of(name, own, classes.names)) is not None}
    shared = tuple(name for number, name in enumerate(classes.names) if number in class_of.values())
    if not shared:
        raise MismatchError(
            f"No common class: {', '.join(own)} in {split.data}, split {split.split!r}, "
            f"and {', '.join(classes.names)} in the model",
            fix="Rename the classes in the data's classes.txt, or name the model's with --class-map.",
        )
    match = ClassMatch(
        shared,
        missing=tuple(name for name in classes.names if name not in shared),
        void=tuple(name for i, name in enumerate(own) if i not in class_of),
    )
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[list(class_of)] = list(class_of.values())
    samples = tuple(replace(sample, labels=_mapped(sample.labels, table)) for sample in split.samples)
    label_map = table if split.label_map is None else table.take(split.label_map)
    return Split(split.data, split.split, classes, samples, label_map, match)


def _mapped(labels: Mapping[str, Source[Any]], table: Pixels) -> Mapping[str, Source[Any]]:
    if SEGMENTATION not in labels:
        return labels
    return {**labels, SEGMENTATION: Mapped(labels[SEGMENTATION], table)}


def _number_of(name: str, own: tuple[str, ...], others: tuple[str, ...]) -> int | None:
    """Return the place of a name of `own` among others, in any case where both lists have it once, or None without."""
    if name in others:
        return others.index(name)
    lowered = [other.lower() for other in others]
    once = lowered.count(name.lower()) == 1 == [other.lower() for other in own].count(name.lower())
    return lowered.index(name.lower()) if once else None
