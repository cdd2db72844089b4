"""The arrays of a cache: names, shapes, types, chunks. One table; writer and reader both use it.

    targets/<head>/values    (R, k, h, w)   float16   logit minus the pixel's maximum over classes; of a regression
                                                      (R, c, h, w), its values, float32 where the range needs it
    targets/<head>/indices   (R, k, h, w)   uint8     class ids (uint16 above 256); absent if k = C
    targets/<head>/tail      (R, h, w)      float16   log-odds of the mass outside the k; absent if k = C
    targets/<head>/max       (R, h, w)      float32   that maximum; with --raw-logits
    features/<tap>           (R, c, h, w)   float16   or uint8 of a tap in 8 bits, see eight_bits.py
    scales/<tap>             (R, 2, c)      float16   low and step of a tap in 8 bits
    statistics/at.<tap>      (R, h, w)      float16
    statistics/similarity.<tap>  (R, n (n - 1) / 2)  uint8  of n = h w cells, see docs/format.md
    labels/segmentation      (R, H, W)      uint8     255 is void; with --pixels stored
    labels/depth             (R, H, W)      float32   metres, NaN is unknown; likewise, of data with labels of depth
    pixels/image             (R, H, W, 3)   uint8     with --pixels stored
    records/*                (R, ...)                 sample, view, window, flip, pixel_checksum, labelled;
                                                      source_size of views that reach beyond it; fold of cross-fitting
    records/*_digest         (R, 16)        uint8     image, label, depth: of the data set's files; zeros without one
    records/label_checksum   (R)            uint64    of the rendered label; this and the digests from version 3 on
    samples/id_bytes, id_ends                         the ids, UTF-8, end to end

Chunks hold one record in image-sized arrays and a whole shard in small ones, so that a random read decodes
one record and opening a large cache does not read millions of tiny chunks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from kdcache.errors import VersionError
from kdcache.store.format.codec import compressors
from kdcache.store.format.eight_bits import pairs
from kdcache.store.format.layout import parse_layout
from kdcache.store.format.manifest import Codec, Manifest
from kdcache.store.format.manifest_models import Regression
from kdcache.tasks import DEPTH, SEGMENTATION

SAMPLE_ARRAYS = ("samples/id_bytes", "samples/id_ends")
LABEL_BITS = {SEGMENTATION: 1, DEPTH: 2}
"""The bit of `records/labelled` by task."""
SMALL_BYTES = 1024  # per record: below, a chunk holds a whole shard


@dataclass(frozen=True)
class ArraySpec:
    """An array of a cache.

    Attributes:
        path: the array's path in the Zarr group, such as `targets/segmentation/values`.
        shape: shape of one record.
        dtype: name of the dtype, such as `float16`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def record_bytes(self) -> int:
        """The uncompressed size of one record in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


_RECORD_ARRAYS = (
    ArraySpec("records/sample", (), "int64"),
    ArraySpec("records/view", (), "int32"),
    ArraySpec("records/window", (4,), "float64"),
    ArraySpec("records/flip", (), "uint8"),
    ArraySpec("records/pixel_checksum", (), "uint64"),
    ArraySpec("records/labelled", (), "uint8"),
)


_CONTENTS = (
    ArraySpec("records/image_digest", (16,), "uint8"),
    ArraySpec("records/label_digest", (16,), "uint8"),
    ArraySpec("records/label_checksum", (), "uint64"),
)


def head_arrays(manifest: Manifest, head: str) -> list[ArraySpec]:
    """Return the arrays in which a cache with this manifest stores the head `head`.

    A numeric head has `values`. A segmentation head has `values`, for top-k also `indices` and `tail`, and with raw
    logits also `max`.
    """
    entry = manifest.heads[head]
    if isinstance(entry, Regression):
        return [ArraySpec(f"targets/{head}/values", (entry.channels, *entry.size), entry.dtype)]
    arrays = [ArraySpec(f"targets/{head}/values", (entry.k, *entry.size), "float16")]
    if not entry.dense:
        index_type = "uint8" if entry.classes <= 256 else "uint16"
        arrays.append(ArraySpec(f"targets/{head}/indices", (entry.k, *entry.size), index_type))
        arrays.append(ArraySpec(f"targets/{head}/tail", entry.size, "float16"))
    if entry.raw:
        arrays.append(ArraySpec(f"targets/{head}/max", entry.size, "float32"))
    return arrays


def record_arrays(manifest: Manifest) -> list[ArraySpec]:
    """Return all arrays of a cache with this manifest that have one row per record, in the order of writing."""
    arrays = [spec for head in manifest.heads for spec in head_arrays(manifest, head)]
    for tap, feature in manifest.features.items():
        arrays.append(ArraySpec(f"features/{tap}", (feature.channels, *feature.size), feature.dtype))
        if feature.dtype == "uint8":
            arrays.append(ArraySpec(f"scales/{tap}", (2, feature.channels), "float16"))
    for name, statistic in manifest.statistics.items():
        similarity = statistic.kind == "similarity"
        shape, dtype = ((pairs(statistic.size),), "uint8") if similarity else (statistic.size, "float16")
        arrays.append(ArraySpec(f"statistics/{name}", shape, dtype))
    if manifest.view.pixels == "stored":
        arrays.append(ArraySpec("labels/segmentation", manifest.view.size, "uint8"))
        if manifest.depth is not None and manifest.depth.labelled:
            arrays.append(ArraySpec("labels/depth", manifest.view.size, "float32"))
        arrays.append(ArraySpec("pixels/image", (*manifest.view.size, 3), "uint8"))
    arrays += _RECORD_ARRAYS
    if manifest.records_contents:
        arrays += _CONTENTS
        if manifest.depth is not None and manifest.depth.labelled:
            arrays.append(ArraySpec("records/depth_digest", (16,), "uint8"))
    if manifest.view.reaches_beyond:
        arrays.append(ArraySpec("records/source_size", (2,), "int32"))
    if manifest.teacher.folds is not None:
        arrays.append(ArraySpec("records/fold", (), "uint8"))
    return arrays


def chunk_records(spec: ArraySpec, manifest: Manifest) -> int:
    """Return the number of records in one chunk of the array `spec`, in a cache with this manifest.

    If a record has at most 1024 bytes, one chunk holds all records of a shard. Otherwise each record has its own chunk.
    """
    return _chunk_records(spec, manifest.build.shard_records)


def _chunk_records(spec: ArraySpec, shard_records: int) -> int:
    return shard_records if spec.record_bytes <= SMALL_BYTES else 1


def create_arrays(
    group: zarr.Group, specs: Sequence[ArraySpec], records: int, shard_records: int, codec: Codec
) -> dict[str, zarr.Array[Any]]:
    """Create the arrays `specs`, which have one row per record, in the Zarr group `group`.

    Args:
        group: the group, without these arrays.
        specs: the arrays, see `record_arrays`.
        records: number of records of the cache.
        shard_records: number of records of a shard.
        codec: how arrays are compressed.
    Returns: path -> array.
    """
    return {
        spec.path: group.create_array(
            spec.path,
            shape=(records, *spec.shape),
            chunks=(_chunk_records(spec, shard_records), *spec.shape),
            shards=(shard_records, *spec.shape),
            dtype=spec.dtype,
            compressors=compressors(spec.path, codec),
            filters=None,
            fill_value=0,
            # A missing chunk reads as zeros without an error: a chunk of zeros must be there to be believed.
            config={"write_empty_chunks": True},
        )
        for spec in specs
    }


@lru_cache(maxsize=8)
def layout_files(specs: tuple[ArraySpec, ...], records: int, shard_records: int, codec: Codec) -> dict[str, bytes]:
    """Return key -> content of the zarr.json of each record array and of the groups that hold them, except the root.

    They depend on nothing else of a cache. zarr takes long to create them, and a build needs them several times.

    Raises: VersionError if this zarr-python writes arrays that `open_cache` cannot read.
    """
    files: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(files), mode="w")
    create_arrays(group, specs, records, shard_records, codec)
    del files["zarr.json"]
    contents = {key: buffer.to_bytes() for key, buffer in files.items()}
    for spec in specs:
        _check_layout(contents[f"{spec.path}/zarr.json"], f"{spec.path}/zarr.json")
    return contents


def _check_layout(content: bytes, key: str) -> None:
    try:
        parse_layout(json.loads(content), key)
    except VersionError as error:
        raise error.within(
            f"zarr-python {zarr.__version__} writes another kind of array",
            fix="Install an earlier zarr-python, or a later kdcache.",
        ) from error


def create_samples(group: zarr.Group, ids: Sequence[str]) -> None:
    """Create the arrays of the sample ids `ids` in the Zarr group `group`, and write them."""
    encoded = [sample.encode() for sample in ids]
    _create_flat(group, SAMPLE_ARRAYS[0], np.frombuffer(b"".join(encoded), np.uint8))
    _create_flat(group, SAMPLE_ARRAYS[1], np.cumsum([len(part) for part in encoded], dtype=np.int64))


def metadata_keys(manifest: Manifest) -> list[str]:
    """Return the keys of all files of a cache with this manifest, except shards, ledger, seal and spare copy.

    These are zarr.json of every group and array, and the files with the sample ids.
    """
    arrays = [*(spec.path for spec in record_arrays(manifest)), *SAMPLE_ARRAYS]
    nodes = {str(node) for path in arrays for node in (PurePosixPath(path), *PurePosixPath(path).parents)}
    keys = [(PurePosixPath(node) / "zarr.json").as_posix() for node in nodes]
    return sorted(keys + [f"{path}/c/0" for path in SAMPLE_ARRAYS])


def shard_key(spec: ArraySpec, shard: int) -> str:
    """Return the key of the file of shard number `shard` of the array `spec`, such as `records/window/c/3/0`."""
    return "/".join([spec.path, "c", str(shard), *("0" for _ in spec.shape)])


def _create_flat(group: zarr.Group, path: str, content: np.ndarray[Any, Any]) -> None:
    array = group.create_array(
        path,
        shape=content.shape,
        chunks=(max(1, len(content)),),
        dtype=content.dtype,
        compressors=(ZstdCodec(), Crc32cCodec()),
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = content
