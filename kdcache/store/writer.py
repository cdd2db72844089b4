"""Write a cache: whole shards by one owner, synced before the ledger lists them.

The order makes a crash harmless: array files, fsync, ledger entry, and `complete.json` last. A killed process leaves
finished shards, which a later one keeps, and at most one unfinished shard, which is written again.

Any number of processes may build one cache. On a disk each takes the next shard that no process has claimed, and a
claim ends with its process. Numbered workers (`Worker`) keep to their own shards and need no claims, which object
caches do not have. The process that finishes the last shard seals the cache.
"""

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from kdcache.data import Changes, Split, changed_data
from kdcache.errors import CorruptError, MismatchError, StoreError
from kdcache.store import ledger, recovery
from kdcache.store.backend.base import MAX_JSON_BYTES, Place, Release
from kdcache.store.backend.open import open_place
from kdcache.store.format.codec import Array
from kdcache.store.format.damage import restored
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.manifest_models import Repair
from kdcache.store.format.schema import (
    ArraySpec,
    chunk_records,
    create_arrays,
    create_samples,
    layout_files,
    metadata_keys,
    record_arrays,
    shard_key,
)
from kdcache.store.format.shard import chunk_checksums
from kdcache.store.freshness import BuiltFrom, Recorded, columns_of, data_changes, renewal
from kdcache.store.ledger import FileRecord, ShardRecord
from kdcache.store.reader import not_continued, read_manifest, store_exists, store_opens
from kdcache.store.sample_ids import read_ids
from kdcache.store.worker import Worker

_SETTING = threading.Lock()
_POLL_SECONDS = 0.5  # between checks of the shards of others


