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
    """Reads rows of records into a caller's memory: a cache, or a layer above it. Safe for many threads at once."""

    def read_into(self, record: int, path: str, out: Array) -> None:
        """Read a row of the array `path` into `out`."""


class RamRecords:
    """Keeps decoded rows of a cache's arrays in memory. Each row is read from the cache once, and then copied.

    Threads need no lock: a row is marked after it is complete, and two threads that fill it write the same bytes.
    Memory is used as rows are filled. It pickles empty: every worker process fills its own.

    Args:
        paths: paths of the arrays that are kept.
    Memory: `decoded_bytes(cache, paths)`.
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
        """Copy a row of one of `paths` into `out`. Raises: as `Cache.read_into` if it is read from the cache."""
        out[...] = self.row(record, path)

    def row(self, record: int, path: str) -> Array:
        """Return the kept row without a copy. Do not write to it. Raises: as `read_into`."""
        rows, whole = self._kept[path]
        row: Array = rows[record]
        if not whole[record]:
            self._cache.read_into(record, path, row)
            whole[record] = 1
        return row


class DeviceTargets:
    """The targets of all records on a device, gathered there by record number for each batch.

    It pickles empty, because worker processes draw only numbers.

    Args:
        targets: head -> the target of all records (R, ...).
    """

    def __init__(self, targets: Mapping[str, Target] | None = None) -> None:
        self._targets = dict(targets or {})

    def __reduce__(self) -> tuple[object, ...]:
        return DeviceTargets, ()

    @classmethod
    def load(
        cls, cache: Cache, device: torch.device, heads: Sequence[str] | None = None, *, threads: int = 2
    ) -> "DeviceTargets":
        """Read the targets of all records of a cache. `heads` of None is all heads.

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
        """Allocate memory for the targets of a batch (B, ...), by head."""
        targets: dict[str, Target] = pytree.tree_map(
            lambda part: part.new_empty((batch_size, *part.shape[1:])), self._targets
        )
        return targets

    def gather_into(self, records_B: Tensor, out: Mapping[str, Target]) -> None:
        """Gather the targets of a batch into `out` from `empty`. `records_B` is int64, on the device."""
        for part, memory in zip(pytree.tree_leaves(self._targets), pytree.tree_leaves(out), strict=True):
            torch.index_select(_selectable(part), 0, records_B, out=_selectable(memory))


def target_paths(cache: Cache, heads: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the paths of the arrays of some heads' targets. None is all heads."""
    names = cache.manifest.heads if heads is None else heads
    paths = (f"targets/{head}/{part}" for head in names for part in TARGET_PARTS)
    return tuple(path for path in paths if path in cache.specs)


def decoded_bytes(cache: Cache, paths: Sequence[str]) -> int:
    """Return the bytes that all records of some arrays take in memory."""
    return len(cache) * sum(cache.specs[path].record_bytes for path in paths)


def _selectable(part: Tensor) -> Tensor:
    """View uint16 as int16 of the same bits: torch gathers no unsigned types wider than a byte."""
    return part.view(torch.int16) if part.dtype == torch.uint16 else part
