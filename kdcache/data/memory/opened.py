"""The splits that this process has made of data sets in memory, by the name that stands for them in settings.

A recipe is text, so a data set in memory has a name there: `memory:NAME@DIGEST`. The name is good as long as the split
is in use; another process, or a later one, makes the split again from the same data set and gets the same name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from kdcache.errors import DataError

if TYPE_CHECKING:
    from kdcache.data.sample import Split

PREFIX = "memory:"
_OPENED: WeakValueDictionary[tuple[str, str], Split] = WeakValueDictionary()


def is_memory(data: str) -> bool:
    """Whether `data` names a data set in memory."""
    return data.startswith(PREFIX)


def register(split: Split) -> None:
    """Let `find` know a split by its `data` and its name, as long as somebody else holds it."""
    _OPENED[split.data, split.split] = split


def find(data: str, split: str) -> Split:
    """The split of that name. Raises: DataError for one that is not there."""
    if (known := _OPENED.get((data, split))) is not None:
        return known
    splits = names(data)
    if splits:
        raise DataError(
            f"Unknown split {split!r} of {data}, which has {', '.join(splits)}",
            fix=f"Name that split, or make another one: kdcache.from_dataset(..., split={split!r})",
        )
    raise DataError(
        f"Data set not in memory: {data}, split {split!r} (this program holds "
        f"{', '.join(sorted({d for d, _ in _OPENED})) or 'none'})",
        fix="Make it again with kdcache.from_dataset(...) and keep it. Or name the data, also a folder, with --data "
        "(in Python data=).",
    )


def names(data: str) -> list[str]:
    """Names of the splits that are held under a name, sorted."""
    return sorted(split for own, split in list(_OPENED) if own == data)
