"""Wrap a user's transform to return also the window and the flip, which move targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdcache.errors import DataError


def traced(transform: Any) -> Callable[..., Any]:
    """Wrap a transform so that it also returns the window and the flip of its result, for `Cache.targets_for`.

    The window is the part of the given image that the result shows. The flip tells whether the result is mirrored.

    >>> import kdcache
    >>> from torchvision.transforms import v2
    >>> augment = kdcache.traced(v2.Compose([v2.CenterCrop((48, 64)), v2.RandomHorizontalFlip(p=1)]))
    >>> image, window, flip = augment(torch.zeros(3, 96, 128))
    >>> window.tolist(), flip
    ([24.0, 32.0, 72.0, 96.0], True)

    With albumentations, `augment(image=image, mask=mask)` returns a dict that also has "window" and "flip".

    Args:
        transform: a `torchvision.transforms.v2` transform, or an `albumentations.Compose`. It may change colours.
    Returns: a function with the transform's arguments. It returns the transform's results, then the window and the
        flip. The window is float64 (4,), y0, x0, y1, x1 in pixels of the given image. The flip is a bool.
    Raises: DataError for another kind of transform. The returned function raises it for transforms such as rotations,
        which a window and a flip cannot describe.
    """
    homes = [kind.__module__ for kind in type(transform).__mro__]
    if any(home.startswith("torchvision.transforms.v2") for home in homes):
        from kdcache.data.tracing.torchvision import TracedTransform

        return TracedTransform(transform)
    if any(home.partition(".")[0] == "albumentations" for home in homes):
        from kdcache.data.tracing.albumentations import TracedCompose

        return TracedCompose(transform)
    raise DataError(
        f"Cannot trace a {type(transform).__module__}.{type(transform).__qualname__}",
        fix="Use torchvision.transforms.v2 or albumentations.Compose. Or give Cache.targets_for the windows and flips "
        "that you draw yourself.",
    )
