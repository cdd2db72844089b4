"""Shards whose checksums fit whatever they claim: index and frames made up by hypothesis, in every codec.

Who forges a store can put any numbers into it; what must not happen is an error that is not ours, a read beyond the
frame, or a wait.
"""

from __future__ import annotations

import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.errors import KDCacheError
from kdcache.store.format.layout import CRC_BYTES
from kdcache.store.format.shard import ShardArray

CHUNKS = 4  # of a shard of the plan
ARRAYS = {
    "blosc": ("default", "targets/segmentation/values"),
    "zstd": ("small", "targets/segmentation/values"),
    "plain": ("none", "targets/segmentation/values"),
    "many records": ("default", "records/window"),
}
numbers = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(0, 4096),
    st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 2, 2**64 - 1]),
)
bytes_at = st.lists(st.tuples(st.integers(0, 63) | st.integers(0, 2**20), st.integers(0, 255)), max_size=6)


@pytest.fixture(scope="module", params=ARRAYS)
def shard(request, plan, tmp_path_factory) -> tuple[Path, Path, bytes]:
    """(an array's folder, its first shard, the content of that)."""
    codec, path = ARRAYS[request.param]
    store = plan(codec=codec).write(tmp_path_factory.mktemp("fuzz") / "s.zarr")
    file = next(file for file in sorted((store / path / "c").rglob("*")) if file.is_file())
    return store / path, file, file.read_bytes()


def sealed(content: bytes) -> bytes:
    """With its crc32c behind it."""
    return content + struct.pack("<I", google_crc32c.value(content))


def look(folder: Path) -> None:
    """Read all records; each is right in shape, or refused."""
    try:
        array = ShardArray(folder)
    except KDCacheError:
        return
    said = []
    for record in range(CHUNKS):
        row = np.empty(array.shape[1:], array.dtype)
        try:
            array.read_into(record, row)
        except KDCacheError as error:
            said.append(str(error))
    assert all(str(folder) in text for text in said)


fuzzing = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@fuzzing
@given(entries=st.dictionaries(st.integers(0, 7), numbers, min_size=1))
def test_an_index_of_any_numbers(shard, entries) -> None:
    folder, file, whole = shard
    chunks = (len(whole) - CRC_BYTES - _first_byte_of_index(whole)) // 16
    index = list(struct.unpack_from(f"<{2 * chunks}Q", whole, _first_byte_of_index(whole)))
    for at, number in entries.items():
        index[at % len(index)] = number
    try:
        file.write_bytes(whole[: _first_byte_of_index(whole)] + sealed(struct.pack(f"<{2 * chunks}Q", *index)))
        look(folder)
    finally:
        file.write_bytes(whole)


@fuzzing
@given(changes=bytes_at, cut=st.integers(0, 40))
def test_a_frame_of_any_bytes(shard, changes, cut) -> None:
    """The first chunk's own bytes, header first, with a checksum that fits; its length too may be another."""
    folder, file, whole = shard
    start = _first_byte_of_index(whole)
    index = list(struct.unpack_from(f"<{(len(whole) - CRC_BYTES - start) // 8}Q", whole, start))
    offset, size = index[:2]
    frame = bytearray(whole[offset : offset + size - CRC_BYTES])
    for at, value in changes:
        frame[at % len(frame)] = value
    frame = frame[: max(1, len(frame) - cut)]
    body = bytearray(whole[:start])
    body[offset : offset + len(frame) + CRC_BYTES] = sealed(bytes(frame))
    index[1] = len(frame) + CRC_BYTES
    try:
        file.write_bytes(bytes(body) + sealed(struct.pack(f"<{len(index)}Q", *index)))
        look(folder)
    finally:
        file.write_bytes(whole)


def _first_byte_of_index(whole: bytes) -> int:
    """The index is at the end: pairs of offset and bytes, and a crc32c of them."""
    for chunks in (CHUNKS, 1):
        start = len(whole) - CRC_BYTES - 16 * chunks
        if google_crc32c.value(whole[start:-CRC_BYTES]) == struct.unpack("<I", whole[-CRC_BYTES:])[0]:
            return start
    raise AssertionError("no index")
