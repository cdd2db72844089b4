"""Footprints that torchvision's v2 transforms move with the image: a kind of tensor with its own kernels.

https://docs.pytorch.org/vision/stable/auto_examples/transforms/plot_custom_tv_tensors.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kdcache.data.tracing.footprint import Footprint, no_window
from kdcache.errors import DataError

_REFUSED = ("rotate", "affine", "perspective", "elastic", "vertical_flip", "five_crop", "ten_crop")


class FootprintTensor(tv_tensors.TVTensor):  # type: ignore[misc]
    """A `Footprint` as a float64 tensor (7,): y0, x0, y1, x1, the flip, height and width.

    The first four are the window's edges in pixels of the original image. The flip is 0 or 1. Height and width are the
    transformed image's size in pixels.

    torchvision's v2 transforms update it together with the image.
    """

    @classmethod
    def of(cls, footprint: Footprint) -> FootprintTensor:
        """Return a footprint as a float64 tensor (7,), in the order that the class gives."""
        numbers = [*footprint.window, float(footprint.flip), *map(float, footprint.size)]
        return torch.tensor(numbers, dtype=torch.float64).as_subclass(cls)


def footprint_of(tensor: torch.Tensor) -> Footprint:
    """Return the footprint that a tensor (7,) holds, in the order of `FootprintTensor`."""
    y0, x0, y1, x1, flip, height, width = tensor.as_subclass(torch.Tensor).tolist()
    return Footprint((y0, x0, y1, x1), bool(flip), (int(height), int(width)))


class TracedTransform:
    """A torchvision v2 transform that also returns the window and the flip of its result.

    The window is the part of the given image that the result shows. The flip tells whether the result is mirrored. Call
    the object like the transform. It returns the transform's results, then the window and the flip (see `traced`). The
    object is picklable if the transform is.

    Args:
        transform: the transform, often a `v2.Compose`.

    Raises: DataError if `ToPureTensor` comes before another transform.
    """

    def __init__(self, transform: v2.Transform) -> None:
        self.transform = transform
        before_last = [part for compose in _composes(transform) for part in list(compose.transforms)[:-1]]
        if any(isinstance(part, v2.ToPureTensor) for part in before_last):
            raise DataError("Cannot trace ToPureTensor before other transforms", fix="Put it last.")

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Apply the transform to the inputs, and return its results followed by the window and the flip.

        Raises: DataError for inputs without an image, or a transform that moves pixels in other ways than a crop.
        """
        height, width = _size_of(inputs)
        *results, footprint = self.transform(*inputs, FootprintTensor.of(Footprint.whole((height, width))))
        moved = footprint_of(footprint)
        if (now := _size_of(results)) != moved.size:
            raise no_window(f"a transform that made {now[0]}x{now[1]} pixels of {moved.size[0]}x{moved.size[1]} unseen")
        return (*results, moved.array, moved.flip)

    def __repr__(self) -> str:
        return f"traced({self.transform!r})"


def _size_of(inputs: Any) -> tuple[int, int]:
    """Return (H, W) of the first image of a transform's inputs. Raises: DataError without one."""
    leaves = torch.utils._pytree.tree_leaves(list(inputs))
    for leaf in leaves:
        if not isinstance(leaf, FootprintTensor) and (isinstance(leaf, torch.Tensor) or hasattr(leaf, "getbands")):
            height, width = F.get_size(leaf)
            return height, width
    raise DataError(
        f"Cannot find an image to trace among {', '.join(type(leaf).__name__ for leaf in leaves) or 'no arguments'}",
        fix="Give a tensor (C, H, W), a Pillow image or a torchvision.tv_tensors.Image, and masks as tv_tensors.Mask.",
    )


def _composes(transform: Any) -> Iterator[Any]:
    """Yield the composed transforms, such as v2.Compose, in a transform: the transform itself and nested ones."""
    if hasattr(transform, "transforms"):
        yield transform
        for part in transform.transforms:
            yield from _composes(part)


def _moves(functional: Any) -> Callable[[Callable[..., Footprint]], Callable[..., Footprint]]:
    """Register a function that changes a footprint as torchvision's kernel of a functional such as `F.crop`."""

    def register(change: Callable[..., Footprint]) -> Callable[..., Footprint]:
        @F.register_kernel(functional, FootprintTensor)  # type: ignore[untyped-decorator]
        def kernel(tensor: torch.Tensor, *args: Any, **named: Any) -> FootprintTensor:
            return FootprintTensor.of(change(footprint_of(tensor), *args, **named))

        return change

    return register


def _resized(footprint: Footprint, size: Any, **named: Any) -> Footprint:
    """Return the footprint after a resize. Torchvision computes the size."""
    image = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, *footprint.size)
    _, height, width = F.resize(image, size, F.InterpolationMode.NEAREST, named.get("max_size")).shape
    return footprint.resize((height, width))


@_moves(F.resize)
def _resize(footprint: Footprint, size: Any, *args: Any, **named: Any) -> Footprint:
    return _resized(footprint, size, **named)


@_moves(F.crop)
def _crop(footprint: Footprint, top: int, left: int, height: int, width: int) -> Footprint:
    return footprint.crop(top, left, height, width)


@_moves(F.resized_crop)
def _resized_crop(
    footprint: Footprint, top: int, left: int, height: int, width: int, size: Any, *args: Any, **named: Any
) -> Footprint:
    return _resized(footprint.crop(top, left, height, width), size)


@_moves(F.center_crop)
def _center_crop(footprint: Footprint, output_size: Any) -> Footprint:
    sides = [output_size] if isinstance(output_size, int) else list(output_size)
    height, width = sides[0], sides[-1]
    rows, columns = footprint.size
    # As torchvision: what is too small is padded first, the smaller half before, and then cropped at a rounded place.
    before = [max((side - length) // 2, 0) for side, length in ((height, rows), (width, columns))]
    after = [max((side - length + 1) // 2, 0) for side, length in ((height, rows), (width, columns))]
    padded = footprint.pad(before[1], before[0], after[1], after[0])
    top, left = (round((length - side) / 2.0) for length, side in zip(padded.size, (height, width), strict=True))
    return padded.crop(top, left, height, width)


@_moves(F.pad)
def _pad(footprint: Footprint, padding: Any, *args: Any, **named: Any) -> Footprint:
    sides = [padding] * 4 if isinstance(padding, int) else list(padding)
    left, top, right, bottom = sides if len(sides) == 4 else (sides * 4)[:4]
    return footprint.pad(left, top, right, bottom)


@_moves(F.horizontal_flip)
def _horizontal_flip(footprint: Footprint) -> Footprint:
    return footprint.mirror()


def _refuse(name: str) -> None:
    def refuse(tensor: torch.Tensor, *args: Any, **named: Any) -> None:
        raise no_window(name)

    F.register_kernel(name, FootprintTensor)(refuse)


for _name in _REFUSED:
    _refuse(_name)
