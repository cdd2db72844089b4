"""Ways to read records of a store's target arrays: ours, its floors, and other libraries.

| name | what it does for a record |
| --- | --- |
| memcpy | copies the decoded bytes: the floor of an uncompressed store |
| decoder | numcodecs decodes a chunk that is in memory already, into a given buffer: the floor of a compressed one |
| direct | `Cache.read_into`, into a given buffer |
| tensorstore | `z[i]` |
| zarr | zarr-python with its default pipeline of codecs, `z[i]` |
| zarrs | the same with the pipeline of the package zarrs, in Rust |
| fused | the same with zarr-python's own `FusedCodecPipeline`, which 3.3 brought (Python 3.12 or later) |
| files | `torch.load` of a file per sample, as frameworks that cache teacher outputs write them |

All read the same records in the same order from a warm page cache. Before one is timed, every record that it gives
must have the bytes that zarr-python reads. Which pipeline it uses stands here, whatever its configuration.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs import blosc, zstd
from zarr.core import codec_pipeline

from kdcache.bench.kernels.memory import available_bytes
from kdcache.bench.kernels.rivals import UnavailableError
from kdcache.errors import RecipeError, StoreError, VersionError
from kdcache.store import Cache
from kdcache.store.format.codec import Array
from kdcache.store.format.layout import CRC_BYTES, read_layout

Reader = Callable[[int], Sequence[Array]]
"""The rows of a record, one per target array; they may lie in buffers that the next call overwrites."""

_COPIES = 3  # of every record: decoded, as its chunk, as its file where temporary files are memory
_ENTRY = struct.Struct("<QQ")  # of a shard's index: offset, bytes


@dataclass(frozen=True)
class Source:
    """The data that the readers read.

    Attributes:
        paths: the target arrays.
        order: record numbers, which may repeat.
        rows: record -> its arrays as zarr-python reads them.
        folder: for temporary files.
    """

    cache: Cache
    paths: tuple[str, ...]
    order: tuple[int, ...]
    rows: dict[int, tuple[Array, ...]]
    folder: Path

    def buffers(self) -> list[Array]:
        """Memory for one record."""
        return [np.empty_like(row) for row in self.rows[self.order[0]]]


def open_source(cache: Cache, records: int, folder: Path, seed: int = 0) -> Source:
    """Draw the order of records and read each of them once.

    Raises: CorruptError for a damaged store; RecipeError when they would not fit into memory.
    """
    paths = tuple(cache.target_paths())
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(len(cache)) for _ in range(-(-records // len(cache)))]
    order = tuple(np.concatenate(epochs)[:records].tolist())
    record_bytes = sum(row.nbytes for row in cache.read(order[0], paths).values())
    needed, free = _COPIES * len(set(order)) * record_bytes, available_bytes()
    if needed > free:
        raise RecipeError(
            "the records that readers compete for must fit into memory",
            received=f"--records {records}: {needed / 2**30:.1f} GiB of {free / 2**30:.1f} that are free",
            remedy="use smaller --records",
        )
    for record in set(order):
        cache.read(record, paths)  # a damaged store gets our own message
    arrays = [_open_zarr(cache.path / path) for path in paths]
    rows = {record: tuple(np.ascontiguousarray(array[record]) for array in arrays) for record in set(order)}
    return Source(cache, paths, order, rows, folder)


def verify(name: str, read: Reader, source: Source) -> None:
    """Check that a reader returns what zarr-python reads.

    Raises: StoreError for other values: a benchmark must not time the wrong thing.
    """
    for record in source.order:
        for path, array, expected in zip(source.paths, read(record), source.rows[record], strict=True):
            same = array.shape == expected.shape and array.dtype == expected.dtype
            if not same or array.tobytes() != expected.tobytes():
                raise StoreError(
                    "readers are timed when they read the same bytes",
                    received=f"{name} reads record {record} of {path} as {array.dtype} {array.shape} "
                    + ("with other bytes than" if same else f"in place of the {expected.dtype} {expected.shape} of")
                    + " zarr-python",
                    remedy="run kdcache verify on the store; if it is sound, report this",
                )


def _memcpy(source: Source) -> Reader:
    buffers = source.buffers()

    def read(record: int) -> Sequence[Array]:
        for buffer, row in zip(buffers, source.rows[record], strict=True):
            np.copyto(buffer, row)
        return buffers

    return read


def _decoder(source: Source) -> Reader:
    arrays = [_chunk_decoder(source.cache.path / path, set(source.order)) for path in source.paths]
    return lambda record: [decode(record) for decode in arrays]


def _chunk_decoder(path: Path, records: set[int]) -> Callable[[int], Array]:
    """Decodes the chunks of some records of an array, which it reads now."""
    try:
        layout = read_layout(path)
    except VersionError as error:
        raise UnavailableError(f"not for this layout: {error.received}") from error
    payloads = {}
    for chunk in {record // layout.chunk_rows for record in records}:
        shard, place = divmod(chunk, layout.shard_chunks)
        with (path / layout.key(shard)).open("rb") as file:
            index_bytes = 16 * layout.shard_chunks + CRC_BYTES
            file.seek(*((-index_bytes, 2) if layout.index_at_end else (0, 0)))
            offset, size = _ENTRY.unpack_from(file.read(index_bytes), 16 * place)
            file.seek(offset)
            payloads[chunk] = file.read(size - layout.crc_bytes)
    rows: Array = np.empty((layout.chunk_rows, *layout.shape[1:]), layout.dtype)
    whole = rows.reshape(-1).view(np.uint8)
    decompress = {"blosc": blosc.decompress, "zstd": zstd.decompress}.get(layout.compressor)

    def decode(record: int) -> Array:
        chunk, row = divmod(record, layout.chunk_rows)
        if decompress is None:
            whole[:] = np.frombuffer(payloads[chunk], np.uint8)
        else:
            decompress(payloads[chunk], rows)
        one: Array = rows[row]
        return one

    return decode


def _direct(source: Source) -> Reader:
    buffers, read_into = source.buffers(), source.cache.read_into

    def read(record: int) -> Sequence[Array]:
        for path, buffer in zip(source.paths, buffers, strict=True):
            read_into(record, path, buffer)
        return buffers

    return read


def _open_zarr(path: Path, pipeline: str = "zarr.core.codec_pipeline.BatchedCodecPipeline") -> Any:
    """The array keeps the pipeline of codecs that it was opened with; one that cannot decode it raises."""
    with zarr.config.set({"codec_pipeline.path": pipeline, "codec_pipeline.strict": True}):
        return zarr.open_array(path, mode="r")


def _zarr(source: Source, *pipeline: str) -> Reader:
    arrays = [_open_zarr(source.cache.path / path, *pipeline) for path in source.paths]
    return lambda record: [array[record] for array in arrays]


def _zarrs(source: Source) -> Reader:
    try:
        from zarrs.pipeline import UnsupportedMetadataError
    except ImportError as error:
        raise UnavailableError("not installed (pip install zarrs)") from error
    try:
        return _zarr(source, "zarrs.ZarrsCodecPipeline")
    except UnsupportedMetadataError as error:
        raise UnavailableError(f"not for this layout: {error.__cause__}") from error


def _fused(source: Source) -> Reader:
    name = "FusedCodecPipeline"
    if not hasattr(codec_pipeline, name):
        raise UnavailableError(f"zarr {zarr.__version__} has none (3.3 and later do, on Python 3.12 or later)")
    return _zarr(source, f"zarr.core.codec_pipeline.{name}")


def _tensorstore(source: Source) -> Reader:
    try:
        import tensorstore
    except ImportError as error:
        raise UnavailableError("not installed (pip install tensorstore)") from error
    specs = [
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{(source.cache.path / path).resolve()}/"}}
        for path in source.paths
    ]
    arrays = [tensorstore.open(spec, read=True).result() for spec in specs]
    return lambda record: [array[record].read().result() for array in arrays]


def _files(source: Source) -> Reader:
    for record, rows in source.rows.items():
        content = dict(zip(source.paths, map(torch.from_numpy, rows), strict=True))
        torch.save(content, source.folder / f"{record}.pt")

    def read(record: int) -> Sequence[Array]:
        content = torch.load(source.folder / f"{record}.pt", weights_only=True)
        return [content[path].numpy() for path in source.paths]

    return read


READERS: dict[str, tuple[str, Callable[[Source], Reader]]] = {
    "memcpy": ("memcpy", _memcpy),
    "decoder": ("bare decoder", _decoder),
    "direct": ("direct", _direct),
    "tensorstore": ("tensorstore z[i]", _tensorstore),
    "zarr": ("zarr-python z[i]", _zarr),
    "zarrs": ("zarr-python, zarrs", _zarrs),
    "fused": ("zarr-python, fused", _fused),
    "files": ("torch.load, .pt files", _files),
}
"""Name -> title, what makes the reader. Raises UnavailableError for one that cannot run here."""
