"""The ledger: one small JSON file per finished shard, and `complete.json` when all are there.

A shard counts if its ledger entry exists. An entry is written only after the shard's files are on the disk. When all
shards are finished, `ledger.jsonl` has one entry per line, so a reader needs one file and parses only what it uses.
`complete.json` seals the rest, with digests of `ledger.jsonl` and of every metadata file. The seal covers an entry as
JSON written by `canonical`, whatever white space its file has.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, TypeVar, cast

from pydantic import Field, ValidationError

from kdcache.errors import CorruptError, StoreError
from kdcache.store.backend.base import MAX_JSON_BYTES, MAX_SEALED_BYTES, Place
from kdcache.store.format.damage import damaged, damaged_metadata, unreadable_metadata
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.manifest_models import Digest, Part
from kdcache.store.format.schema import ArraySpec, record_arrays, shard_key
from kdcache.store.format.shard import chunk_checksums

COMPLETE = "complete.json"
WHOLE = "ledger.jsonl"
# Through no folder above the store: the files that a ledger lists are opened on this machine.
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$", max_length=500)]


class FileRecord(Part):
    """The size and checksums of one shard file.

    Attributes:
        bytes: the file's size in bytes.
        sha256: the file's SHA-256 as 64 hexadecimal digits.
        crc32c: the last 4 bytes of each chunk in the file, as 8 hexadecimal digits each. They show whether a chunk was
            changed, without reading the whole file.
    """

    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest
    crc32c: Annotated[str, Field(pattern=r"^([0-9a-f]{8})*$")]


class ShardRecord(Part):
    """The ledger's entry for a finished shard.

    Attributes:
        noun: name of this object in error messages.
        shard: the shard's number.
        records: (first, end): the shard holds the records from `first` up to, but not including, `end`.
        files: key -> size and checksums of each file of the shard. A shard has one file for each array.
    """

    noun: ClassVar = "the ledger record"
    shard: Annotated[int, Field(ge=0)]
    records: tuple[int, int]
    files: dict[Key, FileRecord]


class Completion(Part):
    """The seal of a finished cache, stored as complete.json.

    Attributes:
        noun: name of this object in error messages.
        shards: number of shards.
        ledger_sha256: digest of the ledger. It identifies the cache's content.
        metadata: key -> SHA-256 of each metadata file.
    """

    noun: ClassVar = "the seal"
    shards: Annotated[int, Field(ge=0)]
    ledger_sha256: Digest
    metadata: dict[Key, Digest]

    @property
    def content(self) -> bytes:
        """The bytes of the file complete.json for this seal."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()

    @property
    def digest(self) -> str:
        """The SHA-256 of the seal, which covers all files of the cache.

        Publish it so that others can detect any change.
        """
        return hashlib.sha256(self.content).hexdigest()


R = TypeVar("R", ShardRecord, Completion)


class Ledger:
    """The ledger of a sealed cache: sizes and checksums of all its files. It is read on first use.

    Args:
        place: the cache's location.
        completion: the cache's seal.
    """

    def __init__(self, place: Place, completion: Completion) -> None:
        self.place = place
        self.completion = completion
        self._records: dict[int, ShardRecord] = {}

    def __len__(self) -> int:
        return self.completion.shards

    def __reduce__(self) -> tuple[object, ...]:
        return Ledger, (self.place, self.completion)

    def record(self, shard: int) -> ShardRecord:
        """Return the ledger's entry for shard number `shard`. Raises: CorruptError for a damaged ledger."""
        record = self._records.get(shard)
        if record is None:
            record = _parse(self.place, WHOLE, self._lines[shard], ShardRecord)
            if record.shard != shard:
                raise damaged_metadata(self.place.describe(WHOLE), f"line {shard} is of shard {record.shard}")
            self._records[shard] = record
        return record

    @cached_property
    def _lines(self) -> list[bytes]:
        file = self.place.describe(WHOLE)
        try:
            content = self.place.read_verified(WHOLE, self.completion.ledger_sha256)
        except (OSError, ValueError) as error:
            raise unreadable_metadata(file, error, f"it cannot be read, or is not what {COMPLETE} seals") from error
        lines = content.count(b"\n")  # before each takes memory of its own
        if lines != len(self) or not content.endswith(b"\n"):
            raise damaged_metadata(file, f"it has {lines} records, {COMPLETE} says {len(self)}")
        return content.split(b"\n")[:-1]

    def check_lines(self) -> None:
        """Check that the ledger file has the digest in the seal. Raises: CorruptError."""
        len(self._lines)

    def file(self, shard: int, key: str) -> FileRecord:
        """Return the expected size and checksums of the file `key` of shard number `shard`.

        Raises: CorruptError if the ledger is damaged or does not list the file.
        """
        record = self.record(shard).files.get(key)
        if record is None:
            raise damaged_metadata(self.place.describe(WHOLE), f"it lists no {key}")
        return record

    def check_files(self) -> None:
        """Check that every shard file exists with the size in the ledger.

        Raises: CorruptError naming the first file that is missing or has another size.
        """
        files = {key: file.bytes for shard in range(len(self)) for key, file in self.record(shard).files.items()}
        for (key, expected), size in zip(files.items(), self.place.sizes(files), strict=True):
            if _has_size(self.place, key, size, expected):
                continue
            if size is None:
                raise damaged(self.place.describe(key), "the file is missing")
            raise damaged(self.place.describe(key), f"it has {size} bytes, the ledger says {expected}")


