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
    """Return the bytes of a file. Raises: OSError; ValueError for a pipe, a device, a folder, or beyond `most`."""
    return read_handle(os.open(path, os.O_RDONLY | os.O_NONBLOCK), most)  # else a pipe without a writer waits


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file, with its line ends as they are. Raises: as `read_bytes`."""
    return read_bytes(path, most).decode("utf-8")


def read_handle(handle: int, most: int) -> bytes:
    """Return the bytes of an open file and close it. Raises: as `read_bytes`."""
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
    """Parse JSON. Raises: ValueError."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises: ValueError."""
    if any(key.count(".") >= _MOST_PARTS for key in re.split(r"[=,{}\[\]\n]", text)):
        raise ValueError(f"a key has more than {_MOST_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_unpacked(path: Path) -> None:
    """Check that a tensor file takes about its own size in memory, as all libraries write it.

    Raises: OSError; ValueError for a zip archive (.pt, .npz) that unpacks to far more, or a long safetensors header.
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
