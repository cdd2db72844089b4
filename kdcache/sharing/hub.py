"""Caches on the Hub: hf://datasets/USER/NAME as a source and a destination of `kdcache copy`.

A push copies the cache into a local folder, and gives that folder to huggingface_hub (the extra `hub`). A pull lets
huggingface_hub fill such a folder. Every file that is copied from it is compared with the ledger, and the ledger with
the seal. huggingface_hub finds the token (HF_TOKEN, or `hf auth login`) and the endpoint (HF_ENDPOINT).
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.errors import CorruptError, StoreError
from kdcache.files import user_cache
from kdcache.locks import Lock
from kdcache.sharing.card import store_card
from kdcache.store import Cache, CopyChanges, Fidelity, copy_store, open_cache, summarise
from kdcache.store.backend.durable import disk_space_errors
from kdcache.store.copy import copied_manifest
from kdcache.store.ledger import COMPLETE, WHOLE
from kdcache.store.recovery import ROOT, SPARE

CARD = "README.md"
_SCHEME = "hf://"
_NAME = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_ADDRESS = re.compile(rf"hf://datasets/({_NAME}/{_NAME})(?:@([\w./-]+))?/?", re.ASCII)
_PARTS = ("ledger", "targets", "features", "statistics", "labels", "pixels", "records", "samples")
_FILES = [ROOT, SPARE, COMPLETE, WHOLE, *(f"{part}/*" for part in _PARTS)]
"""The files of a cache. No others are sent or fetched."""
_OTHERS = {CARD, ".gitattributes"}
"""Files of a repository that the Hub or its users write."""


@dataclass(frozen=True)
class HubAddress:
    """The address of a cache on the Hugging Face Hub. The repository is a data set whose root holds the cache's files.

    Attributes:
        repository: USER/NAME.
        revision: a branch, tag or commit. None means the newest state.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{_SCHEME}datasets/{self.repository}" + ("" if self.revision is None else f"@{self.revision}")


def hub_address(location: object) -> HubAddress | None:
    """Parse an address such as hf://datasets/USER/NAME or hf://datasets/USER/NAME@REVISION.

    Return None for a location that does not begin with hf://.

    Raises: StoreError for an invalid address that begins with hf://.
    """
    text = str(location)
    if not text.startswith(_SCHEME):
        return None
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise StoreError(
            f"Invalid address of a cache on the Hub: {text}",
            fix="Use hf://datasets/USER/NAME, for example hf://datasets/USER/camvid. Append @REVISION for an earlier "
            "state.",
        )
    return HubAddress(found[1], found[2])


@contextmanager
def opened(
    location: str | Path,
    *,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
    progress: bool = True,
) -> Iterator[Cache]:
    """Open a cache at any location, in a with block. A cache on the Hub is downloaded first, and removed afterwards.

    An interrupted download continues with the next call.

    Args:
        location: a path, a URL, or an address such as hf://datasets/USER/NAME.
        cache_dir: folder for downloaded files. None means the user's cache folder.
        cache_bytes: maximum size of the local copies of a remote cache, in bytes. None means half of the free disk
            space.
        progress: whether to show huggingface_hub's progress bars on a terminal.

    Raises: StoreError if the cache cannot be opened or downloaded.
    """
    address = hub_address(location)
    if address is None:
        yield open_cache(location, cache_dir=cache_dir, cache_bytes=cache_bytes)
        return
    hub, where = _client(), {"repo_type": "dataset", "revision": address.revision}
    with _staging(f"pull {address}", cache_dir) as folder:
        with _answers(address, progress):
            if not hub.HfApi().file_exists(address.repository, COMPLETE, **where):
                hub.HfApi().dataset_info(
                    address.repository, revision=address.revision
                )  # raises if there is no such state
                raise StoreError(
                    f"Cannot pull {address}: it has no {COMPLETE}, so the cache is not complete",
                    fix="Check the address. To finish an interrupted push, run its command again.",
                )
            hub.snapshot_download(address.repository, local_dir=folder, allow_patterns=_FILES, **where)
        try:
            yield open_cache(folder)
        except CorruptError as error:
            shutil.rmtree(folder, ignore_errors=True)  # what is there is fetched anew the next time
            raise error.within(
                str(address),
                fix="Run the same command again, which fetches it anew. If it fails again, whoever pushed the cache "
                "has to push it into another repository.",
            ) from error


