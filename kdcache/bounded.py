"""Read files that may hold anything: only regular files, in bounded time and memory.

Everything else is an OSError or a ValueError.
"""

import json
import os
import re
import stat
import tomllib
import zipfile
from pathlib import Path
from typing import Any

MOST_BYTES = 2**23
"""The most bytes of a file of settings or results."""
_MOST_UNPACKED = 2**26  # bytes that any archive may have unpacked, and four times its own size
_MOST_HEADER = 2**24  # bytes of a safetensors header: 100,000 tensors
_MOST_PARTS = 32  # of a key in TOML, for which memory grows with their square


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is a pipe, a device or a folder, or it has more than `most` bytes.
    """
    return read_handle(os.open(path, os.O_RDONLY | os.O_NONBLOCK), most)  # else a pipe without a writer waits


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file of at most `most` bytes, with its line ends unchanged.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, is not UTF-8, or has more than `most` bytes.
    """
    return read_bytes(path, most).decode("utf-8")


def read_handle(handle: int, most: int) -> bytes:
    """Return the content of an open file, and close the file.

    Args:
        handle: a file descriptor for reading.
        most: the most bytes that the file may have.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is a pipe, a device or a folder, or it has more than `most` bytes.
    """
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > most:
            raise ValueError(f"{status.st_size} bytes are more than the {most} that it may have")
        with open(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(handle)


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text. Raises: ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Return the content of a TOML text. Raises: ValueError if it is invalid or nested too deeply."""
    if any(key.count(".") >= _MOST_PARTS for key in re.split(r"[=,{}\[\]\n]", text)):
        raise ValueError(f"a key has more than {_MOST_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_unpacked(path: Path) -> None:
    """Check that a file of tensors will not unpack to far more memory than its size on the disk.

    Raises:
        OSError: the file cannot be read.
        ValueError: a zip archive (`.pt`, `.npz`) unpacks to more than 4 times its size + 64 MiB, or a `.safetensors`
            header is longer than 16 MiB.
    """
    with path.open("rb") as file:
        begin = file.read(8)
        if path.suffix == ".safetensors":
            if (header := int.from_bytes(begin, "little")) > _MOST_HEADER:
                raise ValueError(f"its header has {header} bytes, at most {_MOST_HEADER} are read")
            return
        if not begin.startswith(b"PK"):
            return
        try:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(str(error)) from error
        most = 4 * os.fstat(file.fileno()).st_size + _MOST_UNPACKED
        if unpacked > most:
            raise ValueError(f"it unpacks to {unpacked} bytes, at most {most} are read from a file of its size")
