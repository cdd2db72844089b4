"""Writing a store: whole shards by one owner, synced before the ledger says that they exist.

The order is what makes a crash harmless: array files, fsync, ledger record; `complete.json` last. A process
that dies leaves finished shards, which a later one keeps, and at most one unfinished shard, which it redoes.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from kdcache.errors import CorruptError, MismatchError, StoreError
from kdcache.store import ledger
from kdcache.store.durable import disk_space_errors, sync_path, sync_with_parents
from kdcache.store.manifest import Manifest
from kdcache.store.reader import open_array, read_ids, read_manifest
from kdcache.store.schema import create_arrays, metadata_keys, record_arrays, shard_key


class StoreWriter:
    """Builds one store; created or continued by `open_writer`.

    Attributes:
        manifest: of the store on disk (its `created` is that of the first start).
        finished: shards whose files were found whole.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: int) -> None:
        self.path = path
        self.manifest = manifest
        self.finished = set[int]()
        self._lock = lock
        self._specs = record_arrays(manifest)
        with zarr.config.set({"array.write_empty_chunks": True}):
            group = zarr.open_group(path, mode="r+")
            self._arrays = {spec.path: open_array(path, group, spec, manifest.records) for spec in self._specs}

    @property
    def missing(self) -> list[int]:
        """Shards still to be written, in order."""
        return [shard for shard in range(self.manifest.shards) if shard not in self.finished]

    def write_shard(self, shard: int, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write one whole shard of every array and publish it.

        Args:
            shard: its number.
            arrays: path -> (records of the shard, ...) in the schema's type.
        Raises: StoreError when the disk is full; nothing half written counts as written.
        """
        first, last = self.manifest.shard_range(shard)
        keys = [shard_key(spec, shard) for spec in self._specs]
        # A task per chunk costs more than encoding it: let Zarr take the chunks of a shard together.
        with disk_space_errors(self.path), zarr.config.set({"codec_pipeline.batch_size": last - first}):
            for spec, key in zip(self._specs, keys, strict=True):
                rows = arrays[spec.path]
                assert rows.shape == (last - first, *spec.shape), (spec.path, rows.shape)
                assert rows.dtype == spec.dtype, (spec.path, rows.dtype)
                # Zarr reads a shard that is there before it writes, and fails on a damaged one.
                (self.path / key).unlink(missing_ok=True)
                self._arrays[spec.path][first:last] = rows
            for key in keys:
                sync_with_parents(self.path / key, self.path)
            ledger.publish_shard(self.path, shard, (first, last), keys)
        self.finished.add(shard)

    def seal(self) -> None:
        """Declare the store whole; every shard must be finished."""
        assert not self.missing, self.missing
        with disk_space_errors(self.path):
            ledger.seal(self.path, self.manifest.shards, metadata_keys(self.manifest))

    def close(self) -> None:
        """Release the lock. Nothing is lost: what counts is on disk already."""
        os.close(self._lock)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_writer(path: Path, manifest: Manifest, ids: Sequence[str]) -> StoreWriter:
    """Create the store, or continue one that an equal command began.

    Shards whose files are not what their ledger record says are redone.

    Raises:
        StoreError: the folder holds something else, or another process is building here.
        MismatchError: a store is there that was begun with other inputs; it is left as it is.
    """
    _check_place(path)
    with disk_space_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of several processes that start at once, one makes the store.
        with _locked(path.parent):
            if not (path / "zarr.json").exists():
                _create(path, manifest, ids)
    lock = _lock(path)
    try:
        present = read_manifest(path)
        differences = present.differences(manifest)
        if differences:
            raise MismatchError(
                "a build continues only a store that was begun with the same inputs",
                received=f"{path} differs in " + "; ".join(differences),
                remedy="repeat the first command exactly, or give another --out",
            )
        _check_metadata(path, present, ids)
        for leftover in path.rglob("*.partial"):
            leftover.unlink()
        writer = StoreWriter(path, present, lock)
        writer.finished = _whole_shards(path, present)
    except BaseException:
        os.close(lock)
        raise
    return writer


def _check_place(path: Path) -> None:
    """A store is made in a new or empty folder; what else is there is the user's."""
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir() or (there == path and not (path / "zarr.json").exists() and any(path.iterdir())):
        raise StoreError(
            "--out is a new or empty folder, or a store to continue",
            received=f"{there} holds something else" if there.is_dir() else f"{there} is a file",
            remedy="give another --out, or empty it yourself if nothing in it is needed",
        )


def _create(path: Path, manifest: Manifest, ids: Sequence[str]) -> None:
    """Make an empty store beside its place and move it there whole: a crash leaves no half-made folder."""
    begun = path.with_name(f".{path.name}.begun")
    shutil.rmtree(begun, ignore_errors=True)
    try:
        group = zarr.open_group(begun, mode="w", attributes={"kdcache": manifest.model_dump(mode="json")})
        create_arrays(group, manifest, ids)
        (begun / ledger.FOLDER).mkdir()
        for key in metadata_keys(manifest):
            sync_with_parents(begun / key, begun)
        begun.rename(path)
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    sync_path(path.parent)


def _check_metadata(path: Path, manifest: Manifest, ids: Sequence[str]) -> None:
    """What a build does not write again is as it was made: by the seal, or by what it must say."""
    keys = metadata_keys(manifest)
    try:
        completion = ledger.read_completion(path)
    except CorruptError:
        completion = None
        (path / ledger.COMPLETE).unlink()
    if completion is not None:
        ledger.check_metadata(path, completion, keys)
        return
    for key in keys:
        if not (path / key).is_file():
            raise ledger.damaged_metadata(path / key)
    if read_ids(path) != tuple(ids):
        raise ledger.damaged_metadata(path / "samples")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for and hold the lock of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lock(path: Path) -> int:
    """One builder per store. A lock on the folder itself leaves no file behind and dies with its process."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise StoreError(
            "one process builds a store at a time",
            received=f"another process is building {path}",
            remedy="wait for it to end, or give another --out",
        ) from error
    return handle


def _whole_shards(path: Path, manifest: Manifest) -> set[int]:
    """Shards that the ledger lists and whose files hold what was written. The rest lose their record."""
    whole = {shard for shard in range(manifest.shards) if _is_whole(path, manifest, shard)}
    if len(whole) < manifest.shards:
        # Unseal first: a store with a shard in doubt must not open.
        (path / ledger.COMPLETE).unlink(missing_ok=True)
    for shard in set(range(manifest.shards)) - whole:
        ledger.record_path(path, shard).unlink(missing_ok=True)
    return whole


def _is_whole(path: Path, manifest: Manifest, shard: int) -> bool:
    try:
        record = ledger.read_shard_record(path, shard)
    except CorruptError:
        return False
    return (
        record is not None
        and (record.shard, record.records) == (shard, manifest.shard_range(shard))
        and set(record.files) == {shard_key(spec, shard) for spec in record_arrays(manifest)}
        and not ledger.damaged_files(path, record)
    )
