"""Any network as `module:function` or `path/to/file.py:function`.

The function is called with `num_classes=` if it has that parameter, and returns a module. A `SegmentationModel` is used
directly. Any other module is wrapped. It may return a tensor, a mapping with `out` (or `logits`), an object with
`.logits`, or a tuple or list whose first element is one of these.

A network of several heads declares them in its attribute `kdcache_heads`, and returns a mapping of these names:

    network.kdcache_heads = {"segmentation": "categorical", "depth": {"kind": "regression", "max_depth": 10.0}}

The fields of a regression are those of `kdcache.heads.RegressionHead`. `{}` declares a network with features only.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from kdcache.errors import ModelError
from kdcache.models.foreign.wrapped import WrappedModel, fits
from kdcache.models.native import SegmentationModel
from kdcache.tasks import SEGMENTATION


def build(spec: str, num_classes: int | None) -> SegmentationModel:
    """Import the function that a spec names (`module:function` or `path/to/file.py:function`), and build its model.

    Args:
        spec: such as `my_models.py:build`.
        num_classes: passed to the function if it has this parameter. If None, the function needs a default.
    Raises: ModelError if the import or the call fails, or if the function returns no `torch.nn.Module`. Also if the
    module fails on an image or has another number of classes.
    """
    place, _, name = spec.rpartition(":")
    with _working_folder_on_path():
        function = getattr(_import(place, spec), name, None)
        if not callable(function):
            problem = "no such name" if function is None else f"of type {type(function).__name__}"
            raise ModelError(f"Cannot build {spec}: {name} is {problem}", fix=f"Define {name}(num_classes) there.")
        network = _call(spec, function, num_classes)
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{spec} returned {type(network).__name__}, which is no torch.nn.Module", fix="Return the network itself."
        )
    if not isinstance(network, SegmentationModel):
        return WrappedModel(spec, network, num_classes)
    network.spec = spec
    counted = SEGMENTATION in network.head_kinds
    if counted and num_classes is not None and not fits(network.num_classes, num_classes):
        raise ModelError(
            f"{spec} built {network.num_classes} classes instead of {num_classes}",
            fix="Use the num_classes that the function is given.",
        )
    return network


def _import(place: str, spec: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise ModelError(f"File not found: {place}, named by {spec}", fix="Correct path/to/file.py:function.")
        # The path is part of the name: two files called model.py are two modules.
        module_spec = importlib.util.spec_from_file_location(
            f"kdcache_user{path.with_suffix('')}".replace("/", "_"), path
        )
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses and pickling read their module there
        module_spec.loader.exec_module(module)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"Cannot import {spec}: {type(error).__name__}: {error}",
            fix="Correct the import, install the module, or give path/to/file.py:function.",
        ) from error
    return module


def _call(spec: str, function: Callable[..., Any], num_classes: int | None) -> object:
    named = {} if num_classes is None else {"num_classes": num_classes}
    problem: TypeError | None = None
    for arguments in (named, {}):  # the latter for one that knows its own number, which is compared afterwards
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            problem = problem or error
            continue
        except ValueError:  # a builtin without a signature: the call itself will fail or not
            pass
        return function(**arguments)
    given = f"num_classes={num_classes}" if named else "no argument, as no num_classes is known"
    raise ModelError(
        f"Cannot call {spec} with {given}: {problem}",
        fix="Write it as def build(num_classes=21), or give the number of classes: num_classes in Python, --classes "
        "FOLDER or --data on the command line.",
    ) from problem


@contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """Let `my_models:build` import ./my_models.py, in a with block, because a console script does not search there.

    The folder is added at the end of the path, so a local file never hides an installed module.
    """
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
