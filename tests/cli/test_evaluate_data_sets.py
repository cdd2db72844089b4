"""`kdcache evaluate` of one run on several data sets."""

from __future__ import annotations

import json
from pathlib import Path


def other_data(world: Path, classes: str) -> Path:
    """The data of the world with other class names, in one folder more."""
    (world / "other").mkdir()
    for kind in ("images", "labels"):
        (world / "other" / kind).symlink_to(world / "data" / kind)
    (world / "other" / "classes.txt").write_text(classes)
    return world / "other"


def names_of(world: Path) -> list[str]:
    return [line.rsplit(maxsplit=3)[0] for line in (world / "data/classes.txt").read_text().splitlines()]


def test_several_data_sets_stand_in_one_table(world, cli) -> None:
    names = names_of(world)
    other = other_data(world, "\n".join([names[0].upper(), "unknown", *names[2:]]))
    flags = ("--data", world / "data", "--data", other, "--listing", world / "iou.txt")
    told = cli("evaluate", world / "teacher", *flags)
    assert told.code == 0, told.err
    (file,) = (world / "teacher").glob("evaluations-*.json")
    assert not list((world / "teacher").glob("evaluation-*"))
    content = json.loads(file.read_text())
    whole, part = content["data_sets"]
    assert part["missing_classes"] == [names[1]]
    assert part["void_classes"] == ["unknown"]
    assert [row["name"] for row in part["classes"]] == [names[0], *names[2:]]
    assert [row["name"] for row in whole["classes"]] == names
    text = (world / "iou.txt").read_text()
    assert text.count("===> mIoU: ") == 2
    assert f"# {other.name}, val\n" in text
    assert f"===>{names[1]}:" in text.partition("===> mIoU")[0]
    assert f"===>{names[1]}:" not in text.partition("===> mIoU")[2]
    assert "not shared" in file.with_suffix(".md").read_text()
    alone = cli("evaluate", world / "teacher", "--data", world / "data", "--listing", world / "one.txt")
    assert alone.code == 0, alone.err
    assert json.loads((world / "teacher/evaluation-val.json").read_text())["miou"] == whole["miou"]
    assert (world / "one.txt").read_text() == text.split("\n\n")[0].partition("\n")[2] + "\n"


def test_splits_are_one_for_all_or_one_for_each(world, cli) -> None:
    twice = ("evaluate", world / "teacher", "--data", world / "data", "--data", world / "data")
    told = cli(*twice, "--split", "train", "--split", "val")
    assert told.code == 0, told.err
    (file,) = (world / "teacher").glob("evaluations-*.json")
    assert [one["split"] for one in json.loads(file.read_text())["data_sets"]] == ["train", "val"]
    refused = cli(*twice, "--split", "train", "--split", "val", "--split", "val")
    assert refused.code == 2
    assert "3 splits" in refused.err


def test_data_that_share_no_class_are_refused(world, cli) -> None:
    names = names_of(world)
    other = other_data(world, "\n".join(f"x{name}" for name in names))
    refused = cli("evaluate", world / "teacher", "--data", world / "data", "--data", other)
    assert refused.code == 2
    assert "No common class" in " ".join(refused.err.split())
    assert "--class-map" in refused.err
    assert not list((world / "teacher").glob("evaluations-*"))
