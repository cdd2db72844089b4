"""Rendering: the one way from a source image and a window to the pixels that a network sees.

The teacher pass and the trainer both call `render`, so a stored record can be rendered again and
compared by `pixel_checksum`. Output pixel j of W_out samples the source at
`p = x0 + (j + 0.5) * (x1 - x0) / W_out` (edge coordinates: pixel i covers [i, i + 1)); rows likewise.

- Image: Pillow's antialiased bilinear filter (a triangle, widened when shrinking). It releases the GIL,
  accumulates in fixed point (no float order to drift) and takes fractional boxes.
- Label: the pixel that contains p, by index arithmetic in float64.
- A window may reach beyond the image. Pixels whose p lies outside are grey with label 255; the others
  keep exactly the p above, and their filter counts pixels of the image only, as at any border.

Two other ways past the border were tried. Replicating the edge moves border pixels by ten levels between a
window that ends at the border and one that passes it by a hair; transparent margins (RGBA) cost twice the
time and two levels of rounding.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from kdcache.data.sample import IGNORE_INDEX, Pixels

OUTSIDE_RGB = (124, 116, 104)
"""What lies beyond the image: the ImageNet mean, close to zero after normalisation."""


@dataclass(frozen=True)
class Window:
    """A rectangle in edge coordinates (the image is [0, H) x [0, W)), half-open, in pixels.

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
        """The whole image."""
        return cls(0.0, 0.0, float(height), float(width))

    def scaled(self, fy: float, fx: float) -> Window:
        """The same window in an image whose height is `fy` and whose width is `fx` times as large."""
        return Window(self.y0 * fy, self.x0 * fx, self.y1 * fy, self.x1 * fx)

    def as_tuple(self) -> tuple[float, float, float, float]:
        """(y0, x0, y1, x1), as the store keeps it."""
        y0, x0, y1, x1 = astuple(self)
        return y0, x0, y1, x1


def render(
    image_HW3: Pixels, label_HW: Pixels | None, window: Window, *, flip: bool, size: tuple[int, int]
) -> tuple[Pixels, Pixels]:
    """Cut `window` out of an image and its label, resize to `size`, then flip.

    Args:
        image_HW3: uint8 RGB source.
        label_HW: uint8 class ids of the same height and width; None renders as all void.
        window: in source pixels; may reach beyond the source.
        flip: mirror left and right after the resize (column j becomes W-1-j).
        size: (height, width) of the result.
    Returns: uint8 (height, width, 3) and uint8 (height, width), contiguous, memory of their own.
    Raises: ValueError for shapes or types that do not fit.
    """
    _check(image_HW3, label_HW, size)
    height, width = image_HW3.shape[:2]
    y = _Axis.of(window.y0, window.y1, size[0], height)
    x = _Axis.of(window.x0, window.x1, size[1], width)
    pixels = _render_image(image_HW3, y, x, size)
    label = np.full(size, IGNORE_INDEX, np.uint8)
    if label_HW is not None:
        label[y.first : y.last, x.first : x.last] = label_HW[y.nearest()][:, x.nearest()]
    if flip:
        pixels, label = np.ascontiguousarray(pixels[:, ::-1]), np.ascontiguousarray(label[:, ::-1])
    return pixels, label