class StoreWriter:
    """Writes the shards of one cache. Use `open_writer`, which creates or continues the cache.

    Args:
        place: the cache's location.
        manifest: the manifest on disk.
        worker: this process's part of the build.

    Attributes:
        finished: numbers of the shards that are finished on disk.
        repaired: the manifest's entry on shards that this build writes again with other library versions, or on another
            device, than the rest of the cache. None if there are none.
    """

    def __init__(self, place: Place, manifest: Manifest, worker: Worker) -> None:
        self.place = place
        self.manifest = manifest
        self.worker = worker
        self.finished = set[int]()
        self.repaired: Repair | None = None
        self._claims: dict[int, Release] = {}
        self._specs = record_arrays(manifest)

    @cached_property
    def _encoder(self) -> "Encoder":
        return Encoder(self.manifest)

    @property
    def missing(self) -> list[int]:
        """The numbers of this worker's unfinished shards, then of the shards that it takes over from others."""
        return [shard for shard in self.worker.shards(self.manifest.shards) if shard not in self.finished]

    def passes(self) -> Iterator[Iterator[int]]:
        """Yield iterators over the numbers of the missing shards, until no shard is missing.

        Each iterator comes from a new call of `claimed`. A second one is needed if another process stops before it
        finishes the shards that it claimed.
        """
        while self.missing:
            yield self.claimed()
            if self.missing:
                time.sleep(_POLL_SECONDS)

    def claimed(self) -> Iterator[int]:
        """Yield the numbers of the missing shards, one by one, after claiming each for this process.

        Shards that another process has claimed are skipped.
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

    def write_shard(self, shard: int, arrays: Mapping[str, Array | bytes]) -> None:
        """Write all files of shard number `shard`, then its ledger entry, so that the shard counts as finished.

        `arrays` maps each array's path to this shard's rows of the array, or to the finished bytes of its shard file.

        Raises: StoreError for a full disk.
        """
        self.finish(self.write_files(shard, arrays))

    def write_files(self, shard: int, arrays: Mapping[str, Array | bytes]) -> ShardRecord:
        """Write all files of one shard, but not its ledger entry, so that the shard does not count as finished yet.

        Args:
            shard: the shard's number.
            arrays: path of each array -> this shard's rows of the array, (records, ...), or the finished bytes of its
                shard file.
        Returns: the ledger entry, for `finish`.
        Raises: StoreError for a full disk.
        """
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
        return ShardRecord(shard=shard, records=self.manifest.shard_range(shard), files=files)

    def finish(self, record: ShardRecord) -> None:
        """Write the ledger entry `record` of a shard whose files are written. Release this process's claim on it.

        The shard then counts as finished.

        Raises: StoreError if another worker has finished the shard with other bytes.
        """
        ledger.publish_shard(self.place, record)
        self.finished.add(record.shard)
        release = self._claims.pop(record.shard, None)
        if release is not None:
            release()

    def seal(self) -> bool:
        """Seal the cache and return True if all workers have finished their shards. Otherwise only return False.

        Call it when `missing` is empty, so when this worker has finished.
        """
        assert not self.missing, self.missing
        keys = [*metadata_keys(self.manifest), *([recovery.SPARE] if self.place.exists(recovery.SPARE) else [])]
        return ledger.seal(self.place, self.manifest.shards, keys)

    def repair(self, now: Manifest, doubtful: Mapping[int, ShardRecord | None], data: BuiltFrom | None) -> None:
        """Make finished but damaged shards count as unfinished, so that they are written again.

        This deletes the seal, and the ledger entries of the shards `doubtful`. If a check fails, nothing is deleted.

        Args:
            now: the manifest that a new build would write, with the current library versions and device.
            doubtful: shard number -> ledger entry, or None if the entry is damaged.
            data: the build's data set, to check that it still renders the same pixels. None skips this check.
        Raises: MismatchError if the data or the environment has changed.
        """
        begun = {shard for repair in self.manifest.repairs for shard in repair.shards}
        again = {shard: doubtful.get(shard) for shard in self.missing if shard in doubtful or shard in begun}
        changed = self.manifest.differences(now)  # in the environment alone
        if changed and (set(self.missing) != set(again) or (again and data is None)):
            raise _another(self.place, changed)
        if data is not None:
            proofs: dict[str, bytes] = {}
            for shard, record in again.items():
                for path, rendered in data.checksums(shard).items():
                    proofs |= self._check_rendered(path, shard, record, rendered, changed)
            for key, content in proofs.items():  # they must outlast the record, should this repair be interrupted
                self.place.publish(key, content)
        if changed and again:
            self._note(now, sorted(again))
        if doubtful:
            # Unseal first: a store with a shard in doubt must not open. What others have sealed meanwhile stays.
            self.place.remove(ledger.COMPLETE)
        for shard in doubtful:
            self.place.remove(ledger.record_key(shard))

    def _check_rendered(
        self, path: str, shard: int, record: ShardRecord | None, rendered: Array, changed: Sequence[str]
    ) -> dict[str, bytes]:
        """Compare the checksums of a shard's rendered pixels or labels with the stored ones, if any.

        `changed` describes how this environment differs from the first one.

        Returns: key -> content of the checksum file, if it is damaged and the environment is another one. Otherwise
            empty.
        Raises: MismatchError if the checksums differ. In another environment also if the stored ones are unknown.
        """
        spec = next((spec for spec in self._specs if spec.path == path), None)
        proof: dict[str, bytes] = {}
        if spec is None:
            return proof
        key = shard_key(spec, shard)
        file = None if record is None else record.files[key]
        stored = ledger.read_or_none(self.place, key, MAX_JSON_BYTES)
        rows = None if stored is None else self._encoder.decode(spec, shard, stored)
        if file is not None and (stored is None or hashlib.sha256(stored).hexdigest() != file.sha256):
            # The file is damaged, and its digest shows whether it would be the same again. Or the record is wrong.
            again = self._encoder.encode(spec, shard, rendered)
            same = hashlib.sha256(again).hexdigest() == file.sha256
            if same and changed:
                proof[key] = again
            same = same or (not changed and rows is not None and np.array_equal(rows, rendered))
        else:
            same = not changed if rows is None else np.array_equal(rows, rendered)
        if not same:
            what = "labels" if path == "records/label_checksum" else "images"
            raise MismatchError(
                f"Cannot repair shard {shard} of {self.place}: its {what} do not render as they did at the build "
                f"({', '.join(changed) or 'they have changed, or their checksums are lost'})",
                fix=f"Restore the {what}, or the versions that the cache was built with (kdcache inspect --json). Or "
                "build into a new folder.",
            )
        return proof

    def recorded(self, state: recovery.State) -> Recorded:
        """Return the facts about the data set, such as digests of images, that the shards on disk hold.

        `state` describes this worker's shards. Damaged shards are read as far as their files are intact. Finished
        shards of other workers are also read.

        Raises: CorruptError if the sample ids are damaged.
        """
        manifest, names = self.manifest, columns_of(self.manifest)
        specs = [spec for spec in self._specs if spec.path.removeprefix("records/") in names]
        columns = {spec.path: np.zeros((manifest.records, *spec.shape), spec.dtype) for spec in specs}
        known = np.zeros(manifest.records, np.bool_)
        records = dict.fromkeys(state.whole) | state.doubtful | (self._others() if names else {})
        for shard, record in records.items() if names else ():
            first, last = manifest.shard_range(shard)
            read = {spec.path: self._column(spec, shard, record) for spec in specs}
            if all(rows is not None for rows in read.values()):
                known[first:last] = True
                for path, rows in read.items():
                    columns[path][first:last] = rows
        return Recorded(
            ids=read_ids(self.place, manifest),
            class_names=manifest.dataset.class_names,
            views=manifest.view.views_per_sample,
            columns={path.removeprefix("records/"): rows for path, rows in columns.items()},
            known=known,
            size=manifest.view.size,
        )

    def _others(self) -> dict[int, ShardRecord]:
        """Return the ledger entries of the shards that other workers have finished, as far as they can be read."""
        shards, records = self.manifest.shards, dict[int, ShardRecord]()
        for shard in set(range(shards)).difference(self.worker.shards(shards)):
            with suppress(CorruptError):  # whoever owns the shard says so
                if (record := ledger.read_shard_record(self.place, shard)) is not None:
                    records[shard] = record
        return records

    def _column(self, spec: ArraySpec, shard: int, record: ShardRecord | None) -> Array | None:
        """Return a shard's rows of an array, or None if the file is damaged or does not match its ledger entry."""
        key = shard_key(spec, shard)
        sha256 = None if record is None else record.files[key].sha256
        content = ledger.read_or_none(self.place, key, MAX_JSON_BYTES, sha256)
        intact = content is not None and sha256 in (None, hashlib.sha256(content).hexdigest())
        # Zarr would read an empty file as zeros.
        return self._encoder.decode(spec, shard, content) if content and intact else None

    def _note(self, now: Manifest, shards: list[int]) -> None:
        """Record in the manifest that shards are written again in another environment."""
        if self.worker.count > 1:
            raise MismatchError(
                f"Cannot repair shards {shards} of {self.place} with other versions as one of {self.worker.count} "
                "workers",
                fix="Run the same command once without --worker and without torchrun.",
            )
        with self.place.alone():
            present = read_manifest(self.place)
            repairs = present.repairs
            mine = Repair(
                created=now.created,
                created_by=now.created_by,
                device=now.build.device,
                libraries=now.build.libraries,
                shards=tuple(shards),
            )
            same = [
                old for old in repairs if old == mine.model_copy(update={"created": old.created, "shards": old.shards})
            ]
            if same:
                mine = same[-1].model_copy(update={"shards": tuple(sorted({*same[-1].shards, *shards}))})
            self.repaired = mine
            self.manifest = present.model_copy(update={"repairs": (*(old for old in repairs if old not in same), mine)})
            if mine in repairs:
                return
            self.place.remove(ledger.COMPLETE)
            files: dict[str, Any] = {}
            _new_group(files, self.manifest)
            root: bytes = files[recovery.ROOT].to_bytes()
            self.place.publish(recovery.ROOT, root)
            self.place.publish(recovery.SPARE, recovery.spare_of(root))

    def close(self) -> None:
        """Release this process's claims on unfinished shards, so that other processes can compute them.

        Finished shards stay on disk.
        """
        for release in self._claims.values():
            release()
        self._claims.clear()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_writer(
    location: str | Path,
    manifest: Manifest,
    ids: Sequence[str],
    worker: Worker | None = None,
    data: BuiltFrom | None = None,
) -> StoreWriter:
    """Create a cache, or continue an unfinished one that was begun with the same settings.

    Damaged metadata and ledger entries are repaired at once. Damaged shards of this worker count as missing, so they
    are written again. This needs the same library versions and device as before. Others are accepted only if `data` is
    given and all missing shards of this worker were finished once.

    Args:
        location: folder or object-store address of the cache.
        manifest: the manifest of the build.
        ids: the sample ids, in order.
        worker: this process's part of a shared build. Default: all of it.
        data: the build's data set. Damaged shards are written again only if it still renders the same pixels and
            labels. None skips this check.

    Raises:
        StoreError: the location holds something other than a cache.
        MismatchError: the cache there was begun with other settings, data, library versions or another device. Its
            shards are left unchanged.
        VersionError: the installed zarr-python writes arrays that `open_cache` cannot read.
    """
    place = open_place(location)
    worker = worker or Worker()
    recovery.restore_root(place, manifest)
    if not store_exists(place):
        place.begin(_metadata(manifest, ids))
    present = read_manifest(place)
    differences = present.differences(manifest.with_environment(present))
    completion = recovery.read_seal(place)
    writer = StoreWriter(place, present, worker)
    if differences:
        if data is not None and data.split is not None and all(text.startswith("dataset.") for text in differences):
            _check_dataset(writer, data.split, completion)
        if (left := present.earlier_statistics) and not manifest.earlier_statistics:
            raise not_continued(place, left)
        raise _another(place, differences, intact=recovery.is_intact(place, completion))
    files = _metadata(present, ids)
    same = present.build.libraries == manifest.build.libraries
    with place.alone():  # one that finishes meanwhile would tidy away what is being written
        recovery.restore_metadata(place, files, completion, same_libraries=same)
        recovery.restore_spare(place, completion)
    state = recovery.examine_shards(place, present, sorted(worker.shards(present.shards)), completion)
    writer.finished = state.whole
    if data is not None and data.split is not None:
        _check_data(writer, data.split, data_changes(writer.recorded(state), data.split))
    writer.repair(manifest, state.doubtful, data)
    return writer


