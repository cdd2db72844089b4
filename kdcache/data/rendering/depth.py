"""Rendering of depth: as labels are rendered, but sparse, and smaller where a view is zoomed.

A mean of two depths is the depth of nothing: across the edge of a thing it lies in the air between it and what is
behind, and one of a point and an unknown pixel means nothing at all. So an output takes one source pixel: the one that
contains its centre, as labels do, or where that is unknown the nearest valid one whose centre lies in the output's
cell. Dense depth moves exactly as labels do. A LiDAR's points survive shrinking, where picking alone would lose all but
one of 16 at a quarter of the size. A cell without a point stays unknown.

A view that is zoomed by s shows a scene that looks s times nearer: things are s times larger, as they would be at 1/s
of their distance. No network can tell the one from the other, so metric depth is drawn without zoom, or divided by it.
"""

from __future__ import annotations

import math

import numpy as np

from kdcache.data.rendering.view import MOST_PIXELS, Window
from kdcache.data.sample import Depth


def render_depth(
    depth_HW: Depth | None,
    window: Window,
    *,
    flip: bool,
    size: tuple[int, int],
    zoom: float = 1.0,
    out: Depth | None = None,
) -> Depth:
    """Cut `window` out of a depth label, resize to `size`, then flip, as `render` does with the image.

    Args:
        depth_HW: float32 metres, NaN where unknown; None renders as all unknown.
        window: in source pixels; may reach beyond the source, where depth is unknown.
        flip: mirror left and right after the resize (column j becomes W-1-j).
        size: (height, width) of the result.
        zoom: what the depth is divided by: `zoom_of` the window for `--depth-zoom divide`, 1 to keep the metres.
        out: float32 memory of that size to write to, contiguous; default memory of its own.
    Returns: float32 (height, width), NaN where unknown.
    Raises: ValueError for shapes or types that do not fit, a zoom that is not above 0, and for a window longer than
        2**24 pixels.
    """
    _check(depth_HW, window, size, zoom)
    metres = np.empty(size, np.float32) if out is None else out
    if depth_HW is None:
        metres[...] = np.nan
        return metres
    whole = (0.0, 0.0, float(depth_HW.shape[0]), float(depth_HW.shape[1]))
    if not flip and depth_HW.shape == tuple(size) and window.as_tuple() == whole:
        metres[...] = depth_HW
    else:
        from kdcache.data.rendering.nearest import render_nearest  # which imports numba

        y0, x0, y1, x1 = map(float, window.as_tuple())
        render_nearest(np.ascontiguousarray(depth_HW), (y0, x0, y1, x1), bool(flip), metres)
    if zoom != 1.0:
        metres /= np.float32(zoom)
    return metres


def zoom_of(window: Window, image_size: tuple[int, int], share: tuple[float, float] = (1.0, 1.0)) -> float:
    """How many times nearer the scene looks in a view of a window than in one of the whole image.

    It is the scale s that `draw_window` drew: things are s times larger. Where a window has another aspect ratio than
    the image, it is the geometric mean of both axes. The zooms of a view of the image and of a window in that view
    multiply.

    Args:
        window: in pixels of the image, or of the view that the window is cut from.
        image_size: (H, W) of that image or view.
        share: of crops, what one shows at scale 1, as a part of the image's height and width.
    """
    height, width = window.y1 - window.y0, window.x1 - window.x0
    return math.sqrt(image_size[0] * share[0] / height * image_size[1] * share[1] / width)


def _check(depth_HW: Depth | None, window: Window, size: tuple[int, int], zoom: float) -> None:
    if depth_HW is not None and (depth_HW.ndim != 2 or depth_HW.dtype != np.float32 or 0 in depth_HW.shape):
        raise ValueError(f"a depth label is float32 (H, W), got {depth_HW.dtype} {depth_HW.shape}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is (height, width), each at least 1, got {size}")
    if not 0 < zoom < math.inf:
        raise ValueError(f"a zoom is a number above 0, got {zoom}")
    if max(window.y1 - window.y0, window.x1 - window.x0) > MOST_PIXELS:
        raise ValueError(f"a window is at most {MOST_PIXELS} pixels long, got {window.as_tuple()}")
