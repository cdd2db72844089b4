"""The codecs of `--codec`: compression of chunks, and for small the rounding of logits before it.

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
"""An array of one record or several."""

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
    """Return the Zarr v3 codecs that compress the array at `path`, such as `features/stage4`.

    The last codec is a CRC-32C checksum, so that reading a damaged chunk raises an error.

    `codec` is the cache's setting `--codec`: `default` (lz4, zstd for features), `small` (zstd), or `none`.
    """
    if codec == "none":
        return (Crc32cCodec(),)
    return ((_FEATURES if path.startswith(_OF_FEATURES) else _OTHERS)[codec], Crc32cCodec())


def round_targets(arrays: Mapping[str, Array], codec: Codec) -> dict[str, Array]:
    """Round float16 logits as the codec `small` stores them. With another codec, all arrays are returned unchanged.

    Arrays without logits are also returned unchanged. Rounding keeps 5 of 10 mantissa bits. Stored logits are relative
    to the largest one, which stays 0. Top-k values stay sorted, but unequal values may become equal.

    Args:
        arrays: path in the cache -> finite values of one or more records.
        codec: the cache's codec.
    Returns: path -> rounded copy or unchanged array.
    """
    return {
        path: _round(rows) if codec == "small" and path.startswith(_LOGITS) and rows.dtype == np.float16 else rows
        for path, rows in arrays.items()
    }


def _round(rows: Array) -> Array:
    # BitRound would carry the largest numbers over into infinity.
    rounded: Array = _ROUNDED.encode(rows.clip(-_LARGEST, _LARGEST)).view(np.float16)
    return rounded
