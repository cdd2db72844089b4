"""Functions have the settings of their verbs: the same names, defaults and checks, from one table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import typer

import kdcache
from kdcache.data import fold_alone, open_split
from kdcache.errors import RecipeError
from kdcache.settings import entries, read_value
from kdcache.settings.building import BUILD
from kdcache.settings.engine import EngineSettings
from kdcache.settings.shared import CompareSettings, DepthSettings, ImageSettings, JudgeSettings, MachineSettings
from kdcache.settings.training import TRAINING
from kdcache.verbs.keywords import checked, spec_of
from kdcache_cli.app import app

JUDGED = (ImageSettings, CompareSettings, JudgeSettings, DepthSettings, MachineSettings)
VERBS: dict[str, tuple[Callable[..., Any], tuple[type, ...]]] = {
    "build-teacher-cache": (kdcache.build_cache, (*BUILD, EngineSettings)),
    "train-student": (kdcache.train, TRAINING),
    "train-teacher": (kdcache.train, TRAINING),
    "evaluate": (kdcache.evaluate, JUDGED),
    "compare": (kdcache.compare, JUDGED),
}
NOT_IN_PYTHON = {
    "evaluate": {"json_file", "markdown", "listing", "class_map", "at_size"},
    "compare": {"markdown", "csv", "json_file", "text"},
    "train-student": {"recipe"},
    "train-teacher": {"recipe"},
}
"""Files that Python writes itself; a recipe is a dictionary there."""
OWN = {"data", "split", "runs", "run", "teacher", "out", "model", "val", "resume", "worker", "take_over"}
"""Parameters of the functions, which take objects, too."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_function_has_the_settings_of_its_verb_with_their_defaults(verb: str) -> None:
    function, tables = VERBS[verb]
    flags = {flag.name: flag for flag in typer.main.get_command(app).commands[verb].params}  # type: ignore[attr-defined]
    python = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    table = entries(*tables)
    named = set(flags) - OWN - NOT_IN_PYTHON.get(verb, set()) - {"help_all"}
    assert named <= set(python), named - set(python)
    compared = 0
    for name in named & set(table):
        default = None if flags[name].default is None else read_value(table[name], flags[name].default)
        assert (() if default is None and python[name] == () else default) == python[name], name
        compared += 1
    assert compared > 5


def test_no_default_is_written_twice() -> None:
    """Defaults of settings are in the tables alone: the functions' own parameters have none but None."""
    for function, tables in VERBS.values():
        for name, default in (inspect.unwrap(function).__kwdefaults__ or {}).items():
            assert default is None or name not in entries(*tables), name


def test_a_signature_is_short_and_complete() -> None:
    shown = str(inspect.signature(kdcache.train))
    assert "temperature: float = 2.0" in shown
    assert ", size: " in shown
    assert "Spelling" not in shown
    assert "verb" not in inspect.signature(kdcache.train).parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sise": (32, 48)}, "Did you mean size=?"),
        ({"wholly_other": 1}, "help(kdcache.build_cache)"),
        ({"size": 288}, "Invalid value of size=: 288"),
        ({"size": (288,)}, "Give HEIGHTxWIDTH in pixels"),
        ({"size": "288"}, "Invalid value of size=: '288'"),
        ({"views": "few"}, "Invalid value of views=: 'few'"),
        ({"precision": "fp8"}, "Give one of float32, bf16, fp16"),
        ({"batch_size": 2.5}, "Give a whole number from 1"),
        ({"threads": -1}, "Give a whole number from 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        kdcache.build_cache("scenes", "runs/none", "s.zarr", **settings)
    assert message in str(caught.value)


def test_values_may_be_typed_or_written() -> None:
    tables = tuple(table for table in BUILD if table.__name__ != "DataSettings")
    one = checked(
        kdcache.build_cache, {"size": (32, 48), "views": 1, "heads": ("a", "b"), "render_threads": None}, *tables
    )
    two = checked(kdcache.build_cache, {"size": "32x48", "views": "full", "heads": "a,b"}, *tables)
    assert one == two
    assert one["top_k"] is None


def test_a_part_of_a_split_has_no_name_in_a_recipe() -> None:
    split = open_split("scenes:32x48,train=6,val=2", "train")
    assert spec_of(split, "data") == ("scenes:32x48,train=6,val=2", "train")
    with pytest.raises(RecipeError, match="Cannot open data again by its name"):
        spec_of(fold_alone(split, 0, 3), "data")
