"""Layouts of data of one's own: where images and masks lie, what names end with, colours, numbers of other kinds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcache.data import check
from kdcache.data import list_splits as list_any_splits
from kdcache.data import open_split as open_any_split
from kdcache.data.classes import read_colour_codes
from kdcache.data.colour_codes import ColourCodes
from kdcache.data.layouts.own.pairs import IMAGE_ENDS, LABEL_ENDS, ends_of
from kdcache.data.layouts.registry import find_layout
from kdcache.errors import DataError

open_split, list_splits = partial(open_any_split, exports=True), partial(list_any_splits, exports=True)
IDS = np.resize([0, 1, 2, 255], (6, 8)).astype(np.uint8)
CLASSES = "road 1 2 3\ncar 200 0 0\nsky 0 0 255\nvoid: 9 9 9\n"


def write(root: Path, images: str, masks: str, ids: np.ndarray = IDS, classes: str | None = CLASSES) -> Path:
    """A sample for each {split} and {name} of the paths."""
    for split in ("train", "valid"):
        for name in ("a", "b"):
            pixels = np.random.default_rng(ord(split[0]) * ord(name)).integers(0, 256, (*ids.shape[:2], 3), np.uint8)
            for path, content in ((images, pixels), (masks, ids)):
                file = root / path.format(split=split, name=f"{split}_{name}")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(file)
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root


@pytest.mark.parametrize(
    ("layout", "images", "masks"),
    [
        ("folder", "images/{split}/{name}.jpg", "labels/{split}/{name}_mask.png"),
        ("folder", "images/{split}/{name}_leftImg8bit.png", "labels/{split}/{name}_gtFine_labelIds.png"),
        ("folder", "images/{split}/x/{name}.jpg", "labels/{split}/x/{name}.tif"),
        ("mmseg", "img_dir/{split}/{name}.jpg", "ann_dir/{split}/{name}.png"),
        ("mmseg", "img_dir/{split}/{name}_leftImg8bit.png", "ann_dir/{split}/{name}_gtFine_labelTrainIds.png"),
        ("kaggle", "{split}/images/{name}.jpg", "{split}/masks/{name}.png"),
        ("kaggle", "images/{split}/{name}.jpg", "masks/{split}/{name}_mask.png"),
        ("kaggle", "{split}/{name}.jpg", "{split}_labels/{name}_L.png"),
        ("kaggle", "{split}/{name}_sat.jpg", "{split}/{name}_mask.png"),
    ],
)
def test_a_layout_is_recognised_and_its_masks_are_paired(layout, images, masks, tmp_path) -> None:
    root = write(tmp_path / "set", images, masks)
    assert find_layout(str(root)).layout.name == layout
    assert list_splits(root) == ["train", "valid"]
    for split in ("train", "valid", "val"):  # val means valid, where there is no val
        opened = open_split(root, split)
        assert len(opened) == 2
        assert opened.split == ("valid" if split == "val" else split)
        for index in range(2):
            assert np.array_equal(opened.label(index), IDS)
    report = check(root)
    assert report.problems == []
    assert images.partition("{name}")[0].format(split="train").removesuffix("x/") in report.why


def test_images_and_masks_that_nothing_divides(tmp_path) -> None:
    root = write(tmp_path / "set", "images/{name}.jpg", "masks/{name}.png")
    assert find_layout(str(root)).layout.name == "kaggle"
    assert len(open_split(root, "train")) == 4
    with pytest.raises(DataError, match="--val-fold"):
        open_split(root, "val")
    (root / "train.txt").write_text("train_a\ntrain_b\n")
    (root / "val.txt").write_text("valid_a\nvalid_b\n")
    assert open_split(root, "val").ids == open_split(root, "valid").ids == ("valid_a", "valid_b")


def test_labels_in_the_colours_of_the_classes(tmp_path) -> None:
    colours = np.zeros((256, 3), np.uint8)
    colours[:3] = (1, 2, 3), (200, 0, 0), (0, 0, 255)
    rgb = colours[IDS]
    rgb[0, 3] = 9  # the colour of void in classes.txt; the others are black
    root = write(tmp_path / "set", "train/images/{name}.png", "train/masks/{name}.png", rgb)
    assert np.array_equal(open_split(root, "train").label(0), IDS)
    assert check(root).problems == []
    rgb[2, 1] = 201, 0, 0
    write(root, "train/images/{name}.png", "train/masks/{name}.png", rgb)
    with pytest.raises(DataError, match="201 0 0 in 1 pixels"):
        open_split(root, "train").label(0)
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    with pytest.raises(DataError, match=r"classes\.txt does not give every class its own colour"):
        open_split(root, "train").label(0)


def test_a_table_of_classes_and_colours(tmp_path) -> None:
    """Kaggle's CamVid: SPLIT, SPLIT_labels with `_L`, class_dict.csv, Void in it."""
    rgb = np.array([(10, 0, 0), (20, 0, 0), (0, 0, 0)], np.uint8)[np.resize([0, 1, 2], (6, 8))]
    root = write(tmp_path / "set", "{split}/{name}.png", "{split}_labels/{name}_L.png", rgb, classes=None)
    (root / "class_dict.csv").write_text("name,r,g,b\nRoad,10,0,0\nCar,20,0,0\nVoid,0,0,0\n")
    split = open_split(root, "val")
    assert split.classes.names == ("Road", "Car")
    assert split.classes.colours == ((10, 0, 0), (20, 0, 0))
    assert np.array_equal(split.label(0), np.resize([0, 1, 255], (6, 8)))
    assert "class_dict.csv" in check(root).why
    (root / "class_dict.csv").write_text("class;red\nRoad;10\n")
    with pytest.raises(DataError, match="name, r, g and b"):
        open_split(root, "val")


