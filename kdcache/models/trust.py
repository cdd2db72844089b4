"""Trust in code that files name. A run folder names its model, and `module:function` is code to import.

A name from the user is imported. A name from a file (a run's `model.json`, a recipe) is imported only if the user
trusts it: `--trust`, `trust=True`, or a `with trusting():` around the call.
"""

import importlib.machinery
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache.errors import ModelError
from kdcache.models.added_heads import base_of
from kdcache.models.architectures.hub_models import CODE_ALLOWED
from kdcache.models.registry import is_function

_FIX = "Name a model that `kdcache models` lists, or restore the file from a copy that you trust."


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Allow the import of code that a file names, such as a run's model function, in a with block.

    `trust` False changes nothing: inside an outer `trusting()` block, the import stays allowed.
    """
    token = CODE_ALLOWED.set(trust or CODE_ALLOWED.get())
    try:
        yield
    finally:
        CODE_ALLOWED.reset(token)


def is_trusting() -> bool:
    """Return True inside a `with trusting():` block, in which code that a file names may be imported."""
    return CODE_ALLOWED.get()


@contextmanager
def named_by(where: str) -> Iterator[None]:
    """Prefix the ModelErrors of a with block with `where`, the name of a file whose model spec the block uses.

    The fix of such an error becomes: name a listed model in the file, or restore the file.
    """
    try:
        yield
    except ModelError as error:
        raise error.within(where, fix=_FIX) from error


def check_present(spec: str, where: str) -> None:
    """Check that the .py file in a model spec exists. A run names such a file, but has no copy of it.

    Args:
        spec: a model spec. If it names no .py file, nothing is checked.
        where: the file or folder that has the spec, for the message.
    Raises: ModelError if there is no such file.
    """
    with named_by(where):
        place = base_of(spec).rpartition(":")[0]
    if place.endswith(".py") and not Path(place).is_file():
        raise ModelError(
            f"Cannot find {place}, the code of a model: {where} names {spec}, and there is no {Path(place).resolve()}",
            fix="Copy that file here from where the run was trained. Then read it, and add --trust.",
        )


def check_trusted(spec: str, where: str) -> None:
    """Check that the function that a spec names may be imported. A listed model is always allowed.

    Args:
        spec: the spec.
        where: the file or folder that has the spec, for the message.
    Raises: ModelError outside a `trusting()` block. It names the code, and how to allow it.
    """
    if is_trusting():
        return
    with named_by(where):
        base_of(spec)
    if not is_function(spec):
        return
    place, _, function = base_of(spec).rpartition(":")
    raise ModelError(
        f"Cannot import {spec}: a file names this code, and you have not allowed it. {where} names it: "
        f"{_source_of(place)} would be imported, and {function} called",
        fix="Read that code. If you trust it, add --trust. In Python, call inside `with kdcache.models.trusting():`",
    )


def _source_of(place: str) -> str:
    """Return the source file that a module or .py file would be imported from, without importing anything."""
    if place.endswith(".py"):
        return str(Path(place).resolve())
    top = place.partition(".")[0]
    folder = os.getcwd()
    path = sys.path if folder in sys.path else [*sys.path, folder]  # as callables.py imports it
    module_spec = importlib.machinery.PathFinder.find_spec(top, path) if top.isidentifier() else None
    if module_spec is None:
        return top
    source = module_spec.origin or next(iter(module_spec.submodule_search_locations or []), None)
    return top if source is None else str(Path(source).resolve())
