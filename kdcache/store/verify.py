"""Check every byte of a cache against its ledger."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.errors import MismatchError, StoreError
from kdcache.store import ledger
from kdcache.store.backend.base import Place
from kdcache.store.backend.open import open_place
from kdcache.store.format.damage import damaged_metadata, fix_of_files
from kdcache.store.format.schema import metadata_keys
from kdcache.store.ledger import Ledger
from kdcache.store.reader import Cache, read_manifest, require_complete
from kdcache.store.recovery import check_metadata, chunk_counts


@dataclass
class VerifyReport:
    """The result of `verify_files`.

    Attributes:
        files: number of checked files.
        bytes: their total size in bytes.
        damaged: keys of damaged files. Empty if the cache is intact.
        fix: how to repair damaged files, as text.
        seal: digest of the cache's seal, as 64 hexadecimal digits.
    """

    files: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    fix: str = ""
    seal: str = ""


def verify_files(
    location: str | Path | Place, progress: Callable[[int, int], None] | None = None, *, seal: str | None = None
) -> VerifyReport:
    """Compare the digests of all files of a cache with its ledger and its seal.

    Args:
        location: folder or address of a complete cache.
        progress: called with (shards done, total shards).
        seal: the digest that the seal must have, as published elsewhere. It reveals changes by somebody who also
            changed the ledger. None skips this check.

    Raises:
        IncompleteError: the cache is not finished.
        CorruptError: the ledger or the metadata is damaged.
        MismatchError: the seal has another digest than `seal`.
        VersionError: the cache's format is not supported.
        StoreError: there is no cache, or `seal` is not a digest.
    """
    place = open_place(location)
    manifest = read_manifest(place)
    completion = require_complete(place, manifest)
    if seal is not None:
        _check_seal(place, completion.digest, seal)
    place = place.at(completion.ledger_sha256)
    metadata = sorted({*metadata_keys(manifest), *completion.metadata})  # the spare too, which no reader needs
    for key in (*metadata, ledger.WHOLE):
        place.forget(key)  # the file itself is checked, not its copy
    check_metadata(place, completion, metadata)
    sealed = Ledger(place, completion)
    records = [sealed.record(shard) for shard in range(manifest.shards)]
    cache = Cache(place, manifest, sealed)
    len(cache.ids)
    cache.check_arrays()
    report = VerifyReport(
        files=len(completion.metadata) + 1, fix=fix_of_files(remote=place.remote), seal=completion.digest
    )
    for record, examined in zip(records, ledger.examine(place, records, chunk_counts(manifest)), strict=True):
        report.files += 1 + len(record.files)
        report.bytes += sum(entry.bytes for entry in record.files.values())
        report.damaged += examined.damaged
        if not ledger.is_of(manifest, record.shard, record):
            raise damaged_metadata(
                place.describe(ledger.WHOLE), f"line {record.shard} belongs to no shard of this cache"
            )
        if not examined.damaged and examined.record != record:  # its files are whole, its checksums are not theirs
            report.damaged += [ledger.WHOLE, ledger.record_key(record.shard)]
        elif not ledger.is_published(place, record):
            report.damaged.append(ledger.record_key(record.shard))
        if progress is not None:
            progress(record.shard + 1, manifest.shards)
    return report


def _check_seal(place: Place, digest: str, published: str) -> None:
    expected = published.strip().lower().removeprefix("sha256:")
    if re.fullmatch("[0-9a-f]{64}", expected) is None:
        raise StoreError(
            f"Invalid digest of a seal: {published!r} does not have 64 hexadecimal digits",
            fix="Give the one that kdcache verify or kdcache inspect printed when the cache was published.",
        )
    if digest != expected:
        raise MismatchError(
            f"{place} has the seal {digest}, not {expected}: it was changed or built again",
            fix="Fetch the cache again, or ask who published the digest.",
        )
