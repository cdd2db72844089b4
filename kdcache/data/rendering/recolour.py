"""The kernel of `colour_jitter`: an affine map of the colours of an image, which depends on its mean.

The map is float32 in the order of Pillow's matrix conversion, so the bytes are the same. Colours are separated before
and joined after, a block at a time, because LLVM cannot vectorise interleaved pixels of three bytes: 0.04 ms at 144 x
192 on a Zen 3, 0.14 ms pixel by pixel.
"""

import math

import numpy as np
from numba import types

from kdcache.data.rendering.compiled import BYTES, OPTIONS, kernel, njit

_BLOCK = 512
_f, _i = np.float32, np.int32


@njit(**OPTIONS)
def _mean(pixels_HW3, weights):
    """Return the weighted sum of an image's mean colour. Every second pixel of every second row counts."""
    height, width = pixels_HW3.shape[:2]
    red = green = blue = 0
    for i in range(0, height, 2):
        row = pixels_HW3[i]
        for j in range(0, width, 2):
            red += row[j, 0]
            green += row[j, 1]
            blue += row[j, 2]
    count = ((height + 1) // 2) * ((width + 1) // 2)
    return weights[0] * (red / count) + weights[1] * (green / count) + weights[2] * (blue / count)


@njit(**OPTIONS)
def _map(planes, affine, c, out):
    """Compute one colour channel of a block of pixels: row `c` of the affine map, whose last element is the offset."""
    red, green, blue = planes
    by_red, by_green, by_blue, offset = _f(affine[c, 0]), _f(affine[c, 1]), _f(affine[c, 2]), _f(affine[c, 3])
    for i in range(len(out)):
        value = by_red * red[i] + by_green * green[i] + by_blue * blue[i] + offset + _f(0.5)
        value = value if value > _f(0) else _f(0)  # as a choice it vectorises, as max() it does not
        out[i] = _i(value if value < _f(255) else _f(255))


@njit(**OPTIONS)
def _rotate_and_saturate(factor, turns, matrix_33, luma):
    """Fill the colour matrix (3, 3): rotate the hue around the grey axis by `turns`, then blend with grey."""
    angle = 2 * math.pi * turns
    rest, s = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    same, less, more = 1 - 2 * rest, rest - s, rest + s
    for column, turned in enumerate(((same, more, less), (less, same, more), (more, less, same))):
        grey = (1 - factor) * (luma[0] * turned[0] + luma[1] * turned[1] + luma[2] * turned[2])
        for row in range(3):
            matrix_33[row, column] = factor * turned[row] + grey


@kernel(BYTES[3], *[types.float64] * 4, types.UniTuple(types.float64, 3))
def recolour(pixels_HW3, brightness, contrast, saturation, turns, luma):
    """Change hue, saturation, brightness and contrast of an image in place.

    Args:
        pixels_HW3: RGB image, uint8 (H, W, 3).
        brightness: relative change. 0 changes nothing, and 0.1 makes it a tenth brighter.
        contrast: relative change around the image's mean grey.
        saturation: relative change.
        turns: rotation of the hue in whole turns. 0 changes nothing.
        luma: weights of red, green and blue in grey.
    """
    pixels_X = pixels_HW3.reshape(-1)
    matrix, weights = np.empty((3, 3)), np.empty(3)
    _rotate_and_saturate(1 + saturation, turns, matrix, luma)
    matrix *= 1 + brightness
    for column in range(3):
        weights[column] = luma[0] * matrix[0, column] + luma[1] * matrix[1, column] + luma[2] * matrix[2, column]
    affine = np.empty((3, 4))
    affine[:, :3] = (1 + contrast) * matrix
    affine[:, 3] = -contrast * _mean(pixels_HW3, weights)
    pixels = len(pixels_X) // 3
    values, levels = np.empty((3, _BLOCK), np.float32), np.empty((3, _BLOCK), np.uint8)
    for start in range(0, pixels, _BLOCK):
        count = min(_BLOCK, pixels - start)
        block = pixels_X[3 * start : 3 * (start + count)]
        for c in range(3):
            plane, colour = values[c, :count], block[c:]
            for i in range(count):
                plane[i] = colour[3 * i]
        for c in range(3):
            _map((values[0, :count], values[1, :count], values[2, :count]), affine, c, levels[c, :count])
        red, green, blue = levels[0, :count], levels[1, :count], levels[2, :count]
        for i in range(count):
            block[3 * i], block[3 * i + 1], block[3 * i + 2] = red[i], green[i], blue[i]
