"""The pages that are made from the code are those of the code: flags as the help shows them, every error's entry."""

from __future__ import annotations

import ast
import errno
import importlib.util
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.main import get_command

from kdcache.data import open_split
from kdcache.errors import DataError
from kdcache_cli.app import app, main

ROOT = Path(__file__).parents[2]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r'^- <a id="(E-[\w-]+)"></a>`\1`: ', TROUBLE, re.MULTILINE)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verbs() -> dict[str, Any]:
    """Verb, of one word or two, -> its command."""
    group = get_command(app)
    commands = {}
    for name, command in group.commands.items():
        group.get_command(typer.Context(group), name)  # which gives its flags the types that the help shows
        own = getattr(command, "commands", None)
        commands |= {name: command} if own is None else {f"{name} {verb}": own[verb] for verb in own}
    return commands


def test_the_pages_are_those_of_the_code(reference: ModuleType) -> None:
    assert reference.cli_page() == CLI, "run python scripts/reference.py"
    assert reference.trouble_page() == TROUBLE, "run python scripts/reference.py"


def test_every_verb_has_its_flags_as_the_help_shows_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = dict(re.findall(r"^### kdcache (\S+(?: \w+)?)\n(.*?)(?=^##|\Z)", CLI, re.MULTILINE | re.DOTALL))
    assert sections.keys() == verbs().keys()
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 1000)
    for verb, section in sections.items():
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        shown = capsys.readouterr().out
        rows = re.findall(r"^│ *\*? *(--[a-z][a-z-]*)", shown, re.MULTILINE)
        assert set(rows) - {"--help"} == set(re.findall(r"^\| `(--[a-z][a-z-]*)", section, re.MULTILINE)), verb
        for option in verbs()[verb].params:
            words = " ".join(re.sub(r"\[/?\w*\]", "", option.help or "").split())
            assert words in " ".join(shown.split()), f"{verb}: {option.name}"


def test_every_error_has_an_entry_and_every_entry_an_error(reference: ModuleType) -> None:
    assert list(reference.errors()) == ENTRIES
    assert len(ENTRIES) > 400


def test_every_error_in_the_source_is_seen(reference: ModuleType) -> None:
    """What is raised with a received is raised with a rule that the page has; the makers of any error are these."""
    makers = set()
    for folder in reference.PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                words = {word.arg for word in node.keywords} if isinstance(node, ast.Call) else set()
                if {"received", "remedy"} <= words and not reference.is_error(node):
                    makers.add(ast.unparse(node.func))
    assert makers == {"kind", "type(self)", "error.restated", "failure.restated", "partial"}


def test_an_entry_does_not_vary(reference: ModuleType) -> None:
    assert reference.entry_in_source("a split is one of …, or … of it") == "E-split-is-one-of"
    for words in ("… is a number", "a class of … is one", "one two three four…"):
        with pytest.raises(ValueError, match="entry="):
            reference.entry_in_source(words)


def test_an_error_names_its_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError) as caught:
        open_split(tmp_path / "nothing", "train")
    assert caught.value.entry in ENTRIES
    assert str(caught.value).endswith(f"\n  see docs: {caught.value.entry}")
    assert pickle.loads(pickle.dumps(caught.value)).entry == caught.value.entry
    assert caught.value.restated(received="elsewhere").entry == caught.value.entry
    with pytest.raises(SystemExit):
        main(["data", "check", str(tmp_path / "nothing")])
    assert caught.value.entry in capsys.readouterr().err


def test_what_nobody_foresaw_has_an_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    disk, defect = "E-files-must-be-readable", "E-this-should-not-have"
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, entry in ((PermissionError("no"), disk), (full, disk), (None, defect)):

        def fail(*_: object, error: Exception | None = error) -> None:
            assert error is not None
            raise error

        # A call of None fails in our own line: what fails in this file is the user's own code.
        monkeypatch.setattr("kdcache_cli.verbs.models.list_models", None if error is None else fail)
        with pytest.raises(SystemExit):
            main(["models"])
        assert entry in ENTRIES
        assert f"see docs  {entry}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "received", "remedy"),
    [
        ("plan --bacth-size 3", "kdcache plan --bacth-size", "did you mean --batch-size?"),
        ("plan --zzz 3", "kdcache plan --zzz", "leave it out: kdcache plan --help lists"),
        ("plan", "kdcache plan without --data", "add it, as kdcache plan --help shows"),
        ("models --qiet", "kdcache models --qiet", "did you mean --quiet?"),
        ("report", "kdcache report without RUN", "add it, as kdcache report --help shows"),
        ("plan --batch-size x", "kdcache plan --batch-size x: ", "correct it"),
        ("plan --batch-size", "kdcache plan: Option '--batch-size' requires an argument", "correct it"),
        ("reprot runs", "kdcache: No such command 'reprot'.", "did you mean 'report'"),
        ("data chek x", "kdcache data: No such command 'chek'.", "did you mean 'check'"),
        ("--zzz", "kdcache --zzz", "leave it out: kdcache --help lists"),
        ("models a b", "kdcache models: Got unexpected extra argument", "correct it"),
    ],
)
def test_what_the_parser_refuses_has_an_entry(
    typed: str, received: str, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache_cli.app.ERRORS.width", 200)
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert received in shown
    assert remedy in shown
    assert set(re.findall(r"see docs  (E-[\w-]+)", shown)) < set(ENTRIES)
    assert "see docs" in shown


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    for typed in ([], ["data"]):
        with pytest.raises(SystemExit):
            main(typed)
        shown = capsys.readouterr()
        assert "Usage" in shown.out + shown.err
        assert "see docs" not in shown.out + shown.err