def test_labelids_of_cityscapes_classes_are_mapped(tmp_path) -> None:
    from kdcache.data.layouts.published.cityscapes import CLASSES as CITYSCAPES

    ids = np.resize([7, 8, 11, 26, 0], (6, 8)).astype(np.uint8)
    paths = "images/{split}/{name}_leftImg8bit.png", "labels/{split}/{name}_gtFine_labelIds.png"
    root = write(tmp_path / "set", *paths, ids, "\n".join(CITYSCAPES.names))
    assert np.array_equal(open_split(root, "train").label(0), np.resize([0, 1, 2, 13, 255], (6, 8)))


def test_kitti_semantic(tmp_path) -> None:
    root = tmp_path / "data_semantics"
    for folder, name in (("training", "000000_10"), ("testing", "000001_10")):
        (root / folder / "image_2").mkdir(parents=True)
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(root / folder / "image_2" / f"{name}.png")
    (root / "training/semantic").mkdir()
    Image.fromarray(np.resize([7, 26, 4], (6, 8)).astype(np.uint8)).save(root / "training/semantic/000000_10.png")
    assert find_layout(str(tmp_path)) == (find_layout(f"kitti-semantic:{root}").layout, root, None)
    assert list_splits(root) == ["test", "train"]
    split = open_split(root, "train")
    assert np.array_equal(split.label(0), np.resize([0, 13, 255], (6, 8)))
    assert not open_split(root, "test").has_label(0)
    with pytest.raises(DataError, match="--fold 0/5"):
        open_split(root, "val")


def test_a_mask_without_an_image_is_refused(tmp_path) -> None:
    root = write(tmp_path / "set", "train/images/{name}.png", "train/masks/{name}_mask.png")
    Image.fromarray(IDS).save(root / "train/masks/nobody_mask.png")
    Image.fromarray(IDS).save(root / "train/masks/nothing.png")
    with pytest.raises(DataError) as caught:
        open_split(root, "train")
    assert "'nobody_mask.png'" in caught.value.problem
    assert "'nothing" in caught.value.problem


NAMES = st.lists(st.text("abc_", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)


@given(names=NAMES, image_end=st.sampled_from(IMAGE_ENDS), label_end=st.sampled_from(LABEL_ENDS))
def test_ends_that_are_there_pair_as_many_as_there_are(names, image_end, label_end) -> None:
    images, labels = [name + image_end for name in names], [name + label_end for name in names]
    ends = ends_of(images, labels)
    stems = {name.removesuffix(ends[0]) for name in images}
    assert sum(name.removesuffix(ends[1]) in stems for name in labels if name.endswith(ends[1])) >= len(names)


COLOURS = st.tuples(*[st.integers(0, 255)] * 3)


@given(colours=st.lists(COLOURS, min_size=2, max_size=40, unique=True), data=st.data())
def test_colours_and_ids_are_each_other_s_inverse(colours, data) -> None:
    codes = ColourCodes({colour: number for number, colour in enumerate(colours)}, "classes.txt")
    ids = np.array(data.draw(st.lists(st.integers(0, len(colours) - 1), min_size=1, max_size=30)), np.uint8)[None]
    rgb = np.array(colours, np.uint8)[ids]
    assert np.array_equal(codes.ids(rgb, Path("x.png")), ids)
    other = data.draw(COLOURS.filter(lambda colour: colour not in colours and colour != (0, 0, 0)))
    rgb[0, 0] = other
    with pytest.raises(DataError, match=" ".join(map(str, other)) + " in 1 pixels"):
        codes.ids(rgb, Path("x.png"))


@pytest.mark.parametrize("text", ["a 1 1 1\nb 1 1 1\n", "a 1 1 1\nb\n", "a 1 1 1\nb 2 2 2\nvoid: 2 2 2\n"])
def test_colours_that_tell_nothing_apart_are_none(text, tmp_path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    assert read_colour_codes(tmp_path) is None
