"""Trust in code that files name: a run folder names its model, and for `module:function` that is code to import.

A name that the user gives is imported. A name that a file brings (a run's `model.json`, a recipe) is imported when the
user trusts it (`--trust`), or when a training of this user was begun with that very function. The latter is a list in
the user's own state folder (`$XDG_STATE_HOME/kdcache/functions`, by default below `~/.local/state`): pairs of function
and resolved source file, nothing of which a run folder can bring along. So a run that was trained here goes on working,
and one from elsewhere can at most call what its user has trained with.
"""

import importlib.machinery
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from kdcache.errors import ModelError
from kdcache.models.added_heads import base_of
from kdcache.models.registry import is_function

_REMEDY = "name a model that `kdcache models` lists; or restore the file from a copy that you trust"
_TRUSTING: ContextVar[bool] = ContextVar("trusting", default=False)


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Within the block, names that files bring are imported; `trust=False` changes nothing."""
    token = _TRUSTING.set(trust or _TRUSTING.get())
    try:
        yield
    finally:
        _TRUSTING.reset(token)


@contextmanager
def named_by(where: str) -> Iterator[None]:
    """Let errors about a spec that the file `where` brings name that file, and nothing out of it as their remedy."""
    try:
        yield
    except ModelError as error:
        raise error.restated(received=f"{where}: {error.received}", remedy=_REMEDY) from error


def check_present(spec: str, where: str) -> None:
    """Check that the .py file of a model is there, which a run leaves behind where it was trained. Raises ModelError.

    Args:
        where: the file that names it.
    """
    with named_by(where):
        place = base_of(spec).rpartition(":")[0]
    if place.endswith(".py") and not Path(place).is_file():
        raise ModelError(
            f"Cannot find {place}, the code of a model",
            entry="cannot find code model",
            received=f"{where} names {spec}, and there is no {Path(place).resolve()}",
            remedy="copy that file here from where the run was trained; then read it, and add --trust",
        )


def check_trusted(spec: str, where: str) -> None:
    """Refuse to import a function that a file names, unless it is trusted.

    Args:
        where: the file or folder that names it.
    Raises: ModelError saying what would have been imported, and how to allow it.
    """
    if _TRUSTING.get():
        return
    with named_by(where):
        base_of(spec)
    if not is_function(spec):
        return
    source, function = _resolved(spec)
    if [source, function] in _remembered():
        return
    raise ModelError(
        "code that a file names is imported only when you allow it, or when you have trained with it",
        received=f"{where} names the model {spec}: {source} would be imported, and {function} called",
        remedy="read that code; if you trust it, add --trust (in Python: trust=True)",
    )


def remember(spec: str) -> str | None:
    """Note that a training was begun with this function; returns a warning when that cannot be written."""
    if not is_function(spec):
        return None
    entry = list(_resolved(spec))
    if entry in _remembered():
        return None
    try:
        path = _path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In one write, at the end: several trainings may begin at once.
        with open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write((json.dumps(entry) + "\n").encode())
    except (OSError, RuntimeError) as error:
        return f"{spec} could not be noted as yours ({error}): this run will need --trust where it is used"
    return None


def _resolved(spec: str) -> tuple[str, str]:
    """The source file that a spec would import, found without importing anything, and the function in it."""
    place, _, function = base_of(spec).rpartition(":")
    if place.endswith(".py"):
        return str(Path(place).resolve()), function
    top, _, rest = place.partition(".")
    folder = os.getcwd()
    path = sys.path if folder in sys.path else [*sys.path, folder]  # as callables.py imports it
    module_spec = importlib.machinery.PathFinder.find_spec(top, path) if top.isidentifier() else None
    source = top
    if module_spec is not None:
        source = module_spec.origin or next(iter(module_spec.submodule_search_locations or []), top)
    return str(Path(source).resolve()) if source != top else top, f"{place}:{function}" if rest else function


def _remembered() -> list[object]:
    """Functions of earlier trainings; none where the list is missing, or could have been written by others."""
    try:
        path = _path()
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, RuntimeError, ValueError):
        return []


def _path() -> Path:
    """Raises RuntimeError for a user without a home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "kdcache" / "functions"
