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
    """Where image and labels lie in an item: keys of a mapping, or places in a tuple. None for missing ones."""

    image: Key
    label: Key | None
    depth: Key | None = None


@contextmanager
def naming_item(where: str) -> Iterator[None]:
    """Turn an error of the user's data set into a DataError that names the item, in a with block.

    Running out of memory is not turned into one. Raises: DataError.
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
    """Return the keys of an item: the given ones, else usual names.

    Raises: DataError if an item lacks a key, or no key is found for the image.
    """
    if isinstance(item, Mapping):
        offered: list[Key] = list(item)
        chosen = image if image is not None else next((key for key in IMAGE_KEYS if key in item), None)
        mask = label if label is not None else next((key for key in LABEL_KEYS if key in item), None)
    elif isinstance(item, tuple | list):
        offered = list(range(len(item)))
        chosen, mask = 0 if image is None else image, (1 if len(item) > 1 else None) if label is None else label
    else:
        offered, chosen, mask = [], image, label
        if image is label is depth is None:
            return Keys("", None)  # the item is the image
    wrong = [key for key in (chosen, mask, depth) if key is not None and key not in offered]
    if chosen is None or wrong:
        asked = ", ".join(map(repr, wrong)) if wrong else "image, by the usual names"
        raise DataError(
            f"{where} has no {asked}: it has {', '.join(map(repr, offered)) or type(item).__name__}",
            fix=suggest(
                str(wrong[0]) if wrong else "image",
                map(str, offered),
                "Name the keys: kdcache.from_dataset(..., image='photo', label='mask'), or places in a tuple.",
            ),
        )
    return Keys(chosen, mask, depth)


def part_of(item: Any, key: Key | None) -> Any:
    """Return a part of an item, or the item itself for the key ''."""
    return None if key is None else item if key == "" else item[key]


def image_of(value: Any, where: str) -> Pixels:
    """Return a copy of an image as uint8 (H, W, 3), from Pillow, or integers (H, W, 3), (3, H, W) or (H, W).

    Raises: DataError for anything else. Floats have been normalised in an unknown way.
    """
    if isinstance(value, Image.Image):
        raw = " ".join(str(tile.args) for tile in getattr(value, "tile", ()))  # of a file not yet decoded
        if value.mode.startswith(("I", "F")) or re.search(";16[BLN]", raw):
            raise _no_image(where, f"a picture of mode {value.mode} {raw}".rstrip())
        upright = ImageOps.exif_transpose(value)
        return np.array((upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB"))
    array = _array(value)
    if array is None or array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        shown = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise _no_image(where, shown)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[-1] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.shape[-1] not in (1, 3):
        raise _no_image(where, f"{array.dtype} {array.shape}")
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")


def label_of(value: Any, size: tuple[int, ...], classes: tuple[str, ...], void: int, where: str) -> Pixels | None:
    """Return a label as uint8 (H, W) class ids with 255 for void, or None for None.

    `size` is (H, W) of its image. `void` also means no class, in addition to 255.

    Raises: DataError for a label of another size or kind, and for numbers that are neither class nor void.
    """
    if value is None:
        return None
    array = np.array(value) if isinstance(value, Image.Image) else _array(value)
    if array is not None and array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array is None or array.ndim != 2 or array.dtype.kind not in "iub":
        shown = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise DataError(
            f"Cannot read the label of {where}: {shown} is not class ids (H, W)",
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
    """Return a depth label as float32 (H, W) metres, NaN if it is not above 0, or None for None.

    Raises: DataError for one of another size or kind.
    """
    if value is None:
        return None
    array = np.array(value) if isinstance(value, Image.Image) else _array(value)
    if array is not None and array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array is None or array.shape != size or array.dtype.kind != "f":
        shown = type(value).__name__ if array is None else f"{array.dtype} {array.shape}"
        raise DataError(
            f"Cannot read the depth of {where}: {shown} for an image of {size}",
            fix="Give metres as float32 (H, W) of the image's size, NaN or 0 where the depth is unknown.",
        )
    metres = array.astype(np.float32)
    metres[~(metres > 0) | np.isinf(metres)] = np.nan
    return metres


def _array(value: Any) -> npt.NDArray[Any] | None:
    """Return numbers of an array, a tensor or nested lists, or None for anything else."""
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
