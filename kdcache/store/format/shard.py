"""Reading records straight from the shards of a Zarr v3 array, at the speed of the decoder.

zarr-python takes 0.6 to 0.8 ms of CPU per record: tasks, thread hops, the index of the shard decoded again each time.
Here an index is read and checked once, a chunk comes with one pread, and numcodecs decodes it into the caller's buffer
without the GIL. One layout and a few codec chains are supported, those of our writer (see layout.py); any other array
is refused with a VersionError that says why.

A missing shard and an empty chunk are damage, never fill values. A chunk's crc32c is checked at every read, for a disk
may spoil at any time what was whole before. There are no locks: what threads share is replaced by single assignments,
and every read names its offset, so threads share descriptors and a forked child inherits them. No mapping either:
a file that is shortened under one kills the process.
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
    """One array of a store, open for direct reads. Thread-safe and fork-safe; pickles as its path, and opens it again.

    Args:
        path: the array's folder.
        open_shard: a store's own way to open a shard, by its number and its path below the folder. Returns a descriptor
            and what its chunks must end with (4 bytes each, empty when that is not known).
        name: how messages name the folder; default its path.
    Attributes:
        shape: (R, ...). dtype: little endian.
    Raises:
        VersionError: the array was made in a way that is not supported (layout.py).
        CorruptError: zarr.json is missing, no file or no JSON. StoreError: it may not be opened.
    Memory: 3 KB per shard of 128 chunks that was read, and the last chunk of an array with several records in one.
    """

    def __init__(self, path: str | Path, open_shard: OpenShard | None = None, name: str = "") -> None:
        self.path = Path(path)
        self._name = name or str(path)
        self._open_shard = open_shard
        self._layout = layout = read_layout(self.path)
        self.shape, self.dtype = layout.shape, layout.dtype
        self._decode = _DECODERS.get(layout.compressor)  # None: the bytes are the record
        self._shards: dict[int, _Shard] = {}
        self._last: tuple[int, Array] | None = None  # number of a chunk of several records, and these

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[object, ...]:
        return ShardArray, (self.path, self._open_shard, self._name)

    def read_into(self, record: int, out: Array) -> None:
        """Decode one record into `out`: shape[1:], dtype, C-contiguous.

        Raises:
            CorruptError naming the file; `out` is undefined then. IndexError.
            StoreError for a wrong `out`. VersionError for a zstd frame that does not say how much it holds.
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
        """Every record, (R, ...). Raises: as `read_into`."""
        step = self._layout.chunk_rows
        parts = [np.empty((0, *self.shape[1:]), self.dtype)]
        for first in range(0, len(self), step):  # what is not there takes no memory, whatever zarr.json claims
            part = np.empty((step, *self.shape[1:]), self.dtype)
            self._read_chunk(first // step, part)
            parts.append(part[: len(self) - first])
        return np.concatenate(parts)

    def bytes_of(self, record: int) -> float:
        """Return the bytes that a record takes on disk: its share of a chunk of several. Raises: as `read_into`."""
        number, chunk = divmod(record // self._layout.chunk_rows, self._layout.shard_chunks)
        shard = self._shards.get(number) or self._open(number)[0]
        size: int = _ENTRY.unpack_from(shard.index, 16 * chunk)[1]
        return size / self._layout.chunk_rows

    def _rows(self, chunk: int) -> Array:
        """The records (chunk_rows, ...) of a chunk that holds several. Shared: not to be written to."""
        last = self._last
        if last is None or last[0] != chunk:
            rows = np.empty((self._layout.chunk_rows, *self.shape[1:]), self.dtype)
            self._read_chunk(chunk, rows)
            self._last = last = (chunk, rows)
        return last[1]

    def _read_chunk(self, counted: int, out: Array) -> None:
        """Decode a chunk, counted over the whole array."""
        number, chunk = divmod(counted, self._layout.shard_chunks)
        shard = self._shards.get(number)
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
        """Open a shard, or open it again: if it is the same file still, its index is known."""
        key = self._layout.key(number)
        name = f"{self._name}/{key}"
        try:
            opened = (open_file(self.path / key), b"") if self._open_shard is None else self._open_shard(number, key)
            file, ends = _File(opened[0]), opened[1]
            status = os.fstat(file.handle)
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            shard = self._shards.get(number)
            if shard is None or shard.identity != identity:
                index = _read_index(file.handle, status.st_size, self._layout, number)
                if ends and len(ends) != self._layout.crc_bytes * self._layout.used_chunks(number):
                    raise ValueError(f"the ledger lists {len(ends) // CRC_BYTES} checksums of its chunks")
                shard = _Shard(name, identity, index, ends)
        except (ValueError, OSError) as error:
            raise unreadable(name, "the shard cannot be opened", error) from error
        shard.file = file
        self._shards[number] = shard
        _keep_open(shard)
        return shard, file


def check_buffer(out: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """A record can be decoded into `out`. Raises StoreError."""
    if out.shape != shape or out.dtype != dtype or not out.flags.carray:
        raise StoreError(
            f"Cannot read a record into {out.dtype} {out.shape}, strides {out.strides}, writable: "
            f"{out.flags.writeable}",
            fix=f"Allocate a writable, C-contiguous array: numpy.empty({shape}, {str(dtype)!r})",
        )


@dataclass(slots=True)
class _File:
    """A descriptor, closed when the last thread lets go of it."""

    handle: int

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.handle)  # at the interpreter's end `os` may be gone


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Shard:
    """A shard that was opened: `identity` distinguishes its file from another, `ends` has the 4 bytes that each of its
    chunks must end with, and is empty when these are not known.
    """

    name: str
    identity: tuple[int, ...]
    index: bytes
    ends: bytes
    file: _File | None = None


_DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_MOST_OPEN = 4096 if _DESCRIPTORS == resource.RLIM_INFINITY else max(16, min(4096, _DESCRIPTORS // 4))
_opened: deque[weakref.ref[_Shard]] = deque()


def _keep_open(shard: _Shard) -> None:
    """Keep at most `_MOST_OPEN` shards open in this process: the one that was opened first makes room.

    In random order that hits as often as keeping the least recently used, and a read need not leave a note.
    """
    _opened.append(weakref.ref(shard))
    while len(_opened) > _MOST_OPEN:
        with suppress(IndexError):  # another thread was faster
            first = _opened.popleft()()
            if first is not None:
                first.file = None


def let_go_of_removed() -> None:
    """Close shards whose files are gone: an open file would go on taking its room on the disk."""
    for shard in [opened for reference in list(_opened) if (opened := reference()) is not None]:
        file = shard.file
        if file is not None and os.fstat(file.handle).st_nlink == 0:
            shard.file = None


def _read_index(handle: int, size: int, layout: Layout, number: int) -> bytes:
    """The index of a shard whose chunks begin in the file and have possible sizes. Raises ValueError, OSError."""
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
    """The 4 bytes that end each chunk of a shard as our writer makes them, in the order of the chunks.

    Args:
        content: the whole file, whose index is at its end.
        chunks: of a whole shard; those that were never written are left out.
    """
    index = memoryview(content)[-16 * chunks - CRC_BYTES : -CRC_BYTES]
    ends = (offset + size for offset, size in _ENTRY.iter_unpack(index) if offset != _EMPTY)
    return b"".join(content[end - CRC_BYTES : end] for end in ends)


def _check_chunk(shard: _Shard, chunk: int, parts: list[Any]) -> None:
    """Check that the bytes of a chunk, in parts and with its crc32c, are those that were written. Raises ValueError."""
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
