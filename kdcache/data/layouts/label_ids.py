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

    Attributes:
        rule: the valid numbers in words, for messages. `{last}` stands for the last class id.
        fix: what the user can do about invalid numbers, for messages.
        table: uint8 (256,), the class id or 255 for every number. None if the numbers are class ids already.
        check: function of (numbers, path) for each label file. `numbers` is bool (256,): which numbers occur in the
            label. It raises DataError if they contradict the file's name. None checks nothing.
        colours: the class id of each colour in RGB labels, or None if RGB labels are errors.
    """

    rule: str
    fix: str
    table: Pixels | None = None
    check: Callable[[Seen, Path], None] | None = None
    colours: ColourCodes | None = None


NO_LABELS = LabelIds("The layout has no labels of segmentation.", "Use the folder layout for data with labels.")


def id_table(class_of_number: Mapping[int, int]) -> Pixels:
    """Return a read-only table, uint8 (256,), from the numbers in label files to class ids.

    Numbers that are not in `class_of_number` stay unchanged, so errors can name them. 255 always means void.

    Args:
        class_of_number: number -> class id, or 255 for void.
    """
    table = np.arange(256, dtype=np.uint8)
    table[list(class_of_number)] = list(class_of_number.values())
    classes = {index for index in class_of_number.values() if index != IGNORE_INDEX}
    # A number that is not listed must never pass for a class.
    assert not classes & (set(range(IGNORE_INDEX)) - set(class_of_number)), class_of_number
    table.flags.writeable = False
    return table


def numbers_in(label: Pixels) -> Seen:
    """Return whether each number from 0 to 255 occurs in a label, bool (256,). The label is uint8 of any shape."""
    occurs = np.zeros(256, np.bool_)
    occurs[label.reshape(-1)] = True
    return occurs
