"""Terms of a loss: each is in four places, and no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kdcache.distill.terms import KINDS, loss_term, parse_term, term_modules
from kdcache.errors import RecipeError
from kdcache.settings.streams import term_line
from kdcache.settings.term import TERMS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_has_a_module_a_test_and_a_heading(kind: str) -> None:
    assert term_modules()[kind].kind == kind
    tests = (path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "distill").glob("test_*.py"))
    assert any(f'"{kind}"' in text for text in tests)
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"\n| `{kind}` |" in page
    section = page.partition(f"\n### `{kind}`\n")[2]
    assert 0 < len(re.split(r"\n##+ ", section)[0].split()) <= 250


def test_every_module_has_settings() -> None:
    assert set(term_modules()) == set(KINDS)


@pytest.mark.parametrize("kind", TERMS)
def test_facts_of_a_term_are_words_that_readers_know(kind: str) -> None:
    term = TERMS[kind]()
    assert term.learns_from in ("labels", "teacher", "predictions")
    assert term.compares in ("logits", "features", "depth", "similarity")
    assert term.head in ("segmentation", "auxiliary", "depth")


def test_a_table_has_what_was_given() -> None:
    table = {"kind": "pseudo", "threshold": 0.7, "weight": 0.5}
    assert parse_term(table).table() == table
    assert parse_term("pseudo,threshold=0.7,weight=0.5") == parse_term({**table, "normalise": "kept"})
    assert loss_term("pseudo").table() == {"kind": "pseudo"}


@pytest.mark.parametrize(
    "term",
    [
        {"kind": "at", "student-tap": "a", "student_tap": "b"},
        "at,student-tap=a,student_tap=b",
        "at,student_tap=a,student_tap=b",
        term_line({"kind": "at", "student-tap": "a", "student_tap": "b"}),
    ],
)
def test_an_option_is_given_once(term: Any) -> None:
    with pytest.raises(RecipeError, match="an option twice: "):
        parse_term(term)
