"""Rendering: the one way from a source image and a window to the pixels that a network sees.

The teacher pass and the trainer both call `render`, so a stored record can be rendered again and compared by
`pixel_checksum`. Output pixel j of W_out samples the source at `p = x0 + (j + 0.5) * (x1 - x0) / W_out` (edge
coordinates: pixel i covers [i, i + 1)), and rows in the same way.

- Image: Pillow's antialiased bilinear filter (a triangle, widened when shrinking), by `resample`: its bytes in an
  eighth of its time. It releases the GIL and accumulates in fixed point (no float order to drift).
- Label: the pixel that contains p, by index arithmetic in float64.
- A window may reach beyond the image. Pixels whose p lies outside are grey with label 255. The others keep exactly the
  p above, and their filter counts only pixels of the image, as at any border.

Two other treatments of the border were tried. Replicating the edge moves border pixels by ten levels between a window
that ends at the border and one slightly beyond it. Transparent margins (RGBA) cost twice the time and two levels of
rounding.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.data.sample import Pixels
from kdcache.tasks import IGNORE_INDEX

OUTSIDE_RGB = (124, 116, 104)
"""What lies beyond the image: the ImageNet mean, close to zero after normalisation."""

MOST_PIXELS = 2**24
"""Longest side of a window: beyond, float32 (Pillow's boxes, and so ours) skips whole pixels."""

_NO_LABEL = np.empty((0, 0), np.uint8)


@dataclass(frozen=True)
class Window:
    """A rectangle in pixels: rows y0 to y1 and columns x0 to x1. The whole image is (0, 0, H, W).

    Edges may be fractions, and may lie beyond the image. Raises: ValueError unless all are finite, y0 < y1 and x0 < x1.
    """

    y0: float
    x0: float
    y1: float
    x1: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.as_tuple())) or self.y1 <= self.y0 or self.x1 <= self.x0:
            raise ValueError(f"a window is finite with y0 < y1 and x0 < x1, got {self.as_tuple()}")

    @classmethod
    def full(cls, height: float, width: float) -> Window:
        """Return the window of a whole image with this height and width in pixels."""
        return cls(0.0, 0.0, float(height), float(width))

    def scaled(self, fy: float, fx: float) -> Window:
        """Return the window in an image that is resized by `fy` vertically and by `fx` horizontally."""
        return Window(self.y0 * fy, self.x0 * fx, self.y1 * fy, self.x1 * fx)

    def moved(self, y: float, x: float) -> Window:
        """Return the window moved down by `y` pixels and right by `x` pixels."""
        return Window(self.y0 + y, self.x0 + x, self.y1 + y, self.x1 + x)

    def as_tuple(self) -> tuple[float, float, float, float]:
        """Return (y0, x0, y1, x1) in pixels."""
        return self.y0, self.x0, self.y1, self.x1


def render(
    image_HW3: Pixels,
    label_HW: Pixels | None,
    window: Window,
    *,
    flip: bool,
    size: tuple[int, int],
    out: tuple[Pixels, Pixels] | None = None,
) -> tuple[Pixels, Pixels]:
    """Cut a window out of an image and its label, resize both, and then flip them.

    The image is resized with an antialiased bilinear filter, and the label with nearest.

    Args:
        image_HW3: RGB image, uint8 (H, W, 3).
        label_HW: class ids, uint8 (H, W). None gives a label that is all void.
        window: the part to show, in source pixels. Beyond the image, the result is grey and void.
        flip: whether to mirror left and right after the resize (column j becomes W-1-j).
        size: (height, width) of the result.
        out: contiguous memory for the image and the label, of `size`. None allocates it.
    Returns: the image, uint8 (height, width, 3), and the label, uint8 (height, width).
    Raises: ValueError for arrays that do not fit, or a window longer than 2**24 pixels.
    """
    _check(image_HW3, label_HW, window, size)
    from kdcache.data.rendering.resample import render_window  # which imports numba

    height, width = image_HW3.shape[:2]
    y0, x0, y1, x1 = map(float, window.as_tuple())
    pixels, label = (np.empty((*size, 3), np.uint8), np.empty(size, np.uint8)) if out is None else out
    if not flip and (height, width) == tuple(size) and (y0, x0, y1, x1) == (0.0, 0.0, height, width):
        pixels[...] = image_HW3
        label[...] = IGNORE_INDEX if label_HW is None else label_HW
        return pixels, label
    render_window(
        np.ascontiguousarray(image_HW3).reshape(height, -1),
        _NO_LABEL if label_HW is None else np.ascontiguousarray(label_HW),
        (y0, x0, y1, x1),
        bool(flip),
        OUTSIDE_RGB,
        pixels.reshape(size[0], -1),
        label,
    )
    return pixels, label


def pixel_checksum(pixels: npt.NDArray[np.generic]) -> int:
    """Return an unsigned 64-bit BLAKE2b hash of an image's shape and bytes.

    `pixels` is the image, uint8 (H, W, 3), of any strides.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, pixels.shape))).encode("ascii"), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(digest.digest(), "little")


def _check(image_HW3: Pixels, label_HW: Pixels | None, window: Window, size: tuple[int, int]) -> None:
    if image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or image_HW3.dtype != np.uint8 or 0 in image_HW3.shape:
        raise ValueError(f"an image is uint8 (H, W, 3), got {image_HW3.dtype} {image_HW3.shape}")
    if label_HW is not None and (label_HW.shape != image_HW3.shape[:2] or label_HW.dtype != np.uint8):
        raise ValueError(f"a label is uint8 {image_HW3.shape[:2]}, got {label_HW.dtype} {label_HW.shape}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is (height, width), each at least 1, got {size}")
    if max(window.y1 - window.y0, window.x1 - window.x0) > MOST_PIXELS:
        raise ValueError(f"a window is at most {MOST_PIXELS} pixels long, got {window.as_tuple()}")
