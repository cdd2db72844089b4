"""Several data sets as one, and one task's labels only, to judge a model of several tasks.

    city + depth:kitti-depth:/data/kitti     segmentation and whatever else `city` has, and the depth of KITTI

Parts are separated by ` + ` with spaces. The classes are those of the first part that has any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kdcache.data.sample import ClassList, Depth, DerivedSplit, FileDigest, Pixels, Split
from kdcache.errors import DataError
from kdcache.tasks import DEPTH, SEGMENTATION, TASKS

JOINT = " + "
"""What stands between the data sets of a joined one."""


def parts_of(data: str) -> list[str]:
    """Return the specs of the data sets that `data` joins, or `data` itself if it is one, or a folder of that name."""
    return [data] if Path(data).exists() else [part.strip() for part in data.split(JOINT)]


def task_of(data: str) -> tuple[str | None, str]:
    """Split `depth:DATA` or `segmentation:DATA` into the only task to use and the data set. None: all tasks."""
    task, colon, rest = data.partition(":")
    return (task, rest) if colon and task in TASKS else (None, data)


class OneTask(DerivedSplit):
    """The samples of a split with the labels of one task only."""

    def __init__(self, whole: Split, task: str) -> None:
        self.data, self.split, self.ids = f"{task}:{whole.data}", whole.split, whole.ids
        self.classes = whole.classes if task == SEGMENTATION else ClassList(())
        self.label_map = whole.label_map if task == SEGMENTATION else None
        self._whole, self._task = whole, task

    def _at(self, index: int) -> tuple[Split, int]:
        return self._whole, index

    def has_label(self, index: int, task: str = SEGMENTATION) -> bool:
        """Return whether the sample has a label of the kept task."""
        return task == self._task and self._whole.has_label(index, task)

    def raw_label(self, index: int) -> Pixels | None:
        """Return the unchecked segmentation label, if that is the kept task."""
        return self._whole.raw_label(index) if self._task == SEGMENTATION else None

    def raw_depth(self, index: int) -> Depth | None:
        """Return the unchecked depth label, if that is the kept task."""
        return self._whole.raw_depth(index) if self._task == DEPTH else None

    def content_digests(self, index: int, of_file: FileDigest | None = None) -> tuple[str | None, ...]:
        """Return the digests of the image and of the kept task's label."""
        image, label, *depth = self._whole.content_digests(index, of_file)
        return (image, label) if self._task == SEGMENTATION else (image, None, *depth)

    def _segmentation(self, index: int) -> Pixels | None:
        return self._whole.label(index) if self._task == SEGMENTATION else None

    def _depth(self, index: int) -> Depth | None:
        return self._whole.label(index, DEPTH) if self._task == DEPTH else None


class Joined(DerivedSplit):
    """The samples of several splits, in the order of their ids.

    If two parts share an id, every id is preceded by the number of its part, from 1: `2/000001`.

    Args:
        data: the spec as the user gave it.
        parts: at least one.
    Raises: DataError for parts with other classes than the first that has any.
    """

    def __init__(self, data: str, parts: Sequence[Split]) -> None:
        self.data, self.split = data, parts[0].split
        self.classes = _shared_classes(parts)
        places = [(part.ids[i], number, i) for number, part in enumerate(parts) for i in range(len(part))]
        if len({name for name, *_ in places}) < len(places):
            places = [(f"{number + 1}/{name}", number, i) for name, number, i in places]
        places.sort()
        self.ids = tuple(name for name, *_ in places)
        self._parts = tuple(parts)
        self._places = [place for _, *place in places]

    def digest(self) -> str:
        """Return the SHA-256 over the digests of the parts."""
        return hashlib.sha256(" ".join(part.digest() for part in self._parts).encode("ascii")).hexdigest()

    def _at(self, index: int) -> tuple[Split, int]:
        part, number = self._places[index]
        return self._parts[part], number


def _shared_classes(parts: Sequence[Split]) -> ClassList:
    """Return the classes of the first part that has any. Raises: DataError for a part that has others."""
    with_classes = [part for part in parts if len(part.classes)]
    if not with_classes:
        return ClassList(())
    first = with_classes[0]
    for part in with_classes[1:]:
        if part.classes.names != first.classes.names:
            raise DataError(
                f"Cannot join data sets with different classes: {', '.join(part.classes.names)} in {part.data}, "
                f"{', '.join(first.classes.names)} in {first.data}",
                fix=f"Use only its depth labels, as depth:{part.data}, or give both the same classes.txt.",
            )
    return first.classes
