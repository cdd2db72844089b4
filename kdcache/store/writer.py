"""Write a cache: whole shards by one owner, synced before the ledger lists them.

The order makes a crash harmless: array files, fsync, ledger record, and `complete.json` last. A killed process leaves
finished shards, which a later one keeps, and at most one unfinished shard, which is written again.

Any number of processes may build one cache. On a disk each takes the next shard that no process has claimed, and a
claim ends with its process. Numbered workers (`Worker`) keep to their own shards and need no claims, which object
caches do not have. The process that finishes the last shard seals the cache.
"""

import hashlib
import json
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
from kdcache.errors import CorruptError, MismatchError, StoreError, VersionError
from kdcache.store import ledger, recovery
from kdcache.store.backend.base import MAX_JSON_BYTES, Place, Release
from kdcache.store.backend.open import open_place
from kdcache.store.format.codec import Array
from kdcache.store.format.damage import restored
from kdcache.store.format.layout import parse_layout
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.manifest_models import Repair
from kdcache.store.format.schema import ArraySpec, chunk_records, create_arrays, metadata_keys, record_arrays, shard_key
from kdcache.store.format.shard import chunk_checksums
from kdcache.store.freshness import BuiltFrom, Recorded, columns_of, data_changes, renewal
from kdcache.store.ledger import FileRecord, ShardRecord
from kdcache.store.reader import not_continued, read_manifest, store_exists, store_opens
from kdcache.store.sample_ids import read_ids
from kdcache.store.worker import Worker

_SETTING = threading.Lock()
_POLL_SECONDS = 0.5  # between checks of the shards of others


