"""The kernel of `render`, byte for byte against Pillow, with the margins made as pictures."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from kdcache.data import IGNORE_INDEX, OUTSIDE_RGB, Window, render


def edge(start: float, stop: float, outputs: int, j: int) -> float:
    return stop if j == outputs else start + j * ((stop - start) / outputs)


def triangle_mean(part: np.ndarray, centre: float, support: float) -> np.ndarray:
    """The filter at `centre` along axis 0, from the pixels there are, summed in order and rounded."""
    low, high = max(math.floor(centre - support), 0), min(math.ceil(centre + support) + 1, len(part))
    weights = [max(1.0 - abs(tap + 0.5 - centre) / support, 0.0) for tap in range(low, high)]
    total, mean = sum(weights), np.zeros(part.shape[1:])
    for tap, weight in zip(range(low, high), weights, strict=True):
        mean = mean + (weight / total) * part[tap]
    return np.rint(mean).astype(np.uint8)[None]


def extend(image: np.ndarray, start: float, stop: float, outputs: int):
    """The part along axis 0 with its margins, Pillow's box in it, and the range of inside outputs; None if empty."""
    step = (stop - start) / outputs
    centres = start + (np.arange(outputs) + 0.5) * step
    first, last = np.searchsorted(centres, (0.0, float(len(image))))
    if first == last:
        return None
    reach = math.ceil(max(1.0, step)) + 1
    low, high = edge(start, stop, outputs, int(first)), edge(start, stop, outputs, int(last))
    origin, end = max(math.floor(low) - reach, 0), min(math.ceil(high) + reach, len(image))
    part = image[origin:end]
    low, high = low - origin, high - origin
    before, after = (math.ceil(over) if over > 1e-6 else 0 for over in (-low, high - len(part)))
    margins = [triangle_mean(part, centres[j] - origin, max(1.0, step)) for j in (first, last - 1)]
    extended = np.concatenate([margins[0].repeat(before, 0), part, margins[1].repeat(after, 0)])
    return extended, (max(low + before, 0.0), min(high + before, float(len(extended)))), (int(first), int(last))


def pillow(image: np.ndarray, window: Window, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """Columns first, whatever the version's order: one pass a call."""
    canvas = np.full((*size, 3), OUTSIDE_RGB, np.uint8)
    rows = extend(image, window.y0, window.y1, size[0])
    columns = extend(image.swapaxes(0, 1) if rows is None else rows[0].swapaxes(0, 1), window.x0, window.x1, size[1])
    if rows is not None and columns is not None:
        (y0, y1), (top, bottom) = rows[1:]
        picture, (x0, x1), (left, right) = columns
        source = Image.fromarray(np.ascontiguousarray(picture.swapaxes(0, 1)))
        bilinear, height = Image.Resampling.BILINEAR, source.size[1]
        wide = source.resize((right - left, height), bilinear, box=(x0, 0, x1, height))
        whole = wide.resize((right - left, bottom - top), bilinear, box=(0, y0, right - left, y1))
        canvas[top:bottom, left:right] = np.asarray(whole)
    return canvas[:, ::-1] if flip else canvas


def nearest(label: np.ndarray, window: Window, flip: bool, size: tuple[int, int]) -> np.ndarray:
    y = window.y0 + (np.arange(size[0]) + 0.5) * ((window.y1 - window.y0) / size[0])
    x = window.x0 + (np.arange(size[1]) + 0.5) * ((window.x1 - window.x0) / size[1])
    inside = ((y >= 0) & (y < label.shape[0]))[:, None] & ((x >= 0) & (x < label.shape[1]))
    rows, columns = (np.clip(p, 0, n - 1).astype(int) for p, n in zip((y, x), label.shape, strict=True))
    result = np.where(inside, label[rows][:, columns], IGNORE_INDEX)
    return result[:, ::-1] if flip else result


def source(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape, 3), dtype=np.uint8), rng.integers(0, 255, shape, dtype=np.uint8)


def assert_same(shape, window, flip, size, seed=0) -> None:
    image, label = source(shape, seed)
    pixels, ids = render(image, label, window, flip=flip, size=size)
    assert np.array_equal(pixels, pillow(image, window, flip, size))
    assert np.array_equal(ids, nearest(label, window, flip, size))


