"""The ids of a cache's samples: UTF-8, end to end, in two flat arrays of one chunk each."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import overload

import google_crc32c
import numpy as np

from kdcache.errors import CorruptError
from kdcache.store.backend.base import Place
from kdcache.store.format.codec import Array
from kdcache.store.format.damage import damaged_metadata, unreadable_metadata
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.schema import SAMPLE_ARRAYS
from kdcache.store.format.shard import decode_zstd

_MOST_RATIO = 250  # decoded over encoded; ids reach 50. What claims more is made to fill memory.
_SMALL_BYTES = 2**20
_MOST_ID_BYTES = 4096


class SampleIds(Sequence[str]):
    """The sample ids of a cache as a sequence of strings.

    It keeps them in one text, which takes a tenth of a tuple's memory. It equals any tuple of the same strings.

    Args:
        text: all ids, one after the other, in UTF-8.
        ends: int64 (N,), the end position of each id in `text`.
    Raises: UnicodeDecodeError if an id is not valid UTF-8.
    """

    __slots__ = ("_ends", "_text")

    def __init__(self, text: bytes, ends: Array) -> None:
        self._text, self._ends = text, ends
        for _ in self:  # all are decoded once, so that no later access can fail
            pass

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        if isinstance(at, slice):
            return tuple(self[number] for number in range(*at.indices(len(self))))
        number = range(len(self))[at]  # as of any sequence: negative numbers, IndexError
        start = int(self._ends[number - 1]) if number else 0
        return self._text[start : int(self._ends[number])].decode()

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in map(int, self._ends):
            yield self._text[start:end].decode()
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleIds | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(tuple(self))


def read_ids(place: Place, manifest: Manifest, sealed: Mapping[str, str] = MappingProxyType({})) -> SampleIds:
    """Return the sample ids of the cache at `place`, which has this manifest, in the order of the samples.

    `sealed` maps the keys of the id files to the SHA-256 that they must have. Empty for a cache without a seal.

    Raises: CorruptError if the ids are damaged.
    """
    text_key, ends_key = (f"{path}/c/0" for path in SAMPLE_ARRAYS)
    samples = manifest.dataset.samples
    ends = _decoded(place, ends_key, np.dtype("<i8"), samples, sealed)
    lengths = np.diff(ends, prepend=0)
    if not ((lengths >= 0) & (lengths <= _MOST_ID_BYTES)).all():
        raise damaged_metadata(place.describe(ends_key))
    text = _decoded(place, text_key, np.dtype("u1"), int(ends[-1]) if samples else 0, sealed).tobytes()
    try:
        return SampleIds(text, ends)
    except UnicodeDecodeError as error:
        raise damaged_metadata(place.describe(text_key)) from error


def _decoded(place: Place, key: str, dtype: "np.dtype[np.generic]", length: int, sealed: Mapping[str, str]) -> Array:
    try:
        decoded_bytes = length * dtype.itemsize
        if key in sealed:
            content = place.read_verified(key, sealed[key])
        else:
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
