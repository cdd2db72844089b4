"""The ids of a store's samples, UTF-8 end to end in two flat arrays of one chunk each."""

import struct
from itertools import pairwise

import google_crc32c
import numpy as np

from kdcache.errors import CorruptError
from kdcache.store.damage import damaged_metadata, unreadable_metadata
from kdcache.store.manifest import Manifest
from kdcache.store.place import Place
from kdcache.store.schema import SAMPLE_ARRAYS
from kdcache.store.shard import Array, decode_zstd

_MOST_RATIO = 250  # decoded over encoded; ids reach 50. What claims more is made to fill memory.
_SMALL_BYTES = 2**20
_MOST_ID_BYTES = 4096


def read_ids(place: Place, manifest: Manifest) -> tuple[str, ...]:
    """Sample ids, in sample order; of a store that may still be half built.

    Raises: CorruptError.
    """
    text_key, ends_key = (f"{path}/c/0" for path in SAMPLE_ARRAYS)
    samples = manifest.dataset.samples
    ends = _decoded(place, ends_key, np.dtype("<i8"), samples)
    lengths = np.diff(ends, prepend=0)
    if not ((lengths >= 0) & (lengths <= _MOST_ID_BYTES)).all():
        raise damaged_metadata(place.describe(ends_key))
    text = _decoded(place, text_key, np.dtype("u1"), int(ends[-1]) if samples else 0).tobytes()
    try:
        return tuple(text[a:b].decode() for a, b in pairwise([0, *ends.tolist()]))
    except UnicodeDecodeError as error:
        raise damaged_metadata(place.describe(text_key)) from error


def _decoded(place: Place, key: str, dtype: "np.dtype[np.generic]", length: int) -> Array:
    try:
        decoded_bytes = length * dtype.itemsize
        content = place.read(key, most=decoded_bytes + decoded_bytes // 128 + 1024)  # zstd adds no more
        payload = memoryview(content)[:-4]
        if google_crc32c.value(bytes(payload)) != int.from_bytes(content[-4:], "little"):
            raise ValueError("its crc32c is not the one stored with it")
        if decoded_bytes > max(_SMALL_BYTES, _MOST_RATIO * len(payload)):
            raise ValueError(f"{len(payload)} bytes cannot hold {length} numbers")
        # An empty array still has a chunk of one number.
        out: Array = np.empty(max(length, 1), dtype)
        decode_zstd(payload, out)
        return out[:length]
    except CorruptError:
        raise
    except (OSError, ValueError, RuntimeError, NotImplementedError, struct.error) as error:
        raise unreadable_metadata(place.describe(key), error) from error
