"""The first screen, and what a shell completes."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
import typer
from typer.main import get_command

from kdcache.distill.terms import KINDS
from kdcache_cli.app import app


def option(verb: str, name: str):
    """A flag of a verb."""
    group = get_command(app)
    command = group.get_command(typer.Context(group), verb)
    return next(parameter for parameter in command.params if name in parameter.opts)


def completed(verb: str, name: str, begun: str) -> list[str]:
    return [item.value for item in option(verb, name).shell_complete(None, begun)]


def test_verbs_stand_in_the_order_of_work(cli) -> None:
    told = cli("-h").out
    headings = ["Start", "Data", "Teacher and store", "Train", "Judge", "Ship", "Bench"]
    places = [told.index(f"─ {heading} ─") for heading in headings]
    assert places == sorted(places)
    assert told == cli("--help").out


def test_the_version(cli) -> None:
    assert cli("--version").out == f"kdcache {version('kdcache')}\n"


@pytest.mark.parametrize("verb", ["train-student", "report", "data check"])
def test_switches_have_no_type_and_choices_show(cli, verb: str) -> None:
    shown = cli(*verb.split(), "-h").out
    assert not re.search(r"<(bool|str|int|list|path)", shown)
    assert "store|labels" in shown or verb != "train-student"


@pytest.mark.parametrize(
    ("verb", "name", "begun", "words"),
    [
        ("train-student", "--model", "kdcache:t", ["kdcache:tiny"]),
        ("train-student", "--teacher", "", ["store", "labels"]),
        ("train-student", "--method", "kl+dis", ["kl+dist"]),
        ("build-teacher-cache", "--codec", "s", ["small"]),
    ],
)
def test_values_complete(verb: str, name: str, begun: str, words: list[str]) -> None:
    assert completed(verb, name, begun) == words


def test_models_by_a_part_of_their_name(cli) -> None:
    told = cli("models", "kdcache:").out
    assert "kdcache:tiny" in told
    assert "torchvision:" not in told
    refused = cli("models", "nothing-of-this-name")
    assert refused.code == 2
    assert "nothing-of-this-name" in refused.err


def test_quiet_has_errors_still(cli) -> None:
    refused = cli("models", "nothing-of-this-name", "--quiet")
    assert "received" in refused.err


def test_every_method_completes() -> None:
    kinds = {kind for kind in KINDS if not kind.startswith("depth")}
    assert set(completed("train-student", "--method", "")) == {"auto", "none", "kl", *kinds}
