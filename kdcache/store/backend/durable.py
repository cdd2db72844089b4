"""Writes that survive a power cut: temporary file, fsync, rename, fsync of the folder.

zarr-python renames its files into place but never syncs them, so a machine that loses power can keep
the name and lose the bytes. The cache's ledger is useless unless the files that it lists are on the disk.
"""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache.errors import StoreError

PARTIAL = ".partial"
"""The ending of the name of a file that is being written. After a crash, such a file can be deleted."""
_ROOM_BYTES = 2**20  # with less, a failed write is taken for a full disk
_MOST_NAME_BYTES = 255  # of a file's name, on every usual file system
_FIXES = {
    errno.EROFS: "Give another place, or mount it for writing.",
    errno.EACCES: "Check its permissions, or give another folder.",
    errno.EPERM: "Check its permissions, or give another folder.",
    errno.ENAMETOOLONG: f"Shorten the name to {_MOST_NAME_BYTES} bytes: of the --out or destination, or of the images "
    "whose ids it comes from.",
}


def sync_path(path: Path) -> None:
    """Flush the file `path`, or the entries of the folder `path`, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_with_parents(path: Path, top: Path) -> None:
    """Flush `path` and all folders from `path` up to and including `top` to the disk (fsync)."""
    sync_path(path)
    for folder in path.parents:
        sync_path(folder)
        if folder == top:
            return


def beside(path: Path, ending: str) -> Path:
    """Return a path in the same folder as `path`: its file name plus `ending`.

    The file name is shortened if the result would have more than 255 bytes.
    """
    return path.with_name(os.fsdecode(os.fsencode(path.name)[: _MOST_NAME_BYTES - len(ending)] + ending.encode()))


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to the file `path`, completely or not at all, and flush it to the disk. The folder must exist."""
    partial = beside(path, f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_path(path.parent)


def file_digest(file: Path | int) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    `file` is a path, or a file descriptor, which is then closed.
    """
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def disk_space_errors(path: Path | str) -> Iterator[None]:
    """Turn a failed write inside the with block into a StoreError that says how to fix it.

    `path` is the file or folder that the block writes to, for the message. Other exceptions pass unchanged.

    Raises: StoreError for a full disk, a file system or folder that is not writable, or a file name that is too long.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FIXES:
            raise StoreError(f"Cannot write {_where(error, path)}", fix=_FIXES[error.errno]) from error
        if not _is_full(error, Path(path)):
            raise
        raise StoreError(
            f"No space left on the disk while writing {path}",
            fix="Free some space and run the same command again (a training with --resume): nothing is lost.",
        ) from error


def _where(error: OSError, path: Path | str) -> str:
    """Return a failed write's path and reason, as text for a message."""
    file = str(error.filename2 or error.filename or path)
    return f"{file if len(file) <= 400 else file[:200] + '...' + file[-100:]}: {str(error.strerror).lower()}"


def _is_full(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors and torch.save lose the error number; torch the words as well.
    if "No space left" in str(error):
        return True
    return "inline_container" in str(error) and shutil.disk_usage(path.parent).free < _ROOM_BYTES
