"""benchmarks/crash.py, crash_ray.py, doomed.py: kills come when they were drawn, and a difference is a failure."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kdcache.store import open_cache


@pytest.fixture
def doomed(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("doomed")


def test_moments_are_spread_over_the_rest_of_a_work(doomed) -> None:
    rng = random.Random(0)
    for done, total in ((0, 8), (5, 8), (8, 8)):
        dooms = [doomed.Doom.draw(rng, done, total, 2.0, 10.0) for _ in range(400)]
        assert {doom.steps for doom in dooms} == set(range(done, min(total, done + 1 + total // 4) + 1))
        for doom in dooms:
            most = 12.0 if doom.steps == done else 2.0 if doom.steps < total else 0.5
            assert 0 <= doom.seconds <= most
        longest = max(doom.seconds for doom in dooms if doom.steps == done)
        assert longest > 9, "also while it starts up"


def test_a_kill_waits_for_its_step_and_a_little(doomed, clock, monkeypatch) -> None:
    monkeypatch.setattr(doomed, "time", clock)
    counts = iter([0, 1, 2, 3])
    doomed.Doom(2, 0.25).wait(lambda: next(counts), [SimpleNamespace(ended=lambda: False)])
    assert next(counts) == 3
    assert clock.seconds == pytest.approx(100 + 2 * 0.0005 + 0.25)
    doomed.Doom(9, 0.0).wait(lambda: 0, [SimpleNamespace(ended=lambda: True)])


def test_kills_are_counted_with_their_facts(doomed, capsys) -> None:
    tally = doomed.Tally()
    tally.killed(shards=3, state="incomplete")
    assert tally.kills == [{"shards": 3, "state": "incomplete"}]
    assert capsys.readouterr().out == "kill 1: shards 3, state incomplete\n"


@pytest.fixture
def crash(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("crash")
    monkeypatch.setattr(module, "import_everything", lambda: None)
    monkeypatch.setattr(module.Process, "start", lambda words, log: SimpleNamespace(finish=lambda: None))
    return module


class Killed:
    """Builds or trainings whose every call is a kill; the third one of builds finds a difference if it shall."""

    fails = False
    clean = Path("clean.zarr")

    def __init__(self, *_: Any) -> None: ...

    def kill(self, most: int, tally: Any) -> None:
        tally.killed(number=len(tally.kills))
        tally.finished += 1
        if self.fails and len(tally.kills) == 3:
            raise self.error("store-2 differs in ['zarr.json']")


@pytest.mark.parametrize("fails", [False, True])
def test_a_difference_is_an_exit_code_and_stands_in_the_result(crash, call, monkeypatch, tmp_path, fails) -> None:
    class Builds(Killed):
        error = crash.DifferenceError

    Builds.fails = fails
    monkeypatch.setattr(crash, "Builds", Builds)
    monkeypatch.setattr(crash, "Trainings", Killed)
    words = ["--kills", 5, "--training-kills", 2, "--seed", 7, "--json", tmp_path / "a.json"]
    assert call(crash, *words) == fails
    told = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert told["seed"] == 7
    assert (told["failure"] is not None) is fails
    assert len(told["builds"]["kills"]) == (3 if fails else 5)
    assert len(told["trainings"]["kills"]) == (0 if fails else 2)


def test_what_a_store_and_a_run_have_done_is_counted(crash, tmp_path) -> None:
    assert crash.written(tmp_path / "none") == crash.steps_of(tmp_path) == 0
    (tmp_path / "ledger").mkdir()
    for number in range(3):
        (tmp_path / f"ledger/{number}.json").write_text("{}")
    assert crash.written(tmp_path) == 3
    before = crash.ledger_files(tmp_path)
    (tmp_path / "ledger/new").write_text("{}")
    (tmp_path / "ledger/new").replace(tmp_path / "ledger/1.json")
    assert [name for name, found in crash.ledger_files(tmp_path).items() if before[name] != found] == ["1.json"]
    kinds = ("train", "validation", "train")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"kind": kind}) + "\n" for kind in kinds))
    assert crash.steps_of(tmp_path) == 2


# crash_ray.py


@pytest.fixture
def ray(crash: ModuleType, script: Callable[[str], ModuleType]) -> ModuleType:
    return script("crash_ray")


@pytest.fixture
def builds(ray: ModuleType, crash: ModuleType, store: Path, tmp_path: Path) -> Any:
    clean = open_cache(store)
    return ray.RayBuilds(tmp_path, [], clean, crash.all_rows(clean), random.Random(0), None)


def test_a_store_of_a_cluster_is_compared_with_one_process_s(builds, ray, store, tmp_path) -> None:
    copy = shutil.copytree(store, tmp_path / "copy.zarr")
    builds.compare(str(copy))
    assert ray.written(str(copy)) == ray.written(str(store)) == 2
    builds.rows["labels/segmentation"] = builds.rows["labels/segmentation"] + 1
    with pytest.raises(ray.DifferenceError, match="served wrong records of"):
        builds.compare(str(copy))


def test_actors_nodes_and_drivers_are_killed(builds, ray, monkeypatch) -> None:
    done: list[Any] = []
    cluster = SimpleNamespace(
        head_node="head",
        list_all_nodes=lambda: ["head", "one"],
        remove_node=lambda node, gracefully: done.append(("removed", node, gracefully)),
        add_node=lambda num_cpus: done.append(("added", num_cpus)),
    )
    driver = SimpleNamespace(kill=lambda: "was alive")
    assert builds._kill("driver", driver, cluster) == "was alive"
    assert builds._kill("node", driver, cluster) is True
    assert done == [("removed", "one", False), ("added", 1)]
    monkeypatch.setattr(ray, "actors", list)
    assert builds._kill("actor", driver, cluster) is False
    monkeypatch.setattr(ray, "actors", lambda: [41])
    monkeypatch.setattr(ray.os, "kill", lambda pid, signal: done.append((pid, signal)))
    assert builds._kill("actor", driver, cluster) is True
    assert done[-1] == (41, ray.signal.SIGKILL)
