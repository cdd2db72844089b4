"""Where the files of a store are: a folder, or a prefix of an object store. Keys are paths below it.

The rest of the room works on a `Place` alone. What it promises: `publish` is whole or not at all, and on return on
the disk; `read` and `open` follow no link below the store's own folder; `claim` gives a shard to one process at a time.
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
    """The files of one store.

    Attributes:
        folder: where `open` finds files on this machine; a copy in part when the store is elsewhere.
        remote: whether it is elsewhere, so that reads in any order are slow.
    """

    folder: Path
    remote: bool

    @abstractmethod
    def __str__(self) -> str:
        """The place as the user named it, for messages."""

    def describe(self, key: str) -> str:
        """A file as messages name it."""
        return f"{str(self).rstrip('/')}/{key}"

    def at(self, version: str) -> "Place":
        """This place, known to hold the store that `version` identifies: copies of another one do not count."""
        return self

    @abstractmethod
    def read(self, key: str, most: int = MAX_JSON_BYTES, sha256: str | None = None) -> bytes:
        """The whole file.

        Args:
            sha256: what it should have. What comes from elsewhere and differs is fetched again.
        Raises: OSError; FileNotFoundError when it is not there; ValueError beyond `most` bytes.
        """

    @abstractmethod
    def read_verified(self, key: str, sha256: str) -> bytes:
        """The whole of a file that never changes; afterwards it lies in `folder`.

        Raises: OSError; ValueError when it is another file.
        """

    @abstractmethod
    def sizes(self, keys: Iterable[str]) -> Iterator[int | None]:
        """Bytes of each file, None for one that is not there."""

    def exists(self, *keys: str) -> bool:
        """Whether any of these files is there."""
        return any(size is not None for size in self.sizes(keys))

    @abstractmethod
    def digest(self, key: str) -> str | None:
        """sha256 of a file, None when it is not there; reads all of it."""

    @abstractmethod
    def open(self, key: str, size: int | None = None, sha256: str | None = None) -> int:
        """Descriptor of a file, for reading. Size and digest are what the ledger says, where that is known.

        Raises: OSError; ValueError for a file of another size.
        """

    @property
    def room(self) -> int | None:
        """Bytes of copies that are kept of files that are elsewhere; None where there are none."""
        return None

    def forget(self, key: str) -> bool:
        """Drop the copy of a file that proved damaged; False when there is none: the file itself is."""
        return False

    @abstractmethod
    def begin(self, files: Mapping[str, bytes]) -> None:
        """Make the store of its metadata, unless it is there already: of many that try at once, one does.

        Raises: StoreError when something else is in the place.
        """

    @abstractmethod
    def publish(self, key: str, content: bytes) -> None:
        """Write a file, whole or not at all, and to the disk."""

    @abstractmethod
    def publish_exclusive(self, key: str, content: bytes) -> bool:
        """`publish` a file, unless another process has published it already: then False."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file that may not be there, from the disk too."""

    @abstractmethod
    def claim(self, shard: int, keys: Iterable[str]) -> Release | None:
        """Take a shard for writing its files `keys`; None when another process has it. Ends with the process."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove what interrupted writes left; when nobody writes."""

    def alone(self) -> AbstractContextManager[None]:
        """Wait until no other process is in here too. What is created in one request needs no waiting."""
        return nullcontext()
