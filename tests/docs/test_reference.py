"""The pages that are made from the code are those of the code: flags as the help shows them, every error's entry."""

from __future__ import annotations

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
from kdcache_cli.app import DEFECT, SYSTEM, app, main

ROOT = Path(__file__).parents[2]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
ENTRIES = set(re.findall(r"^### (E-[\w.]+) \{ #\1 \}$", TROUBLE, re.MULTILINE))


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
    assert set(reference.errors()) | {SYSTEM, DEFECT} == ENTRIES
    for entry in ENTRIES:
        assert TROUBLE.count(f"### {entry} ") == 1


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


def test_errors_of_other_packages_have_no_entry() -> None:
    error = DataError("a rule", received="this", remedy="that")
    assert error.entry == ""
    assert "see docs" not in str(error)


def test_what_nobody_foresaw_has_an_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for error, entry in ((PermissionError("no"), SYSTEM), (ZeroDivisionError("no"), DEFECT)):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("kdcache_cli.verbs.models.list_models", fail)
        with pytest.raises(SystemExit):
            main(["models"])
        assert f"see docs  {entry}" in capsys.readouterr().err
