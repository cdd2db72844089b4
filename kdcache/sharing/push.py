"""Pushing: the files of a complete store into a repository of its own, in commits that an interruption leaves whole.

What the repository has already is known by the digests that it lists, so that the same push goes on with what is
missing, and leaves alone what is another's.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import StoreError
from kdcache.sharing.address import HubAddress
from kdcache.sharing.client import DATASET, NOT_THERE, CommitOperationAdd, RepoFile, answers, check_token, hub
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.schema import metadata_keys, record_arrays, shard_key
from kdcache.store.ledger import COMPLETE, WHOLE, canonical, record_key
from kdcache.store.reader import Cache
from kdcache.store.recovery import SPARE

CARD = "README.md"
MOST_FILES, MOST_IN_FOLDER, MOST_FILE_BYTES = 100_000, 10_000, 200 * 10**9
"""Bounds that the Hub's page on storage limits has for a repository, a folder and a file."""
FILES_A_COMMIT = 100
"""Files of a commit: the same page asks for 50 to 100."""
_OWN = (CARD, ".gitattributes")  # which the Hub or its users write
_BESIDE = 5  # files that are neither arrays nor ledger records: seal, ledger, spare, and _OWN


@dataclass(frozen=True)
class PushResult:
    """The result of a push: files of the store, how many of them were sent now, and their bytes.

    Attributes:
        seal: the digest of the seal of what was pushed, and its `manifest`.
    """

    files: int
    sent: int
    sent_bytes: int
    seal: str
    manifest: Manifest


def check_push(address: HubAddress, manifest: Manifest, licence: str | None) -> None:
    """Refuse a push that cannot end well, before any work for it.

    Args:
        manifest: of the store that would be pushed.
    Raises: StoreError: no licence, a revision, too many files, no token, a repository that holds something else.
    """
    _check_licence(licence)
    if address.revision is not None:
        raise StoreError(
            "a store is pushed as the newest state of its repository",
            received=str(address),
            remedy=f"leave @{address.revision} out",
        )
    check_counts(manifest)
    check_token()
    names = {*metadata_keys(manifest), SPARE, WHOLE, COMPLETE}
    names |= {record_key(shard) for shard in range(manifest.shards)}
    names |= {shard_key(spec, shard) for spec in record_arrays(manifest) for shard in range(manifest.shards)}
    with answers(address):
        present = _present(address)
    strange = sorted(set(present) - names - set(_OWN))
    if strange or set(present) - {".gitattributes"} == {CARD}:
        raise _something_else(address, strange or [CARD])


