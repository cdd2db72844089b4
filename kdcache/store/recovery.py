"""Repair of a damaged cache by a build, after an accident, an interrupted copy or a failing disk.

Everything except the shards can be written again without the teacher. Array metadata and ids follow from the manifest
and the command. The manifest has a spare copy (`manifest.json`, with its digest). A ledger entry is also in
`ledger.jsonl`. Ledger and seal follow from the entries. If a digest does not fit, the digest itself may be damaged.
A shard with damaged files is computed again. Nothing is written if nothing is damaged.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kdcache.errors import CorruptError, KDCacheError, MismatchError
from kdcache.store import ledger
from kdcache.store.backend.base import MAX_JSON_BYTES, Place
from kdcache.store.format.damage import AGAIN, unreadable_metadata
from kdcache.store.format.manifest import Manifest, parse_manifest
from kdcache.store.format.schema import ArraySpec, chunk_records, record_arrays
from kdcache.store.ledger import COMPLETE, Completion, ShardRecord, read_or_none

ROOT = "zarr.json"
SPARE = "manifest.json"
"""The spare copy of the top-level zarr.json, which has facts that no build can restore, such as the first start."""


def spare_of(root: bytes) -> bytes:
    """Return the content that the spare copy, `manifest.json`, must have for a cache's top-level zarr.json.

    `root` is the content of that zarr.json.
    """
    content = {"sha256": hashlib.sha256(root).hexdigest(), ROOT: root.decode()}
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_spare(place: Place) -> bytes | None:
    """Return the content of the top-level zarr.json of the cache at `place`, from the spare copy.

    Returns None if there is no spare copy or it is damaged.

    Raises: StoreError if this process may not read it.
    """
    try:
        spare = json.loads(read_or_none(place, SPARE, 2 * MAX_JSON_BYTES) or b"")
        root = str(spare[ROOT]).encode()
        return root if hashlib.sha256(root).hexdigest() == spare["sha256"] else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def read_seal(place: Place) -> Completion | None:
    """Return the seal of the cache at `place`, or None if it is missing or damaged.

    Raises: StoreError if this process may not read it.
    """
    try:
        return ledger.read_completion(place)
    except CorruptError:
        return None


def check_metadata(place: Place, completion: Completion, keys: Iterable[str]) -> None:
    """Check that the metadata files `keys` of the cache at `place` have the digests in the seal `completion`.

    Raises: CorruptError naming the file. The file or the seal was changed.
    """
    for key in keys:
        try:
            place.read_verified(key, completion.metadata.get(key, ""))
        except (OSError, ValueError) as error:
            what = f"it is not what {COMPLETE} seals, or that was changed"
            failure = unreadable_metadata(place.describe(key), error, what)
            if key == ROOT and AGAIN in failure.fix and read_spare(place) is None:
                raise type(failure)(
                    f"{failure.problem}, and zarr.json has no spare copy",
                    fix=f"{AGAIN}: it writes this file again, or says that it cannot.",
                ) from error
            raise failure from error


def is_intact(place: Place, completion: Completion | None) -> bool:
    """Return False if the top-level zarr.json of the cache at `place` is damaged and has no intact spare copy.

    zarr.json counts as damaged if its digest is not the one in the seal `completion`. Without a seal (None), nothing
    counts as damaged, so the result is True.
    """
    root = read_or_none(place, ROOT, MAX_JSON_BYTES) or b""
    sealed = None if completion is None else completion.metadata.get(ROOT)
    return read_spare(place) is not None or sealed in (None, hashlib.sha256(root).hexdigest())


def restore_root(place: Place, wanted: Manifest) -> None:
    """Write the top-level zarr.json of the cache at `place` again from the spare copy, if it is lost or damaged.

    `wanted` is the manifest of a new build with the same settings. If the seal confirms neither zarr.json nor the spare
    copy, the one that fits `wanted` is trusted.
    """
    root, spare = read_or_none(place, ROOT, MAX_JSON_BYTES), read_spare(place)
    if spare is None or root == spare:
        return
    completion = read_seal(place)
    sealed = None if completion is None else completion.metadata.get(ROOT)
    if hashlib.sha256(spare).hexdigest() != sealed:
        if root is not None and hashlib.sha256(root).hexdigest() == sealed:
            return  # the spare of another store
        if not _continues(spare, wanted) and _continues(root, wanted):
            return
    place.publish(ROOT, spare)


def _continues(root: bytes | None, planned: Manifest) -> bool:
    """Return True if a top-level zarr.json belongs to the build that a command would begin."""
    try:
        manifest = parse_manifest(json.loads(root or b"")["attributes"], ROOT)
    except (KDCacheError, ValueError, RecursionError, TypeError, KeyError):
        return False
    return not manifest.differences(planned.with_environment(manifest))


def restore_metadata(
    place: Place, files: Mapping[str, bytes], completion: Completion | None, *, same_libraries: bool
) -> None:
    """Write damaged metadata files again.

    A file counts as damaged if it has neither the digest in the seal nor the content that the build would write.

    Args:
        place: the cache's location.
        files: key -> content that the build would write.
        completion: the seal, or None for a cache without one.
        same_libraries: whether the installed libraries are those that began the cache. Other versions may write the
            same metadata in different bytes.
    Raises: MismatchError for a damaged file that only the original library versions can write.
    """
    for key, content in files.items():
        present = read_or_none(place, key, max(len(content), MAX_JSON_BYTES))
        sealed = None if completion is None else completion.metadata.get(key)
        if present is not None and (present == content or hashlib.sha256(present).hexdigest() == sealed):
            continue
        if hashlib.sha256(content).hexdigest() != sealed:
            if not same_libraries and sealed is None and present is not None:
                continue
            if not same_libraries:
                raise MismatchError(
                    f"Cannot write the damaged {place.describe(key)} again: other library versions wrote it",
                    fix="Install the versions that `kdcache inspect --json` shows, or restore the file from a copy.",
                )
            place.remove(COMPLETE)  # first: a store with metadata in doubt must not open
        place.publish(key, content)


def restore_spare(place: Place, completion: Completion | None) -> None:
    """Write the spare copy of zarr.json of the cache at `place` again if it is missing or damaged.

    If the seal `completion` does not list a spare copy, the cache never had one, and nothing is written.
    `completion` is None for a cache without a seal.
    """
    if completion is not None and SPARE not in completion.metadata:
        return
    root = place.read(ROOT)
    if read_or_none(place, SPARE, 2 * MAX_JSON_BYTES) != spare_of(root):
        place.publish(SPARE, spare_of(root))


@dataclass(frozen=True)
class State:
    """The state of a worker's shards. A shard in neither field was not finished yet.

    Attributes:
        whole: numbers of finished shards with intact files.
        doubtful: numbers of shards that were finished once but are damaged -> ledger entry, or None if that is damaged.
    """

    whole: set[int]
    doubtful: dict[int, ShardRecord | None]


def examine_shards(place: Place, manifest: Manifest, shards: Sequence[int], completion: Completion | None) -> State:
    """Compare the files of some shards with their ledger entries.

    If the files are intact but the ledger entry's own file is damaged, that file is written again. For a remote cache,
    only file sizes are compared.

    Args:
        place: the cache's location.
        manifest: the cache's manifest.
        shards: numbers of the shards.
        completion: the seal, or None for a cache without one.
    Returns: the shards with intact files, and the damaged ones. Without a seal, unfinished shards are in neither.
    """
    sealed = ledger.sealed_records(place, completion)
    listed: list[ShardRecord] = []
    doubtful: dict[int, ShardRecord | None] = {}
    for shard in shards:
        try:
            record = sealed.get(shard) or ledger.read_shard_record(place, shard)
        except CorruptError:
            record, doubtful[shard] = None, None
        if record is None and completion is not None:  # without a seal another process may be about to publish it
            doubtful[shard] = None
        if record is not None and ledger.is_of(manifest, shard, record):
            listed.append(record)
        elif record is not None:
            doubtful[shard] = None
    intact = set[int]()
    for record, examined in zip(
        listed, ledger.examine(place, listed, chunk_counts(manifest), digests=not place.remote), strict=True
    ):
        if examined.damaged:
            doubtful[record.shard] = record
            continue
        intact.add(record.shard)
        if not ledger.is_published(place, examined.record):
            place.publish(ledger.record_key(record.shard), ledger.canonical(examined.record))
    return State(intact, doubtful)


def chunk_counts(manifest: Manifest) -> dict[ArraySpec, int]:
    """Return array -> number of chunks in a full shard, for the arrays of a cache with this manifest."""
    return {spec: manifest.build.shard_records // chunk_records(spec, manifest) for spec in record_arrays(manifest)}