def _check_dataset(writer: StoreWriter, split: Split, completion: ledger.Completion | None) -> None:
    """Refuse a data set with other classes, samples or labels than the cache's. Raises: MismatchError."""
    place, manifest = writer.place, writer.manifest
    try:
        shards = sorted(writer.worker.shards(manifest.shards))
        recorded = writer.recorded(recovery.examine_shards(place, manifest, shards, completion))
    except StoreError:  # it is damaged: the manifest says what differs
        return
    _check_data(writer, split, data_changes(recorded, split))


def _check_data(writer: StoreWriter, split: Split, changes: Changes) -> None:
    """Refuse a data set that is not what a cache was begun with. Raises: MismatchError."""
    if not changes:
        return
    place = writer.place
    fix = f"Restore the data set, or build the data as it is now into a new --out. {place} stays as it is."
    if store_opens(place):  # else --from fails too, and names this command
        fix = (
            f"Restore the data set, or renew the cache: {renewal(place, split.data)} keeps the targets of unchanged "
            f"images. {place} stays as it is."
        )
    raise changed_data(place, changes, split, fix)


def _another(place: Place, differences: Sequence[str], *, intact: bool = True) -> MismatchError:
    """Return the error for a cache that another command began. `intact` says whether its manifest looks unchanged."""
    spare = ""
    fix = (
        "Repeat the first command exactly, with the same teacher, data, libraries and device. Or give another --out "
        "(kdcache copy: another DESTINATION). To add views, taps or samples to a finished cache: "
        f"kdcache build-teacher-cache --from {place} --data DATA --teacher TEACHER --out NEW"
    )
    if not intact:
        spare = f". Its {recovery.ROOT} is not what {ledger.COMPLETE} seals, and has no spare copy"
        fix = f"Repeat the first command exactly. If this is it: {restored(place)}"
    return MismatchError(f"Cannot continue {place}: it differs in {', '.join(differences)}{spare}", fix=fix)


