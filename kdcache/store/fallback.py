"""Arrays of another kind than our writer's, through zarr-python: any layout and codec, some fifty times slower.

To Zarr a file that is missing is full of zeros, and a path is a path: so it gets no folder, but files that come through
the store's place and are what the ledger says. What an unknown codec makes of their bytes is out of our hands.
"""

import os
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from kdcache.store.format.damage import damaged, damaged_metadata
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.schema import ArraySpec
from kdcache.store.format.shard import Array, check_buffer

# What zarr-python raises over malformed JSON, unknown codecs, failed checksums and missing nodes.
ZARR_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, zarr.errors.BaseZarrError, OSError)


class ZarrArray:
    """What ShardArray does, through zarr-python.

    Args:
        open_file: gives a descriptor of a file of the array by its path below the array's folder.
        name: of the array's folder, for messages.
    Raises: CorruptError when it is not the array that the schema says.
    """

    def __init__(self, manifest: Manifest, spec: ArraySpec, open_file: Callable[[str], int], name: str) -> None:
        self._name, self._manifest = name, manifest
        try:
            self._array: Any = zarr.open_array(MemoryStore(_Files(open_file), read_only=True), mode="r", zarr_format=3)
        except ZARR_ERRORS as error:
            raise damaged_metadata(f"{name}/zarr.json") from error
        if self._array.shape != (manifest.records, *spec.shape) or self._array.dtype != np.dtype(spec.dtype):
            raise damaged_metadata(f"{name}/zarr.json")
        self.shape, self.dtype = self._array.shape, self._array.dtype.newbyteorder("=")

    def read_into(self, record: int, out: Array) -> None:
        if not 0 <= record < self.shape[0]:
            raise IndexError(f"record {record} of {self.shape[0]} in {self._name}")
        check_buffer(out, self.shape[1:], self.dtype)
        out[...] = self._rows(record)

    def read_all(self) -> Array:
        ranges = map(self._manifest.shard_range, range(self._manifest.shards))
        return np.concatenate([self._rows(slice(*ends)) for ends in ranges])

    def _rows(self, rows: int | slice) -> Array:
        try:
            return np.asarray(self._array[rows])
        except ZARR_ERRORS as error:
            raise damaged(self._name, f"rows {rows} cannot be read ({error})") from error


class _Files(MutableMapping[str, Buffer]):
    """The files of an array as Zarr's store in memory looks them up. The last one stays: it is asked for in parts."""

    def __init__(self, open_file: Callable[[str], int]) -> None:
        self._open_file = open_file
        self._last: tuple[str, Buffer] | None = None

    def __getitem__(self, key: str) -> Buffer:
        last = self._last
        if last is None or last[0] != key:
            with os.fdopen(self._open_file(key), "rb") as file:
                self._last = last = (key, cpu.Buffer.from_bytes(file.read()))
        return last[1]

    def __contains__(self, key: object) -> bool:
        return True  # what is not there is an error, never a fill value

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __setitem__(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    def __delitem__(self, key: str) -> None:
        raise NotImplementedError
