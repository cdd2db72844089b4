"""Digests of the samples of a split. Data sets with equal digests are the same, whatever their folders' names.

Reading every file again takes time, so a private index in the user's cache folder remembers the digest of each file
with its size, times and inode. Losing the index costs time only.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.data.files import file_digest
from kdcache.data.prefetch import prefetch
from kdcache.data.sample import FileDigest, Split
from kdcache.files import user_cache

Progress = Callable[[int, int], None]
DIGEST_BYTES = 16
_FRESH_NS = 2_000_000_000
"""Nanoseconds: a file changed this recently may change once more without a trace in its times."""


@dataclass(frozen=True)
class Contents:
    """The digests of the samples of a split.

    Attributes:
        ids: the ids of the N samples.
        image: uint8 (N, 16), the first 16 bytes of each image's SHA-256.
        label: the same for segmentation labels. Zeros without a label.
        depth: the same for depth labels. Zeros without a label.
    """

    ids: tuple[str, ...]
    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    depth: npt.NDArray[np.uint8]

    @property
    def digest(self) -> str:
        """The SHA-256 (hex) of the ids of all samples and the digests of their images and labels."""
        combined = hashlib.sha256("\n".join(self.ids).encode())
        for array in (self.image, self.label, self.depth):
            combined.update(array.tobytes())
        return combined.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values, with the digests in base64. `from_json` reads it."""
        parts = {"image": self.image, "label": self.label, "depth": self.depth}
        return {"ids": list(self.ids)} | {
            name: base64.b64encode(rows.tobytes()).decode() for name, rows in parts.items() if rows.any()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Contents:
        """Return the contents for `value`, a dict from `to_json`.

        Raises: ValueError, TypeError or KeyError for another dict.
        """
        ids = tuple(map(str, value["ids"]))
        size = len(ids) * DIGEST_BYTES
        parts = (
            base64.b64decode(value[name]) if name in value else bytes(size) for name in ("image", "label", "depth")
        )
        return cls(ids, *(np.frombuffer(part, np.uint8).reshape(len(ids), DIGEST_BYTES) for part in parts))


def short_digests(split: Split, index: int, of_file: FileDigest | None = None) -> npt.NDArray[np.uint8]:
    """Return the first 16 bytes of the SHA-256 of a sample's image, segmentation label and depth label, uint8 (3, 16).

    A missing label gives zeros.

    Args:
        split: the split.
        index: the sample's position in the split.
        of_file: a function that returns the SHA-256 (hex) of a file, for example from a list of known digests. None
            computes it from the file's bytes.
    """
    rows = np.zeros((3, DIGEST_BYTES), np.uint8)
    for row, digest in zip(rows, split.content_digests(index, of_file), strict=False):
        if digest is not None:
            row[:] = np.frombuffer(bytes.fromhex(digest[: 2 * DIGEST_BYTES]), np.uint8)
    return rows


def read_contents(
    split: Split,
    numbers: Sequence[int] | None = None,
    *,
    indexed: bool = True,
    threads: int = 2,
    progress: Progress | None = None,
) -> Contents:
    """Return the digests of a split's samples.

    Args:
        split: the split.
        numbers: positions of the samples. None means all samples.
        indexed: whether known digests may be used for files whose size, times and inode are unchanged.
        threads: the number of threads that read files.
        progress: called with (samples done, samples).

    Raises: DataError for a file that cannot be read.
    """
    numbers = range(len(split)) if numbers is None else numbers
    rows = np.zeros((len(numbers), 3, DIGEST_BYTES), np.uint8)
    with remembered_digests(split.data) if indexed else nullcontext(file_digest) as of_file:
        read = prefetch(lambda number: short_digests(split, number, of_file), numbers, threads=threads, ahead=64)
        for at, digests in enumerate(read):
            rows[at] = digests
            if progress is not None:
                progress(at + 1, len(numbers))
    ids = tuple(split.ids[number] for number in numbers)
    return Contents(ids, *(np.ascontiguousarray(rows[:, part]) for part in range(3)))


def place_key(data: str) -> str:
    """Return 16 hex digits that identify the data set `data` without revealing its path: a hash of that path."""
    return hashlib.sha256(os.path.abspath(data).encode()).hexdigest()[:16]


@contextmanager
def remembered_digests(data: str) -> Iterator[FileDigest]:
    """Provide, in a with block, a function that returns the SHA-256 (hex) of a file.

    It reads a file again only if its size, times or inode changed since an earlier call. Known digests lie in the
    user's cache folder. `data` is the data set as the user named it.
    """
    index = _Index(user_cache() / "digests" / f"{place_key(data)}.sqlite")
    try:
        yield index.digest
    finally:
        index.close()


class _Index:
    """The known digests of files, kept in an SQLite file. If that file cannot be used, all files are read."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, tuple[str, str]] = {}
        self._new: dict[str, tuple[str, str]] = {}
        with suppress(OSError, sqlite3.Error), self._opened() as database:
            self._known = {path: (state, digest) for path, state, digest in database.execute("SELECT * FROM digests")}

    def digest(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file. Raises: DataError if it cannot be read."""
        began = time.time_ns()
        known = self._known.get(str(path))
        if known is not None and known[0] == _state_of(path, began):
            return known[1]
        digest = file_digest(path)
        state = _state_of(path, began)  # a file that was changed meanwhile is a fresh one
        if state is not None:
            with self._lock:
                self._new[str(path)] = (state, digest)
        return digest

    def close(self) -> None:
        """Write the new digests to the SQLite file."""
        rows = [(path, *entry) for path, entry in self._new.items()]
        with suppress(OSError, sqlite3.Error):
            if rows:
                with self._opened() as database, database:
                    database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database: Any = sqlite3.connect(self._path, timeout=5)
        try:
            database.execute("CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, state TEXT, digest TEXT)")
            yield database
        finally:
            database.close()


def _state_of(path: Path, now_ns: int) -> str | None:
    """Return text that changes when the file changes, or None for a file that changed within the last two seconds."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if max(status.st_mtime_ns, status.st_ctime_ns) > now_ns - _FRESH_NS:
        return None
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