@dataclass(frozen=True)
class PushResult:
    """The result of pushing a cache to the Hub.

    Attributes:
        files: number of the cache's files.
        sent: number of files that this call sent.
        seal: the SHA-256 (hex) of the cache's seal, which identifies the cache with all its files.
    """

    files: int
    sent: int
    seal: str


def push_store(
    source: Cache,
    address: HubAddress,
    changes: CopyChanges | None = None,
    *,
    licence: str | None,
    private: bool = False,
    fidelity: Fidelity | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> PushResult:
    """Push a cache to the Hub as a data set with a card. After an interruption, the same call sends the missing files.

    Images are left out unless `changes` asks for them, because they have their own licences. The seal is sent last, so
    an interrupted push leaves no complete cache.

    Args:
        source: the cache to push.
        address: the repository's address.
        changes: how the pushed copy differs, such as its codec, or that it has the images. None means no changes.
        licence: a licence's name on the Hub, such as "cc-by-4.0". None is an error.
        private: whether a new repository is private. A public repository is then an error.
        fidelity: the error that rounding logits causes (codec `small`), or None if it was not measured.
        cache_dir: folder for the copy, which is removed after the push. None means the user's cache folder.
        progress: whether to show huggingface_hub's progress bars on a terminal.
    Raises: StoreError if the Hub refuses the push, if the repository has files of another cache, or without a licence.
    """
    _check(address, licence)
    changes = changes or CopyChanges()
    changes = replace(changes, pixels=changes.pixels or "source")
    copied_manifest(source, changes)  # refuses changes that do not fit
    assert source.ledger is not None
    name = f"push {address} {source.ledger.completion.digest} {changes}"
    with _staging(name, cache_dir) as folder:
        copy_store(source, folder, changes, fidelity=fidelity)
        copied = open_cache(folder)
        card = store_card(summarise(copied), address=str(address), licence=licence)
        with _answers(address, progress):
            return _send(copied, address, card, private)


def _send(cache: Cache, address: HubAddress, card: str, private: bool) -> PushResult:
    """Send the files that a repository lacks: the card first and the seal last. Then compare all files."""
    hub, where = _client().HfApi(library_name="kdcache"), {"repo_id": address.repository, "repo_type": "dataset"}
    files = {str(path.relative_to(cache.path)): path for path in cache.path.rglob("*") if path.is_file()}
    missing, has_card = _missing(hub, address, files, card)
    hub.create_repo(**where, private=private or None, exist_ok=True)
    if private and not hub.dataset_info(address.repository).private:
        raise StoreError(
            f"Cannot push with --private into {address}: it is public",
            fix="Make it private on the Hub, or give another NAME.",
        )
    if missing or not has_card:
        hub.upload_file(**where, path_or_fileobj=card.encode(), path_in_repo=CARD, commit_message="Card of the cache")
    if missing:
        folder = {"folder_path": cache.path, **where}
        hub.upload_folder(**folder, allow_patterns=_FILES, ignore_patterns=[COMPLETE], commit_message="Files")
        hub.upload_folder(**folder, allow_patterns=[COMPLETE], commit_message="Seal: all files are there")
        left, _ = _missing(hub, address, files, card)
        if left:
            raise StoreError(
                f"Cannot find {left[0]} in {address} after the push ({len(left)} missing files)",
                fix="Run the same command again.",
            )
    assert cache.ledger is not None
    return PushResult(len(files), len(missing), cache.ledger.completion.digest)


def _missing(hub: Any, address: HubAddress, files: Mapping[str, Path], card: str) -> tuple[list[str], bool]:
    """Return the files that a repository lacks, and whether it has a card.

    Raises: StoreError if it has other files, or files with these names and other contents.
    """
    errors = _client().errors
    try:
        tree = hub.list_repo_tree(address.repository, repo_type="dataset", recursive=True)
        present = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError):
        present = {}
    foreign = [
        key for key in present if key not in _OTHERS and (key not in files or not _same(files[key], present[key]))
    ]
    only_a_card = present.keys() - {".gitattributes"} == {CARD}
    if foreign or (only_a_card and present[CARD].blob_id != _git_digest(card.encode())):
        names = sorted(foreign) or [CARD]
        raise StoreError(
            f"Cannot push into {address}: it holds {names[0]}, one of {len(names)} files that are not of this cache",
            fix="Give another NAME, or remove the files yourself if nothing of them is needed.",
        )
    return [key for key in files if key not in present], CARD in present


