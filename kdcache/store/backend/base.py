"""The location of a cache's files: a folder, or a prefix of an object store. Keys are paths below it.

The other modules only use `Place`. `publish` writes a file completely or not at all, and returns when the file is on
disk. `read` and `open` follow no links below the cache's folder. `claim` gives a shard to one process at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

Release = Callable[[], None]
MAX_JSON_BYTES = 2**23
"""The maximum size of a manifest, a seal or a ledger entry. A larger file is an attack or an accident."""
MAX_SEALED_BYTES = 2**30
"""The maximum size of the whole ledger, or of all ids: enough for 13 million records in shards of 128."""


class Place(ABC):
    """The location of one cache's files: a folder, or a prefix in an object store.

    A file's `key` is its path below the location, such as `records/flip/c/0`.

    Attributes:
        folder: the local folder in which `open` finds files. For a remote cache it holds local copies of some files.
        remote: True for an object store, where reads in random order are slow.
    """

    folder: Path
    remote: bool

    @abstractmethod
    def __str__(self) -> str:
        """Return the location as the user gave it, for messages."""

    def describe(self, key: str) -> str:
        """Return the full path or address of the file `key`, for messages."""
        return f"{str(self).rstrip('/')}/{key}"

    def at(self, version: str) -> "Place":
        """Return this location for reading the cache whose ledger has the digest `version`.

        In an object store, local copies of an earlier cache at the same address are then not used. A local folder
        returns itself.
        """
        return self

    @abstractmethod
    def read(self, key: str, most: int = MAX_JSON_BYTES, sha256: str | None = None) -> bytes:
        """Return the content of the file `key`.

        If `sha256` (64 hexadecimal digits) is given, a remote file with another digest is downloaded again.

        Raises: FileNotFoundError if the file is missing; OSError if it cannot be read; ValueError if it has more than
            `most` bytes, or if every download has another digest.
        """

    @abstractmethod
    def read_verified(self, key: str, sha256: str) -> bytes:
        """Return the content of the file `key` after checking that its SHA-256 is `sha256`.

        For a remote cache, a copy stays in `folder`. Use this only for files that never change once the cache is
        sealed.

        Raises: OSError if the file cannot be read; ValueError if the digest differs.
        """

    @abstractmethod
    def sizes(self, keys: Iterable[str]) -> Iterator[int | None]:
        """Yield each file's size in bytes in the order of `keys`, or None for a missing file."""

    def exists(self, *keys: str) -> bool:
        """Return True if at least one of the files `keys` exists."""
        return any(size is not None for size in self.sizes(keys))

    @abstractmethod
    def digest(self, key: str) -> str | None:
        """Read the whole file `key` and return its SHA-256 as 64 hexadecimal digits, or None if the file is missing."""

    @abstractmethod
    def open(self, key: str, size: int | None = None, sha256: str | None = None) -> int:
        """Open the file `key` for reading and return its file descriptor, which the caller must close.

        Args:
            key: path of the file below the location.
            size: the file's expected size in bytes, or None if it is unknown.
            sha256: the file's expected digest, used to check a download, or None if it is unknown.
        Raises: OSError if the file cannot be opened; ValueError if its size is not `size`, or a download is not
            `sha256`.
        """

    @property
    def room(self) -> int | None:
        """The maximum size in bytes of all local copies of remote files, or None for a local cache."""
        return None

    def forget(self, key: str) -> bool:
        """Delete the local copy of the remote file `key`, so that the next read downloads it again.

        Returns: True if a copy was deleted, False if there is no copy. A local cache has no copies, so nothing is
            deleted.
        """
        return False

    @abstractmethod
    def begin(self, files: Mapping[str, bytes]) -> None:
        """Create a cache from its metadata files, or do nothing if the location already holds a cache.

        `files` maps keys to contents. If several processes call this at once, one of them creates the cache.

        Raises: StoreError if the location holds something other than a cache.
        """

    @abstractmethod
    def publish(self, key: str, content: bytes) -> None:
        """Write `content` to the file `key`, completely or not at all, and flush it to the disk."""

    @abstractmethod
    def publish_exclusive(self, key: str, content: bytes) -> bool:
        """Write `content` to the file `key`, completely or not at all, unless the file exists.

        Returns: True if this call wrote the file, False if another process has already written it.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """Delete the file `key` if it exists."""

    @abstractmethod
    def claim(self, shard: int, keys: Iterable[str]) -> Release | None:
        """Claim a shard for this process, which will write the shard's files `keys`.

        Returns: a function that releases the claim, or None if another process has claimed the shard. A claim also ends
            when its process ends.
        """

    @abstractmethod
    def tidy(self) -> None:
        """Delete partial files and locks that interrupted writes left behind. Call it only while no process writes."""

    def alone(self) -> AbstractContextManager[None]:
        """Return a context manager that keeps other processes from taking the same lock on the whole location.

        Entering it waits until the lock is free. In an object store there is no lock, so this does nothing.
        """
        return nullcontext()
