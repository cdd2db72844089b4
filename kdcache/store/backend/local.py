"""A cache in a folder on a disk."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from kdcache.bounded import read_handle
from kdcache.errors import StoreError
from kdcache.files import moved_away
from kdcache.locks import Lock
from kdcache.store.backend.base import MAX_JSON_BYTES, MAX_SEALED_BYTES, Place, Release
from kdcache.store.backend.durable import (
    PARTIAL,
    beside,
    disk_space_errors,
    file_digest,
    sync_path,
    sync_with_parents,
    write_durably,
)

LOCK = ".lock"


class Folder(Place):
    """A cache's location on a local disk. A file's `key` is its path below `folder`."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # a process may change its own folder, and a worker may begin in another
        self._name = str(folder)
        self._synced: set[Path] = set()
        self._claims: dict[int, Lock] = {}  # that others had: each remembers how long its owner is silent

    def __str__(self) -> str:
        return self._name

    def read(self, key: str, most: int = MAX_JSON_BYTES, sha256: str | None = None) -> bytes:
        """Return the content of the file `key`. `sha256` is ignored.

        Raises: FileNotFoundError if the file is missing; OSError if it cannot be read; ValueError if it has more than
            `most` bytes.
        """
        return read_handle(self.open(key), most)

    def read_verified(self, key: str, sha256: str) -> bytes:
        """Return the content of the file `key` after checking that its SHA-256 is `sha256`.

        Raises: OSError if the file cannot be read; ValueError if the digest differs.
        """
        content = self.read(key, most=MAX_SEALED_BYTES)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("it was changed after the cache was sealed")
        return content

    def sizes(self, keys: Iterable[str]) -> Iterator[int | None]:
        """Yield each file's size in bytes in the order of `keys`, or None if it is missing, a link or a folder."""
        for key in keys:
            yield self._size(key)

    def _size(self, key: str) -> int | None:
        try:
            status = os.stat(f"{self.folder}/{key}", follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                return None
            raise
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def digest(self, key: str) -> str | None:
        """Return the SHA-256 of the file `key` as 64 hexadecimal digits.

        Returns None for a file that is missing or behind a symbolic link.
        """
        if self._size(key) is None:
            return None
        try:
            handle = self.open(key)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link above it
                return None
            raise
        return file_digest(handle)

    def open(self, key: str, size: int | None = None, sha256: str | None = None) -> int:
        """Open the file `key` for reading without following symbolic links, and return its file descriptor.

        `sha256` is ignored.

        Raises: OSError if the file cannot be opened; ValueError if `size` is given and is not the file's size in bytes.
        """
        handle = _open_below(self.folder, key)
        actual = os.fstat(handle).st_size
        if size is not None and actual != size:
            os.close(handle)
            raise ValueError(f"it has {actual} bytes, the ledger says {size}")
        return handle

    def begin(self, files: Mapping[str, bytes]) -> None:
        """Create the cache's folder with its metadata files, unless it already holds a cache.

        `files` maps keys to contents. A lock lets only one process create the folder.

        Raises: StoreError if the folder holds something other than a cache, or cannot be written.
        """
        with disk_space_errors(self.folder):
            self._check_place()
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with Lock(self.folder.parent):
                if not (self.folder / "zarr.json").exists():
                    self._make(files)

    def _check_place(self) -> None:
        """Check that the folder is new or empty, because other files in it belong to the user."""
        path = self.folder
        existing = next(part for part in (path, *path.absolute().parents) if part.exists())
        if not existing.is_dir() or (existing == path and not (path / "zarr.json").exists() and any(path.iterdir())):
            content = "holds something else, and no zarr.json" if existing.is_dir() else "is a file"
            existing = Path(self._name) if existing == path else existing
            raise StoreError(
                f"Cannot write a cache here: {existing} {content}",
                fix="Give another folder, or empty it yourself if nothing in it is needed. If it was a cache, move it "
                f"away: {moved_away(existing)}",
            )

    def _make(self, files: Mapping[str, bytes]) -> None:
        """Create the cache next to its place and move it there, so a crash leaves no half-made folder."""
        begun = beside(self.folder.with_name(f".{self.folder.name}"), ".begun")
        shutil.rmtree(begun, ignore_errors=True)
        try:
            for key, content in files.items():
                (begun / key).parent.mkdir(parents=True, exist_ok=True)
                (begun / key).write_bytes(content)
                sync_with_parents(begun / key, begun)
            begun.rename(self.folder)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
        sync_path(self.folder.parent)

    def publish(self, key: str, content: bytes) -> None:
        """Write `content` to the file `key`, completely or not at all, and flush it to the disk.

        Missing folders above it are created.

        Raises: StoreError if the disk is full, or something else is at that path.
        """
        path = self._room_for(key)
        with disk_space_errors(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, content)
            self._sync_above(path.parent)

    def _room_for(self, key: str) -> Path:
        """Return the path for a file. Raises StoreError if something other than a file is in the way."""
        path = self.folder / key
        folders = [folder for folder in reversed(path.parents) if self.folder in folder.parents]
        wrong = [folder for folder in folders if folder.is_symlink() or (folder.exists() and not folder.is_dir())]
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()
            wrong += [path] if path.is_dir() else []
        if wrong:
            raise StoreError(
                f"Cannot write {path}: {wrong[0]} is {'a folder' if wrong[0] == path else 'not a folder'}",
                fix="Move it elsewhere, then run the same command again.",
            )
        return path

    def _sync_above(self, folder: Path) -> None:
        """Flush the folders between a file and the cache's folder to the disk, once per process."""
        while folder != self.folder and folder not in self._synced:
            sync_path(folder.parent)
            self._synced.add(folder)
            folder = folder.parent

    def publish_exclusive(self, key: str, content: bytes) -> bool:
        """Write `content` to the file `key`, completely or not at all, and flush it to the disk. Return True.

        The result is never False, because the caller has claimed the file's shard, so no other process writes the file.
        """
        self.publish(key, content)  # its shard is claimed: there is nobody else
        return True

    def remove(self, key: str) -> None:
        """Delete the file `key` if it exists, and flush its folder to the disk."""
        with suppress(FileNotFoundError, NotADirectoryError), disk_space_errors(self.folder):
            self._room_for(key).unlink()
            sync_path((self.folder / key).parent)

    def claim(self, shard: int, keys: Iterable[str]) -> Release | None:
        """Claim a shard with a lock file, and delete partial files that interrupted writers left behind.

        `keys` are the keys of the shard's files. Only partial files with their names are deleted.

        Returns: a function that releases the claim, or None if another process has claimed the shard.
        """
        lock = self._claims.pop(shard, None) or Lock(self.folder / "ledger" / f"{shard:08d}{LOCK}")
        with disk_space_errors(self.folder):
            (self.folder / "ledger").mkdir(exist_ok=True)
            if not lock.acquire(wait=False):
                self._claims[shard] = lock
                return None
        for path in (self.folder / key for key in keys):
            for left in path.parent.glob(f"{path.name}.*{PARTIAL}"):
                left.unlink()
        return lock.release

    def alone(self) -> AbstractContextManager[None]:
        """Return a context manager that locks the whole folder. It waits while another process has this lock."""
        return Lock(self.folder)

    def tidy(self) -> None:
        """Delete partial files and shard locks that interrupted writers left behind.

        Call it only while no process writes.
        """
        for left in (*self.folder.rglob(f"*{PARTIAL}"), *self.folder.glob(f"ledger/*{LOCK}*")):
            with suppress(FileNotFoundError):  # another process's tidying
                left.unlink()


def _open_below(folder: Path, key: str) -> int:
    """Open the file `key` below a folder without following links.

    A named pipe also opens, but a read at an offset then fails.
    """
    *folders, name = key.split("/")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
    finally:
        os.close(handle)
