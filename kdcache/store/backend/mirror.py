"""Bounded local copies of remote files. The least recently used copies make room for new ones.

Any number of processes may share the folder. The first process that needs a file fetches it under a temporary name and
moves it into place when it is complete. Other processes wait for it. A file reserves its room before it is fetched, so
the bound holds at any time. Partial files of killed processes are removed when room is made. Only files below
`mirrors/` are removed.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from kdcache.errors import StoreError
from kdcache.locks import Lock
from kdcache.store.backend.durable import PARTIAL, disk_space_errors
from kdcache.store.format.shard import let_go_of_removed

Download = Callable[[BinaryIO], int]
"""Writes the whole file into a binary file object, and returns its size in bytes."""
_FOLDER = "mirrors"
_LOCKS = ".locks"
_STRIPES = 64  # locks of files that are being fetched
_KEPT = 0.9  # of what could stay, when room is made: not a round of it for each new file
WAIT_SECONDS = 0.05  # for others that are fetching what takes the room


@dataclass(frozen=True)
class Mirror:
    """A size-limited folder with local copies of files in object stores.

    Args:
        base: the folder of `--cache-dir`. The copies are in its subfolder `mirrors`.
        most_bytes: the maximum size of all copies in bytes (`--cache-bytes`). None is half of the disk space that would
            be free without the copies.
    """

    base: Path
    most_bytes: int | None = None

    @property
    def folder(self) -> Path:
        """The folder with the copies: `mirrors`, in the cache folder `base`."""
        return self.base / _FOLDER

    def open(self, store: Path, key: str, size: int | None, download: Download) -> int:
        """Open the local copy of a file and return its file descriptor. Download the file first if needed.

        Args:
            store: the folder with the copies of this cache's files.
            key: the file's path below the cache.
            size: the file's size in bytes, or None if unknown. A copy of another size is downloaded again.
            download: a function that writes the file into a binary file object and returns its size in bytes.
        Raises: StoreError if the disk is full or the file is larger than the limit of all copies; any error of
            `download`.
        """
        path = store / key
        handle = _opened(path, size)
        if handle is not None:
            return handle
        self._begin()
        with Lock(self._lock(str(crc32(str(path).encode()) % _STRIPES))):
            handle = _opened(path, size)
            if handle is None:
                handle = self._fetched(path, size, download)
        let_go_of_removed()
        return handle

    def forget(self, store: Path, key: str) -> bool:
        """Delete the local copy of a file. Return False if there is no copy.

        `store` is the folder with the copies of one cache's files, and `key` is the file's path below the cache.
        """
        try:
            (store / key).unlink()
        except FileNotFoundError:
            return False
        return True

    def most(self) -> int:
        """Return the maximum size of all copies in bytes.

        This is `most_bytes`, or if that is None, half of the disk space that would be free without the copies.
        """
        self._begin()
        return self._most(self._held())

    def _most(self, held: int) -> int:
        return (shutil.disk_usage(self.folder).free + held) // 2 if self.most_bytes is None else self.most_bytes

    def _begin(self) -> None:
        try:
            (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"Cannot write copies of remote caches to {self.base} ({error.strerror})",
                fix="Give another --cache-dir, or set KDCACHE_CACHE_DIR.",
            ) from error

    def _lock(self, name: str) -> Path:
        return self.folder / _LOCKS / name

    def _fetched(self, path: Path, size: int | None, download: Download) -> int:
        for left in path.parent.glob(f"{path.name}.*{PARTIAL}"):  # of a killed process: this one has the lock
            left.unlink(missing_ok=True)
            self._lock(left.stem).unlink(missing_ok=True)
        if size is None:  # metadata: by way of memory, to know how much room it takes
            memory = BytesIO()
            size = download(memory)
            download = lambda file: file.write(memory.getbuffer())  # noqa: E731
        with disk_space_errors(path), self._reserved(path, size) as file:
            download(file)
            file.flush()
            handle = os.open(file.name, os.O_RDONLY)
            os.replace(file.name, path)
        return handle

    @contextmanager
    def _reserved(self, path: Path, size: int) -> Iterator[BinaryIO]:
        """Create a locked file of the final size next to `path`, so other processes see that it is being written."""
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        written = Lock(self._lock(partial.stem))
        while True:
            with Lock(self._lock("room")):
                if self._make_room(size):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    written.acquire()
                    file = partial.open("w+b")
                    file.truncate(size)
                    break
            time.sleep(WAIT_SECONDS)
        try:
            with file:
                yield file
        finally:
            partial.unlink(missing_ok=True)
            written.release()

    def _make_room(self, needed: int) -> bool:
        """Reserve `needed` bytes, or return False if they do not fit now. Raises StoreError if they can never fit."""
        held = self._held()
        most = self._most(held)
        if needed > most:
            raise StoreError(
                f"A file of {needed} bytes does not fit into --cache-bytes {most} in {self.base}",
                fix="Increase --cache-bytes, or give another --cache-dir.",
            )
        if held + needed > most:
            held = self._clear(needed, most)
        if held + needed > most:
            return False  # others are fetching: what they fetch can make room when it is whole
        self._note(held + needed)
        return True

    def _clear(self, needed: int, most: int) -> int:
        """Remove partial files of killed processes and the least recently used copies. Returns the remaining bytes."""
        held, copies = 0, []
        for path in self._files():
            with suppress(FileNotFoundError):
                status = path.lstat()
                if path.name.endswith(PARTIAL) and self._abandoned(path):
                    path.unlink()
                    continue
                held += status.st_size
                if not path.name.endswith(PARTIAL):
                    copies.append((status.st_atime_ns, status.st_size, path))
        for _, size, path in sorted(copies):
            if held <= _KEPT * (most - needed):
                break
            path.unlink(missing_ok=True)
            held -= size
            with suppress(OSError):
                os.removedirs(path.parent)
        return held

    def _abandoned(self, partial: Path) -> bool:
        """Return whether no process writes a partial file any more. Its lock ends with its process."""
        lock = Lock(self._lock(partial.stem))
        free = lock.acquire(wait=False)
        if free:
            lock.release()
        return free

    def _files(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self.folder):
            if _LOCKS in folders:
                folders.remove(_LOCKS)
            yield from (Path(folder, name) for name in names)

    def _held(self) -> int:
        """Return the bytes of all copies: the last count plus the files added since, because counting takes long."""
        try:
            return int(self._lock("held").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return sum(path.lstat().st_size for path in self._files() if path.exists())

    def _note(self, held: int) -> None:
        self._lock("held").write_text(str(held), encoding="ascii")


def _opened(path: Path, size: int | None) -> int | None:
    """Return a descriptor of an existing copy and mark it as used, or None if no copy has this size."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    status = os.fstat(handle)
    if size is not None and status.st_size != size:
        os.close(handle)
        return None
    with suppress(OSError):  # another user's copies
        os.utime(handle, ns=(time.time_ns(), status.st_mtime_ns))
    return handle
