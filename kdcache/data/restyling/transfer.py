"""One image in the style of another, without a network.

Both are a few lines of numpy: scikit-image, which has histogram matching, brings scipy and four libraries more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdcache.data.rendering.view import Window, render
from kdcache.data.sample import Pixels


def replaced_frequencies(size: tuple[int, int], beta: float) -> int:
    """The highest frequency that `fourier_transfer` replaces, in periods per image; 0 is the mean colour alone."""
    return int(min(size) * beta)


def fourier_transfer(source_HW3: Pixels, target_HW3: Pixels, beta: float) -> Pixels:
    """The source with the target's amplitudes at low frequencies, channel by channel; phases stay the source's.

    The square of frequencies up to `replaced_frequencies` along each axis is replaced. The target is resized to the
    source's size first, as published: periods per image are compared, whatever the sizes.

    Args:
        source_HW3, target_HW3: uint8 RGB, of any sizes.
        beta: reach of the square as a part of the shorter side, above 0 and at most 0.5.
    Returns: uint8 (H, W, 3) of the source's size, rounded and clipped.
    Source: Yang and Soatto 2020, arXiv 2004.05498 (FDA), equation 1.
    """
    size = height, width = source_HW3.shape[0], source_HW3.shape[1]
    if target_HW3.shape[:2] != size:
        window = Window.full(*target_HW3.shape[:2])
        target_HW3 = render(target_HW3, None, window, flip=False, size=size)[0]
    reach = replaced_frequencies(size, beta)
    spectrum, other = (np.fft.rfft2(pixels, axes=(0, 1)) for pixels in (source_HW3, target_HW3))
    rows = np.flatnonzero(np.abs(np.fft.fftfreq(height, 1 / height)) <= reach)
    low = np.ix_(rows, np.arange(min(reach, width // 2) + 1))
    spectrum[low] = np.abs(other[low]) * np.exp(1j * np.angle(spectrum[low]))
    return _levels(np.fft.irfft2(spectrum, s=size, axes=(0, 1)))


def match_histograms(source_HW3: Pixels, target_HW3: Pixels) -> Pixels:
    """The source with each channel's levels moved so that their distribution is that of the target's channel.

    A level goes to the target's level of the same quantile, linearly between those that the target has.

    Args:
        source_HW3, target_HW3: uint8 RGB, of any sizes.
    Returns: uint8 (H, W, 3) of the source's size.
    """
    result = np.empty_like(source_HW3)
    for channel in range(3):
        source, target = source_HW3[..., channel], target_HW3[..., channel]
        source_counts, target_counts = (np.bincount(levels.reshape(-1), minlength=256) for levels in (source, target))
        occurring = np.flatnonzero(target_counts)
        source_quantiles = source_counts.cumsum() / source.size
        target_quantiles = target_counts[occurring].cumsum() / target.size
        table = _levels(np.interp(source_quantiles, target_quantiles, occurring))
        result[..., channel] = table[source]
    return result


def _levels(values: npt.NDArray[np.float64]) -> Pixels:
    levels: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return levels
