"""A transform of somebody's own, and beside its results the window and the flip that targets are moved by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdcache.errors import DataError


def traced(transform: Any) -> Callable[..., Any]:
    """A transform that also returns what its pixels show, for `Cache.targets_for`.

        augment = kdcache.traced(v2.Compose([v2.RandomResizedCrop((288, 384)), v2.RandomHorizontalFlip()]))
        image, mask, window, flip = augment(image, mask)

        augment = kdcache.traced(A.Compose([A.RandomResizedCrop((288, 384)), A.HorizontalFlip()]))
        result = augment(image=image, mask=mask)                   # has "window" and "flip", too

    The random numbers are those of the transform itself. Changes of colour pass; a rotation is refused.

    Args:
        transform: a `torchvision.transforms.v2` transform, or `albumentations.Compose`.
    Returns: a function that takes what the transform takes. The window is an array (y0, x0, y1, x1) in pixels of the
        image that it was given, the flip a bool; torchvision's come behind the other results, albumentations' by name.
    Raises: DataError for another transform. The function raises it for one that moves pixels otherwise.
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
