"""Several data sets as one, and one task's labels only, to judge a model of several tasks.

    city + depth:kitti-depth:/data/kitti     segmentation and whatever else `city` has, and the depth of KITTI

Parts are separated by ` + ` with spaces. The classes are those of the first part that has any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdcache.data.sample import ClassList, Split
from kdcache.errors import DataError
from kdcache.tasks import SEGMENTATION, TASKS

JOINT = " + "
"""What stands between the data sets of a joined one."""


def parts_of(data: str) -> list[str]:
    """Split the name "DATA + DATA" into the names of its data sets. A single data set gives a list of one.

    If the whole name is the path of an existing folder, it is a single data set.
    """
    return [data] if Path(data).exists() else [part.strip() for part in data.split(JOINT)]


def task_of(data: str) -> tuple[str | None, str]:
    """Split "depth:DATA" or "segmentation:DATA" into the task and DATA. Without such a prefix, return (None, data)."""
    task, colon, rest = data.partition(":")
    return (task, rest) if colon and task in TASKS else (None, data)


def one_task(split: Split, task: str) -> Split:
    """Return the split with the same samples, but only the labels of one task, "segmentation" or "depth"."""
    samples = tuple(
        replace(sample, labels={name: source for name, source in sample.labels.items() if name == task})
        for sample in split.samples
    )
    if task == SEGMENTATION:
        return Split(f"{task}:{split.data}", split.split, split.classes, samples, split.label_map)
    return Split(f"{task}:{split.data}", split.split, ClassList(()), samples)


def join(data: str, parts: Sequence[Split]) -> Split:
    """Return one split with the samples of several splits, sorted by id.

    If two parts have a sample with the same id, all ids get a prefix, the part's number from 1: `2/000001`.

    Args:
        data: the spec as the user gave it.
        parts: at least one split.
    Raises: DataError if two parts have different classes.
    """
    classes = _shared_classes(parts)
    samples = [sample for part in parts for sample in part.samples]
    if len({sample.id for sample in samples}) < len(samples):
        samples = [
            replace(sample, id=f"{number}/{sample.id}")
            for number, part in enumerate(parts, 1)
            for sample in part.samples
        ]
    samples.sort(key=lambda sample: sample.id)
    digest = hashlib.sha256(" ".join(part.digest() for part in parts).encode("ascii")).hexdigest()
    return Split(data, parts[0].split, classes, tuple(samples), known_digest=digest)


def _shared_classes(parts: Sequence[Split]) -> ClassList:
    """Return the classes of the parts that have any. Raises: DataError if two parts have different classes."""
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
