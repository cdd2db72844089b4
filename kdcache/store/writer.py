"""Writing a store: whole shards by one owner, synced before the ledger says that they exist.

The order is what makes a crash harmless: array files, fsync, ledger record; `complete.json` last. A process
that dies leaves finished shards, which a later one keeps, and at most one unfinished shard, which it redoes.

Any number of processes may build one store. On a disk each takes the next shard that nobody has claimed, and a claim
ends with its process; workers with numbers (`Worker`) keep to their own shards, which needs no claims: on an object
store there are none. Who finishes the last shard seals the store.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from kdcache.errors import CorruptError, MismatchError, StoreError
from kdcache.store import ledger
from kdcache.store.damage import damaged_metadata, unreadable_metadata
from kdcache.store.ledger import FileRecord, ShardRecord
from kdcache.store.manifest import Manifest
from kdcache.store.place import Place, Release, open_place
from kdcache.store.reader import read_manifest
from kdcache.store.schema import ArraySpec, chunk_records, create_arrays, metadata_keys, record_arrays, shard_key
from kdcache.store.shard import chunk_checksums

Array = np.ndarray[Any, Any]
_SETTING = threading.Lock()
_POLL_SECONDS = 0.5  # between looks at the shards of others


@dataclass(frozen=True)
class Worker:
    """Number `index` of `count` processes that build a store together: shard k is that of worker k mod count."""

    index: int = 0
    count: int = 1

    def owns(self, shard: int) -> bool:
        return shard % self.count == self.index

    def describe(self, what: str) -> str:
        """What this worker does, for messages."""
        return what if self.count == 1 else f"{what}, worker {self.index} of {self.count}"


class StoreWriter:
    """Builds one store; created or continued by `open_writer`.

    Attributes:
        manifest: of the store on disk (its `created` is that of the first start).
        finished: shards whose files were found whole, or are published since.
    """

    def __init__(self, place: Place, manifest: Manifest, worker: Worker) -> None:
        self.place = place
        self.manifest = manifest
        self.worker = worker
        self.finished = set[int]()
        self._claims: dict[int, Release] = {}
        self._specs = record_arrays(manifest)
        self._encoder = _Encoder(manifest)

    @property
    def missing(self) -> list[int]:
        """Shards of this worker still to be written, in order."""
        return [
            shard for shard in range(self.manifest.shards) if self.worker.owns(shard) and shard not in self.finished
        ]

    def claimed(self) -> Iterator[int]:
        """The missing shards, one by one, each as this process gets it; those that other processes have are left out.

        Some may be missing afterwards: see `wait`.
        """
        for shard in self.missing:
            release = self.place.claim(shard, [shard_key(spec, shard) for spec in self._specs])
            if release is None:
                continue
            if ledger.read_shard_record(self.place, shard) is None:
                self._claims[shard] = release
                yield shard
            else:
                self.finished.add(shard)
                release()

    def wait(self) -> None:
        """Between two passes over `claimed`: others are at work, and one that dies leaves its shards to who waits."""
        time.sleep(_POLL_SECONDS)

    def write_shard(self, shard: int, arrays: Mapping[str, Array | bytes]) -> None:
        """Write one whole shard of every array and publish it.

        Args:
            shard: its number.
            arrays: path -> (records of the shard, ...) in the schema's type, or the file as it was encoded before.
        Raises: StoreError when the disk is full; nothing half written counts as written.
        """
        first, last = self.manifest.shard_range(shard)
        files = {}
        for spec in self._specs:
            rows = arrays[spec.path]
            content = rows if isinstance(rows, bytes) else self._encoder.encode(spec, shard, rows)
            key = shard_key(spec, shard)
            chunks = self.manifest.build.shard_records // chunk_records(spec, self.manifest)
            files[key] = FileRecord(
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                crc32c=chunk_checksums(content, chunks).hex(),
            )
            self.place.publish(key, content)
        ledger.publish_shard(self.place, shard, (first, last), files)
        self.finished.add(shard)
        release = self._claims.pop(shard, None)
        if release is not None:
            release()

    def seal(self) -> bool:
        """Declare the store whole, if every worker has finished its shards; this one must have."""
        assert not self.missing, self.missing
        return ledger.seal(self.place, self.manifest.shards, metadata_keys(self.manifest))

    def close(self) -> None:
        """Release what is claimed. Nothing is lost: what counts is on disk already."""
        for release in self._claims.values():
            release()
        self._claims.clear()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_writer(
    location: str | Path, manifest: Manifest, ids: Sequence[str], worker: Worker | None = None
) -> StoreWriter:
    """Create the store, or continue one that an equal command began.

    Shards of this worker whose files are not what their ledger record says are redone.

    Raises:
        StoreError: the place holds something else.
        MismatchError: a store is there that was begun with other inputs; it is left as it is.
    """
    place = open_place(location)
    place.begin(_metadata(manifest, ids))
    present = read_manifest(place)
    sealed = _check_seal(place, present)
    differences = present.differences(manifest)
    if differences:
        raise MismatchError(
            "a store is continued with the inputs that it was begun with",
            received=f"{place} differs in " + "; ".join(differences),
            remedy="repeat the first command exactly, or give another --out (kdcache copy: another DESTINATION)",
        )
    if not sealed:
        _check_metadata(place, present, ids)
    writer = StoreWriter(place, present, worker or Worker())
    writer.finished = _whole_shards(place, present, writer.worker)
    return writer


class _Encoder:
    """Arrays to the bytes of their shards, by zarr-python in memory."""

    def __init__(self, manifest: Manifest) -> None:
        self._files: dict[str, Any] = {}
        group = zarr.open_group(MemoryStore(self._files), mode="w")
        self._arrays = create_arrays(group, manifest, ())

    def encode(self, spec: ArraySpec, shard: int, rows: Array) -> bytes:
        array: Any = self._arrays[spec.path]
        first = shard * array.shards[0]
        assert rows.shape == (min(array.shards[0], array.shape[0] - first), *spec.shape), (spec.path, rows.shape)
        assert rows.dtype == spec.dtype, (spec.path, rows.dtype)
        # A task per chunk costs more than encoding it: let Zarr take the chunks of a shard together. The setting is the
        # process's own: threads that put it back in another order than they changed it would leave it changed.
        with _SETTING, zarr.config.set({"codec_pipeline.batch_size": len(rows)}):
            array[first : first + len(rows)] = rows
        content: bytes = self._files.pop(shard_key(spec, shard)).to_bytes()
        return content


def _metadata(manifest: Manifest, ids: Sequence[str]) -> dict[str, bytes]:
    """Every file of a store that has no shards yet; the one that makes it a store is the last."""
    files: dict[str, Any] = {}
    attributes: Any = {"kdcache": manifest.model_dump(mode="json")}
    create_arrays(zarr.open_group(MemoryStore(files), mode="w", attributes=attributes), manifest, ids)
    keys = sorted(metadata_keys(manifest), key=lambda key: key == "zarr.json")
    return {key: files[key].to_bytes() for key in keys}


def _check_seal(place: Place, manifest: Manifest) -> bool:
    """Whether the store has a seal, which its metadata fits. Raises CorruptError when that was changed."""
    try:
        completion = ledger.read_completion(place)
    except CorruptError:
        completion = None
        place.remove(ledger.COMPLETE)
    if completion is not None:
        ledger.check_metadata(place, completion, metadata_keys(manifest))
    return completion is not None


def _check_metadata(place: Place, manifest: Manifest, ids: Sequence[str]) -> None:
    """What a build does not write again is what it must be, also without a seal."""
    files = _metadata(manifest, ids)
    del files["zarr.json"]  # it was read already
    for key, content in files.items():
        try:
            same = place.read(key, most=len(content)) == content
        except (OSError, ValueError) as error:
            raise unreadable_metadata(place.describe(key), error) from error
        if not same:
            raise damaged_metadata(place.describe(key))


def _whole_shards(place: Place, manifest: Manifest, worker: Worker) -> set[int]:
    """Shards of a worker that the ledger lists and whose files hold what was written. Others lose their record."""
    was_sealed = next(place.sizes([ledger.COMPLETE])) is not None
    mine = [shard for shard in range(manifest.shards) if worker.owns(shard)]
    listed: list[ShardRecord] = []
    wrong = []
    for shard in mine:
        try:
            record = ledger.read_shard_record(place, shard)
        except CorruptError:
            wrong.append(shard)
            continue
        if record is not None:  # else another process may be about to publish it
            if ledger.is_of(manifest, shard, record):
                listed.append(record)
            else:
                wrong.append(shard)
    # An object store keeps what it took: its bytes are not fetched to be looked at again.
    damaged = ledger.damaged_files(place, listed, digests=not place.remote)
    states = {record.shard: not files for record, files in zip(listed, damaged, strict=True)}
    whole = {shard for shard, fine in states.items() if fine}
    doubtful = {*wrong, *states} - whole
    if doubtful or (was_sealed and len(whole) < len(mine)):
        # Unseal first: a store with a shard in doubt must not open. What others have sealed meanwhile stays.
        place.remove(ledger.COMPLETE)
    for shard in doubtful:
        place.remove(ledger.record_key(shard))
    return whole


def worker_of(text: str | None) -> Worker:
    """'2/8' as the third of eight workers; None as torchrun numbers this process, or as the only one.

    Raises: StoreError.
    """
    if text is None:
        return Worker(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise StoreError(
            "--worker is I/N: number I, from 0, of N workers",
            received=repr(text),
            remedy="for instance --worker 0/4 on the first of four machines",
        )
    return Worker(int(index), int(count))
