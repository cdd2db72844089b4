"""Runs keep what a comparison measured, and find their data again where it was moved."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache import evaluate
from kdcache.analysis.compare import CompareOptions, compare
from kdcache.analysis.stored_evaluations import EvalSettings
from kdcache.data import open_split, read_contents, write_scenes
from kdcache.errors import MismatchError
from kdcache.metrics.cost import Cost, CostKey, Latency, keep_cost, kept_cost
from kdcache.run_folder import Run

TIMED = CompareOptions(repeats=3)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The measurements that are made from here on."""
    calls = list[Any]()

    def measure(model: Any, size: tuple[int, int], *, device: str, repeats: int) -> Cost:
        calls.append((size, device, repeats))
        latency = Latency(1.5, 0.1, 1.4, repeats, 1, "a processor", 1) if repeats else None
        return Cost(size, 7, 14, latency)

    monkeypatch.setattr("kdcache.analysis.compare.measure_cost", measure)
    return calls


def notes(comparison: Any) -> list[str]:
    return [note for note in comparison.notes if "was measured earlier" in note]


def test_a_timing_is_kept_beside_its_run_and_said_to_be_used_again(world: Path, measured: list[Any]) -> None:
    first = compare([world / "runs"], options=TIMED)
    assert notes(first) == []
    (file,) = (world / "runs").glob("*/cost-48x64-*.json")
    second = compare([world / "runs"], options=TIMED)
    (note,) = notes(second)
    assert "at 48x64" in note
    assert "Use --fresh to measure it again" in note
    assert second.rows[0].cost == replace(first.rows[0].cost, reused=True)
    assert second.to_json()["rows"][0]["cost"]["reused"]
    assert len(measured) == 1
    compare([world / "runs"], options=replace(TIMED, repeats=4))  # more calls than there were
    compare([world / "runs"], options=replace(TIMED, judging=EvalSettings(fresh=True)))
    compare([world / "runs"], options=replace(TIMED, judging=EvalSettings(size=(32, 32))))
    assert [(size, repeats) for size, _, repeats in measured] == [
        ((48, 64), 3),
        ((48, 64), 4),
        ((48, 64), 3),
        ((32, 32), 3),
    ]
    file.write_text("{")
    compare([world / "runs"], options=TIMED)
    assert len(measured) == 5


def test_without_timing_nothing_is_kept_nor_used(world: Path, measured: list[Any]) -> None:
    compare([world / "runs"], options=replace(TIMED, repeats=0))
    assert not list((world / "runs").glob("*/cost-*"))
    compare([world / "runs"], options=TIMED)
    untimed = compare([world / "runs"], options=replace(TIMED, repeats=0))
    assert untimed.rows[0].cost.latency is None


def test_a_key_is_of_the_machine_and_the_network(tmp_path: Path) -> None:
    key = CostKey.of("kdcache:tiny", 7, (32, 48), "cpu")
    cost = Cost((32, 48), 1, 2, Latency(1.0, 0.0, 1.0, 5, 1, key.device, key.threads))
    assert keep_cost(tmp_path, key, cost, 5) is None
    assert kept_cost(tmp_path, key, 5) == replace(cost, reused=True)
    assert kept_cost(tmp_path, key, 6) is None
    changes: dict[str, Any] = {
        "spec": "kdcache:base",
        "classes": 8,
        "size": (1, 1),
        "device": "x",
        "threads": 99,
        "torch": "0",
    }
    assert changes.keys() == asdict(key).keys()
    assert all(kept_cost(tmp_path, replace(key, **{name: value}), 5) is None for name, value in changes.items())
    note = keep_cost(tmp_path / "none", key, cost, 5)
    assert note is not None
    assert "could not be kept" in note
    assert key.threads == torch.get_num_threads()


def test_two_data_sets_of_one_name_keep_an_evaluation_each(tmp_path: Path, world: Path) -> None:
    """Each replaces its own when its labels change, whichever came first."""
    run, folders = world / "runs/none-0", [tmp_path / name / "data" for name in ("clear", "foggy")]
    for seed, folder in enumerate(folders):
        write_scenes(folder, f"scenes:48x64,train=1,val=3,seed={seed}")

    def kept() -> set[str]:
        return {path.name for path in run.glob("evaluation-val*.json")}

    first = [evaluate(run, folder, progress=False).segmentation for folder in folders]
    names = kept()
    assert len(names) == 2
    assert first == [evaluate(run, folder, progress=False).segmentation for folder in folders]
    for folder in folders:
        label = next((folder / "labels/val").iterdir())
        Image.fromarray((np.array(Image.open(label)) + 1) % 7).save(label)
        evaluate(run, folder, progress=False)
    assert kept() == names
    assert {json.loads((run / name).read_text())["data"] for name in names} == {"data"}


def test_the_data_of_a_comparison_are_read_once(
    world: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Any]()
    monkeypatch.setattr(
        "kdcache.analysis.compare.read_contents", lambda split: read.append(split) or read_contents(split)
    )
    comparison = compare([world / "runs"], options=CompareOptions(repeats=0))
    assert sum(len(row.runs) for row in comparison.rows) > 1
    assert len(read) == 1


def test_a_run_knows_its_validation_data_by_digest_wherever_they_lie(world: Path) -> None:
    data = world / "data"
    model = Run.open(world / "runs" / "none-0").model
    assert model.validated_on == open_split(data, "val").digest()
    moved = data.rename(world / "elsewhere")
    untimed = CompareOptions(repeats=0)
    assert compare([world / "runs"], str(moved), options=untimed).split == "val"
    other = "scenes:48x64,train=2,val=3"
    with pytest.raises(MismatchError) as caught:
        compare([world / "runs"], other, options=untimed)
    assert model.validated_on[:12] in caught.value.problem
    assert "--split" in caught.value.fix
    assert compare([world / "runs"], other, "val", untimed).images == 3  # on purpose


def test_runs_from_before_digests_were_recorded_are_judged_on_any_data(world: Path) -> None:
    for path in (world / "runs").glob("*/model.json"):
        content = json.loads(path.read_text())
        del content["validated_on"]
        path.write_text(json.dumps(content))
    assert compare([world / "runs"], "scenes:48x64,train=2,val=3", options=CompareOptions(repeats=0)).images == 3


def test_a_training_that_did_not_end_is_named(world: Path, measured: list[Any]) -> None:
    def named() -> list[str]:
        return [note for note in compare([world / "runs"], options=TIMED).notes if "has not ended" in note]

    assert named() == []
    result = min((world / "runs").glob("*/result.json"))
    result.write_text(result.read_text()[:20])
    assert len(named()) == 1
    result.unlink()
    assert f"{result.parent.name} has not ended" in named()[0]