def push(
    cache: Cache,
    address: HubAddress,
    card: str,
    *,
    private: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PushResult:
    """Push a complete store of a folder, that `check_push` has let pass. Interrupted, the same call goes on.

    The card goes with the first files, the seal with the last; a card that was edited there since stays.

    Args:
        card: README.md of the repository.
        private: makes a repository that is not there yet a private one, and refuses a public one.
        progress: called with (files there, files of the store).
    Raises: StoreError when the Hub refuses, or holds other files in these files' places.
    """
    digests, folder = _digests(cache), cache.path
    _check_sizes(folder, digests)
    with answers(address):
        hub().create_repo(address.repository, repo_type=DATASET, private=private or None, exist_ok=True)
        present, found = _present(address), hub().dataset_info(address.repository)
    if private and not found.private:
        raise StoreError(
            "--private pushes into a private repository",
            received=f"{address}, which is there already and public",
            remedy="make it private on the Hub, or give another NAME",
        )
    missing = sorted(_missing(address, folder, digests, present), key=lambda key: key == COMPLETE)
    sent_bytes = sum((folder / key).stat().st_size for key in missing)
    done = len(digests) - len(missing)
    contents: dict[str, bytes | Path] = {key: folder / key for key in missing}
    if missing or CARD not in present:
        contents = {CARD: card.encode(), **contents}
    for batch in _batches(list(contents)):
        with answers(address):
            hub().create_commit(
                address.repository,
                [CommitOperationAdd(key, contents[key]) for key in batch],
                repo_type=DATASET,
                commit_message=f"Files of the store, up to {done + len(batch)} of {len(digests)}",
            )
        done += len(batch) - (CARD in batch)
        if progress is not None:
            progress(done, len(digests))
    return PushResult(len(digests), len(missing), sent_bytes, digests[COMPLETE], cache.manifest)


def _batches(keys: list[str]) -> Iterator[list[str]]:
    return (keys[first : first + FILES_A_COMMIT] for first in range(0, len(keys), FILES_A_COMMIT))


def _present(address: HubAddress) -> dict[str, RepoFile]:
    """The files of the newest state by path; none where there is no repository, or nothing in it."""
    try:
        entries = hub().list_repo_tree(address.repository, repo_type=DATASET, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    except NOT_THERE:
        return {}


def _digests(cache: Cache) -> dict[str, str]:
    """SHA-256 of every file of a sealed store, by its path."""
    assert cache.ledger is not None
    seal = cache.ledger.completion
    digests = {**seal.metadata, WHOLE: seal.ledger_sha256, COMPLETE: seal.digest}
    for shard in range(len(cache.ledger)):
        record = cache.ledger.record(shard)
        digests[record_key(shard)] = hashlib.sha256(canonical(record)).hexdigest()
        digests |= {key: file.sha256 for key, file in record.files.items()}
    return digests


def _missing(
    address: HubAddress, folder: Path, digests: Mapping[str, str], present: Mapping[str, RepoFile]
) -> list[str]:
    """The files that the repository has not. Raises StoreError where it has others in their places."""
    other = [key for key in digests if key in present and not _same(folder / key, digests[key], present[key])]
    if other:
        raise _something_else(address, sorted(other))
    return [key for key in digests if key not in present]


def _same(file: Path, sha256: str, there: RepoFile) -> bool:
    """Whether a file of the repository has these bytes: git's own digest stands for small ones."""
    if there.lfs is not None:
        return bool(there.lfs.sha256 == sha256)
    if file.stat().st_size != there.size:
        return False
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id


def _something_else(address: HubAddress, names: list[str]) -> StoreError:
    more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
    return StoreError(
        "a store is pushed into a new or empty repository, or one where its own push was interrupted",
        received=f"{address} holds {names[0]}{more} that {'are' if more else 'is'} not of this store",
        remedy="give another NAME, or remove what is there yourself if nothing of it is needed",
    )


def _check_licence(licence: str | None) -> None:
    if licence is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,99}", licence) is None:
        raise StoreError(
            "a store is pushed under a licence, by the name that the Hub has for it",
            received="no --license" if licence is None else f"--license {licence}",
            remedy="give --license, for instance cc-by-4.0, apache-2.0 or other: what the licences of the images, the "
            "labels and the teacher allow",
        )


def check_counts(manifest: Manifest) -> None:
    """Refuse a store of more files than a repository takes. Raises StoreError naming the shards that fit."""
    a_shard = len(record_arrays(manifest)) + 1  # and its ledger record
    beside = len(metadata_keys(manifest)) + _BESIDE
    files = beside + manifest.shards * a_shard
    if files < MOST_FILES and manifest.shards < MOST_IN_FOLDER:
        return
    shards = min(MOST_IN_FOLDER - 1, (MOST_FILES - 1 - beside) // a_shard)
    raise StoreError(
        f"a repository of the Hub has fewer than {MOST_FILES:,} files, a folder fewer than {MOST_IN_FOLDER:,} entries",
        received=f"{files:,} files in {manifest.shards:,} shards",
        remedy=f"put more records into a shard: --shard-records {-(-manifest.records // shards)}",
    )


def _check_sizes(folder: Path, keys: Mapping[str, str]) -> None:
    largest = max(keys, key=lambda key: (folder / key).stat().st_size)
    size = (folder / largest).stat().st_size
    if size >= MOST_FILE_BYTES:
        raise StoreError(
            f"a file on the Hub has fewer than {MOST_FILE_BYTES:,} bytes",
            received=f"{largest} has {size:,}",
            remedy="put fewer records into a shard: --shard-records",
        )
