"""Write files completely or not at all, whatever interrupts: an error, a kill, a power cut, a full disk."""

import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.bounded import MOST_BYTES, parse_json, read_bytes, read_text
from kdcache.errors import RecipeError, suggest

_PARTIAL = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Provide a temporary path to write to, in a with block. If the block succeeds, that file replaces `path`.

    Otherwise `path` stays unchanged. The temporary file is in the same folder, in which only one process may write. If
    the process is killed, the temporary file stays, until the next call or `clear_partials` removes it.
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
    """Provide an empty temporary folder to write to, in a with block. Its files move to `folder` if the block succeeds.

    If `folder` is new or empty, it appears complete, in one step.

    Args:
        folder: the folder for the files.
        earlier: returns the existing files of `folder` that are removed before the new ones move in.
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
    """Replace a text file (UTF-8). An interruption leaves either the old or the new file."""
    with replacing(path) as partial:
        partial.write_text(content, encoding="utf-8")


MOST_CONTENTS = 2**27
"""The most bytes of a JSON file with digests of samples, enough for about a million samples."""


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file of at most `most` bytes.

    Return {} if the file is missing, damaged or too long, or if it holds no object.
    """
    try:
        content = parse_json(read_bytes(path, most))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def user_cache() -> Path:
    """Return the folder for kdcache's temporary files, which may be deleted at any time.

    It is the environment variable KDCACHE_CACHE_DIR, or else `kdcache` in the user's cache folder (`~/.cache`).
    """
    folder = os.environ.get("KDCACHE_CACHE_DIR")
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdcache"


def check_own_folder(folder: Path, marker: str, fix: str = "Give another folder with --out") -> None:
    """Check that a folder is missing or empty, or that kdcache has written it before.

    Args:
        folder: the folder to write into.
        marker: the name of a file that shows that kdcache has written the folder.
        fix: the fix that the error shows. A command that moves the folder away is added to this text.

    Raises:
        RecipeError: the folder holds other files, or `folder` is a file.
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
    """Return a shell command that renames a folder, so that a new one can take its name and nothing is lost."""
    return shlex.join(["mv", str(folder), str(folder.with_name(f".{folder.name}-before"))])


def is_partial(path: Path) -> bool:
    """Return True if a file has the name of a temporary file of `replacing`. A killed process leaves it behind."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def clear_partials(folder: Path) -> None:
    """Remove temporary files from a folder, which a killed process left in `replacing`.

    No process may be writing there.
    """
    for leftover in filter(is_partial, list(folder.iterdir()) if folder.is_dir() else []):
        leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file to the disk (fsync). For a folder, flush the names of its files."""
    if path.is_dir() and os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_ids(path: Path, ids: Sequence[str]) -> frozenset[str]:
    """Return the ids that the file at `path` lists, one id a line. `ids` are all ids that exist.

    Raises: RecipeError for a file that cannot be read or lists nothing, and for unknown or repeated ids.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"Cannot read --labels-from {path}", fix="Give a text file, one id a line.", rule=str(error)
        ) from error
    listed = Counter(line for line in lines if line)
    if not listed:
        raise RecipeError(f"--labels-from {path} lists no id", fix="Write an id into each line.")
    if twice := [name for name, times in listed.items() if times > 1]:
        raise RecipeError(f"--labels-from {path} lists {twice[0]!r} twice", fix="Write each id once.")
    if missing := sorted(listed.keys() - set(ids)):
        more = f", and {len(missing) - 1} more" if missing[1:] else ""
        raise RecipeError(
            f"Unknown id {missing[0]!r} in --labels-from {path}{more}",
            fix=suggest(missing[0], ids, f"Correct the list. An id is {ids[0]!r}, for example."),
        )
    return frozenset(listed)
