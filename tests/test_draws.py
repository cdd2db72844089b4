"""Hypothesis draws the same cases in every run of CI, others elsewhere, and says how to repeat one that failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

TORCH = "class cuda:\n    is_available = staticmethod(bool)\n"
"""All of torch that conftest.py needs, because importing torch takes seconds."""

# The same function twice: hypothesis draws the same for both where draws are a function of the test's source.
PROGRAM = """
import json, runpy, sys
runpy.run_path(sys.argv[1])
from hypothesis import given, strategies

def draws():
    seen = []

    @given(strategies.integers(0, 2**60))
    def check(number):
        seen.append(number)

    check()
    return seen

@given(strategies.integers())
def fails(number):
    assert number < 1000

try:
    fails()
except AssertionError as error:
    notes = error.__notes__
print(json.dumps([draws(), draws(), notes]))
"""


@pytest.mark.parametrize("ci", [False, True], ids=["elsewhere", "ci"])
def test_cases_are_drawn_anew_but_in_ci_and_failures_can_be_repeated(ci: bool, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(TESTS / "conftest.py")],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path[1:]])} | ({"CI": "1"} if ci else {}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, notes = json.loads(done.stdout)
    assert len(first) > 50
    assert (first == second) == ci
    assert any("@reproduce_failure(" in note for note in notes)


def test_ci_says_that_it_is_one() -> None:
    lines = (TESTS.parent / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[1].startswith("export CI=1"), "before anything runs"


def test_no_test_keeps_to_the_same_cases() -> None:
    here = (Path(__file__).name, "conftest.py", "soak.py")  # a soak is told its seeds
    asking = [path for path in TESTS.rglob("*.py") if path.name not in here and "derandomize" in path.read_text()]
    assert asking == []
