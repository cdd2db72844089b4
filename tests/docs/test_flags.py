"""Every flag has a user: a recipe, a how-to page, a study, an example, or a reason that is written down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from kdcache_cli.app import app

ROOT = Path(__file__).parents[2]
REASONS = ROOT / "docs" / "dev" / "flags.md"
USERS = (
    "README.md",
    "docs/*.md",
    "docs/*.ipynb",
    "benchmarks/*",
    "examples/*",
    "kdcache/sweep/*.py",
    "kdcache/sweep/recipes/*.toml",
)


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for word, command in group.commands.items():
        verb = f"{name} {word}".strip()
        if hasattr(command, "commands"):
            yield from commands(command, verb)
        else:
            yield verb, command


FLAGS = {
    flag
    for _, command in commands(typer.main.get_command(app))
    for parameter in command.params
    if (flag := parameter.opts[0]).startswith("--") and flag not in ("--help", "--help-all")
}


@pytest.fixture(scope="module")
def texts() -> str:
    """What users read and run, with each key of a recipe written as its flag, too."""
    parts = []
    for path in (path for pattern in USERS for path in sorted(ROOT.glob(pattern)) if path.is_file()):
        text = re.sub(r"\bncu --.*", "", path.read_text(encoding="utf-8"))  # another program's flags
        parts.append(text)
        if path.suffix == ".toml":
            parts += [f"--{key}" for key in re.findall(r"(?m)(?:^|[{,]) *([a-z][a-z-]*) *=", text)]
    return "\n".join(parts)


@pytest.fixture(scope="module")
def reasons() -> dict[str, str]:
    return dict(re.findall(r"(?m)^\| `(--[a-z-]+)` \| (.+) \|$", REASONS.read_text(encoding="utf-8")))


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_a_flag_has_a_user_or_a_reason(flag: str, texts: str, reasons: dict[str, str]) -> None:
    used = re.search(rf"--(no-)?{flag[2:]}(?![\w-])", texts) is not None
    assert used or flag in reasons, f"{flag} has no user: remove it, or write its reason into {REASONS}"
    assert not (used and flag in reasons), f"{flag} has a user: its reason in {REASONS} is not needed"


def test_a_reason_is_of_a_flag(reasons: dict[str, str]) -> None:
    assert set(reasons) <= FLAGS
