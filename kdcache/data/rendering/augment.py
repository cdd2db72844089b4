"""Random windows and colours: drawn views for caches, and warp and jitter for the student.

Every draw takes the same number of random values whatever it decides, so streams of a seeded generator stay aligned
when a setting changes.

Colour jitter is one affine map of RGB, composed in float64 and applied in a single pass with one rounding. Brightness,
contrast and saturation are affine by definition, as in torchvision. Hue is a rotation about the grey axis. At 144 x 192
that takes 0.07 ms, Pillow's matrix conversion 0.3 ms, and torchvision's four steps (hue through HSV) 3.4 ms.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.data.rendering.fit import middle_window
from kdcache.data.rendering.rand_augment import RandAugment
from kdcache.data.rendering.view import Window
from kdcache.data.sample import Pixels

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601 weights of red, green and blue in grey, as Pillow and torchvision use them."""

HUE_TURNS_PER_STRENGTH = 1 / 6
"""Hue is drawn from +- strength / 6 turns: 18 degrees at 0.3."""


@dataclass(frozen=True)
class Augmentation:
    """The random changes of a view that a student sees.

    Args:
        scale: (lowest, highest) zoom, which is drawn uniformly. 1 shows the whole view, 2 a window of half its size,
            and 0.5 the whole view at half size with grey around it.
        flip: whether half of the views are mirrored left to right.
        jitter: strength of colour jitter, from 0 (off) to 1, or a `RandAugment`.

    Raises: ValueError unless 0 < lowest <= highest, and for a strength outside 0 to 1.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    jitter: float | RandAugment = 0.3

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not isinstance(self.jitter, RandAugment):
            _check_strength(self.jitter)

    @classmethod
    def off(cls) -> Augmentation:
        """Return an augmentation that changes nothing."""
        return cls(scale=(1.0, 1.0), flip=False, jitter=0.0)


def draw_window(
    rng: np.random.Generator,
    view_size: tuple[int, int],
    scale: tuple[float, float],
    flip: bool,
    share: tuple[float, float] = (1.0, 1.0),
) -> tuple[Window, bool]:
    """Draw a random window of a view, and whether to flip it.

    A scale s is drawn uniformly. With the default `share`, the window measures (H/s, W/s) and so has the view's aspect
    ratio. Along each axis, a smaller window lies at a random position inside the view. A larger window contains the
    view at a random position.

    Args:
        rng: the only source of randomness.
        view_size: (H, W) of the image or view from which the window is cut, in pixels.
        scale: the lowest and the highest s.
        flip: False never flips. True flips half of the time.
        share: (height, width) of the window at s = 1, as a part of the view's height and width.
    Returns: the window in pixels of `view_size`, and whether to flip.
    Raises: ValueError unless 0 < lowest s <= highest s.
    """
    _check_scale(scale)
    u_scale, u_y, u_x, u_flip = rng.random(4)
    s = scale[0] + u_scale * (scale[1] - scale[0])
    height, width = view_size[0] * share[0] / s, view_size[1] * share[1] / s
    # One formula for both: the slack is negative when the window is the larger one.
    y0, x0 = u_y * (view_size[0] - height), u_x * (view_size[1] - width)
    return Window(float(y0), float(x0), float(y0 + height), float(x0 + width)), bool(flip and u_flip < 0.5)


def draw_view(
    seed: int,
    sample: str,
    view: int,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    flip: bool,
    share: tuple[float, float] | None = None,
    *,
    fitted: tuple[float, float] = (1.0, 1.0),
) -> tuple[Window, bool]:
    """Draw the window and flip of a view that a cache stores. Equal arguments give equal results.

    Args:
        seed: the build's seed.
        sample: the sample's id.
        view: the view's number, from 0. It seeds the random numbers. Without `share`, view 0 is the whole image.
        image_size: (H, W) of the image in pixels.
        scale: (lowest, highest) zoom.
        flip: False never flips. True flips half of the views.
        share: the part of the image's height and width that a crop shows at zoom 1. None draws views of the whole
            image.
        fitted: (height, width) of a view at zoom 1, as a part of the image's size. `fitted_share` returns it.
    Returns: the window in pixels of the image, and whether the view is flipped after the resize.
    """
    if view == 0 and share is None:
        return middle_window(image_size, fitted), False
    rng = np.random.default_rng((seed, id_hash(sample), view))
    crop = share or (1.0, 1.0)
    return draw_window(rng, image_size, scale, flip, (crop[0] * fitted[0], crop[1] * fitted[1]))


def inside_rectangle(
    window_R4: npt.NDArray[np.float64],
    flip_R: npt.NDArray[np.generic],
    source_size_R2: npt.NDArray[np.generic],
    view_size: tuple[int, int],
) -> npt.NDArray[np.float64]:
    """Return the part of each view that shows its image, as a rectangle in pixels of the view.

    The rest of a view lies outside the image. It is grey, has no label, and counts in no loss. Pixel (i, j) shows the
    image if (i + 0.5, j + 0.5) is inside the half-open rectangle.

    Args:
        window_R4: float64 (R, 4), the views' windows (y0, x0, y1, x1) in pixels of their images.
        flip_R: bool or number (R,), whether each view is mirrored.
        source_size_R2: (R, 2), height and width of the images in pixels.
        view_size: (H, W) of the views in pixels.
    Returns: float64 (R, 4), y0, x0, y1, x1. For a single view, leave out the axis R everywhere.
    """
    window, source = np.asarray(window_R4, np.float64), np.asarray(source_size_R2, np.float64)
    size = np.asarray(view_size, np.float64)
    low, long = window[..., :2], window[..., 2:] - window[..., :2]
    first, last = (0 - low) * size / long, (source - low) * size / long
    # A flip is the last step of a rendering: column j becomes W - 1 - j, so the edge x becomes W - x.
    flipped = np.asarray(flip_R, bool)
    x0 = np.where(flipped, size[1] - last[..., 1], first[..., 1])
    x1 = np.where(flipped, size[1] - first[..., 1], last[..., 1])
    edges = np.stack([first[..., 0], x0, last[..., 0], x1], axis=-1)
    return edges.clip(0, np.concatenate([size, size]))


def id_hash(sample: str) -> int:
    """Return an unsigned 64-bit number for a sample's id: the BLAKE2b hash of its UTF-8 bytes."""
    return int.from_bytes(hashlib.blake2b(sample.encode(), digest_size=8).digest(), "little")


