"""A choice that nobody made is the same one in Python, on the command line, and from verb to verb."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from kdcache.analysis.predict import predict_images
from kdcache.analysis.stored_evaluations import EvalSettings
from kdcache.distill import DistillLoss
from kdcache.metrics import evaluate_model
from kdcache.settings import entries
from kdcache.settings.building import BuildSettings
from kdcache.settings.training import TRAINING
from kdcache.sweep import plan_sweep, read_recipe, run_jobs
from kdcache.teacher import BuildOptions
from kdcache.teacher.audit.pseudo_labels import Rule
from kdcache.teacher.build.cost_estimate import estimate
from kdcache.training import make_config
from kdcache_cli.app import app
from kdcache_cli.verbs import sweep

SCENES = "scenes:36x52,train=2,val=1"
OF_THE_MACHINE = {"device", "threads"}
"""Which a library leaves to its caller, and the command line looks at; no result depends on them."""


def defaults(verb: str) -> dict[str, Any]:
    """Of every flag that need not be given."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {flag.name: flag.default for flag in commands[verb].params if not flag.required}


def shared(one: dict[str, Any], two: dict[str, Any], but: set[str] = frozenset()) -> tuple[dict[str, Any], ...]:
    names = [name for name in one if name in two and name not in but]
    assert len(names) > 1
    return {name: one[name] for name in names}, {name: two[name] for name in names}


def of_python(function: Callable[..., Any]) -> dict[str, Any]:
    found = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return {name: default for name, default in found.items() if default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("verb", "needed"),
    [
        ("train-teacher", {"data": SCENES}),
        ("train-student", {"cache": "x.zarr"}),
        ("train-student", {"cache": "x.zarr", "accumulate": 2}),
    ],
)
@pytest.mark.parametrize("model", ["kdcache:tiny", "smp:unet-resnet18"])
def test_a_training_has_the_settings_of_its_verb(verb: str, needed: dict[str, Any], model: str) -> None:
    flags = {name: value for name, value in defaults(verb).items() if name in entries(*TRAINING)}
    assert len(flags) > 30
    # Who draws ahead is the machine's; lists that may be repeated begin as None.
    lists = ("term", "log", "lr_scale", "task_weight", "stream")
    flags = {name: () if name in lists else value for name, value in flags.items() if name != "workers"}
    given = {"verb": verb, "model": model, **needed}
    assert make_config(**{**flags, **given}) == make_config(**given)


@pytest.mark.parametrize(("one", "two"), [("train-teacher", "train-student"), ("plan", "build-teacher-cache")])
def test_verbs_that_share_a_flag_share_its_default(one: str, two: str) -> None:
    # Where the store goes is asked of a build, and a plan looks at the disk of the working folder.
    mine, theirs = shared(defaults(one), defaults(two), {"out"})
    assert len(mine) > 20
    assert mine == theirs


@pytest.mark.parametrize("verb", ["plan", "build-teacher-cache"])
def test_a_build_has_the_options_of_its_verb(verb: str) -> None:
    table = {name: entry.default for name, entry in entries(BuildSettings).items()}
    mine, theirs = shared(table, of_python(BuildOptions))
    assert len(mine) == len(table)
    assert mine == theirs
    flags, theirs = shared(defaults(verb), table)
    assert len(flags) == len(table)
    # What a word says on the command line: lists that may be repeated, a number or `full`, what data or machine decide.
    words = {"top_k": "auto", "heads": "", "features": "", "statistics": "", "views": "4", "render_threads": None}
    assert flags == theirs | words


def test_the_loss_is_that_of_a_training() -> None:
    mine, theirs = shared(defaults("train-student"), of_python(DistillLoss.__init__), {"gate", "balance"})
    assert {"kl_weight", "ce_weight", "temperature", "distill_void", "impl"} <= set(mine)
    assert mine == theirs


@pytest.mark.parametrize(
    ("verb", "function"),
    [("evaluate", evaluate_model), ("predict", predict_images), ("plan", estimate), ("sweep", run_jobs)],
)
def test_functions_do_what_their_verbs_do(verb: str, function: Callable[..., Any]) -> None:
    flags, python = defaults(verb), of_python(function)
    names = [name for name in flags if name in python and name not in OF_THE_MACHINE]
    assert names
    assert {name: flags[name] for name in names} == {name: python[name] for name in names}


def test_comparisons_judge_as_their_verb_says() -> None:
    python = {field.name: field.default for field in dataclasses.fields(EvalSettings)}
    flags = defaults("compare")
    assert (flags["weights"], flags["batch_size"]) == (python["which"], python["batch_size"])


def test_pseudo_labels_have_no_rule_of_their_own() -> None:
    flags, python = defaults("export-pseudo-labels"), {field.name: field.default for field in dataclasses.fields(Rule)}
    assert {name: flags[name] for name in python} == python


def test_a_sweep_trains_on_the_splits_of_its_verbs() -> None:
    planned = plan_sweep(
        read_recipe("voc-compare", smoke=True), SCENES, Path("x"), sweep.flags_of(typer.main.get_command(app))
    )
    words = planned.jobs[0].words
    assert words[words.index("--split") + 1] == defaults("train-teacher")["split"]
    assert words[words.index("--val-split") + 1] == defaults("train-teacher")["val_split"]
