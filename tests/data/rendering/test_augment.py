"""Random windows and colours."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.data import Augmentation, Window, colour_jitter, draw_window, inside_rectangle
from kdcache.data.rendering.augment import LUMA


def pixels(seed: int = 0) -> np.ndarray:
    """Mid-tone noise, so that small changes clip nothing."""
    return np.random.default_rng(seed).integers(90, 160, (24, 32, 3), dtype=np.uint8)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_zoomed_in_windows_lie_inside_with_the_view_s_aspect() -> None:
    rng = generator()
    scales, corners = [], []
    for _ in range(2000):
        window, _ = draw_window(rng, (60, 80), (1.0, 2.0), True)
        assert -1e-9 <= window.y0 < window.y1 <= 60 + 1e-9
        assert -1e-9 <= window.x0 < window.x1 <= 80 + 1e-9
        assert (window.y1 - window.y0) * 80 == pytest.approx((window.x1 - window.x0) * 60)
        scales.append(60 / (window.y1 - window.y0))
        corners.append(window.y0 / (60 - (window.y1 - window.y0)))
    for drawn, low, high in ((scales, 1, 2), (corners, 0, 1)):
        assert np.quantile(drawn, (0.25, 0.5, 0.75)) == pytest.approx(
            low + (high - low) * np.array([0.25, 0.5, 0.75]), abs=0.05
        )


def test_zoomed_out_windows_hold_the_view() -> None:
    rng = generator()
    for _ in range(200):
        window, _ = draw_window(rng, (60, 80), (0.5, 0.999), False)
        assert window.y0 <= 0 < 60 <= window.y1 + 1e-9
        assert window.x0 <= 0 < 80 <= window.x1 + 1e-9


@pytest.mark.parametrize("scale", [0.5, 0.8, 2.0])
def test_a_window_is_the_view_divided_by_the_scale(scale: float) -> None:
    window, _ = draw_window(generator(), (60, 80), (scale, scale), False)
    assert (window.y1 - window.y0, window.x1 - window.x0) == pytest.approx((60 / scale, 80 / scale))


def test_scale_one_is_the_full_view() -> None:
    assert draw_window(generator(), (60, 80), (1.0, 1.0), False) == (Window.full(60, 80), False)


def test_flips_are_half_of_the_draws_or_none_and_leave_the_stream_aligned() -> None:
    flipping, still = generator(3), generator(3)
    drawn = [draw_window(flipping, (6, 8), (0.5, 2.0), True) for _ in range(1000)]
    plain = [draw_window(still, (6, 8), (0.5, 2.0), False) for _ in range(1000)]
    assert 400 < sum(flip for _, flip in drawn) < 600
    assert not any(flip for _, flip in plain)
    assert [window for window, _ in drawn] == [window for window, _ in plain]


def test_jitter_is_a_function_of_the_seed_and_leaves_its_input() -> None:
    image = pixels()
    before = image.copy()
    first = colour_jitter(generator(5), image, 0.3)
    assert np.array_equal(first, colour_jitter(generator(5), image, 0.3))
    assert not np.array_equal(first, colour_jitter(generator(6), image, 0.3))
    assert np.array_equal(image, before)
    assert first.dtype == np.uint8
    assert first.shape == image.shape
    assert first.flags.writeable
    assert first.flags.c_contiguous


def test_strength_zero_returns_the_input_and_draws_as_much() -> None:
    image, off, on = pixels(), generator(1), generator(1)
    assert colour_jitter(off, image, 0.0) is image
    colour_jitter(on, image, 0.5)
    assert off.random() == on.random()


def test_jitter_of_grey_stays_grey() -> None:
    grey = np.repeat(pixels()[..., :1], 3, axis=2)
    for seed in range(20):
        result = colour_jitter(generator(seed), grey, 0.3).astype(int)
        assert np.ptp(result, axis=2).max() <= 1


class Fixed:
    """A generator whose draws are given: brightness, contrast, saturation, hue in units of the strength."""

    def __init__(self, *draws: float) -> None:
        self.draws = np.array(draws)

    def uniform(self, low: float, high: float, count: int) -> np.ndarray:
        assert (low, count) == (-high, 4)
        return self.draws * high


def test_brightness_contrast_and_saturation_are_those_of_the_field() -> None:
    image = pixels()
    values, luma = image.astype(float), image.astype(float) @ LUMA
    expected = {
        (1, 0, 0, 0): values * 1.2,
        (0, 1, 0, 0): values * 1.2 - 0.2 * luma[::2, ::2].mean(),
        (0, 0, 1, 0): values * 1.2 - 0.2 * luma[..., None],
        (0, 0, -1, 0): values * 0.8 + 0.2 * luma[..., None],
    }
    for draws, wanted in expected.items():
        assert np.abs(colour_jitter(Fixed(*draws), image, 0.2) - wanted.clip(0, 255)).max() <= 0.51


def test_a_third_of_a_turn_maps_red_to_green() -> None:
    red = np.full((4, 4, 3), (200, 30, 30), np.uint8)
    assert np.abs(colour_jitter(Fixed(0, 0, 0, 2), red, 1.0).astype(int) - (30, 200, 30)).max() <= 1


def test_augmentation_checks_its_values() -> None:
    assert Augmentation().scale == (0.5, 2.0)
    assert Augmentation.off() == Augmentation((1.0, 1.0), False, 0.0)
    for wrong in ({"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"jitter": -0.1}, {"jitter": 1.5}):
        with pytest.raises(ValueError, match="got"):
            Augmentation(**wrong)


def test_a_flip_mirrors_where_a_view_shows_its_image() -> None:
    """A window that begins left of the image shows it at the right, and mirrored at the left."""
    plain, mirrored = inside_rectangle([[0, -10, 20, 10]] * 2, np.array([False, True]), [[20, 20]] * 2, (40, 40))
    assert plain.tolist() == [0, 20, 40, 40]
    assert mirrored.tolist() == [0, 0, 40, 20]
