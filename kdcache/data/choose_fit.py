"""The fit of a data set to a size, where none is asked for: by the shapes of its images."""

from __future__ import annotations

from typing import Literal

from kdcache.data.rendering.fit import MOST_SQUASHED, Fit, squashed
from kdcache.data.sample import Split
from kdcache.errors import DataError

MOST_IMAGES = 128
"""As many images are looked at, evenly spread."""


def choose_fit(fit: Literal["auto", "squash", "crop", "pad"], split: Split, size: tuple[int, int]) -> Fit:
    """Resolve `auto`: pad where the shape of an image differs from the size's by more than 5 %, else squash.

    Args:
        size: (H, W) of the pixels.
    """
    if fit != "auto":
        return fit
    count = min(len(split), MOST_IMAGES)
    for index in (at * len(split) // count for at in range(count)):
        try:
            if squashed(split.image_size(index), size) > MOST_SQUASHED:
                return "pad"
        except DataError:  # named where the image is read
            continue
    return "squash"