class Encoder:
    """Encodes the arrays of a cache into the bytes of shard files, and decodes them, in memory.

    Args:
        manifest: the cache's manifest.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._files: dict[str, Any] = {}
        group = zarr.open_group(MemoryStore(self._files), mode="w")
        specs, shard_records = record_arrays(manifest), manifest.build.shard_records
        self._arrays = create_arrays(group, specs, manifest.records, shard_records, manifest.codec)

    def encode(self, spec: ArraySpec, shard: int, rows: Array) -> bytes:
        """Return the bytes of the file of shard number `shard` of the array `spec`.

        `rows` holds all records of the shard, in the array's dtype.
        """
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

    def decode(self, spec: ArraySpec, shard: int, content: bytes) -> Array | None:
        """Return the records (n, ...) in `content`, the bytes of the file of shard number `shard` of the array `spec`.

        Return None if the checksums in `content` are wrong.
        """
        array: Any = self._arrays[spec.path]
        first = shard * array.shards[0]
        key = shard_key(spec, shard)
        self._files[key] = default_buffer_prototype().buffer.from_bytes(content)
        try:
            rows: Array = array[first : first + array.shards[0]]
        except (ValueError, RuntimeError, IndexError):
            return None
        finally:
            del self._files[key]
        return rows


def _metadata(manifest: Manifest, ids: Sequence[str]) -> dict[str, bytes]:
    """Return key -> content of all metadata files of a new cache. The last one, zarr.json, makes it a cache.

    Raises: VersionError if this zarr-python writes arrays that `open_cache` cannot read.
    """
    files: dict[str, Any] = {}
    create_samples(_new_group(files, manifest), ids)
    specs, shard_records = tuple(record_arrays(manifest)), manifest.build.shard_records
    layout = layout_files(specs, manifest.records, shard_records, manifest.codec)
    keys = sorted(metadata_keys(manifest), key=lambda key: key == "zarr.json")
    return {key: layout[key] if key in layout else files[key].to_bytes() for key in keys}


def _new_group(files: dict[str, Any], manifest: Manifest) -> zarr.Group:
    return zarr.open_group(MemoryStore(files), mode="w", attributes={"kdcache": manifest.to_json()})
