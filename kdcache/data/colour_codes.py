"""Labels with colours as pixels: from RGB to class ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcache.data.sample import Pixels
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

Colour = tuple[int, int, int]

BLACK: Colour = (0, 0, 0)
"""The colour of void where no class has it."""

MOST_SHOWN = 4


class ColourCodes:
    """A map from the colours of RGB labels to class ids.

    Unknown colours are errors and never map to the nearest colour.

    Args:
        id_of_colour: (r, g, b) -> class id, or 255 for void. Black is also void unless a class has it.
        where: the file that lists the colours, for messages.
    """

    def __init__(self, id_of_colour: Mapping[Colour, int], where: str) -> None:
        table = {BLACK: IGNORE_INDEX, **id_of_colour}
        codes = np.array([_code(colour) for colour in table], np.uint32)
        order = np.argsort(codes)
        self._codes, self._ids = codes[order], np.array(list(table.values()), np.uint8)[order]
        self._where = where

    def ids(self, rgb_HW3: Pixels, path: Path) -> Pixels:
        """Return the class ids, uint8 (H, W), of the RGB label `rgb_HW3`, uint8 (H, W, 3).

        Raises: DataError for colours without a class. It names the label's file `path`, the colours and their pixel
            counts.
        """
        wide = rgb_HW3.astype(np.uint32)
        codes_HW = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
        places = np.searchsorted(self._codes, codes_HW).clip(max=len(self._codes) - 1)
        strange = self._codes[places] != codes_HW
        if strange.any():
            raise DataError(
                f"Label {path} has colours that are not in {self._where}: {_describe(codes_HW[strange])}",
                fix=f"Correct the colours in {self._where}, or write `void: r g b` there. If colours are blurred at "
                "borders, save the label again as PNG, resized with nearest: not as JPEG.",
                rule="Black is void, unless a class has it.",
            )
        ids: Pixels = self._ids[places]
        return ids


def shared_colours(colours: Iterable[Colour]) -> list[Colour]:
    """Return the colours that occur more than once, sorted."""
    listed = list(colours)
    return sorted({colour for colour in listed if listed.count(colour) > 1})


def _code(colour: Colour) -> int:
    return (colour[0] << 16) | (colour[1] << 8) | colour[2]


def _describe(codes: npt.NDArray[np.uint32]) -> str:
    values, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_SHOWN]
    listed = [f"{c >> 16} {c >> 8 & 255} {c & 255} in {counts[i]} pixels" for i in order if (c := int(values[i])) >= 0]
    return ", ".join(listed) + (f", and {len(values) - MOST_SHOWN} more colours" if len(values) > MOST_SHOWN else "")
