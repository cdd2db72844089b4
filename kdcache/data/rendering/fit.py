"""How an image of one shape becomes pixels of another: squashed, cropped or padded.

    squash  the whole image, each axis scaled separately: a square becomes a rectangle
    crop    the largest part with the shape of the pixels: the rest is not seen
    pad     the whole image amid grey, void and without a target: nothing is learnt from the margin

A fit decides the size of a view at zoom 1, as a part of the image's height and width. If image and pixels have exactly
the same shape, all three are equal.
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
    """Return (height, width) of a view at zoom 1, as a part of the image's height and width.

    "squash" gives (1, 1). "crop" gives at most 1, because it leaves out a part. "pad" gives at least 1, because margins
    are added.

    Args:
        fit: how an image with another aspect ratio fills the view.
        image_size: (H, W) of the image in pixels.
        size: (H, W) of the view in pixels.
    """
    tall, wide = image_size[0] * size[1], image_size[1] * size[0]
    if fit == "squash" or tall == wide:
        return 1.0, 1.0
    if (fit == "crop") == (tall > wide):
        return wide / tall, 1.0
    return 1.0, tall / wide


def choose_fit(split: Split, size: tuple[int, int]) -> tuple[Fit, str | None]:
    """Return the default fit of a build or training: "pad" if aspect ratios of images and views differ, else "squash".

    One image whose aspect ratio differs from the views' by more than 5 % is enough for "pad".

    Args:
        split: up to about 500 of its images are compared with the views.
        size: (H, W) of the views in pixels.
    Returns: the fit, and for "pad" a note with the reason, else None.
    """
    for index in range(0, len(split), max(1, len(split) // _LOOKED_AT)):
        height, width = split.image_size(index)
        if (difference := squashed((height, width), size)) > MOST_SQUASHED:
            return "pad", (
                f"images are padded, and padding teaches nothing (--fit pad): {split.ids[index]} of {height}x{width} "
                f"has another shape than {size[0]}x{size[1]} by {100 * difference:.0f} %, more than "
                f"{100 * MOST_SQUASHED:.0f} %; --fit crop or squash for the other ways"
            )
    return "squash", None


def whole_window(fit: Fit, image_size: tuple[int, int], size: tuple[int, int]) -> Window:
    """Return the centred window of a view at zoom 1, in pixels of the image. With "pad", it reaches beyond the image.

    Args:
        fit: how an image with another aspect ratio fills the view.
        image_size: (H, W) of the image in pixels.
        size: (H, W) of the view in pixels.
    """
    return middle_window(image_size, fitted_share(fit, image_size, size))


def middle_window(image_size: tuple[int, int], share: tuple[float, float]) -> Window:
    """Return the centred window with a given share of an image's height and width, in pixels of the image.

    Args:
        image_size: (H, W) of the image in pixels.
        share: (height, width) of the window as a part of the image's. Above 1, the window reaches beyond the image.
    """
    if share == (1.0, 1.0):
        return Window.full(*image_size)
    (y0, y1), (x0, x1) = (_middle(length, part) for length, part in zip(image_size, share, strict=True))
    return Window(y0, x0, y1, x1)


def squashed(image_size: tuple[int, int], size: tuple[int, int]) -> float:
    """Return by how much two aspect ratios differ: 0 if they are equal, 0.05 for 5 % in either direction.

    `image_size` and `size` are (H, W).
    """
    ratio = image_size[0] * size[1] / (image_size[1] * size[0])
    return round(max(ratio, 1 / ratio) - 1, 9)  # so that 105 to 100 is 0.05


def _middle(length: int, part: float) -> tuple[float, float]:
    return (length - length * part) / 2, (length + length * part) / 2
