"""How the bytes of an array lie in its shards: the content of zarr.json.

    layout    shape (R, ...) in shards of S records; a chunk is one record, or several in small arrays
    chain     bytes (little endian) [+ blosc | zstd] [+ crc32c]
    index     bytes + crc32c, at the end or the start of a shard

Any other or unknown setting in zarr.json is an error, because it could change the meaning of the bytes.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import VersionError
from kdcache.store.format.damage import unreadable_metadata
from kdcache.store.format.manifest import MAX_RECORD_BYTES
from kdcache.store.format.manifest_models import MAX_RECORDS

CRC_BYTES = 4
NOT_SUPPORTED = (
    "Update kdcache, or build the cache again with this version: another program or a later zarr-python wrote it. "
    "zarr-python itself may still read it."
)
"""The fix for an array that kdcache has not written."""
_MAX_METADATA_BYTES = 2**20  # what is longer is cut, and no JSON then
_MAX_SHARD_CHUNKS = 2**16
_DTYPE = re.compile("bool|u?int(8|16|32|64)|float(16|32|64)")
_FIELDS = {"zarr_format", "node_type", "shape", "data_type", "fill_value", "chunk_grid", "chunk_key_encoding"}
_FIELDS |= {"codecs", "attributes", "dimension_names", "storage_transformers"}
_SETTINGS: dict[str, set[str]] = {
    "regular": {"chunk_shape"},
    "default": {"separator"},
    "sharding_indexed": {"chunk_shape", "codecs", "index_codecs", "index_location"},
    "bytes": {"endian"},
    "blosc": {"cname", "clevel", "shuffle", "typesize", "blocksize"},
    "zstd": {"level", "checksum"},
    "crc32c": set(),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The positions and the encoding of an array's chunks in its shard files, read from its zarr.json.

    Attributes:
        shape: the array's shape, with the records first.
        dtype: the array's little-endian dtype.
        shard_chunks: number of chunks in a full shard.
        chunk_rows: number of records in a chunk.
        compressor: `blosc`, `zstd`, or '' for none.
        crc_bytes: 4 if each chunk ends with a CRC-32C checksum, otherwise 0.
        index_at_end: True if the index of chunk positions is at the end of a shard file, False if it is at the start.
        separator: the character between the numbers of a shard's key, `/` or `.`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shard_chunks: int
    chunk_rows: int
    compressor: str
    crc_bytes: int
    index_at_end: bool
    separator: str

    @property
    def chunk_bytes(self) -> int:
        """The uncompressed size of a chunk in bytes."""
        return self.chunk_rows * math.prod(self.shape[1:]) * self.dtype.itemsize

    def used_chunks(self, shard: int) -> int:
        """Return the number of chunks in shard number `shard` that hold records, fewer in an incomplete last shard."""
        return min(self.shard_chunks, -(-self.shape[0] // self.chunk_rows) - shard * self.shard_chunks)

    def key(self, shard: int) -> str:
        """Return the path of shard number `shard` below the array's folder, such as `c/3/0/0`."""
        return self.separator.join(["c", str(shard), *("0" for _ in self.shape[1:])])


def open_file(path: Path) -> int:
    """Open a file for reading and return its file descriptor.

    A named pipe opens without blocking.

    Raises: OSError if the file cannot be opened or is a symbolic link.
    """
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def read_layout(array: Path) -> Layout:
    """Read the layout of the Zarr array in the folder `array`.

    Raises:
        VersionError: the layout is not supported. Another program or a later zarr-python wrote it.
        CorruptError: zarr.json is missing or is not valid JSON.
        StoreError: this process may not open zarr.json.
    """
    path = array / "zarr.json"
    try:
        handle = open_file(path)
        try:
            metadata = json.loads(os.pread(handle, _MAX_METADATA_BYTES, 0))
        finally:
            os.close(handle)
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable_metadata(path, error) from error
    return parse_layout(metadata, path)