def colour_jitter(
    rng: np.random.Generator, pixels_HW3: Pixels, strength: float | RandAugment, *, out: Pixels | None = None
) -> Pixels:
    """Change brightness, contrast, saturation and hue at random, or apply RandAugment's colour operations.

    The first three factors are uniform in [1 - strength, 1 + strength]. The hue changes by up to strength / 6 turns.
    Contrast changes around the image's mean grey.

    Args:
        rng: the only source of randomness.
        pixels_HW3: RGB image, uint8 (H, W, 3). It stays unchanged, unless it is also `out`.
        strength: 0 to 1, or a `RandAugment`. 0 returns `pixels_HW3` itself.
        out: contiguous memory for the result, uint8 (H, W, 3). None allocates it.
    Returns: uint8 (H, W, 3).
    Raises: ValueError for a strength outside 0 to 1.
    """
    if isinstance(strength, RandAugment):
        words = rng.random(4).view(np.uint64)  # as many as below, however many operations there are
        result = strength(np.random.default_rng(words), pixels_HW3)
        return result if out is None else _copied(result, out)
    _check_strength(strength)
    brightness, contrast, saturation, hue = rng.uniform(-strength, strength, 4).tolist()
    if strength == 0:
        return pixels_HW3
    from kdcache.data.rendering.recolour import recolour  # which imports numba

    result = np.empty_like(pixels_HW3) if out is None else out
    if result is not pixels_HW3:
        result[...] = pixels_HW3
    recolour(result, brightness, contrast, saturation, hue * HUE_TURNS_PER_STRENGTH, LUMA)
    return result


def _copied(pixels_HW3: Pixels, out: Pixels) -> Pixels:
    out[...] = pixels_HW3
    return out


def _check_scale(scale: tuple[float, float]) -> None:
    if not 0 < scale[0] <= scale[1] < math.inf:
        raise ValueError(f"scale is (low, high) with 0 < low <= high, got {scale}")


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"jitter strength is between 0 and 1, got {strength}")
