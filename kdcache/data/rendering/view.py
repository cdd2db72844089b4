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
    """A half-open rectangle in pixels, in edge coordinates (the image is [0, H) x [0, W)).

    It may reach beyond the image. Raises: ValueError unless it is finite and has an area.
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
        """Return the window of the whole image."""
        return cls(0.0, 0.0, float(height), float(width))

    def scaled(self, fy: float, fx: float) -> Window:
        """Return this window in an image of `fy` times the height and `fx` times the width."""
        return Window(self.y0 * fy, self.x0 * fx, self.y1 * fy, self.x1 * fx)

    def moved(self, y: float, x: float) -> Window:
        """Return this window, `y` further down and `x` further right."""
        return Window(self.y0 + y, self.x0 + x, self.y1 + y, self.x1 + x)

    def as_tuple(self) -> tuple[float, float, float, float]:
        """Return (y0, x0, y1, x1), as a cache stores it."""
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
    """Cut `window` out of an image and its label, resize to `size`, then flip.

    Args:
        image_HW3: uint8 RGB source.
        label_HW: uint8 class ids of the same height and width. None renders as all void.
        window: the part in source pixels. It may reach beyond the source.
        flip: mirror left and right after the resize (column j becomes W-1-j).
        size: (height, width) of the result.
        out: pixels and label of that size to write to, contiguous. Default: new memory.
    Returns: uint8 (height, width, 3) and uint8 (height, width).
    Raises: ValueError for shapes or types that do not fit, and for a window longer than 2**24 pixels.
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
    """Return the 64-bit unsigned BLAKE2b over the shape and the bytes of a rendered image.

    It is equal for equal content whatever the strides. The dtype does not count (pixels are uint8).
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
