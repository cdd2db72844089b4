"""The plain model of a data set and of the caches that are built from it: numpy alone, nothing of kdcache.

A sample has a version of its image and one of its label, and a data set has some samples. A cache is known by the
versions that it was built from: they say every byte of every record.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIZE = (16, 24)
CLASSES = ("road", "sky", "tree")
SAMPLES = ("a", "b", "c", "d", "e")
LATER = ("aa", "f")
"""Samples that are added at times: one between the others, and one behind them."""
FEWEST = 4  # samples of a data set, so that a training has a batch
STRIDE = 4
WEIGHTS = np.array([[1, 2, 3], [3, 1, 2], [5, 7, 1]])
MODULUS = 29
"""The teacher's logits are whole numbers below this: exact in float16, whatever the batch, and with codec small."""
LEVELS = (6, 0)
"""The ways to write one image or label: levels of PNG, the usual one first."""

Array = np.ndarray[Any, Any]
Row = dict[str, bytes]


class Version(NamedTuple):
    """The content of one sample: which of its images, and which of its labels."""

    image: int = 0
    label: int = 0


Versions = Mapping[str, Version]
FIRST: Versions = dict.fromkeys(SAMPLES, Version())


def image_of(sample: str, version: int) -> Array:
    """Return an image, uint8 (H, W, 3)."""
    return np.random.default_rng([1, *sample.encode(), version]).integers(0, 256, (*SIZE, 3), np.uint8)


def label_of(sample: str, version: int) -> Array:
    """Return a label, uint8 (H, W), with some void pixels."""
    label = np.random.default_rng([2, *sample.encode(), version]).integers(0, len(CLASSES), SIZE, np.uint8)
    label[:2, version] = 255
    return label


def png(pixels: Array, level: int = LEVELS[0]) -> bytes:
    """Return the file of an image or a label."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png", compress_level=level)
    return content.getvalue()


def taught(pixels: Array) -> Array:
    """Return what the teacher of these tests says of pixels: logits (C, h, w), whole numbers."""
    return np.einsum("kc,hwc->khw", WEIGHTS, pixels[::STRIDE, ::STRIDE].astype(np.int64)) % MODULUS


@cache
def row_of(sample: str, number: int, view: int, version: Version, stored: bool) -> Row:
    """Return every array of a record but its digests of files.

    Args:
        number: of the sample among those of the data set.
        view: 0 is the whole image. Others are mirrored or not, as their number says.
        stored: whether the cache keeps pixels and labels.
    """
    pixels, label = image_of(sample, version.image), label_of(sample, version.label)
    flip = view > 0 and _mirrored(sample, view)
    if flip:
        pixels, label = pixels[:, ::-1], label[:, ::-1]
    logits = taught(pixels)
    row: dict[str, Array] = {
        "targets/segmentation/values": (logits - logits.max(0)).astype(np.float16),
        "records/sample": np.int64(number),
        "records/view": np.int32(view),
        "records/window": np.array([0, 0, *SIZE], np.float64),
        "records/flip": np.uint8(flip),
        "records/pixel_checksum": np.uint64(_checksum(pixels)),
        "records/label_checksum": np.uint64(_checksum(label)),
        "records/labelled": np.uint8(1),
    }
    if stored:
        row |= {"pixels/image": pixels, "labels/segmentation": label}
    return {path: np.ascontiguousarray(array).tobytes() for path, array in row.items()}


@cache
def digests_of(sample: str, version: Version) -> dict[str, tuple[bytes, ...]]:
    """Return what a record's digests of files may be: the files of one content have several."""
    contents = {"image": image_of(sample, version.image), "label": label_of(sample, version.label)}
    return {
        f"records/{name}_digest": tuple(hashlib.sha256(png(content, level)).digest()[:16] for level in LEVELS)
        for name, content in contents.items()
    }


def is_row(found: Mapping[str, Array], record: int, versions: Versions, *, views: int, stored: bool) -> bool:
    """Return True if a record that was read is the one of these versions of the data, in all of its arrays."""
    ids, number = ids_of(versions), record // views
    if number >= len(ids):
        return False
    rest = {path: array.tobytes() for path, array in found.items()}
    sample, version = ids[number], versions[ids[number]]
    digests = digests_of(sample, version)
    allowed = all(rest.pop(path, b"") in choices for path, choices in digests.items())
    return allowed and rest == row_of(sample, number, record % views, version, stored)


def ids_of(versions: Versions) -> list[str]:
    """Return the samples that a data set has, in its order."""
    return sorted(versions)


def _mirrored(sample: str, view: int) -> bool:
    """Return True if a drawn view is mirrored, as docs/format.md says, for seed 0."""
    number = int.from_bytes(hashlib.blake2b(sample.encode(), digest_size=8).digest(), "little")
    return bool(np.random.default_rng((0, number, view)).random(4)[3] < 0.5)


def _checksum(array: Array) -> int:
    content = str(array.shape).encode() + np.ascontiguousarray(array).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
