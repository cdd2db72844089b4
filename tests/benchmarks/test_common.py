"""benchmarks/common.py: medians need repeats, result files go on where they were begun, errors are lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kdcache.errors import RecipeError
from kdcache.store import open_cache


@pytest.fixture
def common(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("common")


def test_a_spread_has_the_median_and_the_fifths(common) -> None:
    assert common.spread([5.0, 1.0, 2.0, 4.0, 3.0, 60.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0]])
def test_too_few_repeats(common, values) -> None:
    with pytest.raises(RecipeError, match=f"Too few repeats for a median: {len(values)}") as caught:
        common.spread(values)
    assert caught.value.fix == "Use --repeats 3 or more."


def test_an_error_is_a_line_and_its_fix(common, capsys) -> None:
    def main() -> None:
        raise RecipeError("Cannot do it: 3", fix="Use 4.")

    with pytest.raises(SystemExit) as ended:
        common.run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: Cannot do it: 3\n  fix: Use 4.\n"


@pytest.fixture
def result(common, tmp_path) -> Callable[..., Path]:
    """A function that writes a result file of this commit and machine, but for some changes."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "result.json"
        content = {**common.header("effect"), "rows": [1], **changes}
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return make


def test_rows_are_added_to_a_result_of_this_commit_and_machine(common, result, tmp_path) -> None:
    assert common.earlier(result(), "effect")["rows"] == [1]
    assert common.earlier(result(), "effect")["also"] == []
    assert common.earlier(tmp_path / "none.json", "effect") == {}
    commit = common.header("effect")["commit"].removesuffix("-dirty")
    assert common.earlier(result(commit=f"{commit}-dirty"), "effect")["rows"] == [1]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "commit": ({"commit": "1234567"}, "its commit is 1234567, and this one is "),
    "machine": ({"machine": {"cpu": "Z80"}}, "its machine is Z80, and this one is "),
}


@pytest.mark.parametrize(("changes", "words"), OTHERS.values(), ids=OTHERS)
def test_a_result_of_another_commit_or_machine(common, result, changes, words) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        common.earlier(result(**changes), "effect")
    assert "--mix" in caught.value.fix
    mixed = common.earlier(result(**changes, also=[{"commit": "0", "cpu": "6502"}]), "effect", mix=True)
    assert mixed["rows"] == [1]
    assert [len(of) for of in mixed["also"]] == [2, 2], "both earlier ones stay named"
    assert changes.get("commit", "Z80") in mixed["also"][1].values()
    assert common.header("effect", mixed["also"])["also"] == mixed["also"]


@pytest.mark.parametrize("mix", [False, True])
def test_a_result_of_another_script(common, result, mix) -> None:
    with pytest.raises(RecipeError, match="a result of 'effect', not of 'tasks'"):
        common.earlier(result(), "tasks", mix=mix)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"theme": 1}'])
def test_what_is_no_result(common, tmp_path, text) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="Not a result file"):
        common.earlier(tmp_path / "a.json", "effect")


def test_a_student_has_the_same_weights_each_time(common, store) -> None:
    import torch

    first, second = (
        common.student_step(open_cache(store), "kdcache:tiny", torch.device("cpu"), kl_weight=weight)
        for weight in (0.0, 1.0)
    )
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert first.model.training


def test_every_script_is_in_the_table_with_tests_that_run_it() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()
    table = dict(re.findall(r"^\| `(\w+)\.py` \| (.*) \|$", "\n".join(lines), re.MULTILINE))
    assert set(table) == {path.stem for path in (root / "benchmarks").glob("*.py")}
    for name, tests in table.items():
        for test in re.findall(r"`([^`]+)`", tests):
            assert re.search(rf"\b{name}\b", (root / test).read_text(encoding="utf-8")), f"{test} does not name {name}"
