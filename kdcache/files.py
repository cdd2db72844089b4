"""Write files completely or not at all, whatever interrupts: an error, a kill, a power cut, a full disk."""

import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.bounded import MOST_BYTES, parse_json, read_bytes
from kdcache.errors import RecipeError

_PARTIAL = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Provide a path to write to, which replaces `path` if the block succeeds. Otherwise the file is unchanged.

    The name is always the same, so the remains of a kill are overwritten, or removed by `clear_partials`. Only one
    process may write in the folder.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.unlink(missing_ok=True)  # of a kill; where a link is made, it may be in the way
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # what does not fit must not keep the disk full
    sync(path.parent)


@contextmanager
def replacing_in(folder: Path, earlier: Callable[[], Iterable[Path]]) -> Iterator[Path]:
    """Provide an empty folder to write to, whose files move into `folder` if the block succeeds.

    A new `folder` appears complete. In an existing one, the new files replace the `earlier` ones.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # of a kill
    partial.mkdir(parents=True)
    try:
        yield partial
        if not folder.is_dir() or not any(folder.iterdir()):
            partial.replace(folder)
            return
        for old in list(earlier()):
            old.unlink()
        for file in [path for path in partial.rglob("*") if not path.is_dir()]:
            place = folder / file.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, content: str) -> None:
    """Replace a text file (UTF-8), completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(content, encoding="utf-8")


MOST_CONTENTS = 2**27
"""The most bytes of a JSON file with digests of samples: those of about a million."""


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if it is missing, damaged, too long, or holds something else."""
    try:
        content = parse_json(read_bytes(path, most))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def user_cache() -> Path:
    """Return the folder for files that may be lost: KDCACHE_CACHE_DIR, or kdcache in the user's cache folder."""
    own = os.environ.get("KDCACHE_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdcache"


def check_own_folder(folder: Path, marker: str, fix: str = "Give another folder with --out") -> None:
    """Check that a folder to write into is new, empty, or holds the file `marker` from an earlier time.

    `fix` is the error's, which also has the command that moves the folder away.

    Raises: RecipeError.
    """
    if folder.is_dir():
        problem = "holds something else" if any(folder.iterdir()) and not (folder / marker).is_file() else ""
    else:
        problem = "is not a folder" if folder.exists() else ""
    if problem:
        raise RecipeError(
            f"Cannot write here: {folder} {problem}",
            fix=f"{fix}. If kdcache wrote this folder, move it away: {moved_away(folder)}",
        )


def moved_away(folder: Path) -> str:
    """Return the command that moves a folder away, so a new one can replace it and nothing is lost."""
    return shlex.join(["mv", str(folder), str(folder.with_name(f".{folder.name}-before"))])


def is_partial(path: Path) -> bool:
    """Return whether a path is the remains of a file that was being replaced during a kill."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def clear_partials(folder: Path) -> None:
    """Remove the remains of kills in a folder without other writers."""
    for leftover in filter(is_partial, list(folder.iterdir()) if folder.is_dir() else []):
        leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush one file, or one folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
