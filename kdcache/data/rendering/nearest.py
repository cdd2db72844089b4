"""The kernel of `render_depth`: an output takes the valid source pixel of its cell nearest to its centre."""

import math

import numpy as np
from numba import types

from kdcache.data.rendering.compiled import OPTIONS, kernel, njit

FLOATS = types.Array(types.float32, 2, "C")
READ_ONLY_FLOATS = types.Array(types.float32, 2, "C", readonly=True)


@njit(**OPTIONS)
def _nearest(depth_HW, y, x, y_range, x_range):
    """Return the known depth nearest to (y, x) in a rectangle of pixels, or NaN.

    The first of equally near ones counts.
    """
    least, nearest = math.inf, np.float32(math.nan)
    for row in range(y_range[0], y_range[1]):
        for column in range(x_range[0], x_range[1]):
            value = depth_HW[row, column]
            if not math.isnan(value):
                distance = (row + 0.5 - y) ** 2 + (column + 0.5 - x) ** 2
                if distance < least:
                    least, nearest = distance, value
    return nearest


@njit(**OPTIONS)
def _cell(centre, step, length):
    """Return the range [first, end) of source pixels along an axis whose centres one output pixel covers."""
    return max(math.ceil(centre - step / 2 - 0.5), 0), min(math.ceil(centre + step / 2 - 0.5), length)


@kernel(READ_ONLY_FLOATS, types.UniTuple(types.float64, 4), types.boolean, FLOATS)
def render_nearest(depth_HW, window, flip, out_HW):
    """Fill `out_HW` with the depth in a window.

    Each pixel of the result takes the source pixel at its centre or, if that is unknown, the nearest known one that it
    covers. A pixel that covers no known depth, or has its centre outside the source, is NaN.

    Args:
        depth_HW: float32 (H, W) in metres, NaN for unknown.
        window: (y0, x0, y1, x1) in source pixels.
        flip: whether to mirror left and right.
        out_HW: float32 of any size, which gets the result.
    """
    height, width = depth_HW.shape
    rows, columns = out_HW.shape
    y0, x0, y1, x1 = window
    y_step, x_step = (y1 - y0) / rows, (x1 - x0) / columns
    out_HW[:] = np.float32(math.nan)
    for i in range(rows):
        y = y0 + (i + 0.5) * y_step
        if y < 0.0 or y >= height:
            continue
        y_range = _cell(y, y_step, height)
        for j in range(columns):
            x = x0 + (j + 0.5) * x_step
            if x < 0.0 or x >= width:
                continue
            value = depth_HW[int(y), int(x)]
            if math.isnan(value):
                value = _nearest(depth_HW, y, x, y_range, _cell(x, x_step, width))
            out_HW[i, columns - 1 - j if flip else j] = value
