"""benchmarks/adapt.py: the target's frames and classes, what its tables make of rows, that its queue goes on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kdcache.data import open_split, write_scenes
from kdcache.sweep import read_recipe

SEQUENCES = {"0001TP": 3, "0006R0": 2, "0016E5": 7}  # frames of train
CLASSES = "Sky Building Road Tree Fence Car Pedestrian"
"""Class names of the scenes in CamVid's words; the scenes' pole is a fence here."""


@pytest.fixture
def adapt(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("adapt")


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Procedural images under names of CamVid's frames and classes."""
    out = tmp_path / "camvid"
    write_scenes(out, f"scenes:192x256,train={sum(SEQUENCES.values())},val=2")
    names = [f"{sequence}_{frame:03d}" for sequence, frames in SEQUENCES.items() for frame in range(frames)]
    for kind in ("images", "labels"):
        for path, name in zip(sorted((out / kind / "train").iterdir()), names, strict=True):
            path.rename(path.with_stem(name))
    (out / "classes.txt").write_text("\n".join(CLASSES.split()), encoding="utf-8")
    return out


def test_the_target_has_the_shared_classes_and_no_frame_of_the_judge(
    adapt: ModuleType, camvid: Path, tmp_path: Path
) -> None:
    adapt.write_target(camvid, tmp_path / "choices", adapt.JUDGE)
    adapt.write_target(camvid, tmp_path / "final", None)
    for name, judges in (
        ("choices", {"0006R0"}),
        ("final", {Path(i).name for i in open_split(str(camvid), "val").ids}),
    ):
        train, val = (open_split(str(tmp_path / name), split) for split in ("train", "val"))
        assert {sample[:6] for sample in train.ids} == {"0001TP", "0016E5"}
        assert {sample[:6] if name == "choices" else sample for sample in val.ids} == judges
        assert train.image(0).shape == (96, 128, 3)
        theirs = open_split(str(camvid), "train").label(0)
        ours = train.label(0)
        fence = CLASSES.split().index("Fence")
        assert np.array_equal(ours, np.where(theirs == fence, 255, theirs)[1::2, 1::2])
        assert (ours == 255).any()


def test_arms_that_tables_compare_are_in_the_recipe(adapt: ModuleType) -> None:
    recipes = {stage: read_recipe(str(Path(adapt.__file__).parent / name)) for stage, name in adapt.RECIPES.items()}
    assert {adapt.BASELINE, *adapt.ONLINE} <= {arm.name for arm in recipes["final"].arms}
    assert not set(recipes["choices"].seeds) & set(recipes["final"].seeds)
    for recipe in recipes.values():
        assert recipe.student["val-every"] == recipe.student["iterations"]  # the score is that of the last


def row(arm: str, seed: int, miou: float, chain: float) -> dict[str, object]:
    own = {"cpu_seconds": 10.0, "chain_seconds": chain}
    return {"stage": "final", "arm": arm, "seed": seed, "miou": miou, **own}


def test_tables_are_of_equal_seeds_and_of_whole_chains(adapt: ModuleType) -> None:
    rows = [row("source only", seed, 20.0 + seed, 10) for seed in (0, 1, 2)]
    rows += [row("self-training, round 2", seed, 30.0 + seed, 60) for seed in (0, 1, 2)]
    rows += [row("EMA consistency", seed, 29.0 + seed, 40 + seed) for seed in (0, 1, 2)]
    rows.append(row("EMA consistency", 9, 99.0, 40) | {"stage": "choices"})
    summary = adapt.summary(rows)
    assert summary["final"]["EMA consistency"] | {"half": None} == {
        **{"mean": 30.0, "half": None, "runs": 3},
        **{"cpu_seconds": 10.0, "chain_seconds": 41.0},
    }
    assert summary["choices"]["EMA consistency"]["mean"] == 99.0
    gaps = adapt.differences(rows)
    assert gaps["self-training, round 2 - EMA consistency"]["mean"] == pytest.approx(1)
    assert gaps["EMA consistency - source only"]["mean"] == pytest.approx(9)
    assert adapt.shares(rows)["self-training, round 2 over EMA consistency"] == pytest.approx(60 / 41, abs=0.01)


@pytest.mark.slow
def test_the_queue_goes_on_from_its_rows(
    adapt: ModuleType, camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher's chain is trained first, and its time counted; nothing is done twice; the cost has a table."""
    result = tmp_path / "adapt.json"
    words = ["adapt.py", "--data", str(camvid), "--out", str(tmp_path / "out"), "--json", str(result), "--few"]
    monkeypatch.setattr(sys, "argv", [*words, "--only", "self-training, round 2", "--only", "source only"])
    adapt.main()
    rows = {own["arm"]: own for own in json.loads(result.read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == {"source only", "self-training, round 2"}
    assert rows["source only"]["chain_seconds"] == rows["source only"]["cpu_seconds"] > 0
    chain = rows["self-training, round 2"]
    assert chain["chain_seconds"] > 2 * chain["cpu_seconds"]  # another round, two stores, a student of the source
    monkeypatch.setattr(adapt.Stage, "do", None)
    adapt.main()
    monkeypatch.setattr(sys, "argv", [*words, "--cost"])
    adapt.main()
    content = json.loads(result.read_text(encoding="utf-8"))
    assert {own["arm"] for own in content["rows"]} == set(rows)
    steps = content["cost"]["steps"]
    assert steps["plain"]["over_plain_best"] == 1
    assert steps["ema"]["logged_best"] > 0
