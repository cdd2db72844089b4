"""How an image of one shape becomes pixels of another: squashed, cropped or padded.

    squash  the whole image, each axis by a factor of its own: what is square no longer is
    crop    the largest part with the shape of the pixels: what lies outside is not seen
    pad     the whole image amid grey, void and without a target: nothing is learnt of the margin

A fit decides what a view at zoom 1 measures, as a part of the image's height and width. Where image and pixels have the
same shape, to the last digit, all three are one.
"""

from __future__ import annotations

from typing import Literal

from kdcache.data.rendering.view import Window
from kdcache.data.sample import Split

Fit = Literal["squash", "crop", "pad"]

MOST_SQUASHED = 0.05
"""By how much the shapes of images and pixels may differ before images are padded by default."""

_LOOKED_AT = 500
"""Images of a split, evenly spread, whose shapes decide."""


def fitted_share(fit: Fit, image_size: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """What a view at zoom 1 measures, as a part of the image's height and width.

    Args:
        image_size, size: (H, W) of the image and of the pixels that it becomes.
    Returns: (1, 1) for squash and for equal shapes; at most 1 for crop, at least 1 for pad.
    """
    tall, wide = image_size[0] * size[1], image_size[1] * size[0]
    if fit == "squash" or tall == wide:
        return 1.0, 1.0
    if (fit == "crop") == (tall > wide):
        return wide / tall, 1.0
    return 1.0, tall / wide


def choose_fit(split: Split, size: tuple[int, int]) -> tuple[Fit, str | None]:
    """The fit of a build or a training that names none: pad where an image has another shape than its pixels.

    Args:
        size: (H, W) of the pixels.
    Returns: the fit, and for `pad` a note that says why.
    """
    for index in range(0, len(split), max(1, len(split) // _LOOKED_AT)):
        height, width = split.image_size(index)
        if (other := squashed((height, width), size)) > MOST_SQUASHED:
            return "pad", (
                f"images are padded, and padding teaches nothing (--fit pad): {split.ids[index]} of {height}x{width} "
                f"has another shape than {size[0]}x{size[1]} by {100 * other:.0f} %, more than "
                f"{100 * MOST_SQUASHED:.0f} %; --fit crop or squash for the other ways"
            )
    return "squash", None


def whole_window(fit: Fit, image_size: tuple[int, int], size: tuple[int, int]) -> Window:
    """The view at zoom 1 that lies in the image's middle, in its pixels; padding lies outside it."""
    return middle_window(image_size, fitted_share(fit, image_size, size))


def middle_window(image_size: tuple[int, int], share: tuple[float, float]) -> Window:
    """The window in an image's middle that measures `share` of its height and width, in pixels of the image."""
    if share == (1.0, 1.0):
        return Window.full(*image_size)
    (y0, y1), (x0, x1) = (_middle(length, part) for length, part in zip(image_size, share, strict=True))
    return Window(y0, x0, y1, x1)


def squashed(image_size: tuple[int, int], size: tuple[int, int]) -> float:
    """By how much the shapes of an image and of pixels differ: 0 for equal ones, 0.05 for 5 % in either direction."""
    ratio = image_size[0] * size[1] / (image_size[1] * size[0])
    return round(max(ratio, 1 / ratio) - 1, 9)  # so that 105 to 100 is 0.05


def _middle(length: int, part: float) -> tuple[float, float]:
    return (length - length * part) / 2, (length + length * part) / 2
