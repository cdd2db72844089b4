"""Convert the numbers in a layout's label files to class ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.data.colour_codes import ColourCodes
from kdcache.data.sample import Pixels
from kdcache.tasks import IGNORE_INDEX

Seen = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class LabelIds:
    """The meaning of the numbers in label files.

    Args:
        rule: the possible numbers, for messages. `{last}` is the last class id.
        fix: what to do about other numbers.
        table: uint8 (256,), the class id of every number, or None if they are class ids already.
        colours: class ids of the colours in RGB labels. None fails on such labels.
        check: raises DataError if the numbers that occur, bool (256,), contradict the file's name. It also gets the
            path.
    """

    rule: str
    fix: str
    table: Pixels | None = None
    check: Callable[[Seen, Path], None] | None = None
    colours: ColourCodes | None = None


NO_LABELS = LabelIds("The layout has no labels of segmentation.", "Use the folder layout for data with labels.")


def id_table(class_of_number: Mapping[int, int]) -> Pixels:
    """Return a read-only table of 256 uint8 entries. `class_of_number` maps numbers to class ids or void.

    Other numbers stay unchanged, so errors show the file's numbers. 255 is void in any file.
    """
    table = np.arange(256, dtype=np.uint8)
    table[list(class_of_number)] = list(class_of_number.values())
    classes = {index for index in class_of_number.values() if index != IGNORE_INDEX}
    # A number that is not listed must never pass for a class.
    assert not classes & (set(range(IGNORE_INDEX)) - set(class_of_number)), class_of_number
    table.flags.writeable = False
    return table


def numbers_in(label: Pixels) -> Seen:
    """Return whether each of the 256 numbers occurs in a label (uint8, any shape), bool (256,)."""
    seen = np.zeros(256, np.bool_)
    seen[label.reshape(-1)] = True
    return seen
