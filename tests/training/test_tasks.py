"""benchmarks/tasks.py: what its queue makes of rows; that it goes on from them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kdcache_cli.app import main


@pytest.fixture
def tasks(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tasks")


def row(arm: str, seed: int, **scores: float) -> dict[str, object]:
    return {"arm": arm, "seed": seed, **scores}


def test_gains_are_paired_by_seed(tasks: ModuleType) -> None:
    rows = [row("segmentation", seed, miou=60.0 + seed) for seed in (0, 1)]
    rows += [row("depth", seed, miou=3.0, depth_rmse=4.0) for seed in (0, 1)]
    rows += [row("both", seed, miou=59.0 + seed, depth_rmse=[3.8, 4.4][seed]) for seed in (0, 1)]
    rows += [row("taught", 1, miou=61.5, depth_rmse=4.0)]
    summary = tasks.summary(rows)
    assert set(summary["means"]["depth"]) == {"depth_rmse"}  # its classes were never learnt
    gains = {name: (gain["mean"], gain["half"], gain["runs"]) for name, gain in summary["gains"].items()}
    assert gains["both against segmentation, miou"] == (-1.0, 0.0, 2)
    assert gains["both against depth, depth_rmse"][0] == pytest.approx(2.5)  # the mean of -5 % and +10 %
    assert gains["taught against segmentation, miou"][::2] == (0.5, 1)
    assert gains["taught against both, miou"][::2] == (1.5, 1)


@pytest.mark.slow
def test_the_queue_trains_every_arm_and_goes_on_from_its_rows(
    tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue's commands run in this process: test_effect.py starts the program."""

    def kdcache(words: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(words.split())
        assert ended.value.code == 0

    monkeypatch.setattr(tasks, "kdcache", kdcache)
    result = tmp_path / "tasks.json"
    words = ["--out", str(tmp_path / "out"), "--json", str(result), "--iterations", "2"]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *words, "--few", "--seeds", "1"])
    tasks.main()
    content = json.loads(result.read_text(encoding="utf-8"))
    assert [own["arm"] for own in content["rows"]] == list(tasks.ARMS)
    assert set(content["summary"]["means"]["taught"]) == {"miou", "depth_rmse"}
    monkeypatch.setattr(tasks, "kdcache", None)
    tasks.main()
    assert json.loads(result.read_text(encoding="utf-8"))["rows"] == content["rows"]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *words, "--cost", "--repeats", "5"])
    tasks.main()
    measured = json.loads(result.read_text(encoding="utf-8"))
    assert measured["cost"]["macs_over_two"] < 0.6
    assert measured["rows"] == content["rows"]
