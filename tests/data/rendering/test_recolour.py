"""Colour jitter against its formula in float64, and against Pillow's matrix conversion."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdcache.data import colour_jitter
from kdcache.data.rendering.augment import HUE_TURNS_PER_STRENGTH, LUMA


def affine(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """The map (3, 4) that `colour_jitter` draws, each factor as a matrix."""
    brightness, contrast, saturation, hue = rng.uniform(-strength, strength, 4)
    saturate = (1 + saturation) * np.eye(3) - saturation * np.tile(LUMA, (3, 1))
    angle = 2 * math.pi * hue * HUE_TURNS_PER_STRENGTH
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    rotate = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
    matrix = (1 + brightness) * saturate @ rotate
    grey = LUMA @ matrix @ image[::2, ::2].reshape(-1, 3).mean(0)
    return np.column_stack([(1 + contrast) * matrix, np.full(3, -contrast * grey)])


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.001, 1), st.integers(0, 1000))
def test_jitter_is_its_formula(height, width, strength, seed) -> None:
    image = picture(height, width, seed)
    result = colour_jitter(np.random.default_rng(seed), image, strength)
    drawn = affine(np.random.default_rng(seed), image, strength)
    exact = (image @ drawn[:, :3].T + drawn[:, 3]).clip(0, 255)
    assert np.abs(result - exact).max() <= 0.501
    by_pillow = Image.fromarray(image).convert("RGB", tuple(drawn.ravel().tolist()))
    assert np.abs(result.astype(int) - np.asarray(by_pillow)).max() <= 1


@pytest.mark.parametrize("shape", [(16, 32), (1, 511), (1, 513), (144, 192)])  # blocks are 512 pixels
def test_jitter_has_pillow_s_bytes(shape) -> None:
    image = picture(*shape, 2)
    drawn = affine(np.random.default_rng(7), image, 0.3)
    by_pillow = Image.fromarray(image).convert("RGB", tuple(drawn.ravel().tolist()))
    assert np.array_equal(colour_jitter(np.random.default_rng(7), image, 0.3), np.asarray(by_pillow))


def test_strided_pictures_are_coloured_alike() -> None:
    image = picture(20, 30, 4)[::-1, ::2]
    results = [colour_jitter(np.random.default_rng(3), pixels, 0.4) for pixels in (image, image.copy())]
    assert np.array_equal(*results)
    assert results[0].flags.c_contiguous
