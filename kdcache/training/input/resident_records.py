"""Decoded records that stay in memory (filled on first read) or on a GPU (filled before the first step).

Legend: R records of a cache, B samples of a batch.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kdcache.data import prefetch
from kdcache.distill import Batch, Target
from kdcache.store import Cache
from kdcache.training.input.batch import Array

TARGET_PARTS = ("values", "indices", "tail")
"""Parts of a target, in their order; the last two are absent from a dense one."""
PIXEL_PATHS = ("pixels/image", "labels/segmentation")


class RecordSource(Protocol):
    """The interface for reading records: a cache, or memory that keeps its records. Safe in several threads at once."""

    def read_into(self, record: int, path: str, out: Array) -> None:
        """Read record `record` of the cache's array `path` into `out`, which has one record's shape and dtype."""


class RamRecords:
    """Keeps decoded records of some arrays of a cache in memory. Each is read from the cache once.

    Threads need no lock: a record is marked after it is complete, and two threads that fill it write the same bytes.
    Memory is used as records are filled. A pickled copy is empty, so every worker process fills its own.

    Args:
        cache: an open cache.
        paths: paths of the arrays that are kept.
    Memory: the size of all records of these arrays, decoded (`decoded_bytes`).
    """

    def __init__(self, cache: Cache, paths: Sequence[str]) -> None:
        self._cache = cache
        self._kept = {
            path: (np.empty((len(cache), *cache.specs[path].shape), cache.specs[path].dtype), bytearray(len(cache)))
            for path in paths
        }

    def __reduce__(self) -> tuple[object, ...]:
        return RamRecords, (self._cache, tuple(self._kept))

    def read_into(self, record: int, path: str, out: Array) -> None:
        """Copy one record of the array `path` into `out`. Raises: KDCacheError if it cannot be read from the cache."""
        out[...] = self.row(record, path)

    def row(self, record: int, path: str) -> Array:
        """Return one record of the array `path` without a copy. Do not write to it.

        Raises: KDCacheError if it cannot be read from the cache.
        """
        rows, complete = self._kept[path]
        row: Array = rows[record]
        if not complete[record]:
            self._cache.read_into(record, path, row)
            complete[record] = 1
        return row


class DeviceTargets:
    """The targets of all R records on a device. Each batch gathers its targets there by record number.

    A pickled copy is empty. Worker processes do not need it, because their batches have record numbers, not targets.

    Args:
        targets: head -> the target of all records (R, ...). None is empty.
    """

    def __init__(self, targets: Mapping[str, Target] | None = None) -> None:
        self._targets = dict(targets or {})

    def __reduce__(self) -> tuple[object, ...]:
        return DeviceTargets, ()

    @classmethod
    def load(
        cls, cache: Cache, device: torch.device, heads: Sequence[str] | None = None, *, threads: int = 2
    ) -> "DeviceTargets":
        """Read the targets of all records of a cache to a device.

        Args:
            cache: an open cache.
            device: where the targets go.
            heads: names of the heads. None is all.
            threads: number of threads that read.
        Raises: KDCacheError for a record that cannot be read.
        """
        paths = target_paths(cache, heads)
        arrays = {
            path: torch.empty((len(cache), *spec.shape), dtype=getattr(torch, spec.dtype), device=device)
            for path, spec in ((path, cache.specs[path]) for path in paths)
        }
        rows = prefetch(lambda n: cache.read(n, paths), range(len(cache)), threads=threads, ahead=16)
        for record, row in enumerate(rows):
            for path in paths:
                arrays[path][record].copy_(torch.from_numpy(row[path]))
        return cls(Batch.from_dict(arrays).targets)

    def empty(self, batch_size: int) -> dict[str, Target]:
        """Allocate memory on the device for the targets of a batch: head -> target (B, ...)."""
        targets: dict[str, Target] = pytree.tree_map(
            lambda part: part.new_empty((batch_size, *part.shape[1:])), self._targets
        )
        return targets

    def gather_into(self, records_B: Tensor, out: Mapping[str, Target]) -> None:
        """Write the targets of the records `records_B` into `out`, a result of the method `empty`.

        `records_B` has the numbers of the records, (B,) int64, on the device.
        """
        for part, memory in zip(pytree.tree_leaves(self._targets), pytree.tree_leaves(out), strict=True):
            torch.index_select(_selectable(part), 0, records_B, out=_selectable(memory))


def target_paths(cache: Cache, heads: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the paths of the cache's arrays with the targets of some heads: `targets/segmentation/values`, ...

    `heads` of None is all heads.
    """
    names = cache.manifest.heads if heads is None else heads
    paths = (f"targets/{head}/{part}" for head in names for part in TARGET_PARTS)
    return tuple(path for path in paths if path in cache.specs)


def decoded_bytes(cache: Cache, paths: Sequence[str]) -> int:
    """Return the bytes that all records of the arrays `paths` take in memory when they are decoded."""
    return len(cache) * sum(cache.specs[path].record_bytes for path in paths)


def _selectable(part: Tensor) -> Tensor:
    """Return uint16 as int16 with the same bits, because torch gathers no unsigned types wider than a byte."""
    return part.view(torch.int16) if part.dtype == torch.uint16 else part
