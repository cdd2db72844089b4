"""RandAugment's colour operations: torchvision's for Pillow pictures, at its magnitudes, without its geometry.

Pillow computes them in integers, so the bytes do not depend on the number of threads, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from kdcache.data.sample import Pixels

BINS = 31
"""Magnitudes are 0 to 30, as in torchvision."""

_Operation = Callable[[Image.Image, float], Image.Image]


@dataclass(frozen=True)
class RandAugment:
    """A number of random colour operations, one after the other.

    Each is drawn from nine, and all have the same magnitude.

    Args:
        operations: how many operations, at least 1.
        magnitude: the strength of the operations, 0 to 30.

    Raises: ValueError for a number out of these ranges.

    Source: Cubuk et al. 2020, arXiv 1909.13719. Magnitudes and signs are as in torchvision's RandAugment.
    """

    operations: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.operations < 1 or not 0 <= self.magnitude < BINS:
            raise ValueError(f"RandAugment has 1 or more operations and a magnitude of 0 to {BINS - 1}, got {self}")

    def __call__(self, rng: np.random.Generator, pixels_HW3: Pixels) -> Pixels:
        """Return the changed image, uint8 (H, W, 3). Each operation uses one number from `rng`."""
        picture = Image.fromarray(pixels_HW3)
        for number in rng.integers(2 * len(OPERATIONS), size=self.operations).tolist():
            change, strength, signed = OPERATIONS[number // 2]
            value = strength(self.magnitude / (BINS - 1))
            picture = change(picture, -value if signed and number % 2 else value)
        return np.array(picture)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> _Operation:
    return lambda picture, value: kind(picture).enhance(1 + value)


def _factor(share: float) -> float:
    return 0.9 * share


OPERATIONS: tuple[tuple[_Operation, Callable[[float], float], bool], ...] = (
    (lambda picture, _: picture, _factor, False),
    (_enhance(ImageEnhance.Brightness), _factor, True),
    (_enhance(ImageEnhance.Color), _factor, True),
    (_enhance(ImageEnhance.Contrast), _factor, True),
    (_enhance(ImageEnhance.Sharpness), _factor, True),
    (lambda picture, bits: ImageOps.posterize(picture, int(bits)), lambda share: 8 - round(4 * share), False),
    (lambda picture, level: ImageOps.solarize(picture, level), lambda share: 255 * (1 - share), False),  # type: ignore[arg-type] # of any number
    (lambda picture, _: ImageOps.autocontrast(picture), _factor, False),
    (lambda picture, _: ImageOps.equalize(picture), _factor, False),
)
"""An operation, its value at a share of the largest magnitude, and whether that may be negative: in torchvision's
order, identity, brightness, saturation, contrast, sharpness, posterise, solarise, auto-contrast, equalise."""
