"""Pulling: the files of a repository into a folder of this machine, from which they are copied and checked."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.errors import CorruptError, StoreError
from kdcache.files import user_cache
from kdcache.locks import Lock
from kdcache.sharing.address import HubAddress
from kdcache.sharing.client import DATASET, answers, hub, snapshot_download, tqdm
from kdcache.store.backend.durable import disk_space_errors
from kdcache.store.ledger import COMPLETE, WHOLE
from kdcache.store.recovery import ROOT, SPARE

Progress = Callable[[int, int], None]
"""Called with (files done, files)."""
_FOLDER = "hub"
_PARTS = ("ledger", "targets", "features", "statistics", "labels", "pixels", "records", "samples")
PATTERNS = (ROOT, SPARE, COMPLETE, WHOLE, *(f"{part}/*" for part in _PARTS))
"""What is fetched of a repository: the files of a store, and none beside."""


@contextmanager
def staging(name: str, cache_dir: Path | None) -> Iterator[Path]:
    """A folder for files on their way, for one process at a time; what is in it stays when the block fails.

    Args:
        name: what identifies what goes through it.
        cache_dir: where it lies; default as for the copies of remote stores.
    """
    folder = (cache_dir or user_cache()) / _FOLDER / name
    with disk_space_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Lock(folder.with_name(f"{name}.lock")):
            yield folder
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fetched(address: HubAddress, cache_dir: Path | None = None, progress: Progress | None = None) -> Iterator[Path]:
    """A folder with the store of a repository, as it was when the block began; removed after it.

    A fetch that was interrupted goes on. The files are those that arrived: whoever copies the store compares each with
    the ledger, and that with the seal.

    Args:
        cache_dir: where the folder lies; default as for the copies of remote stores.
    Raises: StoreError when the Hub refuses, or the repository holds no complete store; CorruptError from the block.
    """
    with answers(address):
        found = hub().dataset_info(address.repository, revision=address.revision)
    _check_store(address, {file.rfilename for file in found.siblings or ()})
    with staging(f"{address.repository.replace('/', '--')}-{str(found.sha)[:12]}", cache_dir) as folder:
        with answers(address):
            snapshot_download(
                address.repository,
                repo_type=DATASET,
                revision=found.sha,
                local_dir=folder,
                allow_patterns=list(PATTERNS),
                tqdm_class=_counting(progress),
            )
        try:
            yield folder
        except CorruptError as error:
            shutil.rmtree(folder, ignore_errors=True)  # what is there is fetched anew the next time
            raise error.restated(
                received=f"{address}: {error.received}",
                remedy="run the same command again, which fetches it anew; if it ends here again, whoever pushed the "
                "store has to push it anew, into another repository",
            ) from error


def _check_store(address: HubAddress, names: set[str]) -> None:
    if missing := [name for name in (ROOT, COMPLETE, WHOLE) if name not in names]:
        raise StoreError(
            "a repository that is pulled holds a complete store",
            received=f"{address} has no {missing[0]}",
            remedy="check the address; a push that was interrupted is finished by the same command, where it began",
        )


def _counting(progress: Progress | None) -> Any:
    """A class of bars for the client that show nothing; those that count files report them."""

    class Counting(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._files = 0 if options.get("unit") == "B" else int(options.get("total") or 0)
            self._done = 0
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if progress is not None and self._files:
                progress(self._done, self._files)
            return None

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable or ():
                yield item
                self.update()

    return Counting
