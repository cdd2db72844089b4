"""The ledger: one small JSON file per finished shard, and `complete.json` when all are there.

A shard counts when its ledger record exists, and a record is published only after the shard's files are
synced. `complete.json` seals the rest: digests of the ledger and of every metadata file.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcache.errors import CorruptError
from kdcache.store.durable import file_digest, write_json_durably

COMPLETE = "complete.json"
FOLDER = "ledger"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class ShardRecord(BaseModel):
    """What a finished shard consists of; `files` are keyed by path below the store."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    shard: Annotated[int, Field(ge=0)]
    records: tuple[int, int]
    files: dict[str, FileRecord]


class Completion(BaseModel):
    """The seal of a finished store."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    shards: Annotated[int, Field(ge=0)]
    ledger_sha256: Digest
    metadata: dict[str, Digest]


def record_path(store: Path, shard: int) -> Path:
    return store / FOLDER / f"{shard:08d}.json"


def publish_shard(store: Path, shard: int, records: tuple[int, int], files: Iterable[str]) -> None:
    """Write the ledger record of a shard whose files are already synced."""
    listed = {key: FileRecord(bytes=(store / key).stat().st_size, sha256=file_digest(store / key)) for key in files}
    record = ShardRecord(shard=shard, records=records, files=listed)
    write_json_durably(record_path(store, shard), record.model_dump(mode="json"))


def read_shard_record(store: Path, shard: int) -> ShardRecord | None:
    """The record of a shard, None when it is not finished. Raises CorruptError when it cannot be read."""
    path = record_path(store, shard)
    try:
        return ShardRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise damaged(path, "the ledger record is malformed") from error


def check_sizes(store: Path, record: ShardRecord) -> None:
    """Every file of a shard is there with its size. Raises CorruptError naming the first that is not."""
    for key, expected in record.files.items():
        path = store / key
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise damaged(path, "the file is missing") from error
        if size != expected.bytes:
            raise damaged(path, f"it has {size} bytes, the ledger says {expected.bytes}")


def damaged_files(store: Path, record: ShardRecord) -> list[str]:
    """Files of a shard whose bytes are not those that were written; reads them all."""
    return [
        key
        for key, expected in record.files.items()
        if not (store / key).is_file()
        or (store / key).stat().st_size != expected.bytes
        or file_digest(store / key) != expected.sha256
    ]


def ledger_digest(store: Path, shards: int) -> str:
    """sha256 over all ledger records, in order."""
    digest = hashlib.sha256()
    for shard in range(shards):
        try:
            digest.update(record_path(store, shard).read_bytes())
        except FileNotFoundError as error:
            raise damaged(record_path(store, shard), "the ledger record is missing") from error
    return digest.hexdigest()


def seal(store: Path, shards: int, metadata_keys: Iterable[str]) -> None:
    """Write complete.json: from here on the store is whole."""
    metadata = {key: file_digest(store / key) for key in metadata_keys}
    completion = Completion(shards=shards, ledger_sha256=ledger_digest(store, shards), metadata=metadata)
    write_json_durably(store / COMPLETE, completion.model_dump(mode="json"))


def read_completion(store: Path) -> Completion | None:
    """The seal, None for a store that is still being built."""
    path = store / COMPLETE
    try:
        return Completion.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise damaged(path, "the seal is malformed") from error


def check_ledger(store: Path, completion: Completion, shards: int) -> None:
    """The ledger is the one that was sealed. Raises CorruptError."""
    if completion.shards != shards:
        raise damaged(store / COMPLETE, f"it seals {completion.shards} shards, the manifest has {shards}")
    if ledger_digest(store, shards) != completion.ledger_sha256:
        raise damaged(store / FOLDER, "a ledger record was changed after the store was sealed")


def check_metadata(store: Path, completion: Completion, metadata_keys: Iterable[str]) -> None:
    """Manifest, array metadata and ids are those that were sealed. Raises CorruptError naming the file."""
    for key in metadata_keys:
        path = store / key
        if not path.is_file() or file_digest(path) != completion.metadata.get(key):
            raise damaged_metadata(path)


def damaged_metadata(path: Path) -> CorruptError:
    return CorruptError(
        "a store's metadata must be what was written",
        received=f"{path} was changed or removed",
        remedy="restore that file from a copy of the store, or build into a new folder",
    )


def damaged(path: Path, what: str) -> CorruptError:
    return CorruptError(
        "a store's files must be those that were written",
        received=f"{path}: {what}",
        remedy="run the same build-teacher-cache command again: it redoes what is damaged and keeps the rest",
    )
