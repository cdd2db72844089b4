"""Read records straight from the shards of a Zarr v3 array, at the speed of the decoder.

zarr-python takes 0.6 to 0.8 ms of CPU per record: tasks, thread hops, and decoding the shard's index each time. Here an
index is read and checked once, a chunk is read with one pread, and numcodecs decodes it into the caller's buffer
without the GIL. Only the layout and codec chains of our writer are supported (see layout.py). Any other array fails
with a VersionError that gives the reason.

A missing shard and an empty chunk are damage, never fill values. Every read checks the chunk's crc32c, because a disk
may fail at any time. There are no locks: threads share only single assignments, and every read names its offset, so
threads share descriptors and a forked child inherits them. There is no memory mapping, because shortening a mapped file
kills the process.
"""

import os
import resource
import struct
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd

from kdcache.errors import StoreError, VersionError
from kdcache.store.format.codec import Array
from kdcache.store.format.damage import unreadable
from kdcache.store.format.layout import CRC_BYTES, NOT_SUPPORTED, Layout, open_file, read_layout

# Blosc's own threads survive no fork and serve one caller at a time. zarr-python switches them off as well.
blosc.use_threads = False

OpenShard = Callable[[int, str], tuple[int, bytes]]

_ENTRY = struct.Struct("<QQ")  # of an index: offset, bytes
_EMPTY = 2**64 - 1
_CRC_RESIDUE = 0x48674BC7  # the crc32c of anything that is followed by its own crc32c
_BLOSC_HEADER = struct.Struct("<4xI4xI")  # decoded bytes, encoded bytes
_ZSTD_HEADER = struct.Struct("<IB")  # magic, descriptor
_ZSTD_MAGIC = 0xFD2FB528