def pixel_checksum(pixels: npt.NDArray[np.generic]) -> int:
    """64-bit unsigned BLAKE2b over the shape and the bytes of a rendered image.

    Equal for equal content whatever the strides; the dtype is not part of it (pixels are uint8).
    """
    digest = hashlib.blake2b(repr(tuple(map(int, pixels.shape))).encode("ascii"), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(digest.digest(), "little")


class _Axis(NamedTuple):
    """One axis of a rendering: outputs `first:last` have their centre inside the source."""

    start: float
    stop: float
    outputs: int
    length: int
    first: int
    last: int

    @classmethod
    def of(cls, start: float, stop: float, outputs: int, length: int) -> _Axis:
        whole = cls(start, stop, outputs, length, 0, outputs)
        first, last = np.searchsorted(whole.centres(), (0.0, float(length)))
        return whole._replace(first=int(first), last=int(last))

    @property
    def step(self) -> float:
        return (self.stop - self.start) / self.outputs

    def edge(self, output: int) -> float:
        """Where an output begins; the last one ends exactly at `stop`."""
        return self.stop if output == self.outputs else self.start + output * self.step

    def centres(self) -> npt.NDArray[np.float64]:
        """Source coordinates of the outputs that lie inside."""
        outputs = np.arange(self.first, self.last, dtype=np.float64)
        return self.start + (outputs + 0.5) * self.step

    def nearest(self) -> npt.NDArray[np.intp]:
        """The source pixel that contains each inside centre."""
        return self.centres().astype(np.intp)  # centres are >= 0, so truncation is floor

    def region(self) -> tuple[int, int]:
        """The source pixels that the filter of the inside outputs can touch."""
        reach = math.ceil(self.support) + 1
        low, high = math.floor(self.edge(self.first)) - reach, math.ceil(self.edge(self.last)) + reach
        return max(low, 0), min(high, self.length)

    @property
    def support(self) -> float:
        """Half the width of Pillow's triangle, in source pixels."""
        return max(1.0, self.step)


def _render_image(image_HW3: Pixels, y: _Axis, x: _Axis, size: tuple[int, int]) -> Pixels:
    inside = (y.last - y.first, x.last - x.first)
    if 0 in inside:
        return _canvas(size)
    # Only what the filter reads is handed over: Pillow copies its input, and its box is float32, which
    # is finest near zero.
    (top, bottom), (left, right) = y.region(), x.region()
    part, y_box = _fit(image_HW3[top:bottom, left:right], y, 0, top)
    part, x_box = _fit(part, x, 1, left)
    source = Image.fromarray(np.ascontiguousarray(part))
    box = (x_box[0], y_box[0], x_box[1], y_box[1])
    resized = source.resize((inside[1], inside[0]), Image.Resampling.BILINEAR, box=box)
    if inside == tuple(size):
        return np.array(resized)
    canvas = _canvas(size)
    canvas[y.first : y.last, x.first : x.last] = np.asarray(resized)
    return canvas


def _fit(part: Pixels, axis: _Axis, dim: int, origin: int) -> tuple[Pixels, tuple[float, float]]:
    """Extend `part`, source pixels from `origin` on along `dim`, until it holds the box of the inside outputs.

    The outermost output's centre is inside, its cell may stick out by up to half a step, and Pillow wants
    its box within the picture. Each margin repeats the mean that this output shall have: adding that to a
    weighted mean leaves it as it is. No other output's triangle reaches the margin when shrinking; when
    enlarging, the mean is the edge pixel, which is right for all.

    Returns: the extended part, and the box (low, high) in it.
    """
    length = part.shape[dim]
    low, high = axis.edge(axis.first) - origin, axis.edge(axis.last) - origin
    before, after = _overhang(-low), _overhang(high - length)
    if before or after:
        centres = axis.centres() - origin
        first, last = (_triangle_mean(part, dim, centres[end], axis.support) for end in (0, -1))
        part = np.concatenate([first.repeat(before, dim), part, last.repeat(after, dim)], axis=dim)
    return part, (max(low + before, 0.0), min(high + before, float(length + before + after)))


def _overhang(distance: float) -> int:
    """Whole pixels that cover an overhang; none below a millionth of a pixel, which is rounding."""
    return math.ceil(distance) if distance > 1e-6 else 0


def _triangle_mean(part: Pixels, dim: int, centre: float, support: float) -> Pixels:
    """What the filter gives at `centre` along `dim`, from the pixels there are; `dim` becomes 1 long."""
    low, high = max(math.floor(centre - support), 0), math.ceil(centre + support) + 1
    taps = np.moveaxis(part, dim, 0)[low:high]
    weights = np.maximum(1.0 - np.abs(low + np.arange(len(taps)) + 0.5 - centre) / support, 0.0)
    mean = np.tensordot(weights / weights.sum(), taps, 1)
    return np.expand_dims(np.rint(mean).astype(np.uint8), dim)


def _canvas(size: tuple[int, int]) -> Pixels:
    return np.full((*size, 3), OUTSIDE_RGB, np.uint8)


def _check(image_HW3: Pixels, label_HW: Pixels | None, size: tuple[int, int]) -> None:
    if image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or image_HW3.dtype != np.uint8 or 0 in image_HW3.shape:
        raise ValueError(f"an image is uint8 (H, W, 3), got {image_HW3.dtype} {image_HW3.shape}")
    if label_HW is not None and (label_HW.shape != image_HW3.shape[:2] or label_HW.dtype != np.uint8):
        raise ValueError(f"a label is uint8 {image_HW3.shape[:2]}, got {label_HW.dtype} {label_HW.shape}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is (height, width), each at least 1, got {size}")
