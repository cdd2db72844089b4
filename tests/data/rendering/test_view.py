"""`render` against a float64 sampler that shares no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.data import IGNORE_INDEX, OUTSIDE_RGB, Window, pixel_checksum, render


def filter_rows(source: np.ndarray, start: float, stop: float, outputs: int) -> np.ndarray:
    """The triangle filter along axis 0, in float64; NaN where the centre is outside."""
    length, step = source.shape[0], (stop - start) / outputs
    support = max(1.0, step)
    result = np.full((outputs, *source.shape[1:]), np.nan)
    for j in range(outputs):
        p = start + (j + 0.5) * step
        if not 0 <= p < length:
            continue
        taps = np.arange(math.floor(p - support) - 1, math.ceil(p + support) + 1)
        weights = np.maximum(0.0, 1.0 - np.abs(taps + 0.5 - p) / support)
        weights[(taps < 0) | (taps >= length)] = 0.0
        result[j] = np.tensordot(weights / weights.sum(), source[taps.clip(0, length - 1)], 1)
    return result


def oracle(image, label, window, flip, size):
    """Rendered image in float64 and label, pixel by pixel."""
    height, width = label.shape
    pixels = filter_rows(image.astype(float), window.y0, window.y1, size[0])
    pixels = filter_rows(pixels.swapaxes(0, 1), window.x0, window.x1, size[1]).swapaxes(0, 1)
    ids = np.full(size, IGNORE_INDEX, np.uint8)
    for i in range(size[0]):
        for j in range(size[1]):
            y = window.y0 + (i + 0.5) * (window.y1 - window.y0) / size[0]
            x = window.x0 + (j + 0.5) * (window.x1 - window.x0) / size[1]
            if 0 <= y < height and 0 <= x < width:
                ids[i, j] = label[math.floor(y), math.floor(x)]
    pixels[np.isnan(pixels).any(axis=2)] = OUTSIDE_RGB
    return (pixels[:, ::-1], ids[:, ::-1]) if flip else (pixels, ids)


def source(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        rng.integers(0, 255, (height, width), dtype=np.uint8),
    )


def assert_renders(image, label, window, flip, size) -> None:
    pixels, ids = render(image, label, window, flip=flip, size=size)
    expected, expected_ids = oracle(image, label, window, flip, size)
    # Pillow rounds to whole levels after each of its two passes: half a level each.
    assert np.abs(pixels - expected).max() <= 1.01
    assert np.array_equal(ids, expected_ids)
    assert pixels.shape == (*size, 3)
    for array in (pixels, ids):
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not np.shares_memory(array, image)


WINDOWS = {
    "full": Window.full(37, 53),
    "inside": Window(3.3, 7.7, 30.1, 41.9),
    "half pixel": Window(10.5, 10.5, 26.5, 34.5),
    "corner": Window(0.0, 20.25, 18.5, 53.0),
    "one pixel": Window(5.0, 6.0, 6.0, 7.0),
    "below a pixel": Window(5.2, 6.9, 5.3, 7.05),
    "twice as large": Window(-18.5, -26.5, 55.5, 79.5),
    "out on one side": Window(-9.7, 4.2, 20.0, 40.0),
    "out by a hair": Window(-1e-9, 0.0, 37.0, 53.0 + 1e-9),
    "mostly outside": Window(36.2, 52.6, 99.0, 120.0),
    "all outside": Window(40.0, -50.0, 60.0, -10.0),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("size", [(16, 24), (37, 53), (70, 91), (1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_windows(name, size, flip) -> None:
    assert_renders(*source(37, 53), WINDOWS[name], flip, size)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (2, 3)])
@pytest.mark.parametrize("window", [(0, 0, 1, 1), (-3, -2, 5, 6), (0.25, 0.5, 0.75, 0.9)])
def test_tiny_images(shape, window) -> None:
    assert_renders(*source(*shape), Window(*map(float, window)), True, (5, 6))


@settings(max_examples=60, deadline=None)
@given(
    y0=st.floats(-30, 40), x0=st.floats(-30, 40), tall=st.floats(0.01, 90), wide=st.floats(0.01, 90),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)), flip=st.booleans(), seed=st.integers(0, 3),
)  # fmt: skip
def test_any_window(y0, x0, tall, wide, size, flip, seed) -> None:
    image, label = source(19, 23, seed)
    assert_renders(image, label, Window(y0, x0, y0 + tall, x0 + wide), flip, size)


def test_full_window_at_full_size_is_the_identity() -> None:
    image, label = source(37, 53)
    pixels, ids = render(image, label, Window.full(37, 53), flip=False, size=(37, 53))
    assert np.array_equal(pixels, image)
    assert np.array_equal(ids, label)


def test_whole_pixel_windows_are_slices_inside_and_outside() -> None:
    image, label = source(37, 53)
    pixels, ids = render(image, label, Window(-4.0, 10.0, 16.0, 70.0), flip=False, size=(20, 60))
    assert np.array_equal(pixels[4:, :43], image[:16, 10:])
    assert np.array_equal(ids[4:, :43], label[:16, 10:])
    outside = np.ones((20, 60), bool)
    outside[4:, :43] = False
    assert (pixels[outside] == OUTSIDE_RGB).all()
    assert (ids[outside] == IGNORE_INDEX).all()


def test_large_coordinates_keep_their_precision() -> None:
    """A window far from the origin equals the same window of a crop near it (Pillow's box is float32)."""
    image, label = source(64, 64)
    wide = np.zeros((64, 9000, 3), np.uint8)
    wide_label = np.zeros((64, 9000), np.uint8)
    wide[:, 8900:8964], wide_label[:, 8900:8964] = image, label
    near = render(image, label, Window(10.3, 10.25, 40.7, 40.75), flip=False, size=(300, 300))
    far = render(wide, wide_label, Window(10.3, 8910.25, 40.7, 8940.75), flip=False, size=(300, 300))
    assert np.abs(near[0].astype(int) - far[0]).max() <= 1
    assert np.array_equal(near[1], far[1])


def test_without_a_label_all_is_void() -> None:
    image, _ = source(5, 5)
    assert (render(image, None, Window.full(5, 5), flip=True, size=(3, 4))[1] == IGNORE_INDEX).all()


def test_strided_sources_render_alike() -> None:
    image, label = source(37, 53)
    views = render(image[::-1, ::2], label[::-1, ::2], Window.full(37, 27), flip=False, size=(9, 9))
    copies = render(image[::-1, ::2].copy(), label[::-1, ::2].copy(), Window.full(37, 27), flip=False, size=(9, 9))
    assert all(np.array_equal(a, b) for a, b in zip(views, copies, strict=True))


@pytest.mark.parametrize(
    ("image", "label", "size"),
    [
        (np.zeros((4, 4), np.uint8), None, (2, 2)),
        (np.zeros((4, 4, 3), np.float32), None, (2, 2)),
        (np.zeros((0, 4, 3), np.uint8), None, (2, 2)),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), (2, 2)),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.int64), (2, 2)),
        (np.zeros((4, 4, 3), np.uint8), None, (0, 2)),
    ],
)
def test_wrong_arguments(image, label, size) -> None:
    with pytest.raises(ValueError, match="got"):
        render(image, label, Window.full(4, 4), flip=False, size=size)


@pytest.mark.parametrize("edges", [(0, 0, 0, 1), (2, 0, 1, 1), (0, 0, math.nan, 1), (0, 0, math.inf, 1)])
def test_windows_without_an_area_are_refused(edges) -> None:
    with pytest.raises(ValueError, match="window"):
        Window(*edges)


def test_window_scales_with_the_image() -> None:
    assert Window(1.0, 2.0, 3.0, 4.0).scaled(2.0, 0.5).as_tuple() == (2.0, 1.0, 6.0, 2.0)


def test_checksum_sees_bytes_and_shape_but_not_strides() -> None:
    image, _ = source(6, 8)
    assert pixel_checksum(image) == pixel_checksum(image.copy()) == pixel_checksum(image[::-1][::-1])
    assert 0 <= pixel_checksum(image) < 2**64
    assert pixel_checksum(image) != pixel_checksum(image.reshape(8, 6, 3))
    changed = image.copy()
    changed[5, 7, 2] ^= 1
    assert pixel_checksum(image) != pixel_checksum(changed)
    # A constant of the store's format: it must never change.
    assert pixel_checksum(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)) == CHECKSUM_OF_ARANGE


CHECKSUM_OF_ARANGE = 7580658050685744798