class ShardArray:
    """An array of a cache, open for direct reads. It is safe to use from threads, to fork and to pickle.

    Args:
        path: the array's folder.
        open_shard: a function of a shard's number and its file's path below `path`. It returns a file descriptor and
            the checksums of all chunks as one bytes object: 4 bytes per chunk, in order, or b'' if unknown. A chunk
            must end with its checksum. Default: open the file in `path`.
        name: the array's name in error messages. Default: `path`.

    Attributes:
        shape: the array's shape, with the records first.
        dtype: the array's little-endian dtype.

    Raises:
        VersionError: the array has an unsupported layout.
        CorruptError: zarr.json is missing or is not valid JSON.
        StoreError: this process may not open zarr.json.

    Memory: 3 KB for each shard of 128 chunks that was read, and one decoded chunk if chunks hold several records.
    """

    def __init__(self, path: str | Path, open_shard: OpenShard | None = None, name: str = "") -> None:
        self.path = Path(path)
        self._name = name or str(path)
        self._open_shard = open_shard
        self._layout = layout = read_layout(self.path)
        self.shape, self.dtype = layout.shape, layout.dtype
        self._decode = _DECODERS.get(layout.compressor)  # None: the bytes are the record
        self.shards: dict[int, _Shard] = {}
        self._last: tuple[int, Array] | None = None  # number of a chunk of several records, and these

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[object, ...]:
        return ShardArray, (self.path, self._open_shard, self._name)

    def read_into(self, record: int, out: Array) -> None:
        """Decode record number `record` into `out`, a writable C-contiguous array with the record's shape and dtype.

        Raises:
            CorruptError: the shard file is damaged. The content of `out` is then undefined.
            IndexError: there is no such record.
            StoreError: `out` has another shape or dtype, or a file may not be opened.
            VersionError: a zstd frame does not give its size.
        """
        if not 0 <= record < self.shape[0]:
            raise IndexError(f"record {record} of {len(self)} in {self._name}")
        check_buffer(out, self.shape[1:], self.dtype)
        if self._layout.chunk_rows == 1:
            self._read_chunk(record, out)
        else:
            chunk, row = divmod(record, self._layout.chunk_rows)
            out[...] = self._rows(chunk)[row]

    def read_all(self) -> Array:
        """Return all records as a new array with the array's shape and dtype.

        Raises: CorruptError for a damaged shard file; StoreError for a file that may not be opened.
        """
        step = self._layout.chunk_rows
        parts = [np.empty((0, *self.shape[1:]), self.dtype)]
        for first in range(0, len(self), step):  # what is not there takes no memory, whatever zarr.json claims
            part = np.empty((step, *self.shape[1:]), self.dtype)
            self._read_chunk(first // step, part)
            parts.append(part[: len(self) - first])
        return np.concatenate(parts)

    def bytes_of(self, record: int) -> float:
        """Return the number of bytes that record number `record` takes on disk.

        If a chunk holds several records, this is the mean over them.

        Raises: CorruptError for a damaged shard file; StoreError for a file that may not be opened.
        """
        number, chunk = divmod(record // self._layout.chunk_rows, self._layout.shard_chunks)
        shard = self.shards.get(number) or self._open(number)[0]
        size: int = _ENTRY.unpack_from(shard.index, 16 * chunk)[1]
        return size / self._layout.chunk_rows

    def _rows(self, chunk: int) -> Array:
        """Return the records (chunk_rows, ...) of a chunk of several. The array is shared: do not write to it."""
        last = self._last
        if last is None or last[0] != chunk:
            rows = np.empty((self._layout.chunk_rows, *self.shape[1:]), self.dtype)
            self._read_chunk(chunk, rows)
            self._last = last = (chunk, rows)
        return last[1]

    def _read_chunk(self, counted: int, out: Array) -> None:
        """Decode a chunk, counted over the whole array."""
        number, chunk = divmod(counted, self._layout.shard_chunks)
        shard = self.shards.get(number)
        # Held by this name, a file stays open when another thread makes room for its own.
        file = None if shard is None else shard.file
        if shard is None or file is None:
            shard, file = self._open(number)
        offset, size = _ENTRY.unpack_from(shard.index, 16 * chunk)
        try:
            if self._decode is None:  # straight to where it belongs
                flat, end = out.reshape(-1).view(np.uint8), bytearray(self._layout.crc_bytes)
                length = os.preadv(file.handle, [flat.data, end], offset)
                parts: list[Any] = [flat, bytes(end)]
            else:
                parts = [os.pread(file.handle, size, offset)]
                length = len(parts[0])
            if length != size:
                raise ValueError("the file was shortened")
            if self._layout.crc_bytes:
                _check_chunk(shard, chunk, parts)
            if self._decode is not None:
                self._decode(memoryview(parts[0])[: size - self._layout.crc_bytes], out)
        except NotImplementedError as error:
            raise VersionError(
                f"Cannot read chunk {chunk} of {shard.name}: its zstd frame does not give its size", fix=NOT_SUPPORTED
            ) from error
        except (ValueError, RuntimeError, struct.error, OSError) as error:
            raise unreadable(shard.name, f"chunk {chunk} cannot be read", error) from error

    def _open(self, number: int) -> "tuple[_Shard, _File]":
        """Open a shard, or open it again. The index is reused if the file is the same."""
        key = self._layout.key(number)
        name = f"{self._name}/{key}"
        try:
            opened = (open_file(self.path / key), b"") if self._open_shard is None else self._open_shard(number, key)
            file, ends = _File(opened[0]), opened[1]
            status = os.fstat(file.handle)
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            shard = self.shards.get(number)
            if shard is None or shard.identity != identity:
                index = _read_index(file.handle, status.st_size, self._layout, number)
                if ends and len(ends) != self._layout.crc_bytes * self._layout.used_chunks(number):
                    raise ValueError(f"the ledger lists {len(ends) // CRC_BYTES} checksums of its chunks")
                shard = _Shard(name, identity, index, ends)
        except (ValueError, OSError) as error:
            raise unreadable(name, "the shard cannot be opened", error) from error
        shard.file = file
        self.shards[number] = shard
        _keep_open(shard)
        return shard, file


def check_buffer(out: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Check that a record of `shape` and `dtype` can be decoded into `out`.

    Raises: StoreError if `out` has another shape or dtype, is read-only, or is not C-contiguous.
    """
    if out.shape != shape or out.dtype != dtype or not out.flags.carray:
        raise StoreError(
            f"Cannot read a record into {out.dtype} {out.shape}, strides {out.strides}, writable: "
            f"{out.flags.writeable}",
            fix=f"Allocate a writable, C-contiguous array: numpy.empty({shape}, {str(dtype)!r})",
        )


@dataclass(slots=True)
class _File:
    """A descriptor that closes when the last thread drops it."""

    handle: int

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.handle)  # at the interpreter's end `os` may be gone


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Shard:
    """A shard that was opened.

    `identity` distinguishes its file from another. `ends` has the 4 bytes that each chunk must end with, or is empty.
    """

    name: str
    identity: tuple[int, ...]
    index: bytes
    ends: bytes
    file: _File | None = None


_DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MOST_OPEN = 4096 if _DESCRIPTORS == resource.RLIM_INFINITY else max(16, min(4096, _DESCRIPTORS // 4))
_opened: deque[weakref.ref[_Shard]] = deque()


def _keep_open(shard: _Shard) -> None:
    """Keep at most `MOST_OPEN` shards open in this process by closing the one opened first.

    In random order this hits as often as least-recently-used, and reads need no bookkeeping.
    """
    _opened.append(weakref.ref(shard))
    while len(_opened) > MOST_OPEN:
        with suppress(IndexError):  # another thread was faster
            first = _opened.popleft()()
            if first is not None:
                first.file = None


def let_go_of_removed() -> None:
    """Close shard files that this process still reads, but that were deleted, so that the disk can free their space."""
    for shard in [opened for reference in list(_opened) if (opened := reference()) is not None]:
        file = shard.file
        if file is not None and os.fstat(file.handle).st_nlink == 0:
            shard.file = None


def _read_index(handle: int, size: int, layout: Layout, number: int) -> bytes:
    """Read the index of a shard and check its offsets and sizes. Raises ValueError, OSError."""
    index_bytes = 16 * layout.shard_chunks
    if size < index_bytes + CRC_BYTES:
        raise ValueError(f"{size} bytes are too few for its index")
    index = os.pread(handle, index_bytes + CRC_BYTES, size - index_bytes - CRC_BYTES if layout.index_at_end else 0)
    if len(index) != index_bytes + CRC_BYTES or google_crc32c.value(index) != _CRC_RESIDUE:
        raise ValueError("the crc32c of its index is not the one stored with it")
    offsets, sizes = np.frombuffer(index, "<u8", 2 * layout.used_chunks(number)).reshape(-1, 2).T
    least = most = layout.chunk_bytes + layout.crc_bytes
    if layout.compressor:
        least, most = 1 + layout.crc_bytes, most + most // 128 + 1024
    wrong = np.flatnonzero((sizes < least) | (sizes > most) | (offsets > size))
    if len(wrong):
        at, length = int(offsets[wrong[0]]), int(sizes[wrong[0]])
        where = "was never written" if at == length == _EMPTY else f"has {length} bytes at {at} of {size} by its index"
        raise ValueError(f"chunk {wrong[0]} {where}")
    return index[:index_bytes]


def chunk_checksums(content: bytes, chunks: int) -> bytes:
    """Return the last 4 bytes of each chunk of a shard file, concatenated in the order of the chunks.

    Args:
        content: the whole file, with its index at the end.
        chunks: number of chunks in a full shard. Chunks that were never written are skipped.
    """
    index = memoryview(content)[-16 * chunks - CRC_BYTES : -CRC_BYTES]
    ends = (offset + size for offset, size in _ENTRY.iter_unpack(index) if offset != _EMPTY)
    return b"".join(content[end - CRC_BYTES : end] for end in ends)


def _check_chunk(shard: _Shard, chunk: int, parts: list[Any]) -> None:
    """Check the ledger's checksum and the crc32c of a chunk's bytes, given in parts. Raises ValueError."""
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    if crc != _CRC_RESIDUE:
        raise ValueError("its crc32c is not the one stored with it")
    if shard.ends and parts[-1][-CRC_BYTES:] != shard.ends[CRC_BYTES * chunk : CRC_BYTES * (chunk + 1)]:
        raise ValueError("it is another chunk than the ledger lists")


def _decode_blosc(payload: Any, out: Array) -> None:
    # Blosc believes its header: one that claims more bytes than there are would make it read beyond them.
    decoded, encoded = _BLOSC_HEADER.unpack_from(payload)
    if decoded != out.nbytes or encoded != len(payload):
        raise ValueError(f"blosc says {encoded} bytes hold {decoded}; here {len(payload)} should hold {out.nbytes}")
    blosc.decompress(payload, out)


def decode_zstd(payload: Any, out: Array) -> None:
    """Decompress the zstd frame `payload` into the array `out`.

    Raises: ValueError for bytes that are not a zstd frame, and if the decompressed size is not the size of `out`.
        NotImplementedError if the frame does not give its decompressed size.
    """
    # A frame that holds less than was requested is no error to zstd: the rest of `out` would stay what it was.
    # One that does not say what it holds would be decoded to its end, whatever that takes.
    magic, descriptor = _ZSTD_HEADER.unpack_from(payload)
    kind, single = descriptor >> 6, descriptor >> 5 & 1
    if magic != _ZSTD_MAGIC:
        raise ValueError("no zstd frame")
    if not kind and not single:
        raise NotImplementedError
    start = 6 - single + (0, 1, 2, 4)[descriptor & 3]
    decoded = int.from_bytes(payload[start : start + (1 << kind)], "little") + 256 * (kind == 1)
    if decoded != out.nbytes:
        raise ValueError(f"a zstd frame of {decoded} bytes in place of {out.nbytes}")
    zstd.decompress(payload, out)


_DECODERS: dict[str, Callable[[Any, Array], None]] = {"blosc": _decode_blosc, "zstd": decode_zstd}
