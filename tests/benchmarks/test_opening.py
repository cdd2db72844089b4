"""benchmarks/opening.py and build_engines.py: fresh processes are timed, and throughputs compared, the right way up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kdcache.errors import RecipeError
from kdcache.store import open_cache


@pytest.fixture
def opening(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("opening")


def test_each_step_of_opening_is_timed_alone_in_milliseconds(opening, clock, monkeypatch, tmp_path) -> None:
    path = tmp_path / "store.zarr"
    monkeypatch.setattr(opening, "SHARD_RECORDS", 8)
    assert opening.make_store(path, 20) > 0
    cache = open_cache(path)
    assert (len(cache), len(set(cache.ids)), cache.manifest.shards) == (20, 20, 3)
    assert cache.column("sample").tolist() == list(range(20))
    monkeypatch.setattr(opening, "time", clock)
    monkeypatch.setattr(opening, "open_cache", lambda store: clock.work(5) or open_cache(store))
    visited: list[int] = []
    visit = opening.Order.visit
    monkeypatch.setattr(
        opening.Order, "visit", lambda self, draw: clock.work(1) or visited.append(draw) or visit(self, draw)
    )
    found = opening.measure_opening(path)
    assert found["open_ms"] == pytest.approx(5)
    assert found["order_of_an_epoch_ms"] == pytest.approx(20)
    assert visited == list(range(20)), "a whole epoch"
    assert set(found) == {"open_ms", "check_files_ms", "ids_ms", "first_record_ms", "column_ms", "order_of_an_epoch_ms"}


def test_every_measurement_is_a_fresh_process(opening, call, monkeypatch, tmp_path) -> None:
    times = iter([9.0, 1.0, 4.0, 5.0])
    commands: list[Any] = []

    def answer(command: Any, **_: Any) -> Any:
        commands.append(command[1:3])
        return SimpleNamespace(stdout=f"a warning\n{json.dumps({'open_ms': next(times)})}\n")

    monkeypatch.setattr(opening, "make_store", lambda path, records: path.mkdir() or 1.0)
    monkeypatch.setattr(opening, "subprocess", SimpleNamespace(run=answer))
    assert call(opening, "--repeats", 4, "--json", tmp_path / "a.json") == 0
    assert commands == 4 * [[opening.__file__, "--store"]]
    told = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert told["opening"] == {"open_ms": {"p20": 4.0, "p50": 4.5, "p80": 5.0}}
    assert told["store"]["records"] == 120_000
    with pytest.raises(RecipeError, match="Too few repeats"):
        call(opening, "--repeats", 2)


# build_engines.py


@pytest.fixture
def engines(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("build_engines")


def test_throughput_is_of_the_images_between_the_first_shard_and_the_last(engines, tmp_path, monkeypatch) -> None:
    ended = {"a/0": 100.0, "b/0": 101.0, "a/1": 103.0, "b/1": 104.0, "a/2": 107.0, "b/2": 105.0}
    for key, at in ended.items():
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).touch()
        os.utime(tmp_path / key, (at, at))
    records = [
        SimpleNamespace(files={key: SimpleNamespace(sha256=key * 2) for key in ended if key.endswith(str(shard))})
        for shard in range(3)
    ]

    class Ledger(list):  # type: ignore[type-arg]
        def record(self, shard: int) -> Any:
            return self[shard]

    cache = SimpleNamespace(ledger=Ledger(records), manifest=SimpleNamespace(records=36))
    monkeypatch.setattr(engines, "open_cache", lambda store: cache)
    rate, digests = engines.shards_of(tmp_path)
    assert rate == pytest.approx(24 / (107 - 101)), "of the second and third shard, from the first one's last file"
    assert digests == {key: key * 2 for key in ended}


def test_ratios_are_rays_over_torchruns(engines) -> None:
    whole = {"torchrun": [30.0, 20.0, 40.0], "ray": [50.0, 40.0, 90.0]}
    found = engines.compare(whole, {"torchrun": [8.0, 10.0, 2.0], "ray": [9.0, 1.0, 12.0]})
    assert found["ratio"] == 1.2, "best over best, not clipped"
    assert found["ratio_of_whole_commands"] == 0.5
    assert found["seconds"]["ray"] == {"p20": 40, "p50": 50, "p80": 90, "best": 40}
    assert found["images_per_s"]["torchrun"]["best"] == 10


def test_engines_take_turns_with_as_many_workers_and_the_same_bytes(engines, options, tmp_path, monkeypatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(engines, "run", lambda words: commands.append([str(w) for w in words]) or float(len(commands)))
    monkeypatch.setattr(engines.shutil, "rmtree", lambda store: None)
    answers = iter([(5.0, {"a/0": "x"}) for _ in range(6)])
    monkeypatch.setattr(engines, "shards_of", lambda store: next(answers))
    given = options(data="camvid", model="kdcache:tiny", size="32x48", views="4", shard_records=8, repeats=3)
    row = engines.measure(given, tmp_path)
    (_, *builds) = commands
    assert ["ray" in words for words in builds] == [False, True] * 3
    for words in builds:
        assert words[words.index("--threads") + 1] == "1"
        assert words[words.index("--nproc-per-node" if "ray" not in words else "--actors") + 1] == "2"
    plain, with_actors = (words[words.index("build-teacher-cache") :] for words in builds[:2])
    assert with_actors[: len(plain)] == plain, "one build by two engines"
    assert (row["files"], row["shards"], row["ratio"]) == (1, 1, 1.0)
    answers = iter([(5.0, {"a/0": "x"}), (5.0, {"a/0": "y"})])
    with pytest.raises(SystemExit, match="ray wrote other files"):
        engines.measure(given, tmp_path)


@pytest.mark.parametrize(("ratio", "code"), [(0.901, 0), (0.899, 1)])
def test_the_bound_of_actors(engines, call, monkeypatch, tmp_path, ratio, code) -> None:
    monkeypatch.setattr(engines, "measure", lambda given, work: {"ratio": ratio, "ratio_of_whole_commands": 1.0})
    assert call(engines, "--data", "camvid", "--json", tmp_path / "a.json") == code
    told = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (told["bound"], told["met"]) == (0.9, code == 0)


def test_a_command_runs_on_one_thread_and_a_failure_shows_its_end(engines, monkeypatch) -> None:
    seen: dict[str, Any] = {}

    def answer(command: Any, env: dict[str, str], **_: Any) -> Any:
        seen.update(env=env, command=command)
        return SimpleNamespace(returncode=1, stdout="so far", stderr="it broke")

    monkeypatch.setattr(engines, "subprocess", SimpleNamespace(run=answer))
    with pytest.raises(SystemExit, match="it broke"):
        engines.run(["-m", Path("x")])
    assert (seen["env"]["OMP_NUM_THREADS"], seen["env"]["NUMBA_NUM_THREADS"]) == ("1", "1")
    assert seen["command"][1:] == ["-m", "x"]