def _has_size(place: Place, key: str, size: int | None, expected: int) -> bool:
    """Return whether a file has the expected size. A remote file is asked for again before it is called damaged."""
    return size == expected or (place.remote and next(place.sizes([key])) == expected)


def record_key(shard: int) -> str:
    """Return the key of the file with a shard's ledger entry, such as `ledger/00000003.json`."""
    return f"ledger/{shard:08d}.json"


def publish_shard(place: Place, record: ShardRecord) -> None:
    """Write the ledger entry `record` of the cache at `place`, after the shard's files are written.

    From then on the shard counts as finished.

    Raises: StoreError if another worker has already finished the shard with other bytes.
    """
    shard = record.shard
    if not place.publish_exclusive(record_key(shard), canonical(record)) and read_shard_record(place, shard) != record:
        for key in (COMPLETE, record_key(shard)):  # its files may be some of each
            place.remove(key)
        raise StoreError(
            f"Two workers wrote {place.describe(record_key(shard))} with different bytes",
            fix="Give every worker its own number with --worker I/N, then run the same build again: it rebuilds what "
            "is damaged.",
        )


def is_of(manifest: Manifest, shard: int, record: ShardRecord) -> bool:
    """Return True if the ledger entry `record` fits shard number `shard` of the cache with this manifest.

    The shard's number, its range of records and the keys of its files must be equal.
    """
    keys = {shard_key(spec, shard) for spec in record_arrays(manifest)}
    return (record.shard, record.records, set(record.files)) == (shard, manifest.shard_range(shard), keys)


def is_published(place: Place, record: ShardRecord) -> bool:
    """Return True if the stored ledger entry for the shard of `record` equals `record`, in the cache at `place`."""
    try:
        return place.read(record_key(record.shard)) == canonical(record)
    except (OSError, ValueError):
        return False


def read_shard_record(place: Place, shard: int) -> ShardRecord | None:
    """Return the ledger entry of shard number `shard` of the cache at `place`, or None if the shard is not finished.

    Raises: CorruptError for a damaged entry.
    """
    return _read(place, record_key(shard), ShardRecord)


def _read(place: Place, key: str, kind: type[R]) -> R | None:
    try:
        return _parse(place, key, place.read(key), kind)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise unreadable_metadata(place.describe(key), error, f"{kind.noun} cannot be read") from error


def _parse(place: Place, key: str, content: bytes, kind: type[R]) -> R:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise damaged_metadata(place.describe(key), f"{kind.noun} is malformed") from error


def sealed_records(place: Place, completion: Completion | None) -> dict[int, ShardRecord]:
    """Return the ledger entries in `ledger.jsonl` of the cache at `place`, by shard number.

    The result is empty if the seal `completion` is None, or if the file does not have the digest in that seal.

    Raises: StoreError if the file cannot be read.
    """
    if completion is None:
        return {}
    content = read_or_none(place, WHOLE, MAX_SEALED_BYTES)
    if content is None or hashlib.sha256(content).hexdigest() != completion.ledger_sha256:
        return {}
    records = [_parse(place, WHOLE, line, ShardRecord) for line in content.splitlines()]
    return {record.shard: record for record in records}


