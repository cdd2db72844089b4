"""Convert an item of a user's data set to an image, a class label and a depth label."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from kdcache.data.sample import Depth, Pixels, ids_out_of_range
from kdcache.errors import DataError, KDCacheError, suggest
from kdcache.tasks import IGNORE_INDEX

IMAGE_KEYS = ("image", "img", "pixel_values", "pixels")
LABEL_KEYS = ("label", "mask", "annotation", "labels", "masks", "segmentation", "semantic", "target", "seg_map")
Key = str | int


@dataclass(frozen=True)
class Keys:
    """Where the image and the labels lie in an item: keys of a mapping, or positions in a tuple.

    Attributes:
        image: the image's key. '' means that the item itself is the image.
        label: the segmentation label's key, or None without one.
        depth: the depth label's key, or None without one.
    """

    image: Key
    label: Key | None
    depth: Key | None = None


@contextmanager
def naming_item(where: str) -> Iterator[None]:
    """In a with block, turn errors of the user's data set into a DataError that names the item.

    `where` names the item, as in "item 3". A MemoryError stays unchanged.

    Raises: DataError.
    """
    try:
        yield
    except (KDCacheError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"Cannot read {where}: {type(error).__name__}: {error}",
            fix="Correct your data set or its transform, or leave the item out (torch.utils.data.Subset).",
        ) from error


def find_keys(item: Any, image: Key | None, label: Key | None, depth: Key | None, where: str) -> Keys:
    """Return the keys of an item's image and labels: the given keys, or usual names such as "image" and "mask".

    Args:
        item: an item of the data set: a mapping, a tuple, or an image.
        image: the image's key, or None to search for it.
        label: the segmentation label's key, or None to search for it.
        depth: the depth label's key, or None without depth.
        where: the item's name for messages.

    Raises: DataError if the item lacks a given key, or if no key for the image is found.
    """
    if isinstance(item, Mapping):
        offered: list[Key] = list(item)
        photo = image if image is not None else next((key for key in IMAGE_KEYS if key in item), None)
        mask = label if label is not None else next((key for key in LABEL_KEYS if key in item), None)
    elif isinstance(item, tuple | list):
        offered = list(range(len(item)))
        photo, mask = 0 if image is None else image, (1 if len(item) > 1 else None) if label is None else label
    else:
        offered, photo, mask = [], image, label
        if image is label is depth is None:
            return Keys("", None)  # the item is the image
    wrong = [key for key in (photo, mask, depth) if key is not None and key not in offered]
    if photo is None or wrong:
        asked = ", ".join(map(repr, wrong)) if wrong else "image, by the usual names"
        raise DataError(
            f"{where} has no {asked}: it has {', '.join(map(repr, offered)) or type(item).__name__}",
            fix=suggest(
                str(wrong[0]) if wrong else "image",
                map(str, offered),
                "Name the keys: kdcache.from_dataset(..., image='photo', label='mask'), or places in a tuple.",
            ),
        )
    return Keys(photo, mask, depth)


def part_of(item: Any, key: Key | None) -> Any:
    """Return `item[key]`, None for the key None, or the item itself for the key ''."""
    return None if key is None else item if key == "" else item[key]


def image_of(value: Any, where: str) -> Pixels:
    """Return a new RGB image, uint8 (H, W, 3), from a value of an item.

    Args:
        value: a Pillow image, or uint8 of shape (H, W, 3), (3, H, W) or (H, W).
        where: the item's name for messages.

    Raises: DataError for anything else, such as normalised floats.
    """
    if isinstance(value, Image.Image):
        raw = " ".join(str(tile.args) for tile in getattr(value, "tile", ()))  # of a file not yet decoded
        if value.mode.startswith(("I", "F")) or re.search(";16[BLN]", raw):
            raise _no_image(where, f"a picture of mode {value.mode} {raw}".rstrip())
        upright = ImageOps.exif_transpose(value)
        return np.array((upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB"))
    array = _array(value)
    if array is None or array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        kind = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise _no_image(where, kind)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[-1] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.shape[-1] not in (1, 3):
        raise _no_image(where, f"{array.dtype} {array.shape}")
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")


def label_of(value: Any, size: tuple[int, ...], classes: tuple[str, ...], void: int, where: str) -> Pixels | None:
    """Return a segmentation label as class ids, uint8 (H, W), 255 for void, or None if `value` is None.

    Args:
        value: an array, tensor or Pillow image of integers, (H, W), (1, H, W) or (H, W, 1).
        size: (H, W) of the image in pixels.
        classes: class names in the order of their ids.
        void: the number that means no class, in addition to 255.
        where: the item's name for messages.

    Raises: DataError for a label of another size or kind, or numbers that are neither a class nor void.
    """
    if value is None:
        return None
    array = np.array(value) if isinstance(value, Image.Image) else _array(value)
    if array is not None and array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array is None or array.ndim != 2 or array.dtype.kind not in "iub":
        kind = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise DataError(
            f"Cannot read the label of {where}: {kind} is not class ids (H, W)",
            fix="Give ids, not colours, one-hot maps or floats. For one-hot maps, give argmax(0).",
        )
    if array.shape != size:
        raise DataError(
            f"Sizes differ in {where}: a label of {array.shape[0]}x{array.shape[1]}, an image of {size[0]}x{size[1]}",
            fix="Give both before they are resized, or resize both.",
        )
    numbers: npt.NDArray[Any] = array.astype(np.int64)
    ids = np.where((numbers == void) | (numbers == IGNORE_INDEX), IGNORE_INDEX, numbers)
    beyond = (ids < 0) | (ids > IGNORE_INDEX)
    unknown = ids_out_of_range(ids[~beyond].astype(np.uint8), len(classes))
    wrong = sorted({*np.unique(ids[beyond]).tolist(), *unknown})
    if wrong:
        raise DataError(
            f"Unknown ids in the label of {where}: {', '.join(map(str, wrong[:8]))} for {len(classes)} classes",
            fix="List every class. Or say which number is void: kdcache.from_dataset(..., void=-100)",
        )
    return ids.astype(np.uint8)


def depth_of(value: Any, size: tuple[int, ...], where: str) -> Depth | None:
    """Return a depth label as float32 (H, W) metres, or None if `value` is None.

    Depths that are not above 0 become NaN.

    Args:
        value: an array, tensor or Pillow image of floats, (H, W) or (1, H, W), in metres.
        size: (H, W) of the image in pixels.
        where: the item's name for messages.

    Raises: DataError for a label of another size or kind.
    """
    if value is None:
        return None
    array = np.array(value) if isinstance(value, Image.Image) else _array(value)
    if array is not None and array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array is None or array.shape != size or array.dtype.kind != "f":
        kind = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise DataError(
            f"Cannot read the depth of {where}: {kind} for an image of {size}",
            fix="Give metres as float32 (H, W) of the image's size, NaN or 0 where the depth is unknown.",
        )
    metres = array.astype(np.float32)
    metres[~(metres > 0) | np.isinf(metres)] = np.nan
    return metres


def _array(value: Any) -> npt.NDArray[Any] | None:
    """Return an array, a tensor or nested lists as an array of numbers, or None for anything else."""
    if hasattr(value, "detach"):  # a tensor: this room imports no torch
        value = value.detach().cpu()
    if not hasattr(value, "__array__") and not isinstance(value, list | tuple):
        return None
    array: npt.NDArray[Any] = np.asarray(value)
    return array if array.dtype.kind in "iubf" else None


def _no_image(where: str, found: str) -> DataError:
    return DataError(
        f"Cannot read the image of {where}: {found} is not 8-bit RGB",
        fix="Give Pillow's images, or uint8 (H, W, 3) or (3, H, W), as they were read: not floats, normalised or "
        "augmented.",
    )