class StoreWriter:
    """Writes one cache, which `open_writer` created or continues.

    Attributes:
        manifest: the manifest on disk (its `created` is the time of the first start).
        finished: shards that are complete on disk.
        repaired: the manifest's note on shards that are written again in another environment, or None.
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
        """This worker's shards that are not yet written, in order, then those that it takes over."""
        return [shard for shard in self.worker.shards(self.manifest.shards) if shard not in self.finished]

    def passes(self) -> Iterator[Iterator[int]]:
        """Yield passes over the missing shards until all are written: another worker may die and leave some."""
        while self.missing:
            yield self.claimed()
            if self.missing:
                time.sleep(_POLL_SECONDS)

    def claimed(self) -> Iterator[int]:
        """Yield the missing shards that this process could claim, one by one."""
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
        """Write one whole shard of every array and publish it. Args, Raises: as `write_files`."""
        self.finish(self.write_files(shard, arrays))

    def write_files(self, shard: int, arrays: Mapping[str, Array | bytes]) -> ShardRecord:
        """Write the files of one whole shard of every array. The ledger does not list them yet.

        Args:
            shard: the shard's number.
            arrays: path -> (records of the shard, ...) in the schema's type, or the file as it was encoded before.
        Returns: its ledger record, for `finish`.
        Raises: StoreError for a full disk. A partly written shard does not count.
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
        """Publish the ledger record of a shard after its files are written. From then on the shard counts."""
        ledger.publish_shard(self.place, record)
        self.finished.add(record.shard)
        release = self._claims.pop(record.shard, None)
        if release is not None:
            release()

    def seal(self) -> bool:
        """Seal the cache if every worker has finished its shards. This worker must have finished its own."""
        assert not self.missing, self.missing
        keys = [*metadata_keys(self.manifest), *([recovery.SPARE] if self.place.exists(recovery.SPARE) else [])]
        return ledger.seal(self.place, self.manifest.shards, keys)

    def repair(self, now: Manifest, doubtful: Mapping[int, ShardRecord | None], data: BuiltFrom | None) -> None:
        """Prepare to write damaged shards again. All checks run before any file is removed.

        Args:
            now: the manifest that the command would begin, with the current libraries and device.
            doubtful: shards that were finished once, with their records if these could be read.
            data: the data set, as in `open_writer`.
        Raises: MismatchError.
        """
        begun = {shard for repair in self.manifest.repairs for shard in repair.shards}
        again = {shard: doubtful.get(shard) for shard in self.missing if shard in doubtful or shard in begun}
        other = self.manifest.differences(now)  # in the environment alone
        if other and (set(self.missing) != set(again) or (again and data is None)):
            raise _another(self.place, other)
        if data is not None:
            proofs: dict[str, bytes] = {}
            for shard, record in again.items():
                for path, rendered in data.checksums(shard).items():
                    proofs |= self._check_rendered(path, shard, record, rendered, other)
            for key, content in proofs.items():  # they must outlast the record, should this repair be interrupted
                self.place.publish(key, content)
        if other and again:
            self._note(now, sorted(again))
        if doubtful:
            # Unseal first: a store with a shard in doubt must not open. What others have sealed meanwhile stays.
            self.place.remove(ledger.COMPLETE)
        for shard in doubtful:
            self.place.remove(ledger.record_key(shard))

    def _check_rendered(
        self, path: str, shard: int, record: ShardRecord | None, rendered: Array, other: Sequence[str]
    ) -> dict[str, bytes]:
        """Compare the checksums of a shard's pixels or labels with the stored ones, if the cache has them.

        `other` lists how this environment differs from the first one.

        Returns: the file that proves it, if it is damaged and the environment is another one.
        Raises: MismatchError if they differ, and in another environment also if they are not known.
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
            if same and other:
                proof[key] = again
            same = same or (not other and rows is not None and np.array_equal(rows, rendered))
        else:
            same = not other if rows is None else np.array_equal(rows, rendered)
        if not same:
            what = "labels" if path == "records/label_checksum" else "images"
            raise MismatchError(
                f"Cannot repair shard {shard} of {self.place}: its {what} do not render as they did at the build "
                f"({', '.join(other) or 'they have changed, or their checksums are lost'})",
                fix=f"Restore the {what}, or the versions that the cache was built with (kdcache inspect --json). Or "
                "build into a new folder.",
            )
        return proof

    def recorded(self, state: recovery.State) -> Recorded:
        """Return what finished shards, and intact files of damaged ones, record about the data set.

        `state` describes this worker's shards. Shards that other workers have finished are read as well.

        Raises: as `read_ids`.
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
        """Return the records of the shards that other workers have finished, as far as they can be read."""
        shards, records = self.manifest.shards, dict[int, ShardRecord]()
        for shard in set(range(shards)).difference(self.worker.shards(shards)):
            with suppress(CorruptError):  # whoever owns the shard says so
                if (record := ledger.read_shard_record(self.place, shard)) is not None:
                    records[shard] = record
        return records

    def _column(self, spec: ArraySpec, shard: int, record: ShardRecord | None) -> Array | None:
        """Return a shard's rows of an array, or None if the file is damaged or does not match its record."""
        key = shard_key(spec, shard)
        sha256 = None if record is None else record.files[key].sha256
        content = ledger.read_or_none(self.place, key, MAX_JSON_BYTES, sha256)
        whole = content is not None and sha256 in (None, hashlib.sha256(content).hexdigest())
        return self._encoder.decode(spec, shard, content) if content and whole else None  # Zarr reads no bytes as zeros

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
        """Release all claims. Nothing is lost, because finished shards are on disk."""
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
    """Create the cache, or continue one that an equal command began.

    Damage is repaired: metadata and ledger at once, and this worker's shards with damaged files count as missing
    (recovery.py). Libraries and device may differ from the first start if only finished shards are written again. The
    manifest then records it. A shard is written again only if `data`, the data set of the build, renders the same
    pixels and labels as before. None compares neither.

    Raises:
        StoreError: the place holds something else.
        MismatchError: the cache there was begun with other inputs, or pixels differ now. It is left unchanged.
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
    """Encodes arrays to the bytes of their shards, by zarr-python in memory."""

    def __init__(self, manifest: Manifest) -> None:
        self._files: dict[str, Any] = {}
        self._arrays = create_arrays(_new_group(self._files, manifest), manifest, ())

    def encode(self, spec: ArraySpec, shard: int, rows: Array) -> bytes:
        """Return the bytes of a shard of an array, given all of its rows."""
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
        """Return the records in a shard's file, or None if its own checksums do not fit."""
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
    """Every file of a cache that has no shards yet; the one that makes it a cache is the last.

    Raises: VersionError when this zarr-python writes arrays that no reader of ours would take.
    """
    files: dict[str, Any] = {}
    create_arrays(_new_group(files, manifest), manifest, ids)
    keys = sorted(metadata_keys(manifest), key=lambda key: key == "zarr.json")
    contents = {key: files[key].to_bytes() for key in keys}
    for spec in record_arrays(manifest):
        _check_layout(contents[f"{spec.path}/zarr.json"], f"{spec.path}/zarr.json")
    return contents


def _new_group(files: dict[str, Any], manifest: Manifest) -> zarr.Group:
    return zarr.open_group(MemoryStore(files), mode="w", attributes={"kdcache": manifest.to_json()})


def _check_layout(content: bytes, key: str) -> None:
    try:
        parse_layout(json.loads(content), key)
    except VersionError as error:
        raise error.within(
            f"zarr-python {zarr.__version__} writes another kind of array",
            fix="Install an earlier zarr-python, or a later kdcache.",
        ) from error