@dataclass(frozen=True)
class Examined:
    """The result of comparing a shard's files with its ledger entry.

    Attributes:
        damaged: keys of files that are missing or have another size or digest.
        record: the ledger entry with the chunk checksums that the files actually have.
    """

    damaged: list[str]
    record: ShardRecord


def examine(
    place: Place, records: Sequence[ShardRecord], chunks: Mapping[ArraySpec, int], *, digests: bool = True
) -> Iterator[Examined]:
    """Compare the files of some shards with their ledger entries, and yield one result for each entry, in order.

    Args:
        place: the cache's location.
        records: the ledger entries of the shards.
        chunks: array -> number of chunks in a full shard. For undamaged files of these arrays, the yielded `record` has
            the chunk checksums that the file has now.
        digests: True compares sizes and digests. False compares only file sizes, and `record` keeps the ledger's
            checksums.
    """
    sizes = place.sizes([key for record in records for key in record.files])
    for record in records:
        counts = {shard_key(spec, record.shard): count for spec, count in chunks.items()}
        damaged, files = [], {}
        for key, expected in record.files.items():
            files[key] = expected
            if not _has_size(place, key, next(sizes), expected.bytes):
                damaged.append(key)
            elif digests:
                content = read_or_none(place, key, expected.bytes, expected.sha256)
                if content is None or hashlib.sha256(content).hexdigest() != expected.sha256:
                    damaged.append(key)
                elif key in counts and expected.crc32c:
                    files[key] = expected.model_copy(update={"crc32c": _checksums(content, counts[key])})
        yield Examined(damaged, record.model_copy(update={"files": files}))


def _checksums(content: bytes, chunks: int) -> str:
    try:
        return chunk_checksums(content, chunks).hex()
    except struct.error:  # too short for its index: nothing that our writer makes
        return ""


def read_or_none(place: Place, key: str, most: int, sha256: str | None = None) -> bytes | None:
    """Return the content of the file `key` of the cache at `place`.

    Return None if it is missing, damaged, not a file, or longer than `most` bytes.

    `sha256` is the file's expected digest, or None if unknown. A download with another digest counts as damaged. For a
    local file, `sha256` is ignored.

    Raises: StoreError if this process may not read the file.
    """
    try:
        return place.read(key, most, sha256)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        failure = unreadable_metadata(place.describe(key), error)
        if not isinstance(failure, CorruptError):  # this process may not read it: that is no damage
            raise failure from error
        return None


def seal(place: Place, shards: int, metadata_keys: Iterable[str]) -> bool:
    """Write complete.json, the seal, and return True if all shards are finished. Otherwise only return False.

    Args:
        place: the cache's location.
        shards: number of shards.
        metadata_keys: keys of the metadata files that the seal covers.
    Raises: CorruptError for a missing metadata file.
    """
    records = [read_shard_record(place, shard) for shard in range(shards)]
    if None in records:
        return False
    lines = b"".join(canonical(record) for record in records if record is not None)
    metadata = {key: place.digest(key) for key in metadata_keys}
    missing = next((key for key, digest in metadata.items() if digest is None), None)
    if missing is not None:
        raise damaged_metadata(place.describe(missing))
    ledger_sha256 = hashlib.sha256(lines).hexdigest()
    completion = Completion(shards=shards, ledger_sha256=ledger_sha256, metadata=cast(dict[str, str], metadata))
    with place.alone():  # processes that finish together would tidy away what the other is writing
        place.tidy()
        if read_or_none(place, WHOLE, MAX_SEALED_BYTES) != lines:
            if read_or_none(place, COMPLETE, MAX_JSON_BYTES) not in (None, completion.content):
                place.remove(COMPLETE)  # a seal of another ledger; never that of a process which finished just before
            place.publish(WHOLE, lines)
        if read_or_none(place, COMPLETE, MAX_JSON_BYTES) != completion.content:
            place.publish(COMPLETE, completion.content)
    return True


def read_completion(place: Place) -> Completion | None:
    """Return the seal of the cache at `place`, or None if its build is not finished.

    Raises: CorruptError for a damaged seal.
    """
    return _read(place, COMPLETE, Completion)


def canonical(record: ShardRecord) -> bytes:
    """Return the ledger entry `record` as one line of JSON with sorted keys, in UTF-8.

    Equal entries give equal bytes.
    """
    return (json.dumps(record.model_dump(mode="json"), sort_keys=True) + "\n").encode()
