"""How a data set differs from what something was made from, with the names of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.data.contents import Contents
from kdcache.data.sample import Split
from kdcache.errors import MismatchError

UNRECORDED = "This cache does not record labels, so changed labels cannot be noticed."
_MOST_NAMED = 3


@dataclass(frozen=True)
class Changes:
    """The differences between a data set and an earlier state of it, which a cache or run recorded.

    The object is true if something changed.

    Attributes:
        classes: how the class list differs, in words, or ''.
        added: ids of samples that only the data set has now.
        removed: ids of samples that the data set no longer has.
        images: ids of samples whose image changed.
        labels: ids of samples whose segmentation label changed.
        depths: ids of samples whose depth label changed.
        same: ids of samples whose files changed, but whose pixels and labels did not.
        recorded: False if the cache or run did not record its labels, so changes of labels cannot be found.
    """

    classes: str = ""
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    depths: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    recorded: bool = True

    def __bool__(self) -> bool:
        return bool(self.classes or self.added or self.removed or self.images or self.labels or self.depths)

    def describe(self) -> str:
        """Describe the changes in one line, with examples of the affected samples. Return '' if nothing changed."""
        counted = [
            (self.labels, "label differs", "labels differ"),
            (self.images, "image differs", "images differ"),
            (self.depths, "depth label differs", "depth labels differ"),
            (self.added, "sample was added", "samples were added"),
            (self.removed, "sample was removed", "samples were removed"),
        ]
        parts = [self.classes] if self.classes else []
        parts += [
            f"{len(ids)} {many if len(ids) > 1 else single} ({named(ids)})" for ids, single, many in counted if ids
        ]
        return ", ".join(parts)

    def notes(self) -> list[str]:
        """Return sentences on how far the two data sets could be compared. The list is often empty.

        They say that the cache or run did not record its labels, or how many samples have a changed file with the same
        pixels and labels.
        """
        if not self.recorded:
            return [UNRECORDED]
        if self.same:
            return [f"{len(self.same)} samples have the same content in another file ({named(self.same)})"]
        return []


def name_changes(class_names: Sequence[str], ids: Sequence[str], split: Split) -> dict[str, Any]:
    """Return how the class names and sample ids of a split differ from earlier ones. It reads no files.

    Args:
        class_names: the earlier class names.
        ids: the earlier sample ids.
        split: the split as it is now.

    Returns: {"classes": difference in words, "added": tuple of ids, "removed": tuple of ids}, arguments for `Changes`.
    """
    before, now = set(ids), set(split.ids)
    return {
        "classes": class_changes(tuple(class_names), split.classes.names),
        "added": tuple(sample for sample in split.ids if sample not in before),
        "removed": tuple(sample for sample in ids if sample not in now),
    }


def class_changes(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    """Describe in words how the class names `now` differ from the earlier names `before`. Return '' without changes."""
    if before == now:
        return ""
    if sorted(before) == sorted(now):
        return f"the classes are in another order ({', '.join(now)}, before {', '.join(before)})"
    if len(before) == len(now):
        pairs = [f"{old!r} is now {new!r}" for old, new in zip(before, now, strict=True) if old != new]
        return "classes were renamed: " + ", ".join(pairs[:_MOST_NAMED])
    parts = [f"class {name!r} was added" for name in now if name not in before]
    parts += [f"class {name!r} was removed" for name in before if name not in now]
    return ", ".join(parts[:_MOST_NAMED])


def changed_data(what: object, changes: Changes, split: Split | None, fix: str) -> MismatchError:
    """Return the error for a data set that has changed.

    Args:
        what: the cache, run or folder that was made from the data set, for the message.
        changes: how the data set differs from the recorded state.
        split: the split as it is now, for the message, or None.
        fix: what the user can do.
    """
    where = "" if split is None else f" ({split.data}, split {split.split!r})"
    if split is not None and len(changes.added) == len(split.ids):
        return MismatchError(f"Not the data set that {what} was made from: no sample is the same{where}", fix=fix)
    return MismatchError(f"The data set has changed since {what} was made: {changes.describe()}{where}", fix=fix)


def named(ids: Sequence[str]) -> str:
    """Describe sample ids in words: the first three, and how many more there are."""
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    return ", ".join(map(repr, ids[:_MOST_NAMED])) + more


def digest_changes(before: Contents, now: Contents, classes: str = "") -> Changes:
    """Return how a data set's samples differ from the state that a cache or run recorded.

    It compares digests of images and labels, and reads no files.

    Args:
        before: the recorded digests.
        now: the digests of the data set as it is now.
        classes: how the class list differs, in words (see `class_changes`). It becomes `Changes.classes`.
    """
    at_now = {sample: number for number, sample in enumerate(now.ids)}
    at_before = {sample: number for number, sample in enumerate(before.ids)}
    shared = [sample for sample in before.ids if sample in at_now]
    olds, news = [at_before[sample] for sample in shared], [at_now[sample] for sample in shared]
    differ: dict[str, Any] = {
        name: tuple(
            shared[at] for at in np.flatnonzero((getattr(before, part)[olds] != getattr(now, part)[news]).any(1))
        )
        for name, part in (("images", "image"), ("labels", "label"), ("depths", "depth"))
    }
    return Changes(
        classes=classes,
        added=tuple(sample for sample in now.ids if sample not in at_before),
        removed=tuple(sample for sample in before.ids if sample not in at_now),
        **differ,
    )
