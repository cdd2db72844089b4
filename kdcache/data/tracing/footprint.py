"""The part of an image that pixels show, updated by crops, resizes and flips."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kdcache.errors import DataError

Edges = tuple[float, float, float, float]


@dataclass(frozen=True)
class Footprint:
    """The part of the original image that a transformed image shows.

    Attributes:
        window: edges (y0, x0, y1, x1) in pixels of the original image. With padding, edges lie outside the image.
        flip: whether the transformed image is mirrored left to right.
        size: (height, width) of the transformed image in pixels.
    """

    window: Edges
    flip: bool
    size: tuple[int, int]

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Footprint:
        """Return the footprint of an untransformed image of this size, (height, width) in pixels."""
        return cls((0.0, 0.0, float(size[0]), float(size[1])), False, size)

    @property
    def array(self) -> npt.NDArray[np.float64]:
        """The window (y0, x0, y1, x1) as float64 (4,). A DataLoader collates such arrays to (B, 4)."""
        return np.array(self.window)

    def crop(self, top: int, left: int, height: int, width: int) -> Footprint:
        """Return the footprint after a crop of the transformed image.

        The position (`top`, `left`) and the size are in pixels of the transformed image. A crop outside the image pads
        it.
        """
        y0, x0, y1, x1 = self.window
        rows, columns = self.size
        if self.flip:
            left = columns - left - width
        down, across = (y1 - y0) / rows, (x1 - x0) / columns
        window = (y0 + top * down, x0 + left * across, y0 + (top + height) * down, x0 + (left + width) * across)
        return Footprint(window, self.flip, (height, width))

    def pad(self, left: int, top: int, right: int, bottom: int) -> Footprint:
        """Return the footprint after padding the transformed image by these numbers of pixels on its four sides."""
        return self.crop(-top, -left, self.size[0] + top + bottom, self.size[1] + left + right)

    def resize(self, size: tuple[int, int]) -> Footprint:
        """Return the footprint after a resize to (height, width) pixels."""
        return replace(self, size=size)

    def mirror(self) -> Footprint:
        """Return the footprint after mirroring left to right."""
        return replace(self, flip=not self.flip)


def no_window(transform: str) -> DataError:
    """Return the DataError for a transform that moves pixels other than by cropping, resizing, padding or flipping.

    `transform` is its name, for the message.
    """
    return DataError(
        f"Cannot trace {transform}: it moves pixels in other ways than crops, resizes, padding and horizontal flips",
        fix="Leave it out of what is traced. Changes of colour may stay.",
    )