def parse_layout(metadata: Any, file: object) -> Layout:
    """Return how an array's chunks lie in its shard files, from the content of the array's zarr.json.

    Args:
        metadata: the parsed JSON.
        file: the file's name for error messages.
    Raises: VersionError if kdcache cannot read arrays with these settings.
    """
    try:
        return _parse(metadata)
    except (ValueError, RecursionError) as error:
        raise VersionError(f"Cannot read the array {file}: {error}", fix=NOT_SUPPORTED) from error


def _parse(metadata: Any) -> Layout:
    _require(isinstance(metadata, dict) and metadata.keys() <= _FIELDS, "fields", metadata)
    for name, supported in (("zarr_format", 3), ("node_type", "array"), ("storage_transformers", [])):
        value = metadata.get(name, [])
        _require(type(value) is type(supported) and value == supported, name, value)
    shape = _sizes(metadata.get("shape"), "shape", least=0)
    kind = str(metadata.get("data_type"))
    _require(_DTYPE.fullmatch(kind) is not None, "data_type", kind)
    dtype = np.dtype(kind).newbyteorder("<")
    shards = _sizes(_named(metadata.get("chunk_grid"), "regular")[1].get("chunk_shape"), "shards")
    separator = _named(metadata.get("chunk_key_encoding"), "default")[1].get("separator", "/")
    _require(separator in ("/", "."), "separator", separator)
    _, (sharding,) = _chain(metadata.get("codecs"), "sharding_indexed")
    location = sharding.get("index_location", "end")
    _require(location in ("start", "end"), "index_location", location)
    names, settings = _chain(sharding.get("index_codecs"), "bytes", "crc32c")
    _require(names == ("bytes", "crc32c") and settings[0].get("endian") == "little", "index_codecs", settings)
    names, settings = _chain(sharding.get("codecs"), "bytes", "blosc", "zstd", "crc32c")
    compressors = names[1:-1] if names[-1] == "crc32c" else names[1:]
    _require(names[0] == "bytes" and compressors in ((), ("blosc",), ("zstd",)), "codecs", names)
    endian = settings[0].get("endian", "little" if dtype.itemsize == 1 else None)
    _require(endian == "little", "endian", endian)
    chunks = _sizes(sharding.get("chunk_shape"), "chunks")
    matching = shape[1:] == shards[1:] == chunks[1:] and shards[0] % chunks[0] == 0
    _require(matching and len(shape) == len(shards) == len(chunks), "shape, shards, chunks", (shape, shards, chunks))
    _require(shards[0] // chunks[0] <= _MAX_SHARD_CHUNKS, "chunks of a shard", shards[0] // chunks[0])
    layout = Layout(
        shape=shape,
        dtype=dtype,
        shard_chunks=shards[0] // chunks[0],
        chunk_rows=chunks[0],
        compressor="".join(compressors),
        crc_bytes=CRC_BYTES if names[-1] == "crc32c" else 0,
        index_at_end=location == "end",
        separator=separator,
    )
    _require(layout.chunk_bytes <= MAX_RECORD_BYTES, "bytes of a chunk", layout.chunk_bytes)
    return layout


def _require(condition: bool, what: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{what}: {repr(value)[:200]}")


def _sizes(value: Any, what: str, least: int = 1) -> tuple[int, ...]:
    fine = isinstance(value, list) and 1 <= len(value) <= 32
    _require(fine and all(type(size) is int and least <= size <= MAX_RECORDS for size in value), what, value)
    return tuple(value)


def _named(value: Any, *supported: str) -> tuple[str, dict[str, Any]]:
    """Return the name and settings of a codec, a grid or a key encoding. Unknown settings fail."""
    fine = isinstance(value, dict) and value.keys() <= {"name", "configuration"} and value.get("name") in supported
    _require(fine, f"{' or '.join(supported)} expected", value)
    settings = value.get("configuration", {})
    _require(isinstance(settings, dict) and settings.keys() <= _SETTINGS[value["name"]], "configuration", value)
    return value["name"], settings


def _chain(value: Any, *supported: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Return the names and settings of a chain of codecs."""
    _require(isinstance(value, list) and 1 <= len(value) <= len(supported), "codecs", value)
    codecs = [_named(codec, *supported) for codec in value]
    return tuple(name for name, _ in codecs), [settings for _, settings in codecs]
