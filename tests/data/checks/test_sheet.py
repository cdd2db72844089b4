"""The sheet of samples, and the command that a check ends with."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kdcache.data import CheckReport, ClassList, SplitReport, check, open_split, write_scenes
from kdcache.data.checks.next_step import next_step, suggested_size
from kdcache.data.checks.sheet import TILE, overlay, write_sheet
from kdcache.errors import RecipeError


def test_an_overlay_has_the_colours_of_the_classes_and_dark_void() -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    label = np.array([[0, 1, 255], [0, 9, 255]], np.uint8)
    shown = overlay(image, label, ClassList(("a", "b"), ((200, 0, 0), (0, 200, 0))), opacity=0.5)
    assert shown[0].tolist() == [[150, 50, 50], [50, 150, 50], [35, 35, 35]]
    assert shown[1, 1].tolist() == [178, 178, 178]  # 177.5: white for what is no class


def test_twelve_samples_of_all_splits_are_on_the_sheet(tmp_path) -> None:
    splits = [open_split("scenes:24x40,train=20,val=9", name) for name in ("train", "val")]
    names = write_sheet(splits, tmp_path / "sheet.png")
    assert len(names) == len(set(names)) == 12
    assert sum(name.startswith("val/") for name in names) == 6
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * TILE[1]
        first = np.asarray(sheet)[6 + 24 : 6 + TILE[0] - 24, 6 : 6 + TILE[1]]
    label = np.asarray(Image.fromarray(splits[0].label(0)).resize((320, 192), Image.Resampling.NEAREST))
    image = np.asarray(Image.fromarray(splits[0].image(0)).resize((320, 192), Image.Resampling.BOX))
    assert np.array_equal(first, overlay(image, label, splits[0].classes))


def test_splits_without_labels_and_small_ones_leave_their_tiles_to_others(builder, tmp_path) -> None:
    for name in "abcdefghijklmno":
        builder.pair(name)
    builder.pair("v", "val")
    for name in "xyz":
        builder.image(f"{name}.png", "test")
    splits = [open_split(builder.root, name) for name in ("test", "train", "val")]
    names = write_sheet(splits, tmp_path / "sheet.png")
    assert [sum(name.startswith(split) for name in names) for split in ("test", "train", "val")] == [0, 11, 1]


@pytest.mark.parametrize("name", ["sheet.jpg", "nowhere/sheet.png"])
def test_a_sheet_is_a_png_in_a_folder(name, tmp_path) -> None:
    with pytest.raises(RecipeError, match="--sheet"):
        write_sheet([open_split("scenes:24x40,train=2,val=1", "train")], tmp_path / name)


def test_a_sample_that_cannot_be_read_leaves_a_tile(builder, tmp_path) -> None:
    builder.pair("a")
    builder.image("b.png").write_bytes(b"nothing")
    builder.label("b.png")
    assert len(write_sheet([open_split(builder.root, "train")], tmp_path / "sheet.png")) == 2


def test_the_suggested_size_has_the_shape_of_most_images() -> None:
    sizes = {"360x270": 14, "240x320": 13, "360x480": 14, "375x500": 1}
    splits = {"train": SplitReport("train", images=42, labelled=42, sizes=sizes)}
    report = CheckReport("d", "folder", "d", ClassList(("a", "b")), splits, [])
    assert suggested_size(report) == "352x480"


def test_a_check_ends_with_the_command_to_run_next(builder, tiny, tmp_path) -> None:
    write_scenes(tmp_path / "my scenes", "scenes:96x200,train=4,val=2")
    step = next_step(check(tmp_path / "my scenes"))
    assert step == (
        f"kdcache train-teacher --data '{tmp_path}/my scenes' --model kdcache:base --size 96x192 --out runs/teacher"
    )
    root = tiny.write("gta5", tmp_path / "game")
    for name in ("train", "val"):
        (root / f"{name}.txt").unlink()
    assert "--fold 0/5 --val-split train --val-fold 0/5" in next_step(check(root))
    builder.image("x.png")
    assert "fix the problem above, then: kdcache data check" in next_step(check(builder.root))
    assert next_step(check(tiny.write("coco", tmp_path / "coco"))) == (
        f"kdcache data convert {tmp_path}/coco coco-folder"
    )
    root = tiny.write("mmseg", tmp_path / "unlabelled")
    for path in (root / "ann_dir/train").iterdir():
        path.unlink()
    assert next_step(check(root, ["train"])).startswith("kdcache build-teacher-cache")
