"""Wrong calls of every function of kdcache: one error that names the problem and the fix, and nothing is written."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kdcache
from kdcache.data import write_scenes
from kdcache.errors import KDCacheError
from kdcache.settings import entries
from kdcache.settings.building import BuildSettings
from kdcache.settings.training import Optimizer

FUNCTIONS = [name for name in kdcache.__all__ if inspect.isfunction(getattr(kdcache, name))]
NAN = float("nan")
RIGHT: dict[str, tuple[Any, ...]] = {
    "audit": ("store.zarr",),
    "build_cache": ("data", "teacher", "new"),
    "build_model": ("kdcache:tiny", 7),
    "card": ("store.zarr",),
    "compare": ("teacher",),
    "copy": ("store.zarr", "new"),
    "evaluate": ("teacher", "data"),
    "evaluate_model": (kdcache.build_model("kdcache:tiny", 7), kdcache.open_split("scenes:32x48", "val"), (32, 48)),
    "export": ("teacher", "new.onnx"),
    "export_pseudo_labels": ("store.zarr", "new"),
    "from_dataset": ([1], ["road", "sky"]),
    "inspect": ("store.zarr",),
    "load_run": ("teacher",),
    "load_teacher": ("teacher", ["road", "sky"]),
    "open_cache": ("store.zarr",),
    "open_caches": (["store.zarr"],),
    "open_split": ("data", "val"),
    "plan": ("data", "teacher"),
    "predict": ("teacher", "data/images/val", "new"),
    "report": ("teacher", "new.html"),
    "traced": (None,),
    "train": ("new",),
    "verify": ("store.zarr",),
}
"""Arguments of a right call, as far as they have no default."""
ABSURD: dict[str, list[dict[str, Any]]] = {
    "audit": [{"cache_bytes": 0}, {"progress": NAN}],
    "build_cache": [{"views": 0}, {"batch_size": NAN}],
    "build_model": [{"num_classes": -1}, {"num_classes": NAN}],
    "card": [{"cache_bytes": 0}, {"cache_bytes": NAN}],
    "compare": [{"repeats": -1}, {"min_depth": NAN}],
    "copy": [{"samples": 0}, {"shard_records": -1}],
    "evaluate": [{"batch_size": 0}, {"max_depth": NAN}, {"data": []}],
    "evaluate_model": [{"batch_size": 0}, {"size": (0, 48)}],
    "export": [{"tolerance": -1}, {"tolerance": NAN}, {"size": 0}],
    "export_pseudo_labels": [{"threshold": 0}, {"quantile": NAN}],
    "from_dataset": [{"void": 300}, {"void": NAN}],
    "inspect": [{"cache_bytes": 0}, {"cache_bytes": -1}],
    "load_run": [{"which": 0}, {"trust": NAN}],
    "load_teacher": [{"mean": (NAN,)}, {"outputs": "sigmoids"}],
    "open_cache": [{"cache_bytes": 0}, {"cache_bytes": NAN}],
    "open_caches": [{"cache_bytes": -1}, {"locations": []}],
    "open_split": [{"split": 0}, {"split": NAN}],
    "plan": [{"records": 0}, {"epochs": -1}, {"teacher": []}],
    "predict": [{"batch_size": 0}, {"threads": -1}, {"images": []}],
    "report": [{"num": -1}, {"repeats": NAN}],
    "traced": [{"transform": 0}, {"transform": NAN}],
    "train": [{"lr": NAN}, {"batch_size": 0}, {"stream": -1}, {"jitter": []}],
    "verify": [{"records": 0}, {"records": NAN}],
}
WORDS = {
    "dataset": ("item", "split"),
    "locations": ("cache", "locations="),
    "images": ("image",),
    "transform": ("trace",),
}
"""What an error calls an argument that may be of any type, or is empty, where it is not its name."""


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that calls run in: data/, teacher/ (a run) and store.zarr."""
    root, before = tmp_path_factory.mktemp("wrong"), Path.cwd()
    os.chdir(root)
    write_scenes(root / "data", "scenes:32x48,train=4,val=1")
    short: dict[str, Any] = {"iterations": 1, "batch_size": 2, "device": "cpu", "workers": 0, "progress": False}
    kdcache.train("teacher", model="kdcache:tiny", data="data", size=(32, 48), **short)
    kdcache.build_cache("data", "teacher", "store.zarr", views=1, device="cpu", progress=False)
    yield root
    os.chdir(before)


