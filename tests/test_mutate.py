"""scripts/mutate on a tiny package: killed, survived, not found, hanging."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "mutate"
SOURCE = """def larger(a, b):
    return a if a > b else b

def count(n):
    done = 0
    while done < n:
        done += 1
    return done

def unused():
    return 1
"""
TESTS = """import pytest
from tiny.code import count, larger

def test_larger():
    assert larger(1, 2) == 2

def test_count():
    assert count(3) == 3

@pytest.mark.slow
def test_slow():
    from tiny.code import unused
    assert unused() == 1
"""
ROW = '[[{room}]]\nname = "{name}"\nfile = "tiny/code.py"\nold = "{old}"\nnew = "{new}"\n{more}\n'
KILLED = ROW.format(room="tiny", name="the smaller", old="a > b", new="a < b", more="")
HANGING = ROW.format(
    room="tiny", name="no end", old="done += 1", new="__import__('time').sleep(1)", more='tests = ["tests/tiny"]'
)
SURVIVOR = ROW.format(
    room="others", name="another constant", old="return 1", new="return 2", more='tests = ["tests/tiny/test_code.py"]'
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout of a package of one file."""
    files = {
        "tiny/__init__.py": "",
        "tiny/code.py": SOURCE,
        "tests/tiny/test_code.py": TESTS,
        "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow"]\n',
    }
    for name, text in files.items():
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_text(text)
    subprocess.run(["git", "init", "-q", tmp_path / "checkout"], check=True)
    return tmp_path / "checkout"


def mutate(root: Path, table: str, *words: str) -> tuple[int, str]:
    (root / "scripts").mkdir(exist_ok=True)
    (root / "scripts" / "mutations.toml").write_text(table)
    command = [sys.executable, str(SCRIPT), "--root", str(root), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def results(root: Path) -> dict[str, str]:
    result = json.loads((root / "benchmarks" / "results" / "mutations.json").read_text())
    return {row["name"]: row["killed_by"] for row in result["mutations"]}


def test_killed_survived_and_explained(root: Path) -> None:
    code, said = mutate(root, KILLED + SURVIVOR)
    assert code == 1
    assert "1 survivors without an explanation: another constant" in said
    assert results(root) == {"the smaller": "tests/tiny/test_code.py::test_larger", "another constant": ""}
    assert (root / "tiny" / "code.py").read_text() == SOURCE, "the checkout itself is never changed"
    page = (root / "benchmarks" / "results" / "mutations.md").read_text()
    assert "| tiny | 1 | 1 | 0 |" in page
    assert "| others | 1 | 0 | 1 |" in page
    assert "| all | 2 | 1 | 1 |" in page
    assert "- others: another constant. Not explained." in page

    code, said = mutate(root, KILLED + SURVIVOR + 'survives = "Only a slow test calls it."\n', "--only", "other*")
    assert (code, "the smaller" in said) == (0, False)
    assert set(results(root)) == {"the smaller", "another constant"}, "the other row keeps its result"
    page = (root / "benchmarks" / "results" / "mutations.md").read_text()
    assert "- others: another constant. Only a slow test calls it." in page


def test_a_mutation_that_hangs_is_killed(root: Path) -> None:
    assert mutate(root, HANGING, "--limit", "8")[0] == 0
    assert results(root) == {"no end": "the time limit"}


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (KILLED.replace("a > b", "a >= b"), "'the smaller': tiny/code.py holds its old text 0 times, not once"),
        (KILLED.replace("a > b", "return"), "'the smaller': tiny/code.py holds its old text 3 times, not once"),
        (KILLED.replace("code.py", "gone.py"), "'the smaller': tiny/gone.py holds its old text 0 times, not once"),
        (KILLED.replace("a < b", "a > b"), "'the smaller' changes nothing"),
        (KILLED.replace("[[tiny]]", "[[gone]]"), "'the smaller': tests/gone does not exist"),
        (KILLED + KILLED, "'the smaller': another row has this name"),
    ],
    ids=["not found", "found thrice", "no file", "no change", "no tests", "same name"],
)
def test_rows_that_cannot_be_applied(root: Path, table: str, problem: str) -> None:
    code, said = mutate(root, SURVIVOR + table)
    assert code == 1
    assert f"error: {problem}" in said
    assert not (root / "benchmarks").exists(), "nothing ran"


def test_tests_that_fail_anyway_kill_nothing(root: Path) -> None:
    (root / "tests/tiny/test_code.py").write_text(TESTS.replace("== 2", "== 3"))
    code, said = mutate(root, KILLED)
    assert code == 1
    assert "A test fails without a mutation: tests/tiny/test_code.py::test_larger" in said


def test_a_pattern_without_rows(root: Path) -> None:
    code, said = mutate(root, KILLED, "--only", "nothing")
    assert (code, said) == (1, "error: No row of scripts/mutations.toml matches 'nothing'\n")
