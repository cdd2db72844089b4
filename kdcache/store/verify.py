"""Checking every byte of a store against its ledger."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.store import ledger
from kdcache.store.damage import damaged as damaged_record
from kdcache.store.ledger import Ledger
from kdcache.store.place import Place, open_place
from kdcache.store.reader import read_manifest, require_complete
from kdcache.store.schema import metadata_keys


@dataclass
class VerifyReport:
    """What `verify_files` found. `damaged` lists files below the store whose bytes are not those written."""

    files: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)


def verify_files(location: str | Path | Place, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Compare the digest of every file with the ledger's.

    Args:
        location: of a complete store.
        progress: called with (shards done, shards).
    Raises: IncompleteError, CorruptError (ledger or metadata), VersionError, StoreError.
    """
    place = open_place(location)
    manifest = read_manifest(place)
    completion = require_complete(place, manifest)
    place = place.at(completion.ledger_sha256)
    for key in (*metadata_keys(manifest), ledger.WHOLE):
        place.forget(key)  # the file itself is checked, not its copy
    ledger.check_metadata(place, completion, metadata_keys(manifest))
    sealed = Ledger(place, completion)
    records = [sealed.record(shard) for shard in range(manifest.shards)]
    report = VerifyReport(files=len(completion.metadata) + 1)
    for record, damaged in zip(records, ledger.damaged_files(place, records), strict=True):
        report.files += 1 + len(record.files)
        report.bytes += sum(entry.bytes for entry in record.files.values())
        report.damaged += damaged
        if not ledger.is_of(manifest, record.shard, record):
            raise damaged_record(place.describe(ledger.WHOLE), f"line {record.shard} is of no shard of this store")
        if not ledger.is_published(place, record):
            report.damaged.append(ledger.record_key(record.shard))
        if progress is not None:
            progress(record.shard + 1, manifest.shards)
    return report
