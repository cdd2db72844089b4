"""Footprints from the applied parameters that `albumentations.Compose(save_applied_params=True)` records."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import albumentations as A

from kdcache.data.tracing.footprint import Footprint, no_window
from kdcache.errors import DataError

_RESIZES = ("Resize", "RandomScale", "LongestMaxSize", "SmallestMaxSize")
_IN_PLACE = (
    *("NoOp", "ToTensorV2", "CoarseDropout", "GridDropout", "PixelDropout", "MaskDropout", "XYMasking", "Erasing"),
    *("ConstrainedCoarseDropout", "Morphological"),
)
"""Transforms of image and mask that move no pixel."""


class TracedCompose:
    """An albumentations composition that also returns the window and the flip of its result.

    The window is the part of the given image that the result shows. The flip tells whether the result is mirrored. Call
    the object like the composition, with `image=`. The returned dict has two more keys, "window" and "flip" (see
    `traced`). The object is picklable if the composition is.

    Args:
        transform: an `albumentations.Compose`.

    Raises: DataError for another kind of transform, or for a part that moves pixels other than by cropping, resizing,
        padding or flipping left to right.
    """

    def __init__(self, transform: Any) -> None:
        if not isinstance(transform, A.Compose):
            raise DataError(
                f"Cannot trace a single transform: {type(transform).__name__}",
                fix="Wrap it: kdcache.traced(A.Compose([...]))",
            )
        for part in _parts(transform):  # at once, though it may be applied to few images
            if not _may_show_window(part):
                raise no_window(type(part).__name__)
        self.transform = copy.copy(transform)  # the random numbers stay those of the given one
        self.transform.save_applied_params = True

    def __call__(self, *unnamed: Any, **named: Any) -> dict[str, Any]:
        """Return the composition's result for image=..., with "window" and "flip" added. Raises: DataError."""
        image = named.get("image")
        if unnamed or image is None or getattr(image, "ndim", 0) not in (2, 3):
            raise DataError(
                "Missing image= in the call of a traced composition: it has "
                + (f"{len(unnamed)} arguments without a name" if unnamed else ", ".join(named) or "no arguments"),
                fix="Call it as augment(image=image, mask=mask), the image an array (H, W, C).",
            )
        result: dict[str, Any] = self.transform(**named)
        applied = result.pop("applied_transforms")
        kinds = {type(part).__name__: type(part) for part in _parts(self.transform)}
        sizes = [params["shape"][:2] for _, params in applied] + [_size(result["image"])]
        footprint = Footprint.whole(_size(image))
        for (name, params), size in zip(applied, sizes[1:], strict=True):
            footprint = _moved(footprint, name, kinds.get(name), params, (int(size[0]), int(size[1])))
        return {**result, "window": footprint.array, "flip": footprint.flip}

    def __repr__(self) -> str:
        return f"traced({self.transform!r})"


def _may_show_window(part: Any) -> bool:
    """Return whether `_moved` can follow a transform. Crops qualify because they report their windows when applied."""
    known = type(part).__name__ in ("HorizontalFlip", "PadIfNeeded", "Pad", *_RESIZES, *_IN_PLACE)
    crops = any(kind.__module__ == A.RandomCrop.__module__ for kind in type(part).__mro__)
    return known or crops or isinstance(part, (A.BaseCompose, A.ImageOnlyTransform))


def _moved(footprint: Footprint, name: str, kind: Any, params: Mapping[str, Any], size: tuple[int, int]) -> Footprint:
    """Return the footprint after the transform `name` with output size (H, W).

    Raises: DataError for other movements.
    """
    if name == "HorizontalFlip":
        return footprint.mirror()
    if "crop_coords" in params:
        left, top, right, bottom = map(int, params["crop_coords"])
        padded = _padded(footprint, params.get("pad_params") or {})
        return padded.crop(top, left, bottom - top, right - left).resize(size)
    if name in ("PadIfNeeded", "Pad"):
        moved = _padded(footprint, params)
    elif name in _RESIZES:
        moved = footprint.resize(size)
    elif name in _IN_PLACE or (isinstance(kind, type) and issubclass(kind, A.ImageOnlyTransform)):
        moved = footprint
    else:
        raise no_window(name)
    if moved.size != size:
        raise no_window(f"{name}, which made {size[0]}x{size[1]} pixels of {footprint.size[0]}x{footprint.size[1]}")
    return moved


def _padded(footprint: Footprint, params: Mapping[str, Any]) -> Footprint:
    left, top, right, bottom = (int(params.get(f"pad_{side}") or 0) for side in ("left", "top", "right", "bottom"))
    return footprint.pad(left, top, right, bottom)


def _parts(compose: Any) -> Iterator[Any]:
    """Yield the transforms of a composition, at any depth."""
    for part in compose.transforms:
        yield part
        if isinstance(part, A.BaseCompose):
            yield from _parts(part)


def _size(image: Any) -> tuple[int, int]:
    """Return (H, W) of an array (H, W, C), or of the tensor (C, H, W) that ToTensorV2 makes."""
    shape = image.shape if not hasattr(image, "is_floating_point") else image.shape[-2:]
    return int(shape[0]), int(shape[1])
