"""benchmarks/effect.py, the queue that compares recipes: whose rows, which folds, and that it goes on from its rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdcache.data import folds_of, open_split, write_scenes

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "effect.py"
PLAIN, CROSSED = "plain from files, lr 0.006", "dist, lr 0.006, 4 views, cross-fitted"

pytestmark = pytest.mark.slow


def queue(folder: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--data", str(folder / "data"), "--out", str(folder / "out"),
               "--json", str(folder / "effect.json"), "--size", "48x64", "--large", "96x128",
               "--teacher-iterations", "2", "--iterations", "2", "--final-iterations", "3", "--seeds", "2",
               "--only", PLAIN, "--only", CROSSED, *words]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads((folder / "effect.json").read_text())
    return result


def test_the_queue_of_recipes(tmp_path: Path) -> None:
    """Both phases, from a teacher of each half to paired gains; a second call repeats nothing."""
    write_scenes(tmp_path / "data", "scenes:48x64,train=40,val=4,seed=0")
    searched = queue(tmp_path, "--phases", "search")
    assert {(row["phase"], row["arm"]) for row in searched["rows"]} == {("search", PLAIN), ("search", CROSSED)}
    assert searched["gains"] == []

    # What cross-fitted teachers see lacks the fold that students are judged on, and nothing else.
    ids = open_split(str(tmp_path / "data"), "train").ids
    judges = {id for id, fold in zip(ids, folds_of(ids, 5), strict=True) if fold == 0}
    assert set(open_split(str(tmp_path / "out" / "part"), "train").ids) == set(ids) - judges

    process = queue(tmp_path)
    finals = {(row["arm"], row["seed"]): row["miou"] for row in process["rows"] if row["phase"] == "final"}
    assert set(finals) == {(arm, seed) for arm in (PLAIN, CROSSED) for seed in (100, 101)}
    gain = next(gain for gain in process["gains"] if gain["arm"] == CROSSED)
    mean = sum(finals[CROSSED, seed] - finals[PLAIN, seed] for seed in (100, 101)) / 2
    assert (gain["over"], gain["iterations"], gain["pairs"]) == (PLAIN, 3, 2)
    assert gain["mean"] == pytest.approx(mean, abs=1e-3)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    assert queue(tmp_path)["rows"] == process["rows"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")} == before