SIDE = st.integers(1, 80)
# Halves to twelfths meet borders and rounding exactly; floats meet nothing.
PLACE = st.one_of(st.floats(-60, 90), st.builds(lambda n, d: n / d, st.integers(-300, 300), st.integers(1, 12)))
EXTENT = st.one_of(st.floats(0.01, 400), st.builds(lambda n, d: n / d, st.integers(1, 900), st.integers(1, 12)))


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(SIDE, SIDE), size=st.tuples(SIDE, SIDE), corner=st.tuples(PLACE, PLACE),
    extent=st.tuples(EXTENT, EXTENT), flip=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@example(shape=(46, 9), size=(76, 19), corner=(-48.0, -30.0), extent=(94.5, 61.5), flip=True, seed=0)  # ties in means
@example(shape=(80, 3), size=(2, 80), corner=(-1.0, 0.5), extent=(90.0, 0.25), flip=False, seed=0)
@example(shape=(3, 80), size=(80, 2), corner=(0.5, -1.0), extent=(0.25, 90.0), flip=False, seed=0)
def test_any_window_is_pillow_s(shape, size, corner, extent, flip, seed) -> None:
    (y0, x0), (tall, wide) = corner, extent
    assert_same(shape, Window(y0, x0, y0 + tall, x0 + wide), flip, size, seed)


@pytest.mark.parametrize("size", [(144, 192), (288, 384), (100, 37), (360, 480)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [(0, 0, 360, 480), (-100.3, -77.7, 500.1, 700.9), (33.3, 44.4, 201.7, 299.9)])
def test_images_of_common_sizes(size, flip, window) -> None:
    assert_same((360, 480), Window(*map(float, window)), flip, size)


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (96, 300)])
def test_one_call_of_pillow_where_its_order_is_ours(shape) -> None:
    """Pillow 13 takes rows first when the height loses more than twice as many pixels as the width."""
    image, label = source(shape, 1)
    size = (shape[0] // 2, shape[1] // 2)
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(render(image, label, Window.full(*shape), flip=False, size=size)[0], np.asarray(expected))


@pytest.mark.parametrize("window", [Window(-1e6, -1e6, 1e6, 1e6), Window(0.0, 0.0, 1e-300, 1e-300)])
def test_extreme_windows_stay_within_memory(window) -> None:
    image, label = source((5, 7), 0)
    pixels, ids = render(image, label, window, flip=False, size=(3, 3))
    assert pixels[1, 1].tolist() in [*image.reshape(-1, 3).tolist(), np.rint(image.mean((0, 1))).tolist()]
    assert ids[1, 1] in label


def test_windows_beyond_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 16777216 pixels"):
        render(*source((5, 7), 0), Window(0.0, 0.0, 1.0, 2.0**24 + 2), flip=False, size=(3, 3))


def test_whole_numbers_and_borrowed_memory_pass(tmp_path: Path) -> None:
    image, label = source((9, 12), 0)
    expected = render(image, label, Window(1.0, 2.0, 8.0, 11.0), flip=True, size=(5, 6))
    np.save(tmp_path / "image.npy", image)
    label.setflags(write=False)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    rendered = render(mapped, label, Window(1, 2, 8, 11), flip=np.True_, size=(5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(rendered, expected, strict=True))


CODE = """
import hashlib, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from kdcache.data import Window, colour_jitter, render
assert "numba" not in sys.modules
image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
def draw(seed):
    window = Window(-10.3 + seed, -7.7, 70.9, 95.3 - seed)
    pixels, label = render(image, image[..., 0].copy(), window, flip=seed % 2 == 0, size=(40, 57))
    jittered = colour_jitter(np.random.default_rng(seed), pixels, 0.3)
    return hashlib.sha256(jittered.tobytes() + label.tobytes()).hexdigest()
with ThreadPoolExecutor(8) as pool:
    print(list(pool.map(draw, range(16))) == [draw(seed) for seed in range(16)], draw(3))
"""


@pytest.mark.slow
def test_threads_come_first_at_once_and_later_processes_load_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", CODE]
    outputs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert outputs[0].startswith("True ")
    assert outputs[0] == outputs[1]
    assert len(list(tmp_path.rglob("*.nbi"))) == 2


def test_many_threads_draw_alike() -> None:
    image, label = source((90, 120), 3)

    def draw(shift: int) -> bytes:
        window = Window(-10.5 + shift, 3.25, 80.0, 140.75 - shift)
        return b"".join(part.tobytes() for part in render(image, label, window, flip=shift % 2 > 0, size=(72, 96)))

    expected = [draw(shift) for shift in range(32)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, range(32))) == expected
