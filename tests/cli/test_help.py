"""The first screen, and what a shell completes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

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


def every_option(group: Any = None, words: str = "") -> Iterator[tuple[str, Any]]:
    """Each verb with each of its parameters."""
    for name, command in (get_command(app) if group is None else group).commands.items():
        if hasattr(command, "commands"):
            yield from every_option(command, f"{words}{name} ")
        else:
            yield from ((f"{words}{name}", parameter) for parameter in command.params if hasattr(parameter, "help"))


def completed(verb: str, name: str, begun: str) -> list[str]:
    return [item.value for item in option(verb, name).shell_complete(None, begun)]


def test_verbs_stand_in_the_order_of_work(cli) -> None:
    told = cli("-h").out
    headings = ["Start", "Data", "Teacher and cache", "Train", "Evaluate", "Ship", "Bench"]
    places = [told.index(f"─ {heading} ─") for heading in headings]
    assert places == sorted(places)
    assert told == cli("--help").out


def test_the_version(cli) -> None:
    assert cli("--version").out == f"kdcache {version('kdcache')}\n"


FLAG = r"(?m)^│[ *]+(--[a-z-]+)  "


@pytest.mark.parametrize("verb", ["train-student", "train-teacher", "build-teacher-cache", "plan", "compare", "report"])
def test_the_help_has_about_twenty_flags_and_help_all_has_the_rest(
    cli, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    short, whole = cli(verb, "-h"), cli(verb, "--help-all")
    assert (short.code, whole.code) == (0, 0)
    shown, every = (re.findall(FLAG, told.out) for told in (short, whole))
    group = get_command(app)
    parameters = group.get_command(typer.Context(group), verb).params
    options = {parameter.opts[0] for parameter in parameters if parameter.param_type_name == "option"}
    assert set(every) == options | {"--help"}
    assert 18 <= len(shown) <= 26
    assert set(shown) <= set(every)
    rest = len(every) - len(shown)
    assert (f"{rest} more flags: kdcache {verb} --help-all" in short.out) == (rest > 0)
    assert "more flags" not in whole.out


def test_a_flag_is_explained_in_at_most_twelve_words() -> None:
    long = [(verb, option.name) for verb, option in every_option() if len((option.help or "").split()) > 12]
    assert long == []


def test_a_paragraph_of_the_help_is_not_broken_within_its_lines(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in cli("evaluate", "-h").out.partition("╭")[0].splitlines()]
    paragraphs = "\n".join(lines).split("\n\n")
    for paragraph in paragraphs[1:-2]:  # between the usage and the examples
        broken = paragraph.split("\n")[:-1]
        assert all(len(line) > 60 for line in broken), paragraph


@pytest.mark.parametrize("verb", ["train-student", "report", "data check"])
def test_switches_have_no_type_and_choices_show(cli, verb: str) -> None:
    shown = cli(*verb.split(), "--help-all" if verb == "train-student" else "-h").out
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
    assert "fix: " in refused.err


def test_every_method_completes() -> None:
    kinds = {kind for kind in KINDS if not kind.startswith("depth")}
    assert set(completed("train-student", "--method", "")) == {"auto", "none", "kl", *kinds}
