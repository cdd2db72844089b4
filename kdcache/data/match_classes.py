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
    """A source of a label with its class ids mapped by a table.

    Attributes:
        label: the source of the original label.
        table: uint8 (256,), the new class id of each id.
    """

    label: Source[Pixels]
    table: Pixels

    def read(self) -> Pixels:
        """Return the label with mapped class ids, uint8 (H, W). Raises: DataError like the original label."""
        return self.table.take(self.label.read())

    def raw(self) -> Pixels:
        """Return the label with mapped class ids, uint8 (H, W). Faulty sizes and ids raise no error."""
        return self.table.take(self.label.raw())

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the SHA-256 (hex) of the original label, before `table` maps its ids.

        `of_file` is a function that returns the SHA-256 of a file. None computes it from the file's bytes.
        """
        return self.label.digest(of_file)


def classes_by_name(split: Split, classes: ClassList) -> Split:
    """Return a split whose labels have a model's class ids.

    Classes are matched by name, and unmatched classes become void.

    Case does not matter, unless a list has two names that differ only in case. If the names are equal, or one list is
    empty, the split is returned unchanged.

    Args:
        split: the split to map.
        classes: the model's classes.

    Raises: MismatchError if no name matches.
    """
    if not len(classes) or split.classes.names in (classes.names, ()):
        return split
    source_names = split.classes.names
    class_of = {
        i: number
        for i, name in enumerate(source_names)
        if (number := _number_of(name, source_names, classes.names)) is not None
    }
    shared = tuple(name for number, name in enumerate(classes.names) if number in class_of.values())
    if not shared:
        raise MismatchError(
            f"No common class: {', '.join(source_names)} in {split.data}, split {split.split!r}, "
            f"and {', '.join(classes.names)} in the model",
            fix="Rename the classes in the data's classes.txt, or name the model's with --class-map.",
        )
    match = ClassMatch(
        shared,
        missing=tuple(name for name in classes.names if name not in shared),
        void=tuple(name for i, name in enumerate(source_names) if i not in class_of),
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


def _number_of(name: str, names: tuple[str, ...], others: tuple[str, ...]) -> int | None:
    """Return the position of a name in `others`, or None.

    If the name differs only in case and both lists have it once, it also matches.
    """
    if name in others:
        return others.index(name)
    lowered = [candidate.lower() for candidate in others]
    unique = lowered.count(name.lower()) == 1 == [candidate.lower() for candidate in names].count(name.lower())
    return lowered.index(name.lower()) if unique else None
