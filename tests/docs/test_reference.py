"""The reference of the command line: a page per verb, with the flags that its help shows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from kdcache_cli.app import app, main

ROOT = Path(__file__).parents[2]


def verbs() -> dict[str, Any]:
    """Verb, of one word or two, -> its command."""
    group = get_command(app)
    commands = {}
    for name, command in group.commands.items():
        group.get_command(typer.Context(group), name)  # which gives its flags the types that the help shows
        own = getattr(command, "commands", None)
        commands |= {name: command} if own is None else {f"{name} {verb}": own[verb] for verb in own}
    return commands


@pytest.fixture(scope="module")
def hook() -> dict[str, Any]:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    return runpy.run_path(str(ROOT / "scripts" / "reference.py"))


@pytest.fixture(scope="module")
def pages(hook: dict[str, Any]) -> dict[str, str]:
    made: dict[str, str] = hook["pages"]()
    return made


def test_every_verb_has_its_flags_as_the_help_shows_them(
    pages: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = verbs()
    assert pages.keys() == {"cli/index.md"} | {f"cli/{verb.replace(' ', '-')}.md" for verb in commands}
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 1000)
    for verb, command in commands.items():
        page = pages[f"cli/{verb.replace(' ', '-')}.md"]
        assert page.startswith(f"# kdcache {verb}\n")
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help-all" if any("--help-all" in p.opts for p in command.params) else "--help"])
        shown = capsys.readouterr().out
        rows = re.findall(r"^│ *\*? *(--[a-z][a-z-]*)", shown, re.MULTILINE)
        assert set(rows) - {"--help", "--help-all"} == set(re.findall(r"^\| `(--[a-z][a-z-]*)", page, re.MULTILINE)), (
            verb
        )
        for option in command.params:
            words = " ".join(re.sub(r"\[/?\w*\]", "", option.help or "").split())
            assert words in " ".join(shown.split()), f"{verb}: {option.name}"


def test_the_index_links_every_verb(pages: dict[str, str]) -> None:
    linked = re.findall(r"^\| \[`([^`]+)`\]\(([\w-]+\.md)\) \| \S", pages["cli/index.md"], re.MULTILINE)
    assert sorted(name for name, _ in linked) == sorted(verbs())
    assert {f"cli/{link}" for _, link in linked} | {"cli/index.md"} == pages.keys()


def test_the_navigation_has_every_page(hook: dict[str, Any], pages: dict[str, str]) -> None:
    config = hook["on_config"]({"nav": [{"Start": ["index.md"]}, {"Reference": ["data.md", "cli/index.md"]}]})
    (section,) = (entry for entry in config["nav"][1]["Reference"] if isinstance(entry, dict))
    listed = [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in section["Command line"]]
    assert sorted(listed) == sorted(pages)
