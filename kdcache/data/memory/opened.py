"""The splits that this process has made of data sets in memory, by their names in settings.

A recipe is text, so a data set in memory has a name there: `memory:NAME@DIGEST`. The name is valid as long as the split
is in use. Another process, or a later one, makes the split again from the same data set and gets the same name.
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
    """Return whether `data` names a data set in memory, as "memory:NAME@DIGEST" does."""
    return data.startswith(PREFIX)


def register(split: Split) -> None:
    """Make a split available to `find` in this process, until nothing else refers to the split."""
    _OPENED[split.data, split.split] = split


def find(data: str, split: str) -> Split:
    """Return a registered split of a data set in memory. Raises: DataError if it is not registered.

    Args:
        data: the data set's name, such as "memory:NAME@DIGEST".
        split: the split's name.
    """
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
    """Return the sorted names of the splits that are registered for a data set. An unknown one gives [].

    `data` is the data set's spec, such as "memory:NAME@DIGEST".
    """
    return sorted(split for name, split in list(_OPENED) if name == data)
