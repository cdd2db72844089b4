"""Where the files of a cache are: a folder, or a prefix of an object store. Keys are paths below it.

The rest of the room works on a `Place` alone. What it promises: `publish` is whole or not at all, and on return on
the disk; `read` and `open` follow no link below the cache's own folder; `claim` gives a shard to one process at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

Release = Callable[[], None]
MAX_JSON_BYTES = 2**23
"""The most bytes of a manifest, a seal or a ledger record. A longer one is an attack or an accident."""
MAX_SEALED_BYTES = 2**30
"""The most bytes of the whole ledger, or of all ids: 13 million records in shards of 128."""


class Place(ABC):
    """The files of one cache.

    Attributes:
        folder: where `open` finds files on this machine. For a remote cache it holds a partial copy.
        remote: whether the cache is elsewhere, so reads in random order are slow.
    """

    folder: Path
    remote: bool

    @abstractmethod
    def __str__(self) -> str:
        """Return the place as the user named it, for messages."""

    def describe(self, key: str) -> str:
        """Return a file as messages name it."""
        return f"{str(self).rstrip('/')}/{key}"

    def at(self, version: str) -> "Place":
        """Return this place, bound to the cache that `version` identifies, so copies of another cache do not count."""
        return self

    @abstractmethod
    def read(self, key: str, most: int = MAX_JSON_BYTES, sha256: str | None = None) -> bytes:
        """Return the content of a file of at most `most` bytes.

        If `sha256` is given, a remote file with another digest is fetched again.

        Raises: OSError; FileNotFoundError for a missing file; ValueError beyond `most` bytes.
        """

    @abstractmethod
    def read_verified(self, key: str, sha256: str) -> bytes:
        """Return the content of a file that never changes, and leave a copy in `folder`.

        Raises: OSError; ValueError if the digest differs.
        """

    @abstractmethod
    def sizes(self, keys: Iterable[str]) -> Iterator[int | None]:
        """Yield the size of each file in bytes, or None if it is missing."""

    def exists(self, *keys: str) -> bool:
        """Return whether any of the files `keys` exists."""
        return any(size is not None for size in self.sizes(keys))

    @abstractmethod
    def digest(self, key: str) -> str | None:
        """Return the SHA-256 of a file as hex, or None if it is missing. This reads the whole file."""

    @abstractmethod
    def open(self, key: str, size: int | None = None, sha256: str | None = None) -> int:
        """Return a file descriptor for reading. `size` and `sha256` come from the ledger, if they are known.

        Raises: OSError; ValueError for a file of another size.
        """

    @property
    def room(self) -> int | None:
        """The bytes reserved for local copies of remote files, or None for a local cache."""
        return None

    def forget(self, key: str) -> bool:
        """Delete the damaged local copy of a file. Return False if there is no copy, so the file itself is damaged."""
        return False

    @abstractmethod
    def begin(self, files: Mapping[str, bytes]) -> None:
        """Create the cache from its metadata files unless it exists. If several processes try, one succeeds.

        Raises: StoreError if the place holds something else.
        """

    @abstractmethod
    def publish(self, key: str, content: bytes) -> None:
        """Write a file completely or not at all, and flush it to the disk."""

    @abstractmethod
    def publish_exclusive(self, key: str, content: bytes) -> bool:
        """Publish a file, or return False if another process has already published it."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file from the disk. A missing file is fine."""

    @abstractmethod
    def claim(self, shard: int, keys: Iterable[str]) -> Release | None:
        """Claim a shard to write its files `keys`, or return None if another process has it. Ends with the process."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove the remains of interrupted writes. Call it only while nobody writes."""

    def alone(self) -> AbstractContextManager[None]:
        """Return a lock of the whole place, for a with block. Places that create a cache in one request need none."""
        return nullcontext()
