"""Crops of an image at a random scale, and where a view shows its image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.data import Window, draw_view, draw_window, id_hash, inside_rectangle, render

SIDE = st.integers(3, 40)


@given(
    source=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    size=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    crop=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    scale=st.tuples(st.floats(0.1, 4), st.floats(0, 4)),
    view=st.integers(0, 5),
)
def test_a_crop_is_so_many_pixels_of_the_scaled_image(source, size, crop, scale, view) -> None:
    """Along each axis: inside the image where it is smaller, around it where it is larger; view 0 is drawn too."""
    scale = scale[0], scale[0] + scale[1]
    share = crop[0] / size[0], crop[1] / size[1]
    window, _ = draw_view(5, "a", view, source, scale, True, share)
    u = np.random.default_rng((5, id_hash("a"), view)).random(4)
    s = scale[0] + u[0] * (scale[1] - scale[0])
    for low, high, whole, pixels, of, free in (
        (window.y0, window.y1, source[0], crop[0], size[0], u[1]),
        (window.x0, window.x1, source[1], crop[1], size[1], u[2]),
    ):
        # The scaled image measures s * of pixels, of which the crop takes `pixels`: in the source,
        length = pixels * whole / (s * of)
        assert high - low == pytest.approx(length, rel=1e-9)
        assert low == pytest.approx(free * (whole - length), rel=1e-9, abs=1e-9 * max(whole, length))


def test_without_a_share_nothing_changed() -> None:
    for seed in range(5):
        drawn = [
            draw_window(np.random.default_rng(seed), (30, 40), (0.5, 2), True, *share) for share in ((), ((1, 1),))
        ]
        assert drawn[0] == drawn[1]


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(SIDE, SIDE),
    size=st.tuples(SIDE, SIDE),
    seed=st.integers(0, 1000),
    low=st.floats(0.2, 1.5),
    flip=st.booleans(),
)
def test_the_rectangle_is_where_a_rendering_shows_its_image(source, size, seed, low, flip) -> None:
    window, _ = draw_window(np.random.default_rng(seed), source, (low, 2.0), True, (1.1, 0.8))
    image = np.zeros((*source, 3), np.uint8)
    _, label = render(image, np.zeros(source, np.uint8), window, flip=flip, size=size)
    y0, x0, y1, x1 = inside_rectangle(np.array(window.as_tuple()), np.array(flip), np.array(source), size)
    centre_y, centre_x = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    rows, columns = (centre_y >= y0) & (centre_y < y1), (centre_x >= x0) & (centre_x < x1)
    # A centre that lies on the image's edge to 1e-9 may fall on either side.
    doubtful_y = np.minimum(abs(centre_y - y0), abs(centre_y - y1)) < 1e-9
    doubtful_x = np.minimum(abs(centre_x - x0), abs(centre_x - x1)) < 1e-9
    wrong = (label == 0) != (rows[:, None] & columns)
    assert not (wrong & ~doubtful_y[:, None] & ~doubtful_x).any()


def test_many_rectangles_at_once() -> None:
    windows = np.array([Window.full(30, 40).as_tuple(), (-30, -10, 60, 70), (5, 5, 10, 10)])
    rectangles = inside_rectangle(windows, np.array([0, 1, 1]), np.array([[30, 40]] * 3), (9, 8))
    assert rectangles.tolist() == [[0, 0, 9, 8], [3, 3, 6, 7], [0, 0, 9, 8]]
