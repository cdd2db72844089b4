"""Collect records into whole shards, which one thread writes meanwhile."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from kdcache.store import Manifest
from kdcache.store.format.schema import LABEL_BITS, record_arrays
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache.teacher.build.render import Array, Rendered


class ShardQueue:
    """Collects records until a shard is full, and writes full shards in a background thread.

    Args:
        manifest: the manifest of the build.
        write: called with a shard's number, and path -> array of all its records.
    """

    def __init__(self, manifest: Manifest, write: Callable[[int, Mapping[str, Array]], None]) -> None:
        self._manifest, self._write = manifest, write
        self._specs = record_arrays(manifest)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kdcache-writer")
        self._writing: Future[None] | None = None
        self._arrays: dict[str, Array] = {}
        self._filled = 0

    def __enter__(self) -> "ShardQueue":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._writing is not None:
                self._writing.result()
        finally:
            self._pool.shutdown(wait=True)

    def add(self, batch: Sequence[Rendered], outputs: Mapping[str, Array]) -> None:
        """Add some records of one shard, in any order. The last record of a shard starts its writing in a thread.

        The call that adds this last record first waits until the previous shard is written. Earlier calls do not wait.

        Args:
            batch: the records.
            outputs: path in the cache -> the teacher's outputs for these records.
        """
        shard = batch[0].record // self._manifest.build.shard_records
        first, last = self._manifest.shard_range(shard)
        if not self._filled:
            self._arrays = {spec.path: np.empty((last - first, *spec.shape), spec.dtype) for spec in self._specs}
        rows = {**outputs, **_record_rows(batch, self._manifest)}
        places = [item.record - first for item in batch]
        for path, array in self._arrays.items():
            array[places] = rows[path]
        self._filled += len(batch)
        if self._filled == last - first:
            if self._writing is not None:
                self._writing.result()
            self._writing = self._pool.submit(self._write, shard, self._arrays)
            self._arrays, self._filled = {}, 0


def _record_rows(batch: Sequence[Rendered], manifest: Manifest) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "records/sample": [item.sample for item in batch],
        "records/view": [item.view for item in batch],
        "records/window": [item.window.as_tuple() for item in batch],
        "records/flip": [item.flip for item in batch],
        "records/pixel_checksum": np.array([item.checksum for item in batch], np.uint64),
        "records/labelled": [
            LABEL_BITS[SEGMENTATION] * item.labelled + LABEL_BITS[DEPTH] * item.depth_labelled for item in batch
        ],
    }
    if manifest.records_contents:
        image, label, depth = np.stack([item.digests for item in batch], axis=1)
        rows |= {"records/image_digest": image, "records/label_digest": label, "records/depth_digest": depth}
        rows["records/label_checksum"] = np.array([item.label_checksum for item in batch], np.uint64)
    if manifest.view.reaches_beyond:
        rows["records/source_size"] = [item.source_size for item in batch]
    if manifest.teacher.folds is not None:
        rows["records/fold"] = [item.fold for item in batch]
    if manifest.view.pixels == "stored":
        rows["labels/segmentation"] = [item.label for item in batch]
        rows["pixels/image"] = [item.pixels for item in batch]
        rows["labels/depth"] = [item.depth for item in batch]
    return rows
