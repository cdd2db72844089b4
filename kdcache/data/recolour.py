# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls
"""The kernel of `colour_jitter`: the mean of an image, and an affine map of its colours.

The map is float32 in the order of Pillow's matrix conversion, so that the bytes are the same. Colours are separated
before and joined after, a block at a time, because LLVM vectorises none of it where three bytes make a pixel: 0.04 ms
at 144 x 192 on a Zen 3, 0.14 pixel by pixel.
"""

import numpy as np
from numba import njit, types

from kdcache.data.compiled import BYTES, OPTIONS, kernel

_BLOCK = 512
_f, _i = np.float32, np.int32


@njit(**OPTIONS)
def _mean(pixels_HW3, weights):
    """The weighted sum of the mean colour, of every second pixel of every second row."""
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
    """One colour of a block: row `c` of the map, whose last element is the offset."""
    red, green, blue = planes
    by_red, by_green, by_blue, offset = _f(affine[c, 0]), _f(affine[c, 1]), _f(affine[c, 2]), _f(affine[c, 3])
    for i in range(len(out)):
        value = by_red * red[i] + by_green * green[i] + by_blue * blue[i] + offset + _f(0.5)
        value = value if value > _f(0) else _f(0)  # as a choice it vectorises, as max() it does not
        out[i] = _i(value if value < _f(255) else _f(255))


@kernel(BYTES[3], types.float64[:, ::1], types.float64[::1], types.float64)
def recolour(pixels_HW3, matrix, luma, contrast):
    """Map every pixel by `matrix`, then change the contrast about the mean grey; in place, rounded half up.

    Args:
        luma: weights of a pixel's colours in its grey after `matrix`.
        contrast: 0 leaves it.
    """
    pixels_X = pixels_HW3.reshape(-1)
    affine = np.empty((3, 4))
    affine[:, :3] = (1 + contrast) * matrix
    affine[:, 3] = -contrast * _mean(pixels_HW3, luma)
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
