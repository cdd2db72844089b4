"""One image in the style of another: against the published algorithm with a full spectrum, and sorted levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.data import Window, render
from kdcache.data.restyling.transfer import fourier_transfer, match_histograms, replaced_frequencies

SIDES = st.tuples(st.integers(2, 24), st.integers(2, 24))


def noise(size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def published(source: np.ndarray, target: np.ndarray, beta: float) -> np.ndarray:
    """Both spectra whole, shifted, a square around the middle swapped; float64, neither rounded nor clipped."""
    height, width = source.shape[:2]
    reach = int(np.floor(min(height, width) * beta))
    result = np.empty(source.shape)
    for channel in range(3):
        own, other = (np.fft.fft2(image[..., channel].astype(np.float64)) for image in (source, target))
        amplitude, wanted = np.fft.fftshift(np.abs(own)), np.fft.fftshift(np.abs(other))
        y, x = height // 2, width // 2
        square = np.s_[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
        amplitude[square] = wanted[square]
        back = np.fft.ifft2(np.fft.ifftshift(amplitude) * np.exp(1j * np.angle(own)))
        result[..., channel] = back.real
    return result


@given(size=SIDES, beta=st.sampled_from([0.01, 0.05, 0.09, 0.2, 0.33]), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_transfer_is_the_published_one(size: tuple[int, int], beta: float, seed: int) -> None:
    source, target = noise(size, seed), noise(size, seed + 100)
    wanted = np.clip(published(source, target, beta), 0, 255)
    restyled = fourier_transfer(source, target, beta)
    assert restyled.dtype == np.uint8
    np.testing.assert_allclose(restyled, wanted, atol=0.5 + 1e-6)


def test_amplitudes_are_the_targets_where_they_are_replaced_and_the_sources_elsewhere() -> None:
    source, target = noise((32, 48), 0) // 2 + 64, noise((32, 48), 1) // 4 + 96
    restyled = fourier_transfer(source, target, 0.1)
    assert replaced_frequencies((32, 48), 0.1) == 3
    spectra = [np.abs(np.fft.fft2(image.astype(float), axes=(0, 1))) for image in (restyled, source, target)]
    np.testing.assert_allclose(spectra[0][:4, :4], spectra[2][:4, :4], atol=60)  # 1,536 pixels, each rounded
    np.testing.assert_allclose(spectra[0][4:16, 4:16], spectra[1][4:16, 4:16], atol=60)
    assert np.abs(spectra[0][:4, :4] - spectra[1][:4, :4]).max() > 1000


def test_a_beta_below_one_frequency_moves_the_mean_colour_alone() -> None:
    source, target = noise((30, 40), 0) // 4 + 90, noise((30, 40), 1) // 4 + 70
    restyled = fourier_transfer(source, target, 0.01).astype(int)
    np.testing.assert_allclose(restyled.mean((0, 1)), target.mean((0, 1)), atol=0.5)
    assert len({tuple(step) for step in (restyled - source).reshape(-1, 3)}) == 1


def test_a_target_of_another_size_is_resized_to_the_source() -> None:
    source, target = noise((24, 32), 0), noise((50, 41), 1)
    resized = render(target, None, Window.full(50, 41), flip=False, size=(24, 32))[0]
    np.testing.assert_array_equal(fourier_transfer(source, target, 0.2), fourier_transfer(source, resized, 0.2))


@given(source=SIDES, seed=st.integers(0, 99))
@settings(deadline=None)
def test_levels_follow_the_targets_quantiles(source: tuple[int, int], seed: int) -> None:
    image, target = noise(source, seed) // 3, noise((17, 23), seed + 100) // 2 + 50
    matched = match_histograms(image, target)
    for channel in range(3):
        levels = np.sort(target[..., channel].reshape(-1)).astype(float)
        own = image[..., channel].astype(float)
        # The share of pixels up to a level, then the target's level of that share, between neighbours linearly.
        shares = (own[..., None, None] >= own).mean((2, 3))
        steps = np.unique(levels)
        reached = np.searchsorted(levels, steps, side="right") / len(levels)
        np.testing.assert_allclose(matched[..., channel], np.interp(shares, reached, steps), atol=0.5 + 1e-9)


def test_an_image_that_is_its_own_target_stays() -> None:
    image = noise((20, 30), 3)
    np.testing.assert_array_equal(match_histograms(image, image), image)
    np.testing.assert_array_equal(fourier_transfer(image, image, 0.3), image)


@pytest.mark.parametrize("transfer", [match_histograms, lambda a, b: fourier_transfer(a, b, 0.1)])
def test_images_are_not_written_to(transfer) -> None:
    source, target = noise((20, 30), 3), noise((10, 12), 4)
    source.flags.writeable = target.flags.writeable = False
    assert transfer(source, target).shape == (20, 30, 3)