def wrong_call(name: str, *args: Any, **keywords: Any) -> KDCacheError:
    """Return the error of a call, which writes nothing."""
    with pytest.raises(KDCacheError) as caught:
        getattr(kdcache, name)(*args, **keywords)
    error = caught.value
    assert error.problem
    assert error.fix
    assert "--" not in error.problem
    assert len(error.problem.split()) <= 25
    assert {path.name for path in Path().iterdir()} == {"data", "teacher", "store.zarr"}
    return error


def names_it(error: KDCacheError, argument: str) -> bool:
    """Return True if an error says which argument it is about."""
    return any(word in str(error) for word in WORDS.get(argument, (argument,)))


def right(name: str) -> dict[str, Any]:
    """The arguments of a right call, by name."""
    return dict(zip(inspect.signature(getattr(kdcache, name)).parameters, RIGHT[name], strict=False)) | (
        {"model": "kdcache:tiny", "data": "data", "size": (32, 48)} if name == "train" else {}
    )


def test_every_function_is_called() -> None:
    assert list(RIGHT) == list(ABSURD) == FUNCTIONS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_type_of_the_first_argument(name: str) -> None:
    first = next(iter(right(name)))
    for value in (None, 3, [3], {"a": 1}):
        error = wrong_call(name, **{**right(name), first: value})
        assert names_it(error, first), error


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_keyword_close_to_a_real_one(name: str) -> None:
    for known in inspect.signature(getattr(kdcache, name)).parameters:
        typed = known[:2] + known[3:] + known[-1] * 2
        error = wrong_call(name, **right(name), **{typed: 1})
        assert f"{typed}=" in error.problem
        assert error.fix.startswith("Did you mean "), (typed, error)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_missing_and_superfluous_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(kdcache, name)).parameters.values()
    required = [one.name for one in parameters if one.default is one.empty]
    for absent in required:
        error = wrong_call(name, **{key: value for key, value in right(name).items() if key != absent})
        assert error.problem == f"Missing {absent}="
    assert "without a name" in wrong_call(name, *range(12)).problem
    assert f"{required[0]}=" in wrong_call(name, 1, **{required[0]: 1}).problem


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_setting_of_another_verb(name: str) -> None:
    known = inspect.signature(getattr(kdcache, name)).parameters
    for other in {*entries(BuildSettings, Optimizer)} - {*known}:
        assert f"{other}=" in wrong_call(name, **right(name), **{other: 1}).problem


@pytest.mark.parametrize("name", FUNCTIONS)
def test_absurd_values(name: str) -> None:
    for values in ABSURD[name]:
        error = wrong_call(name, **{**right(name), **values})
        assert any(names_it(error, key) for key in values), error


def test_settings_of_a_training_are_keywords() -> None:
    short = {"model": "kdcache:tiny", "data": "data", "size": (32, 48), "device": "cpu"}
    assert wrong_call("train", "new", **short, method="kl").problem == "Cannot learn kl without cache="
    error = wrong_call("train", "new", **short, iterations=3, epochs=2)
    assert error.problem == "Use either iterations=3 or epochs=2, not both"
    error = wrong_call("train", "new", **short, val_fold="5/3")
    assert error.problem.startswith("Invalid value of val_fold=: '5/3'")
    assert error.fix.endswith("val_fold='0/4'")
    fix = wrong_call("train", "new", **short, fold="0/2", schedule="plateau", val="data", resume=True).fix
    assert "--" not in fix


def test_commands_in_a_fix_stay_commands() -> None:
    assert "kdcache build-teacher-cache --data DATA" in wrong_call("verify", "none.zarr").fix


def test_an_unknown_implementation_of_the_loss() -> None:
    with pytest.raises(KDCacheError, match="Unknown impl 'cuda'"):
        kdcache.DistillLoss(impl="cuda")
