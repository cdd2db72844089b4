"""Opening and reading a store.

Opening checks presence, sizes and the seal; the first read of a chunk checks its crc32c; `verify` checks every byte.
Reads go straight to the shards (shard.py). An array of another kind than our writer's is read through zarr-python,
some fifty times slower, and said so once in the log.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from kdcache.errors import IncompleteError, StoreError, VersionError
from kdcache.store import ledger
from kdcache.store.manifest import Head, Manifest, parse_manifest
from kdcache.store.schema import SAMPLE_ARRAYS, ArraySpec, metadata_keys, record_arrays
from kdcache.store.shard import ShardArray, check_buffer

_log = logging.getLogger("kdcache.store")
Array = np.ndarray[Any, Any]
# What zarr-python raises over malformed JSON, unknown codecs, failed checksums and missing nodes.
_ZARR_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, zarr.errors.BaseZarrError)


class Cache:
    """A complete store, open for reading.

    Many threads may read at once. Safe to fork, and to pickle: a worker process opens it again.

    Attributes:
        path: the store's folder.
        manifest: who made it, from what and how.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.specs = {spec.path: spec for spec in record_arrays(manifest)}
        self._arrays: dict[str, ShardArray | _ZarrArray] = {}

    def __len__(self) -> int:
        """Number of records."""
        return self.manifest.records

    def __reduce__(self) -> tuple[object, ...]:
        return Cache, (self.path, self.manifest)

    @property
    def head(self) -> Head:
        """The segmentation head."""
        return self.manifest.heads["segmentation"]

    @property
    def num_classes(self) -> int:
        return self.head.classes

    @property
    def view_size(self) -> tuple[int, int]:
        """(H, W) of the rendered views."""
        return self.manifest.view.size

    @property
    def align_corners(self) -> bool:
        """Of the teacher's resize from native stride to the view."""
        return self.head.align_corners

    @property
    def pixels_stored(self) -> bool:
        return self.manifest.view.pixels == "stored"

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Sample ids, in sample order."""
        return read_ids(self.path)

    def column(self, name: str) -> Array:
        """`records/<name>` of all records, (R, ...)."""
        path = f"records/{name}"
        try:
            return self._array(path).read_all()
        except VersionError as error:
            return self._through_zarr(path, error).read_all()

    def read(self, record: int, paths: Sequence[str]) -> dict[str, Array]:
        """Rows of one record, path -> array of the schema's shape and type, each with memory of its own.

        Raises: CorruptError naming the file when its bytes fail their checksum.
        """
        rows = {}
        for path in paths:
            array = self._array(path)
            rows[path] = np.empty(array.shape[1:], array.dtype)
            self.read_into(record, path, rows[path])
        return rows

    def read_into(self, record: int, path: str, out: Array) -> None:
        """Decode the row of one record into `out`: the schema's shape and type, C-contiguous.

        Raises: CorruptError as `read` (`out` is undefined then), IndexError, StoreError for a wrong `out`.
        """
        try:
            self._array(path).read_into(record, out)
        except VersionError as error:
            self._through_zarr(path, error).read_into(record, out)

    def target_paths(self) -> list[str]:
        """Arrays that make up the segmentation target: values, and for top-k indices and tail."""
        return [path for path in self.specs if path.startswith("targets/segmentation/")]

    def _array(self, path: str) -> "ShardArray | _ZarrArray":
        array = self._arrays.get(path)
        if array is None:
            spec = self.specs.get(path)
            if spec is None:
                raise StoreError(
                    "a reader asks for arrays that the store has",
                    received=f"{self.path} has no array {path}; it has {', '.join(self.specs)}",
                    remedy="build the store with what the run needs (see build-teacher-cache --help)",
                )
            try:
                array = ShardArray(self.path / path)
            except VersionError as error:
                return self._through_zarr(path, error)
            if array.shape != (len(self), *spec.shape) or array.dtype != np.dtype(spec.dtype):
                raise ledger.damaged_metadata(self.path / path / "zarr.json")
            self._arrays[path] = array
        return array

    def _through_zarr(self, path: str, reason: VersionError) -> "_ZarrArray":
        """The array for all further reads, by zarr-python."""
        _log.warning("%s is read through zarr-python, which is slow: %s", self.path / path, reason.received)
        array = _ZarrArray(self.path, open_array(self.path, _open_group(self.path), self.specs[path], len(self)))
        self._arrays[path] = array
        return array


class _ZarrArray:
    """What ShardArray does, through zarr-python: for any layout and codecs."""

    def __init__(self, store: Path, array: zarr.Array[Any]) -> None:
        self._path = store / array.path
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype.newbyteorder("=")

    def read_into(self, record: int, out: Array) -> None:
        if not 0 <= record < self.shape[0]:
            raise IndexError(f"record {record} of {self.shape[0]} in {self._path}")
        check_buffer(out, self.shape[1:], self.dtype)
        out[...] = self._rows(record)

    def read_all(self) -> Array:
        return self._rows(slice(None))

    def _rows(self, rows: int | slice) -> Array:
        try:
            return np.asarray(self._array[rows])
        except (*_ZARR_ERRORS, OSError) as error:
            raise ledger.damaged(self._path, f"rows {rows} cannot be read ({error})") from error


def open_cache(path: str | Path) -> Cache:
    """Open a complete store.

    Raises:
        IncompleteError: it is half built (the message says how far).
        CorruptError: files are missing, of another size, or metadata was changed.
        VersionError, StoreError: it is of another format, or no store.
    """
    store = Path(path)
    manifest = read_manifest(store)
    completion = require_complete(store, manifest)
    ledger.check_metadata(store, completion, metadata_keys(manifest))
    ledger.check_ledger(store, completion, manifest.shards)
    for shard in range(manifest.shards):
        record = ledger.read_shard_record(store, shard)
        assert record is not None, shard  # check_ledger has read it
        ledger.check_sizes(store, record)
    return Cache(store, manifest)


def require_complete(path: Path, manifest: Manifest) -> ledger.Completion:
    """The seal of a finished store. Raises IncompleteError saying how far the build came."""
    completion = ledger.read_completion(path)
    if completion is None:
        done = sum(ledger.record_path(path, shard).exists() for shard in range(manifest.shards))
        raise IncompleteError(
            "a store is used when it is complete",
            received=f"{path} has {done} of {manifest.shards} shards",
            remedy="run the same build-teacher-cache command again: it continues where it stopped",
        )
    return completion


def read_manifest(path: Path) -> Manifest:
    """The manifest of a store, complete or not."""
    return parse_manifest(_open_group(path).attrs.asdict(), str(path))


def _open_group(path: Path) -> zarr.Group:
    """The Zarr group of a store, read only."""
    if not (path / "zarr.json").is_file():
        raise StoreError(
            "a store is a folder that build-teacher-cache wrote",
            received=f"{path} " + ("has no zarr.json" if path.exists() else "does not exist"),
            remedy="check the path, or build one with kdcache build-teacher-cache (see its --help)",
        )
    try:
        return zarr.open_group(path, mode="r")
    except _ZARR_ERRORS as error:
        raise ledger.damaged(path / "zarr.json", f"not the metadata of a Zarr group ({error})") from error


def open_array(store: Path, group: zarr.Group, spec: ArraySpec, records: int) -> zarr.Array[Any]:
    """An array of the schema. Raises CorruptError when it has not the shape and type that the manifest implies."""
    try:
        array = group[spec.path]
    except _ZARR_ERRORS as error:
        raise ledger.damaged_metadata(store / spec.path / "zarr.json") from error
    shape = (records, *spec.shape)
    if not isinstance(array, zarr.Array) or array.shape != shape or array.dtype != np.dtype(spec.dtype):
        raise ledger.damaged_metadata(store / spec.path / "zarr.json")
    return array


def read_ids(store: Path) -> tuple[str, ...]:
    """Sample ids, in sample order; of a store that may still be half built."""
    group = _open_group(store)
    try:
        text, ends = (np.asarray(group[path][...]) for path in SAMPLE_ARRAYS)  # type: ignore[index]
        starts = [0, *ends.tolist()]
        return tuple(text[a:b].tobytes().decode() for a, b in pairwise(starts))
    except _ZARR_ERRORS as error:
        raise ledger.damaged_metadata(store / "samples") from error
