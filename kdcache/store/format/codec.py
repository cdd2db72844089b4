"""What `--codec` means: how chunks are compressed, and what small rounds away before they are.

    default   lz4; targets in float16. CamVid's 11 classes on 36 x 48: 30.0 KiB, 43 us of CPU per read
    small     logits keep 5 of float16's 10 mantissa bits, zstd: 15.0 KiB, 146 us
    none      nothing is compressed: 37.1 KiB, 15 us

Rounding happens before the write and arrays stay plain: as a Zarr filter it would shut out libraries without numcodecs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numcodecs.bitround import BitRound
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from kdcache.store.format.manifest import Codec

Array = np.ndarray[Any, Any]
"""The rows of an array, one record's or more."""

_FEATURES = {"default": ZstdCodec(level=1), "small": ZstdCodec(level=3)}
_OTHERS = {
    "default": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
    "small": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
}
_OF_FEATURES = ("features/", "scales/", "statistics/similarity.")
_ROUNDED = BitRound(keepbits=5)
_LOGITS = "targets/segmentation/"
_LARGEST = np.float16(59392)  # of 5 mantissa bits, within the bound of packed targets, 60000


def compressors(path: str, codec: Codec) -> tuple[Any, ...]:
    """Return the standard Zarr v3 codecs of an array. Their checksum turns a flipped bit into an error."""
    if codec == "none":
        return (Crc32cCodec(),)
    return ((_FEATURES if path.startswith(_OF_FEATURES) else _OTHERS)[codec], Crc32cCodec())


def round_targets(arrays: Mapping[str, Array], codec: Codec) -> dict[str, Array]:
    """Return the rows that a cache keeps: the codec `small` rounds float16 logits, other codecs change nothing.

    `arrays` maps paths to finite rows. Rounding is to the nearest, ties to even, and keeps order: the largest class
    stays at 0 and top-k values stay sorted, but unequal values may become equal. Changed arrays are new.
    """
    return {
        path: _round(rows) if codec == "small" and path.startswith(_LOGITS) and rows.dtype == np.float16 else rows
        for path, rows in arrays.items()
    }


def _round(rows: Array) -> Array:
    # BitRound would carry the largest numbers over into infinity.
    rounded: Array = _ROUNDED.encode(rows.clip(-_LARGEST, _LARGEST)).view(np.float16)
    return rounded
