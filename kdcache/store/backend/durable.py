"""Writes that survive a power cut: temporary file, fsync, rename, fsync of the folder.

zarr-python renames its files into place but never syncs them, so a machine that loses power can keep
the name and lose the bytes. The cache's ledger is only worth something when what it lists is on disk.
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
"""Ends the name of a file that is being written; what a crash leaves of it means nothing."""
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
    """Flush one file or one folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_with_parents(path: Path, top: Path) -> None:
    """Flush `path` and every folder between it and `top`, inclusive: a file is found only by its folders."""
    sync_path(path)
    for folder in path.parents:
        sync_path(folder)
        if folder == top:
            return


def beside(path: Path, ending: str) -> Path:
    """Return a temporary path next to `path`: as much of its name as fits, plus `ending`."""
    return path.with_name(os.fsdecode(os.fsencode(path.name)[: _MOST_NAME_BYTES - len(ending)] + ending.encode()))


def write_durably(path: Path, content: bytes) -> None:
    """Publish a file whole or not at all, in a folder that exists."""
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
    """Return the SHA-256 of a file's bytes as hex. If `file` is a descriptor, close it."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def disk_space_errors(path: Path | str) -> Iterator[None]:
    """Turn a failed write into an error that says which data is safe and what to do.

    Raises: StoreError for a full disk, a read-only file system or folder, or a name that is too long.
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
    """Return the path of the failed write, and the reason."""
    file = str(error.filename2 or error.filename or path)
    return f"{file if len(file) <= 400 else file[:200] + '...' + file[-100:]}: {str(error.strerror).lower()}"


def _is_full(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors and torch.save lose the error number; torch the words as well.
    if "No space left" in str(error):
        return True
    return "inline_container" in str(error) and shutil.disk_usage(path.parent).free < _ROOM_BYTES
