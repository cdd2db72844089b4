"""The prose guard: a page made worse fails, a better one passes and lowers its ratchet."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROSE = ROOT / "scripts" / "prose"
MEASURE = runpy.run_path(str(PROSE))["measure"]
PLAIN = "The build writes a cache. You train from it.\n"
WORSE = "The size of the cache, which is small; that of the teacher is smaller.\n"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page with a ratchet, in a checkout of its own."""
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "prose.toml", tmp_path / "scripts")
    (tmp_path / "README.md").write_text(PLAIN)
    page.write_text(4 * PLAIN + WORSE)
    ratchet = {"docs/page.md": MEASURE(page.read_text())}
    (tmp_path / "scripts" / "prose.json").write_text(json.dumps(ratchet))
    return page


def run(page: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, str(PROSE), "--root", str(page.parents[1]), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def ratchet_of(page: Path) -> dict[str, float] | None:
    return json.loads((page.parents[1] / "scripts" / "prose.json").read_text()).get("docs/page.md")


def test_a_page_gets_no_worse(page: Path) -> None:
    kept = ratchet_of(page)
    assert run(page) == (0, "")
    page.write_text(4 * PLAIN + 2 * WORSE)
    code, said = run(page, "--update")
    assert code == 1
    assert f"docs/page.md: semicolons is {MEASURE(page.read_text())['semicolons']:g}, at most" in said
    assert "docs/page.md: dialect is" in said
    assert ratchet_of(page) == kept, "no update raises a ratchet"
    page.write_text(4 * PLAIN + WORSE.replace("small;", "quite small;"))
    assert run(page) == (0, ""), "a word more is noise"


def test_a_better_page_lowers_its_ratchet_until_it_meets_the_limits(page: Path) -> None:
    page.write_text(5 * PLAIN + WORSE)
    assert run(page, "--update") == (0, "")
    assert ratchet_of(page) == MEASURE(page.read_text())
    page.write_text(4 * PLAIN + WORSE)
    assert run(page)[0] == 1
    page.write_text(5 * PLAIN)
    assert run(page, "--update") == (0, "")
    assert ratchet_of(page) is None
    page.write_text(5 * PLAIN + WORSE)
    assert "semicolons" in run(page)[1]


@pytest.mark.parametrize("name", ["README.md", "docs/new.md", "docs/api/new.md"])
def test_pages_without_a_ratchet_meet_the_limits_unless_they_are_made_from_the_code(page: Path, name: str) -> None:
    other = page.parents[1] / name
    other.parent.mkdir(exist_ok=True)
    other.write_text(WORSE)
    assert run(page)[0] == (name in ("README.md", "docs/new.md"))


def test_the_guard_says_what_to_change(page: Path) -> None:
    code, said = run(page, "--list", str(page))
    assert code == 0
    assert "repeat the noun" in said
    assert "two sentences" in said


@pytest.mark.parametrize("name", ["nope.md", str(ROOT / "README.md")])
def test_pages_of_another_checkout_are_named(page: Path, name: str) -> None:
    assert run(page, name) == (1, f"{name} is not a page of {page.parents[1]}\n")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "| name | the cache holds the logits; you read them |\n| --- | --- |\n| cache | four views of an image |\n",
            1,
        ),
        ("```\nThis is code; it is long.\n```\n# A heading of four words\n", 0),
        ("- The first item is short\n- the second item is short too.\n", 2),
        ("See [the page that is linked](page.md) and `code; with; semicolons`. It is good.\n", 2),
    ],
)
def test_what_counts_as_a_sentence(text: str, sentences: int) -> None:
    found = list(runpy.run_path(str(PROSE))["sentences"](text))
    assert len(found) == sentences
    assert "code; with" not in " ".join(found)


def test_numbers_of_a_page() -> None:
    values = MEASURE("One two three four. " * 9 + "Word " * 40 + "last; that of it.")
    assert values == {"mean": 8.0, "p90": 44, "over40": 10.0, "semicolons": 12.5, "dialect": 12.5}
