"""Rendering of depth: one source pixel for each output, never a mean, moved as labels are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.data import Window, draw_window, render, render_depth, zoom_of

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
EDGES = st.floats(-3, 12, width=32)


def oracle(depth: np.ndarray, window: Window, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """The rule of the docstring, pixel by pixel and slowly."""
    steps = (window.y1 - window.y0) / size[0], (window.x1 - window.x0) / size[1]
    result = np.full(size, np.nan, np.float32)
    for i, j in np.ndindex(*size):
        y, x = window.y0 + (i + 0.5) * steps[0], window.x0 + (j + 0.5) * steps[1]
        if not (0 <= y < depth.shape[0] and 0 <= x < depth.shape[1]):
            continue
        value = depth[math.floor(y), math.floor(x)]
        if np.isnan(value):
            valid = [
                ((row + 0.5 - y) ** 2 + (column + 0.5 - x) ** 2, row, column)
                for row, column in np.argwhere(np.isfinite(depth)).tolist()
                if y - steps[0] / 2 <= row + 0.5 < y + steps[0] / 2
                and x - steps[1] / 2 <= column + 0.5 < x + steps[1] / 2
            ]
            value = depth[min(valid)[1:]] if valid else np.nan
        result[i, j] = value
    return result[:, ::-1] if flip else result


@st.composite
def cases(draw):
    height, width = draw(SIZES)
    values = np.random.default_rng(draw(st.integers(0, 999))).permutation(height * width) + np.float32(1)
    depth = values.reshape(height, width).astype(np.float32)
    depth[np.random.default_rng(draw(st.integers(0, 999))).random(depth.shape) < draw(st.floats(0, 1))] = np.nan
    y0, x0 = draw(EDGES), draw(EDGES)
    window = Window(y0, x0, y0 + draw(st.floats(0.25, 14, width=32)), x0 + draw(st.floats(0.25, 14, width=32)))
    return depth, draw(st.sampled_from([window, Window.full(height, width)])), draw(st.booleans()), draw(SIZES)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_it_is_the_nearest_valid_pixel_of_the_cell(case) -> None:
    depth, window, flip, size = case
    rendered = render_depth(depth, window, flip=flip, size=size)
    assert rendered.dtype == np.float32
    np.testing.assert_array_equal(rendered, oracle(depth, window, flip, size))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_dense_depth_moves_as_labels_do(case) -> None:
    depth, window, flip, size = case
    numbers = np.arange(depth.size, dtype=np.uint8).reshape(depth.shape)
    image = np.zeros((*depth.shape, 3), np.uint8)
    _, label = render(image, numbers, window, flip=flip, size=size)
    moved = render_depth(numbers.astype(np.float32), window, flip=flip, size=size)
    np.testing.assert_array_equal(np.nan_to_num(moved, nan=255).astype(np.uint8), label)


def test_the_points_of_a_lidar_survive_shrinking() -> None:
    depth = np.full((64, 64), np.nan, np.float32)
    depth[1::4, 2::4] = np.arange(1, 257, dtype=np.float32).reshape(16, 16)
    small = render_depth(depth, Window.full(64, 64), flip=False, size=(16, 16))
    np.testing.assert_array_equal(small, depth[1::4, 2::4])
    large = render_depth(depth, Window.full(64, 64), flip=False, size=(128, 128))
    assert np.isfinite(large).sum() == 4 * 256  # a point covers its own pixel, and nothing beside it


def test_the_whole_view_is_a_copy_and_memory_can_be_given() -> None:
    depth = np.array([[1, np.nan], [3, 4]], np.float32)
    memory = np.empty((2, 2), np.float32)
    assert render_depth(depth, Window.full(2, 2), flip=False, size=(2, 2), out=memory) is memory
    np.testing.assert_array_equal(memory, depth)
    assert np.isnan(render_depth(None, Window.full(2, 2), flip=True, size=(3, 5))).all()
    np.testing.assert_array_equal(depth, np.array([[1, np.nan], [3, 4]], np.float32))


@pytest.mark.parametrize("share", [(1.0, 1.0), (0.5, 0.25)])
def test_zoom_is_the_scale_that_was_drawn_and_divides(share) -> None:
    for scale in (0.5, 1.0, 1.7):
        window, flip = draw_window(np.random.default_rng(3), (60, 80), (scale, scale), True, share)
        assert zoom_of(window, (60, 80), share) == pytest.approx(scale, rel=1e-12)
        depth = np.full((60, 80), 12, np.float32)
        zoom = zoom_of(window, (60, 80), share)
        shown = render_depth(depth, window, flip=flip, size=(30, 40), zoom=zoom)
        assert np.nanmax(shown) == np.nanmin(shown) == pytest.approx(12 / scale, rel=1e-6)


def test_the_zooms_of_a_view_and_of_a_window_in_it_multiply() -> None:
    view, inner = Window(10, 20, 40, 60), Window(3, 4, 13, 24)  # of an image of 60 x 80, and of a view of 30 x 40
    step_y, step_x = (40 - 10) / 30, (60 - 20) / 40
    direct = Window(10 + 3 * step_y, 20 + 4 * step_x, 10 + 13 * step_y, 20 + 24 * step_x)
    assert zoom_of(direct, (60, 80)) == pytest.approx(zoom_of(view, (60, 80)) * zoom_of(inner, (30, 40)))


def test_a_ground_plane_zoomed_by_two_is_the_plane_of_a_lower_camera() -> None:
    """Why dividing is right: rows of a plane seen through a window of half the size, about the horizon, look alike."""
    rows = np.arange(32, dtype=np.float64)[:, None] + 0.5
    plane = np.broadcast_to((100 / rows).astype(np.float32), (32, 8))
    shown = render_depth(np.ascontiguousarray(plane), Window(0, 2, 16, 6), flip=False, size=(32, 8), zoom=2.0)
    source = np.arange(32) // 2 + 0.5  # what each output's pixel shows
    np.testing.assert_allclose(shown, np.broadcast_to((100 / source / 2)[:, None], (32, 8)), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth_HW": np.ones((2, 2))}, "float32"),
        ({"depth_HW": np.ones((2, 2, 1), np.float32)}, "float32"),
        ({"size": (0, 2)}, "at least 1"),
        ({"zoom": 0.0}, "above 0"),
        ({"zoom": math.nan}, "above 0"),
        ({"window": Window(0, 0, 2**25, 1)}, "pixels long"),
    ],
)
def test_wrong_arguments(change, message) -> None:
    arguments = {
        "depth_HW": np.ones((2, 2), np.float32), "window": Window.full(2, 2), "flip": False, "size": (2, 2), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        render_depth(**arguments)
