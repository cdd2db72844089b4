"""Random windows and colours: views that are stored, warp of a view and jitter of its pixels for the student.

Every draw takes the same number of random values whatever it decides, so that streams of a seeded
generator stay aligned when a setting changes.

Colour jitter is one affine map of RGB, composed in float64 and applied in a single pass with one rounding.
Brightness, contrast and saturation are affine by definition, as in torchvision; hue is a rotation about
the grey axis. At 144 x 192 that takes 0.07 ms, Pillow's matrix conversion 0.3 ms; torchvision's four steps (hue
through HSV) take 3.4 ms.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.data.sample import Pixels
from kdcache.data.view import Window

LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R 601 weights of red, green and blue in grey, as Pillow and torchvision use them."""

HUE_TURNS_PER_STRENGTH = 1 / 6
"""Hue is drawn from +- strength / 6 turns: 18 degrees at 0.3."""


@dataclass(frozen=True)
class Augmentation:
    """What is drawn at random for the student.

    Args:
        scale: zoom is uniform in this range, 1 = the whole view, 2 = a window of half its size,
            0.5 = the view at half size amid grey.
        flip: mirror left and right half of the time.
        jitter: strength of colour jitter, 0 (off) to 1.

    Raises: ValueError.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    jitter: float = 0.3

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        _check_strength(self.jitter)

    @classmethod
    def off(cls) -> Augmentation:
        """The view as it is."""
        return cls(scale=(1.0, 1.0), flip=False, jitter=0.0)


def draw_window(
    rng: np.random.Generator, view_size: tuple[int, int], scale: tuple[float, float], flip: bool
) -> tuple[Window, bool]:
    """Draw a window of the aspect ratio of a view, and whether to flip.

    The scale s is uniform in `scale` (as in mmsegmentation); the window measures (H/s, W/s). For s >= 1 it
    lies uniformly inside the view, for s < 1 the view lies uniformly inside it.

    Args:
        view_size: (H, W) of whatever the window counts in: source pixels or stored view pixels.
        flip: whether flips are drawn at all.
    Returns: the window in the units of `view_size`, and the flip.
    """
    _check_scale(scale)
    u_scale, u_y, u_x, u_flip = rng.random(4)
    s = scale[0] + u_scale * (scale[1] - scale[0])
    height, width = view_size[0] / s, view_size[1] / s
    # One formula for both: the slack is negative when the window is the larger one.
    y0, x0 = u_y * (view_size[0] - height), u_x * (view_size[1] - width)
    return Window(float(y0), float(x0), float(y0 + height), float(x0 + width)), bool(flip and u_flip < 0.5)


def draw_view(
    seed: int, sample: str, view: int, image_size: tuple[int, int], scale: tuple[float, float], flip: bool
) -> tuple[Window, bool]:
    """Window and flip of a view that a store keeps: a function of its arguments alone, so that any may be added later.

    Args:
        sample: its id.
        view: 0 is the whole image, the others are drawn as `draw_window` does, each from a generator of its own.
        image_size: (H, W) of the source, in whose pixels the window counts.
    """
    if view == 0:
        return Window.full(*image_size), False
    return draw_window(np.random.default_rng((seed, id_hash(sample), view)), image_size, scale, flip)


def id_hash(sample: str) -> int:
    """64-bit unsigned BLAKE2b of a sample's id: a number for it that no order of samples changes."""
    return int.from_bytes(hashlib.blake2b(sample.encode(), digest_size=8).digest(), "little")


def colour_jitter(rng: np.random.Generator, pixels_HW3: Pixels, strength: float) -> Pixels:
    """Change brightness, contrast, saturation and hue at random.

    Factors are uniform in [1 - strength, 1 + strength], the hue in +- strength / 6 turns. The contrast pivots
    on the mean grey (of every second pixel and row: a mean needs no more).

    Args:
        pixels_HW3: uint8 RGB; not written to.
        strength: 0 to 1; 0 returns `pixels_HW3` itself, unchanged.
    Returns: uint8 (H, W, 3), memory of its own unless the strength is 0.
    """
    _check_strength(strength)
    brightness, contrast, saturation, hue = rng.uniform(-strength, strength, 4)
    if strength == 0:
        return pixels_HW3
    from kdcache.data.recolour import recolour  # which imports numba

    matrix = (1 + brightness) * _saturate_and_rotate(1 + saturation, hue * HUE_TURNS_PER_STRENGTH)
    result = pixels_HW3.copy()
    recolour(result, matrix, LUMA @ matrix, contrast)
    return result


def _saturate_and_rotate(factor: float, turns: float) -> npt.NDArray[np.float64]:
    """Turn hues about (1, 1, 1) (Rodrigues; red to green at a third), then blend with grey, whose rows are LUMA."""
    angle = 2 * math.pi * turns
    rest, s = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    own, less, more = 1 - 2 * rest, rest - s, rest + s
    rotation = np.array([[own, less, more], [more, own, less], [less, more, own]])
    blended: npt.NDArray[np.float64] = factor * rotation + (1 - factor) * (LUMA @ rotation)
    return blended


def _check_scale(scale: tuple[float, float]) -> None:
    if not 0 < scale[0] <= scale[1] < math.inf:
        raise ValueError(f"scale is (low, high) with 0 < low <= high, got {scale}")


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"jitter strength is between 0 and 1, got {strength}")