def _same(file: Path, there: Any) -> bool:
    """Return whether a file in a repository has the same bytes: by SHA-256 if it is large, by git's digest if small."""
    if there.lfs is not None:
        with file.open("rb") as stream:
            return bool(there.lfs.sha256 == hashlib.file_digest(stream, "sha256").hexdigest())
    return bool(there.blob_id == _git_digest(file.read_bytes()))


def _git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _check(address: HubAddress, licence: str | None) -> None:
    """Check a push before any work for it. Raises: StoreError for a push that cannot succeed."""
    if licence is None:
        raise StoreError(
            f"Missing --license for {address}",
            fix="Give a license by its name on the Hub, for example --license cc-by-4.0 or --license other. Choose "
            "one that the licenses of the images, the labels and the teacher allow.",
        )
    if address.revision is not None:
        raise StoreError(
            f"Cannot push into {address}: a push is always the newest state", fix=f"Leave @{address.revision} out."
        )
    if _client().get_token() is None:
        raise StoreError(
            "Missing token: HF_TOKEN is not set, and there is no login",
            fix="Set HF_TOKEN to a token that may write, or log in once with: hf auth login",
        )


def _client() -> Any:
    """Return the module huggingface_hub. Raises: StoreError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise StoreError(
            f"Cannot import huggingface_hub, which caches on the Hub need ({error})",
            fix="Install it in a clone of kdcache: pip install '.[hub]'",
        ) from error
    return huggingface_hub


@contextmanager
def _staging(name: str, cache_dir: Path | None) -> Iterator[Path]:
    """Provide a folder for a transfer's files to one process at a time, in a with block.

    `name` identifies the transfer.

    The folder stays if the block fails, so that the next call can continue.
    """
    folder = (cache_dir or user_cache()) / "hub" / hashlib.sha256(name.encode()).hexdigest()[:16]
    with disk_space_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Lock(folder.with_name(f"{folder.name}.lock")):
            yield folder
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _answers(address: HubAddress, bars: bool) -> Iterator[None]:
    """Turn errors of the Hub and of the network, in a with block, into a StoreError with a fix.

    Errors of this machine's disk stay unchanged.

    Raises: StoreError.
    """
    client = _client()
    utils, http_error = client.utils, client.errors.HfHubHTTPError.__mro__[1]  # of its HTTP library, of any name
    hidden = not (bars and sys.stderr.isatty()) and not utils.are_progress_bars_disabled()
    if hidden:
        utils.disable_progress_bars()
    try:
        yield
    except (http_error, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        chain = [error, *_causes(error)]
        statuses = (getattr(getattr(failure, "response", None), "status_code", None) for failure in chain)
        status = next((status for status in statuses if status is not None), None)
        message = next(filter(None, (getattr(failure, "server_message", None) for failure in chain)), None)
        words = " ".join(str(message or (error if isinstance(error, ValueError) else chain[-1])).split())[:300]
        login = "Set HF_TOKEN to a valid token that may do this, or log in with: hf auth login"
        fixes = {400: "Correct what the Hub names, for instance --license.", 401: login, 403: login}
        fixes[404] = "Check the address. A private or gated repository needs a token that may read it (HF_TOKEN)."
        raise StoreError(
            f"The Hub failed for {address}: {words if status is None else f'{status}, {words}'}",
            fix=fixes.get(status or 0, "Run the same command again: it continues where it stopped."),
        ) from error
    finally:
        if hidden:
            utils.enable_progress_bars()


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__) is not None:
        yield (error := cause)
