"""Random windows and colours for the student: warp of a view, jitter of its pixels.

Every draw takes the same number of random values whatever it decides, so that streams of a seeded
generator stay aligned when a setting changes.

Colour jitter is one affine map of RGB, composed in float64 and applied in a single pass with one rounding.
Brightness, contrast and saturation are affine by definition, as in torchvision; hue is a rotation about
the grey axis. At 144 x 192 that takes 0.3 ms; torchvision's four steps (hue through HSV) take 3.4 ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

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
    mean = np.array([channel.mean() for channel in np.moveaxis(pixels_HW3[::2, ::2], 2, 0)])
    matrix = (1 + brightness) * _saturate(1 + saturation) @ _rotate_hue(hue * HUE_TURNS_PER_STRENGTH)
    grey = float(LUMA @ matrix @ mean)
    matrix, offset = (1 + contrast) * matrix, -contrast * grey
    rows = [(*(float(value) for value in row), float(offset)) for row in matrix]
    coefficients = tuple(value for row in rows for value in row)
    image = Image.fromarray(np.ascontiguousarray(pixels_HW3))
    return np.array(image.convert("RGB", coefficients))


def _saturate(factor: float) -> npt.NDArray[np.float64]:
    """Blend with grey: every row of the grey part is the luma weights."""
    return factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1))


def _rotate_hue(turns: float) -> npt.NDArray[np.float64]:
    """Rodrigues' rotation about (1, 1, 1): grey stays, hues turn (red to green at a third)."""
    angle = 2 * math.pi * turns
    c, s = math.cos(angle), math.sin(angle) / math.sqrt(3)
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    rotation: npt.NDArray[np.float64] = c * np.eye(3) + s * cross + (1 - c) / 3 * np.ones((3, 3))
    return rotation


def _check_scale(scale: tuple[float, float]) -> None:
    if not 0 < scale[0] <= scale[1] < math.inf:
        raise ValueError(f"scale is (low, high) with 0 < low <= high, got {scale}")


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"jitter strength is between 0 and 1, got {strength}")
