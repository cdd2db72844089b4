"""Checking every byte of a store against its ledger."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.store import ledger
from kdcache.store.reader import read_manifest, require_complete
from kdcache.store.schema import metadata_keys


@dataclass
class VerifyReport:
    """What `verify_files` found. `damaged` lists files below the store whose bytes are not those written."""

    files: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)


def verify_files(path: str | Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Compare the digest of every file with the ledger's.

    Args:
        path: a complete store.
        progress: called with (shards done, shards).
    Raises: IncompleteError, CorruptError (ledger or metadata), VersionError, StoreError.
    """
    store = Path(path)
    manifest = read_manifest(store)
    completion = require_complete(store, manifest)
    ledger.check_metadata(store, completion, metadata_keys(manifest))
    ledger.check_ledger(store, completion, manifest.shards)
    report = VerifyReport(files=len(completion.metadata))
    for shard in range(manifest.shards):
        record = ledger.read_shard_record(store, shard)
        assert record is not None, shard
        report.files += len(record.files)
        report.bytes += sum(entry.bytes for entry in record.files.values())
        report.damaged += ledger.damaged_files(store, record)
        if progress is not None:
            progress(shard + 1, manifest.shards)
    return report
