"""What is written for developers: decisions by number, and a log next to every result."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DECISIONS = ROOT / "docs" / "dev" / "decisions"


def test_every_result_has_a_log_that_names_it() -> None:
    logs = " ".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md"))
    missing = [path.name for path in RESULTS.glob("*.json") if f"`{path.name}`" not in logs]
    assert [name for name in missing if not (RESULTS / name).with_suffix(".md").is_file()] == []
    assert [name for name in re.findall(r"`([\w-]+\.json)`", logs) if not (RESULTS / name).is_file()] == []


def test_decisions_are_numbered_and_listed() -> None:
    records = sorted(DECISIONS.glob("[0-9]*.md"))
    numbers = [int(path.name[:4]) for path in records]
    assert numbers == list(range(1, len(numbers) + 1))
    listed = (DECISIONS / "README.md").read_text(encoding="utf-8")
    for path in records:
        text = path.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        assert f"- [{title}]({path.name})" in listed, path.name
        assert title.startswith(f"{path.name[:4]}: ")
        assert "**Context.**" in text, path.name
        assert "**Decision.**" in text, path.name


def test_the_changelog_is_short() -> None:
    assert len((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()) <= 30
