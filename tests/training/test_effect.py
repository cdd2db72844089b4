"""benchmarks/effect.py, the queue of the study: whose frames a data set has, and that it goes on from its rows."""

import argparse
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kdcache.data import open_split, write_scenes
from kdcache.models import build_model
from kdcache_cli.app import main

SEQUENCES = {"0001TP": 6, "0006R0": 4, "0016E5": 14}  # frames of train


@pytest.fixture
def effect(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("effect")


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Procedural images under names of CamVid's frames."""
    out = tmp_path / "camvid"
    write_scenes(out, f"scenes:48x64,train={sum(SEQUENCES.values())},val=2,seed=0")
    names = iter([f"{sequence}_{30 * frame:05d}" for sequence, frames in SEQUENCES.items() for frame in range(frames)])
    for image in sorted((out / "images" / "train").iterdir()):
        name = next(names)
        label = out / "labels" / "train" / f"{image.stem}.png"
        label.rename(label.with_stem(name))
        image.rename(image.with_stem(name))
    return out


def sequences(data: Path, split: str) -> dict[str, int]:
    ids = open_split(str(data), split).ids
    return {name: count for name in SEQUENCES if (count := sum(id.startswith(name) for id in ids))}


def test_nothing_is_trained_on_the_sequence_that_judges(effect: ModuleType, camvid: Path, tmp_path: Path) -> None:
    folders = effect.Folders(camvid, tmp_path / "out")
    assert sequences(folders.data("dev"), "train") == {"0001TP": 6, "0016E5": 14}
    assert sequences(folders.data("dev"), "val") == {"0006R0": 4}
    assert sequences(folders.data("apart"), "train") == {"0001TP": 6, "0006R0": 4}
    assert open_split(str(folders.data("apart")), "val").ids == open_split(str(camvid), "val").ids
    assert sequences(folders.data("all"), "train") == SEQUENCES


def test_few_labels_are_those_of_a_block(
    effect: ModuleType, camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(effect.BLOCKS, "46-a", ("0016E5", 3, 8))
    folders = effect.Folders(camvid, tmp_path / "out")
    few, only = (folders.data(f"{kind}-46-a") for kind in ("few", "only"))
    block = [f"0016E5_{30 * frame:05d}" for frame in range(3, 8)]
    assert sequences(few, "train") == {"0001TP": 6, "0016E5": 14}
    assert sorted(path.stem for path in (few / "labels" / "train").iterdir()) == block
    assert sorted(open_split(str(only), "train").ids) == block
    assert sequences(few, "val") == sequences(only, "val") == {"0006R0": 4}


@pytest.mark.slow
def test_a_row_is_kept_and_not_repeated(
    effect: ModuleType, camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a teacher through its store to students: of labels, targets, a live teacher; twice does nothing more.

    The first command and the one with a live teacher are processes, and the others run in this one.
    """
    start, commands = effect.kdcache, 0

    def kdcache(words: str, live: str = "", ends: float = math.inf) -> None:
        nonlocal commands
        commands += 1
        if live or commands == 1:
            start(words, live, ends)
            return
        with pytest.raises(SystemExit) as ended:
            main(words.split())
        assert ended.value.code == 0

    monkeypatch.setattr(effect, "kdcache", kdcache)
    monkeypatch.setitem(effect.TEACHERS, "base", "--model kdcache:base --size 144x192 --iterations 2")
    monkeypatch.setitem(effect.STORES, "base", replace(effect.STORES["pixels"], teachers=("base",), views=2))
    monkeypatch.setitem(effect.COMBINED, "mirrored", (("base-dev-0@last", "base-dev-0@last-ema"), "flip"))
    arms = [effect.Arm("E1", name, "base", f"--method {name} --augment replay", 2) for name in ("none", "dist")]
    live = effect.Arm("E1", "live", "base", "--method dist --augment replay --jitter 0", 2, live="base")
    files = effect.Arm("E1", "files", "", "", 2)
    where = argparse.Namespace(data=camvid, out=tmp_path / "out", json=tmp_path / "study.json", minutes=60, mix=False)
    study = effect.Study(where)
    study.teach("E2", "base", "base", "dev")
    for arm in (*arms, live, files):
        study.run(arm, 3)
    study.combine("mirrored")
    rows = json.loads(where.json.read_text())["rows"]
    assert commands == 6
    assert [row["arm"] for row in rows] == ["base", "none", "dist", "live", "files", "mirrored"]
    for row in rows:
        assert 0 < row["miou"] < 100
        assert row["miou"] == row.get("by_iteration", {"2": row["miou"]})["2"]
    assert json.loads(where.json.read_text())["summary"]["E1"]["dist"]["runs"] == 1

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    again = effect.Study(where)
    again.teach("E2", "base", "base", "dev")
    for arm in (*arms, live, files):
        again.run(arm, 3)
    again.combine("mirrored")
    assert json.loads(where.json.read_text())["rows"] == rows
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")} == before


def test_the_summary_is_a_mean_and_its_interval_over_seeds(effect: ModuleType) -> None:
    rows = [{"stage": "E1", "arm": "a", "miou": score} for score in (50.0, 52.0, 54.0)]
    assert effect.summary(rows) == {"E1": {"a": {"mean": 52.0, "half": 4.97, "runs": 3}}}


def test_the_plot_draws_the_arms_that_there_are(effect: ModuleType, tmp_path: Path) -> None:
    scores = {"750": 40.0, "1500": 50.0}
    rows = [
        {"stage": "E6", "arm": f"{arm}, all", "seconds": 90 + seed, "by_iteration": scores}
        for arm in ("plain", "distilled")
        for seed in range(2)
    ]
    results = importlib.import_module("study_results")
    results.draw(rows, tmp_path / "plots" / "study.png")
    drawn = json.loads(Image.open(tmp_path / "plots" / "study.png").text[results.DATA])
    assert drawn == results.curves(rows)
    assert [curve["seconds"] for curve in drawn.values()] == [[45.0, 90.0]] * 2
    assert all(curve["half"] is None for curve in drawn.values())


def test_differences_are_paired_by_seed(effect: ModuleType) -> None:
    scores = {"E6 distilled, all": (3.0, 5.0, 4.0), "E6 plain, all": (1.0, 2.0, 3.0)}
    rows = [
        {"stage": arm[:2], "arm": arm[3:], "seed": seed, "miou": miou}
        for arm, mious in scores.items()
        for seed, miou in enumerate(mious)
    ]
    ((name, paired),) = effect.differences(rows).items()
    half = 4.302653 / 3**0.5  # Student's t for three pairs, whose differences 2, 3, 1 have a deviation of 1
    assert name == "E6 distilled, all - E6 plain, all"
    assert paired["paired"]
    assert paired["mean"] == pytest.approx(2)
    assert (paired["low"], paired["high"]) == pytest.approx((2 - half, 2 + half), abs=1e-4)


def test_intervals_over_images_are_those_of_the_weights(
    effect: ModuleType, camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights against themselves both are zero; of others they span the difference, in stretches as well."""
    images = importlib.import_module("study_images")
    monkeypatch.setattr(images, "WEIGHTS", tmp_path)
    split = open_split(str(camvid), "train")
    for number, arm in enumerate(("plain", "distilled")):
        torch.manual_seed(number)
        model = build_model("kdcache:tiny", len(split.classes.names))
        save_file(model.state_dict(), tmp_path / f"e6-{arm}-all-0.safetensors")
    same = images.row("E6", ("plain, all", "plain, all"), (0,), split)
    assert (same["points"], same["images"]) == (0, {"blocks": 24, "low": 0, "high": 0})
    other = images.row("E6", ("distilled, all", "plain, all"), (0,), split)
    assert other["stretches of 10 images"]["blocks"] == 3
    for over in ("images", "stretches of 10 images"):
        assert other[over]["low"] <= other["points"] <= other[over]["high"]
    assert other["points"] != 0
