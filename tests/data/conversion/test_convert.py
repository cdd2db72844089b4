"""Conversion of every layout into a folder: the same images and class ids, what is left out, and going on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import DataWarning, check, convert, open_split
from kdcache.data.conversion import folder_writer
from kdcache.data.conversion.folder_writer import link_file
from kdcache.errors import DataError, MismatchError, RecipeError


@pytest.mark.parametrize(
    "layout", ["folder", "mmseg", "kaggle", "coco", "camvid", "voc", "cityscapes", "gta5", "ade20k"]
)
def test_a_layout_becomes_a_folder_of_the_same_samples(layout, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / "set")
    converted = convert(f"{layout}:{root}", tmp_path / "out", threads=1)
    assert list(converted.splits) == ["train", "val"]
    assert converted.layout == layout
    for split in ("train", "val"):
        before, after = (
            open_split(f"{layout}:{root}", split, exports=True),
            open_split(f"folder:{tmp_path / 'out'}", split),
        )
        assert after.ids == before.ids
        assert after.classes == before.classes
        assert after.label_map is None
        for index in range(len(before)):
            assert np.array_equal(after.image(index), before.image(index))
            assert np.array_equal(after.label(index), before.label(index))
            assert os.path.samefile(after.samples[index].image.path, before.samples[index].image.path)
    assert check(tmp_path / "out").problems == []
    plain = layout in ("folder", "mmseg", "voc")
    assert (after.samples[0].labels["segmentation"].path.stat().st_nlink > 1) == plain


def test_procedural_scenes_become_files(tmp_path) -> None:
    scenes = "scenes:16x24,train=3,val=1,depth=exact"
    convert(scenes, tmp_path / "out")
    before, after = open_split(scenes, "train"), open_split(tmp_path / "out", "train")
    assert np.array_equal(after.image(2), before.image(2))
    assert np.array_equal(after.label(2), before.label(2))
    assert np.array_equal(after.label(2, "depth"), before.label(2, "depth"), equal_nan=True)


def broken(tiny, root: Path) -> Path:
    """Two sound samples, and one of each kind that cannot be used."""
    tiny.write("folder", root)
    for name in ("cut", "large", "stray"):
        tiny.save_image(root / f"images/train/{name}.jpg")
        tiny.save_label(root / f"labels/train/{name}.png", np.zeros(tiny.SIZE, np.uint8))
    (root / "images/train/cut.jpg").write_bytes(b"nothing")
    tiny.save_label(root / "labels/train/large.png", np.zeros((9, 9), np.uint8))
    tiny.save_label(root / "labels/train/stray.png", np.full(tiny.SIZE, 77, np.uint8))
    tiny.save_label(root / "labels/train/nobody.png", np.zeros(tiny.SIZE, np.uint8))
    return root


def test_what_no_training_could_use_is_left_out_and_named(tiny, tmp_path) -> None:
    out = tmp_path / "out"
    train = convert(broken(tiny, tmp_path / "set"), out).splits["train"]
    assert (train.written, train.kept, set(train.dropped)) == (3, 0, {"cut", "large", "stray", "nobody.png"})
    assert open_split(out, "train").ids == ("a", "b", "c.1")
    assert check(out).problems == []
    table = (out / "converted/train.csv").read_text()
    assert "nobody.png,no image has this label's name" in table
    assert "ids of no class: 77" in table
    assert "label 9 x 9, image 32 x 48" in table
    for name in ("a", "b", "c.1"):
        (tmp_path / f"set/images/train/{name}.jpg").unlink()
    with pytest.raises(DataError, match="Cannot use any of 3 samples"):
        convert(tmp_path / "set", tmp_path / "empty", splits=["train"])


def test_an_interrupted_conversion_is_no_data_set_and_goes_on(tiny, tmp_path, monkeypatch) -> None:
    root, out = tiny.write("kaggle", tmp_path / "set"), tmp_path / "out"
    whole = folder_writer.FolderWriter.write_depth

    def killed(self, index) -> None:
        if self.source.ids[index] == "c.1":
            raise KeyboardInterrupt
        whole(self, index)

    monkeypatch.setattr(folder_writer.FolderWriter, "write_depth", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(root, out, threads=1)
    with pytest.raises(DataError):
        open_split(out, "train")
    monkeypatch.undo()
    train = convert(root, out, threads=1).splits["train"]
    assert train.kept >= 1
    assert train.kept + train.written == 3
    again = convert(root, out).splits["train"]
    assert (again.kept, again.written) == (3, 0)
    assert len(open_split(out, "train")) == 3


def test_a_folder_of_something_else_is_refused(tiny, tmp_path) -> None:
    root, out = tiny.write("mmseg", tmp_path / "set"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(RecipeError, match="holds something else"):
        convert(root, out)
    (out / "mine.txt").unlink()
    convert(root, out)
    with pytest.raises(RecipeError, match='which was converted with layout "mmseg"'):
        convert(tiny.write("kaggle", tmp_path / "other"), out)


def test_a_source_that_changed_since_is_named(tiny, tmp_path) -> None:
    root, out = tiny.write("camvid", tmp_path / "set"), tmp_path / "out"
    convert(root, out)
    record = json.loads((out / "converted.json").read_text())
    assert record["command"] == "kdcache data convert camvid:../set ."
    assert str(tmp_path) not in json.dumps(record)
    assert convert(root.rename(tmp_path / "renamed"), out).splits["train"].kept == 3
    labels = tmp_path / "renamed/trainannot"
    tiny.save_label(labels / "a.png", np.zeros(tiny.SIZE, np.uint8))
    before = (out / "converted.json").read_text()
    with pytest.raises(MismatchError, match=r"1 label differs \('a'\)"):
        convert(tmp_path / "renamed", out)
    assert (out / "converted.json").read_text() == before
    assert convert(tmp_path / "renamed", tmp_path / "new").splits["train"].written == 3


@pytest.mark.parametrize("layout", ["coco", "camvid"])
def test_whoever_opens_a_converted_folder_is_told_that_its_source_changed(layout, tiny, tmp_path) -> None:
    root, out = tiny.write(layout, tmp_path / "set"), tmp_path / "out"
    convert(root, out)
    open_split(out, "train")  # which warns of nothing
    if layout == "coco":
        path = root / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 0]
        path.write_text(json.dumps(content))
    else:
        (root / "trainannot/b.png").unlink()  # a file of its own: the folder has links
        tiny.save_label(root / "trainannot/b.png", np.zeros(tiny.SIZE, np.uint8))
    with pytest.warns(DataWarning, match=r"set has changed since .*out was converted from it: 1 label differs \('b'\)"):
        open_split(out, "train")
    assert any("1 label differs ('b')" in warning for warning in check(out).warnings)
    open_split(out, "val")
    shutil.rmtree(root)
    open_split(out, "train")  # nobody can tell


def test_masks_of_0_and_255(tiny, tmp_path) -> None:
    root = tmp_path / "set"
    for name in "ab":
        tiny.save_image(root / f"images/{name}.jpg")
        tiny.save_label(root / f"masks/{name}.png", np.resize([0, 255], tiny.SIZE).astype(np.uint8))
    (root / "classes.txt").write_text("background\nroad\nsky\n")
    with pytest.raises(RecipeError, match="--binary with 3 classes: background, road, sky"):
        convert(root, tmp_path / "out", binary=True)
    (root / "classes.txt").write_text("background\nroad\n")
    asis = convert(root, tmp_path / "asis").splits["train"]
    assert (asis.one_class, asis.labels) == ("background", {"hard link": 2})
    train = convert(root, tmp_path / "out", binary=True).splits["train"]
    assert (train.one_class, train.labels) == (None, {"file": 2})
    assert np.array_equal(open_split(tmp_path / "out", "train").label(0), np.resize([0, 1], tiny.SIZE))
    assert check(tmp_path / "out").problems == []
    # The source is as it was, for what is written is no link to it.
    with Image.open(root / "masks/a.png") as image:
        assert set(np.unique(np.asarray(image))) == {0, 255}


def test_files_are_copied_where_no_link_is_possible(tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    (tmp_path / "a").write_text("content")
    assert link_file(tmp_path / "a", tmp_path / "x/hard") == "hard link"
    monkeypatch.setattr(os, "link", refuse)
    assert link_file(tmp_path / "a", tmp_path / "x/soft") == "link"
    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert link_file(tmp_path / "a", tmp_path / "x/copy") == "copy"
    assert {path.read_text() for path in (tmp_path / "x").iterdir()} == {"content"}


def test_a_name_that_leads_out_of_the_folder_is_left_out(tiny, tmp_path) -> None:
    root = tiny.write("coco", tmp_path / "set")
    tiny.save_image(tmp_path / "outside.jpg")
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for image, name in zip(content["images"], ("../../outside.jpg", "../train2017/a.jpg"), strict=False):
        image["file_name"] = name
    path.write_text(json.dumps(content))
    train = convert(root, tmp_path / "out").splits["train"]
    assert list(train.dropped) == ["outside.jpg"]
    assert open_split(tmp_path / "out", "train").ids == ("a", "c.1")
