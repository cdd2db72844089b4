"""benchmarks/few_labels.py and features_first.py: the order of their rows, their data, and what rows say together."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def few(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("few_labels")


@pytest.fixture
def first(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("features_first")


def row(stage: str, arm: str, miou: float, seed: int = 0, flags: str = "") -> dict[str, Any]:
    return {"stage": stage, "arm": arm, "seed": seed, "flags": flags, "miou": miou}


def test_each_arm_has_a_folder_and_data_without_the_judge(few: ModuleType) -> None:
    arms = [arm for stage in few.ARMS.values() for arm in stage]
    assert len({(arm.stage, arm.name) for arm in arms}) == len(arms)
    data = importlib.import_module("arms").DATA
    assert {data[arm.data].without for arm in arms} == {few_judge := data["dev"].judge}
    assert few_judge == "0006R0"
    for arm in arms:
        if "--teacher labels" not in arm.flags and arm.store.startswith("few"):
            assert data[arm.teacher_data or arm.data].labels == data[arm.data].labels, arm.name


def test_choices_are_made_on_two_blocks_only(few: ModuleType) -> None:
    assert {arm.data.partition("-")[2] for arm in few.ARMS["F0"]} == {"46-a", "92-a"}
    assert "F0" not in few.STAGES
    counts = {family: len(settings) for family, settings in few.TRIALS.items()}
    assert len(set(counts.values())) == 1, "tuned as much as the rest"


@pytest.mark.parametrize(
    ("distilled", "words"),
    [(20.0, "what at most 46 labels"), (30.0, "what 65 labels"), (41.0, "what more than 92 labels")],
)
def test_labels_that_reach_as_much(distilled: float, words: str, few: ModuleType) -> None:
    rows = [row("F1", "labels only, 46-a", 18), row("F1", "labels only, 46-b", 22), row("F1", "labels only, 92-a", 40)]
    assert words in few.sentence([*rows, row("F1", "distilled, 46-b", distilled)])
    assert "lacks rows" in few.sentence(rows)


def test_nested_blocks_have_a_number_of_their_own(few: ModuleType) -> None:
    rows = [row("F1", "labels only, 46-a", 10), row("F1", "labels only, 46-b", 20), row("F1", "labels only, 92-a", 40)]
    said = few.sentence([*rows, row("F1", "distilled, 46-a", 20), row("F1", "distilled, 46-b", 30)])
    assert "what 61 labels reach without (mean of all blocks" in said
    assert "For nested blocks: 65." in said
    mixed = [row("F1", f"labels only with ClassMix, {block}", miou) for block, miou in (("46-a", 20), ("92-a", 30))]
    assert said.replace("65.", "65. With ClassMix: 65.") == few.sentence(
        [*rows, *mixed, row("F1", "distilled, 46-a", 20), row("F1", "distilled, 46-b", 30)]
    )
    frames = importlib.import_module("arms")
    spans = [{**frames.BLOCKS, **frames.MORE_BLOCKS}[block][1:] for block in few.NESTED[:-1]]
    assert all(low >= wide_low and high <= wide_high
               for (low, high), (wide_low, wide_high) in pairwise(spans))  # fmt: skip


def test_differences_are_paired_by_block_and_seed_and_counted(few: ModuleType) -> None:
    rows = [row("F1", f"{arm}, 46-b", miou + seed, seed) for seed in range(3)
            for arm, miou in (("labels only", 30), ("control", 29), ("distilled", 33))]  # fmt: skip
    rows += [row("F2", "(f) hard pseudo labels, 46-b", 31 + 2 * seed, seed) for seed in range(2)]
    found: Mapping[str, Any] = few.differences(rows, few.pairs())
    assert {name: gap.mean for name, gap in found.items()} == {
        "distilled, 46-b - labels only, 46-b": 3,
        "distilled, 46-b - control, 46-b": 4,
        "(f) hard pseudo labels, 46-b - distilled, 46-b": -1.5,
        "(f) hard pseudo labels, 46-b - labels only, 46-b": 1.5,
    }
    assert {gap.comparisons for gap in found.values()} == {4}
    assert found["(f) hard pseudo labels, 46-b - distilled, 46-b"].runs == 2
    assert "4 comparisons" in few.table(rows)


def test_the_final_is_a_family_of_its_own(few: ModuleType) -> None:
    """Comparisons on val do not count those on 0006R0. Without a row on val there is none."""
    rows = [row(stage, f"{arm}, {block}", miou + seed, seed) for stage in ("F1", "F5")
            for block in ("46-b", "92-b") for arm, miou in (("labels only", 30), ("control", 29), ("distilled", 33))
            for seed in range(2)]  # fmt: skip
    said = few.conclusions(rows)
    assert {gap["comparisons"] for gap in said["final"].values()} == {4}
    assert {gap["mean"] for gap in said["final"].values()} == {3, 4}
    assert few.conclusions(rows[:12])["final"] == {}


def test_only_blocks_of_46_labels_have_an_interval_over_blocks(few: ModuleType) -> None:
    """Blocks of 92 share frames. A block counts once, with its mean over seeds."""
    gains = {"46-a": 1.0, "46-b": 2.0, "46-c": 3.0, "92-a": 50.0}
    rows = [row("F1", f"{arm}, {block}", (arm == "distilled") * gain + seed, seed)
            for block, gain in gains.items() for arm in few.FAMILIES for seed in range(3)]  # fmt: skip
    found = few.over_blocks(rows, "F1")
    assert list(found) == ["distilled - labels only", "distilled - control"]
    for gap in found.values():
        assert (gap.mean, gap.runs, gap.over) == (2, 3, "blocks")
        assert gap.half_width == pytest.approx(4.302653 / 3**0.5)  # Student's t for three blocks
    assert few.over_blocks(rows, "F5") == {}


def test_the_picture_holds_every_run(few: ModuleType, tmp_path: Path) -> None:
    rows = [row("F1", f"{arm}, {block}", 30 + seed, seed) for arm in few.FAMILIES for block in ("46-b", "92-b")
            for seed in range(2)]  # fmt: skip
    rows += [row("F3", "distilled, all", 40), row("F0", "distilled: a trial, 46-a", 90)]
    few.draw(rows, tmp_path / "curve.png")
    drawn = json.loads(Image.open(tmp_path / "curve.png").text[few.DATA])
    assert drawn["labels only"] == {"46": [30, 31], "92": [30, 31]}
    assert drawn["distilled"]["266"] == [40]


def test_a_prefix_of_features_first_has_all_arms_of_one_number(first: ModuleType) -> None:
    rows = list(first.rows())
    assert len(rows) == len(set(rows)) == 5 * (6 * 3 + 4)
    begun = rows[:10]
    assert {(own.arm, own.labels) for own in begun if own.labels != "none"} == {
        (arm, "46") for arm in ("scratch", "scratch long", *first.TEACHERS)
    }
    assert {own.seed for own in rows[:22]} == {0}


def test_features_first_compares_with_both_baselines_and_the_control(first: ModuleType) -> None:
    rows = [{"arm": arm, "labels": "46", "seed": seed, "miou": miou + seed} for seed in range(2)
            for arm, miou in (("scratch", 30), ("scratch long", 32), ("fp16", 33), ("random", 31))]  # fmt: skip
    assert {name: gap.mean for name, gap in first.differences(rows).items()} == {
        "fp16 - scratch, 46": 3,
        "fp16 - scratch long, 46": 1,
        "fp16 - random, 46": 2,
        "random - scratch, 46": 1,
        "random - scratch long, 46": -1,
    }
    assert "5 comparisons" in first.table(rows)
