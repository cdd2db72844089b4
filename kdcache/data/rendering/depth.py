"""Render depth in the same way as labels, but for sparse maps, and divided by a view's zoom.

A mean of two depths is meaningless: at an object's edge it lies in the air between object and background, and a known
with an unknown pixel has no mean. So an output takes one source pixel: the one that contains its centre, as for labels,
or if that is unknown the nearest valid one whose centre lies in the output's cell. Dense depth moves exactly as labels
do. A LiDAR's points survive shrinking, where picking the centre would lose all but one of 16 at a quarter of the size.
A cell without a point stays unknown.

A view that is zoomed by s shows a scene that looks s times nearer: things are s times larger, as they would be at 1/s
of their distance. No network can tell the difference, so metric depth is drawn without zoom, or divided by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from kdcache.data.rendering.view import MOST_PIXELS, Window
from kdcache.data.sample import Depth
from kdcache.tasks import DEPTH


def render_depth(
    depth_HW: Depth | None,
    window: Window,
    *,
    flip: bool,
    size: tuple[int, int],
    zoom: float = 1.0,
    out: Depth | None = None,
) -> Depth:
    """Cut a window out of a depth label, resize it, and then flip it, as `render` does with an image.

    Each output pixel takes one source pixel: the one at its centre or, if that is unknown, the nearest known one that
    it covers.

    Args:
        depth_HW: float32 (H, W) in metres, NaN for unknown. None means that all depth is unknown.
        window: the part to show, in source pixels. Depth is unknown beyond the source.
        flip: whether to mirror left and right after the resize (column j becomes W-1-j).
        size: (height, width) of the result.
        zoom: the depth is divided by it. `zoom_of` returns it for `--depth-zoom divide`. 1 keeps the metres.
        out: contiguous memory for the result, float32 of `size`. None allocates it.
    Returns: float32 (height, width), NaN for unknown.
    Raises: ValueError for arrays that do not fit, a zoom that is not above 0, or a window longer than 2**24 pixels.
    """
    _check(depth_HW, window, size, zoom)
    metres = np.empty(size, np.float32) if out is None else out
    if depth_HW is None:
        metres[...] = np.nan
        return metres
    full = (0.0, 0.0, float(depth_HW.shape[0]), float(depth_HW.shape[1]))
    if not flip and depth_HW.shape == tuple(size) and window.as_tuple() == full:
        metres[...] = depth_HW
    else:
        from kdcache.data.rendering.nearest import render_nearest  # which imports numba

        y0, x0, y1, x1 = map(float, window.as_tuple())
        render_nearest(np.ascontiguousarray(depth_HW), (y0, x0, y1, x1), bool(flip), metres)
    if zoom != 1.0:
        metres /= np.float32(zoom)
    return metres


RENDERERS: Mapping[str, Callable[..., Depth]] = {DEPTH: render_depth}
"""How the label of each numeric task is rendered, with the arguments of `render_depth`. `render` renders class ids."""


def zoom_of(window: Window, image_size: tuple[int, int], share: tuple[float, float] = (1.0, 1.0)) -> float:
    """Return how many times larger things look in a view of a window than in a view of the whole image.

    If the window's aspect ratio differs from the image's, this is the geometric mean of the factors along both axes. If
    the window is cut from a view instead of the image, multiply the result by the view's zoom.

    Args:
        window: in pixels of the image, or of the view from which it is cut.
        image_size: (H, W) of that image or view in pixels.
        share: for crops, the part of the image's height and width that a crop shows at zoom 1.
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
