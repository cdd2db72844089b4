"""Every exported name has an example in its docstring, and the examples run."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdcache
import kdcache_kernels
from kdcache.data import write_scenes

WITHOUT = {"KernelError", "ReferenceWarning", "ShapeError", "ValueRangeError", "LossProblem", "distill_loss_reference"}
"""Exceptions, and the checked input that `distill_loss` makes for a kernel."""
SLOW = {"audit", "plan"}
NAMES = [
    pytest.param(package, name, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for package in (kdcache, kdcache_kernels)
    for name in package.__all__
    if name not in WITHOUT and callable(getattr(package, name))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a teacher, two caches and a student, which the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    train = {"model": "kdcache:tiny", "iterations": 2, "batch_size": 2, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_scenes("streets", "scenes:48x64,train=8,val=4")
        kdcache.train("runs/teacher", data="streets", size=(48, 64), **train)
        kdcache.build_cache("streets", "runs/teacher", "streets.zarr", pixels="stored", progress=False)
        only_features = {"features_only": True, "features": ["stage4"], "like": "streets.zarr"}
        kdcache.build_cache(None, "runs/teacher", "features.zarr", progress=False, **only_features)
        kdcache.train("runs/student", cache="streets.zarr", val="streets", **train)
    return folder


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_examples_run(package: Any, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    text = inspect.getdoc(getattr(package, name)) or ""
    test = doctest.DocTestParser().get_doctest(
        text, {"np": np, "torch": torch, package.__name__: package}, name, None, 0
    )
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)
