"""The report on whole and on broken data sets, and class weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdcache.data import check, class_weights, open_split, write_scenes
from kdcache.errors import DataError

SMALL = "scenes:32x40,train=4,val=2,unlabelled=2"


def test_a_sound_data_set_has_no_problems_and_exact_counts(tmp_path) -> None:
    root = write_scenes(tmp_path / "data", SMALL)
    report = check(root)
    assert report.problems == []
    train = report.splits["train"]
    split = open_split(root, "train")
    counts = sum(np.bincount(split.label(i).reshape(-1), minlength=256) for i in range(4))
    assert train.class_pixels == counts[:7].tolist()
    assert train.void_pixels == counts[255]
    assert sum(train.shares()[0]) + train.shares()[1] == pytest.approx(1)
    assert (train.images, train.labelled, train.sizes) == (4, 4, {"32x40": 4})
    assert report.splits["unlabelled"].labelled == 0
    assert len(report.splits["unlabelled"].without_label) == 2
    assert check(SMALL).splits["train"].class_pixels == train.class_pixels


def test_the_report_is_plain_json_and_the_digest_stable(tmp_path) -> None:
    root = write_scenes(tmp_path / "data", SMALL)
    report = check(root, threads=2).to_json()
    assert json.loads(json.dumps(report)) == report
    assert report == check(root, threads=0).to_json()
    moved = root.rename(tmp_path / "moved")
    assert check(moved).splits["train"].digest == report["splits"]["train"]["digest"]
    changed = next((moved / "images/train").iterdir())
    changed.write_bytes(changed.read_bytes() + b" ")
    assert check(moved).splits["train"].digest != report["splits"]["train"]["digest"]


def break_everything(builder) -> None:
    builder.pair("whole")
    builder.image("alone.png")
    builder.label("orphan.png")
    builder.label("whole.jpg")
    builder.image("twice.png")
    builder.image("twice.jpg")
    builder.image("cut.png", size=(64, 64)).write_bytes(b"\x89PNG\r\n\x1a\n")
    builder.image("wide.png")
    builder.label("wide.png", np.zeros((6, 9), np.uint8))
    builder.image("deep.png")
    builder.label("deep.png", np.full((6, 8), 256, np.uint16))
    builder.image("beyond.png")
    builder.label("beyond.png", np.full((6, 8), 9, np.uint8))


def test_a_broken_data_set_is_described_in_full(builder) -> None:
    break_everything(builder)
    report = check(builder.root)
    train = report.splits["train"]
    assert train.clashes == ["twice.png"]
    assert train.without_image == ["orphan.png", "whole.jpg"]
    assert train.without_label == ["alone", "cut", "twice"]
    assert set(train.unreadable) == {"cut", "deep"}
    assert "16-bit" in train.unreadable["deep"]
    assert train.mismatched == {"wide": "label 6 x 9, image 6 x 8 (height x width)"}
    assert train.out_of_range == {"beyond": {"9": 48}}
    assert train.class_pixels == [0, 48, 0]
    assert sum(train.sizes.values()) == train.images - 1
    assert len(report.problems) == 6
    assert [p for p in report.problems if not (p.startswith("train: ") and ". " in p)] == []
    assert "1 labels have ids that are no class (9 in 1 file, 48 pixels): 'beyond'" in report.problems[4]
    assert json.dumps(report.to_json())


CLASSES = np.arange(48, dtype=np.uint8).reshape(6, 8) % 3


def test_one_image_in_two_splits_is_a_problem(builder) -> None:
    for split in ("train", "val"):
        builder.image("a.png", split)
        builder.label("a.png", CLASSES, split)
    (problem,) = check(builder.root).problems
    assert "more than one split" in problem
    assert "train/a = val/a" in problem
    assert check(builder.root, ["train"]).problems == []


def test_pixels_tell_the_same_image_whatever_its_file_and_id(builder) -> None:
    """As BMP and PNG, in two splits or in one; other pixels of the same size are another image."""
    builder.image("a.png")
    builder.label("a.png", CLASSES)
    builder.image("b.bmp", "val")
    builder.label("b.png", CLASSES, "val")
    builder.image("longer.png", "val")
    report = check(builder.root)
    assert [problem for problem in report.problems if "'train/a = val/b'" in problem] == report.problems
    assert not any("more than once" in warning for warning in report.warnings)
    builder.image("c.bmp", "train")
    report = check(builder.root, ["train"])
    assert report.problems == []
    assert "1 images are in a split more than once: 'train/a = train/c'; remove all but one of each" in report.warnings


def test_progress_counts_every_sample() -> None:
    calls = []
    check(SMALL, ["val"], progress=lambda *call: calls.append(call))
    assert calls == [("val", 1, 2), ("val", 2, 2)]


def test_what_cannot_be_examined_is_refused(tmp_path, builder) -> None:
    for action in (
        lambda: check(tmp_path / "nowhere"),
        lambda: check(SMALL, ["test"]),
        lambda: check(SMALL, []),
        lambda: check(builder.pair("a").root, ["val"]),
    ):
        with pytest.raises(DataError):
            action()


def test_class_weights() -> None:
    counts = np.array([800, 150, 0, 50])
    present, frequency = counts > 0, counts / 1000
    median = class_weights(counts, "median")
    assert median[present] / median[1] == pytest.approx(150 / counts[present])
    assert class_weights(counts, "sqrt")[present] ** 2 == pytest.approx(
        median[present] * (class_weights(counts, "sqrt")[1] ** 2 / median[1])
    )
    for kind in ("none", "median", "sqrt"):
        weights = class_weights(counts.tolist(), kind)
        assert (weights * frequency).sum() == pytest.approx(1)
        assert weights[2] == 1
    assert class_weights([0, 0], "median").tolist() == [1, 1]
    for wrong in (("other", counts), ("median", [-1, 2])):
        with pytest.raises(ValueError, match="class_weights"):
            class_weights(wrong[1], wrong[0])
