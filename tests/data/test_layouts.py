"""The layouts of public data sets: found, read, mapped; other people's readers and tables are the judges."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcache.data import IGNORE_INDEX, check, fold_alone
from kdcache.data import list_splits as list_any_splits
from kdcache.data import open_split as open_any_split
from kdcache.data.folds import subset
from kdcache.data.layouts.label_ids import id_table
from kdcache.data.layouts.registry import LAYOUTS, find_layout, split_prefix

open_split, list_splits = partial(open_any_split, exports=True), partial(list_any_splits, exports=True)
WITHOUT = ("kitti-semantic", "kitti-depth", "nyu", "images", "ultralytics")
WITH_LABELS = [
    name for name, layout in LAYOUTS.items() if (layout.live or name in ("kaggle", "coco")) and name not in WITHOUT
]
SPLITS = {name: ["train", "val"] for name in WITH_LABELS} | {"voc": ["train", "trainval", "val"]}
PREFIXES = {"cityscapes": ("{split}stadt/{split}stadt_", "_leftImg8bit"), "ade20k": ("ADE_{split}_", "")}

CAMVID = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
VOC_COLOURS = {
    0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128),
    16: (0, 64, 0), 19: (128, 192, 0), 20: (0, 64, 128),
}  # fmt: skip


def expected(layout: str) -> dict[int, int]:
    """Number in the file -> class id, from tables that are not kdcache's."""
    if layout in ("cityscapes", "gta5"):
        from torchvision.datasets import Cityscapes

        table = {entry.id: entry.train_id for entry in Cityscapes.classes if entry.id >= 0}
        return {n: train if 0 <= train < 19 else 255 for n, train in table.items()} | {34: 255}
    if layout == "ade20k":
        return {0: 255} | {n: n - 1 for n in range(1, 151)}
    if layout == "coco":
        return {0: 0, 1: 1, 2: 2, 3: 255}
    classes = {"camvid": 11, "voc": 21, "folder": 3, "mmseg": 3, "kaggle": 3}[layout]
    return {n: n for n in range(classes)} | {11 if layout == "camvid" else 255: 255}


@pytest.mark.parametrize("layout", WITH_LABELS)
def test_a_layout_is_found_and_every_number_mapped(layout, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / "set")
    assert find_layout(str(root)) == (LAYOUTS[layout], root, None)
    assert list_splits(root) == list_splits(f"{layout}:{root}") == SPLITS[layout]
    table = expected(layout)
    before, after = PREFIXES.get(layout, ("", ""))
    for split, names in (("train", tiny.TRAIN), ("val", tiny.VAL)):
        opened = open_split(f"{layout}:{root}", split)
        assert opened.ids == tuple(f"{before.format(split=split)}{name}{after}" for name in sorted(names))
        assert opened.data == f"{layout}:{root}"
        assert opened.digest() == open_split(root, split).digest()
        for index, name in enumerate(sorted(names)):
            raw = tiny.numbers(layout, name)
            assert set(np.unique(raw)) == set(tiny.NUMBERS[layout])
            wanted = np.vectorize(table.__getitem__)(raw)
            label = opened.label(index)
            assert np.array_equal(label, wanted)
            assert np.array_equal(opened.raw_label(index), wanted)
            assert label.dtype == np.uint8
            assert label.flags.writeable
            assert label.flags.c_contiguous
            assert opened.has_label(index)
            with Image.open(opened.samples[index].image.path) as image:
                assert np.array_equal(opened.image(index), np.array(image.convert("RGB")))


@pytest.mark.parametrize("layout", WITH_LABELS)
def test_a_check_has_no_problem_and_counts_what_is_there(layout, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / "set")
    report = check(f"{layout}:{root}")
    assert report.problems == []
    assert (report.layout, report.folder) == (layout, str(root))
    assert report.to_json()["layout"] == layout
    train = report.splits["train"]
    table = expected(layout)
    mapped = [table[n] for name in tiny.TRAIN for n in tiny.numbers(layout, name).reshape(-1).tolist()]
    counts = np.bincount(mapped, minlength=256)
    assert train.class_pixels == counts[: len(report.classes)].tolist()
    assert train.void_pixels == counts[255] > 0
    assert (train.images, train.labelled, train.sizes) == (3, 3, {"32x48": 3})


@pytest.mark.parametrize(
    ("layout", "home"),
    [
        ("voc", "VOCdevkit/VOC2012"),
        ("voc", "VOC2012"),
        ("camvid", "CamVid"),
        ("ade20k", "ADEChallengeData2016"),
    ],
)
def test_a_data_set_may_begin_below_the_folder(layout, home, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / home)
    assert find_layout(str(tmp_path)) == find_layout(f"{layout}:{tmp_path}") == (LAYOUTS[layout], root, None)
    assert len(open_split(tmp_path, "train")) == 3


def test_names_and_colours_are_those_of_the_field(tiny, tmp_path) -> None:
    from torchvision.datasets import Cityscapes
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    classes = {layout: open_split(tiny.write(layout, tmp_path / layout), "train").classes for layout in WITH_LABELS}
    assert dict(zip(classes["camvid"].names, classes["camvid"].colours, strict=True)) == CAMVID
    trained = sorted((e for e in Cityscapes.classes if 0 <= e.train_id < 19), key=lambda entry: entry.train_id)
    assert classes["cityscapes"].names == tuple(entry.name for entry in trained)
    assert classes["cityscapes"].colours == tuple(entry.color for entry in trained)
    assert classes["gta5"] == classes["cityscapes"]
    categories = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert classes["voc"].names == ("background", *categories[1:])
    assert {index: classes["voc"].colours[index] for index in VOC_COLOURS} == VOC_COLOURS
    assert classes["ade20k"].names[:5] == ("wall", "building", "screen, silver screen", "screen, crt", "thing 5")
    assert len(classes["ade20k"]) == 150
    assert {classes[layout].names for layout in ("folder", "mmseg", "kaggle")} == {("road", "car", "sky")}
    assert classes["coco"].names == ("background", "road", "car")


@pytest.mark.parametrize("split", ["train", "val"])
def test_torchvision_reads_the_same_voc(split, tiny, tmp_path) -> None:
    from torchvision.datasets import VOCSegmentation

    tiny.write("voc", tmp_path / "VOCdevkit/VOC2012")
    theirs = VOCSegmentation(str(tmp_path), image_set=split)
    ours = open_split(tmp_path, split)
    assert len(theirs) == len(ours)
    order = {Path(path).stem: number for number, path in enumerate(theirs.images)}
    for index, sample in enumerate(ours.ids):
        image, mask = theirs[order[sample]]
        assert np.array_equal(ours.image(index), np.array(image))
        assert np.array_equal(ours.label(index), np.array(mask))


def test_torchvision_reads_the_same_cityscapes(tiny, tmp_path) -> None:
    from torchvision.datasets import Cityscapes

    root = tiny.write("cityscapes", tmp_path / "set")
    theirs = Cityscapes(str(root), split="train", mode="fine", target_type="semantic")
    ours = open_split(root, "train")
    pairs = {(str(sample.image.path), str(sample.labels["segmentation"].path)) for sample in ours.samples}
    assert pairs == {(image, targets[0]) for image, targets in zip(theirs.images, theirs.targets, strict=True)}


def test_train_ids_are_used_as_they_are_where_there_are_no_label_ids(tiny, tmp_path) -> None:
    root = tiny.write("cityscapes", tmp_path / "set")
    mapped = open_split(root, "train")
    labels = [mapped.label(index) for index in range(len(mapped))]
    for path in sorted(root.rglob("*_labelIds.png")):
        with Image.open(path) as image:
            ids = np.vectorize(expected("cityscapes").__getitem__)(np.array(image)).astype(np.uint8)
        tiny.save_label(path.with_name(path.name.replace("labelIds", "labelTrainIds")), ids)
    both = open_split(root, "train")
    assert both.digest() == mapped.digest()
    for path in sorted(root.rglob("*_labelIds.png")):
        path.unlink()
    plain = open_split(root, "train")
    assert plain.label_map is None
    assert plain.digest() != mapped.digest()
    assert plain.ids == mapped.ids
    for index in range(len(plain)):
        assert np.array_equal(plain.label(index), labels[index])
    assert check(root).problems == []


def test_a_part_of_a_split_is_mapped_as_the_whole(tiny, tmp_path) -> None:
    split = open_split(tiny.write("cityscapes", tmp_path), "train")
    every = subset(split, range(len(split)))
    assert every.digest() == split.digest()
    assert fold_alone(split, 0, 2).label_map is split.label_map is not None


def test_the_digest_covers_the_mapping_and_is_what_it_was_without_one(tiny, tmp_path) -> None:
    def plain(split) -> str:
        return hashlib.sha256(json.dumps([list(split.classes.names), list(split.ids)]).encode()).hexdigest()

    for layout in WITH_LABELS:
        split = open_split(tiny.write(layout, tmp_path / layout), "train")
        assert (split.digest() == plain(split)) == (layout in ("folder", "mmseg", "kaggle", "coco", "voc"))
        other = pickle.loads(pickle.dumps(split))
        assert other.digest() == split.digest()
        if other.label_map is not None:
            table = other.label_map.copy()
            table[7] = IGNORE_INDEX if table[7] != IGNORE_INDEX else 0
            assert replace(other, label_map=table).digest() != split.digest()


def test_a_split_survives_pickling_and_a_change_of_directory(tiny, tmp_path, monkeypatch) -> None:
    tiny.write("cityscapes", tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    split = open_split("cityscapes:set", "train")
    copy = pickle.loads(pickle.dumps(split))
    monkeypatch.chdir("/")
    assert np.array_equal(copy.label(0), split.label(0))
    assert np.array_equal(copy.image(0), split.image(0))


def test_splits_without_labels(tiny, tmp_path) -> None:
    """VOC's test list, Cityscapes' train_extra, CamVid lines with an image alone."""
    voc = tiny.write("voc", tmp_path / "voc")
    tiny.save_image(voc / "JPEGImages/t.jpg")
    tiny.write_list(voc / "ImageSets/Segmentation/test.txt", ["t"])
    city = tiny.write("cityscapes", tmp_path / "city")
    tiny.save_image(city / "leftImg8bit/test/x/x_leftImg8bit.png")
    camvid = tiny.write("camvid", tmp_path / "camvid")
    tiny.save_image(camvid / "test/t.png")
    tiny.write_list(camvid / "test.txt", ["/SegNet/CamVid/test/t.png"])
    for root in (voc, city, camvid):
        assert "test" in list_splits(root)
        split = open_split(root, "test")
        assert len(split) == 1
        assert not split.has_label(0)
        assert split.label(0) is None
        assert check(root).problems == []


def test_trainaug_needs_its_labels_and_uses_them(tiny, tmp_path) -> None:
    root = tiny.write("voc", tmp_path / "voc")
    tiny.save_image(root / "JPEGImages/sbd.jpg")
    lists = root / "ImageSets/Segmentation"
    tiny.write_list(
        lists / "trainaug.txt", [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in ("a", "sbd")]
    )
    assert "trainaug" not in list_splits(root)
    for name in ("a", "sbd"):
        tiny.save_label(root / f"SegmentationClassAug/{name}.png", np.full(tiny.SIZE, 20, np.uint8))
    split = open_split(root, "trainaug")
    assert split.ids == ("a", "sbd")
    assert (split.label(0) == 20).all()
    assert not (open_split(root, "train").label(0) == 20).all()
    assert check(root).problems == []
    tiny.write_list(lists / "trainaug.txt", ["a", "sbd", "d"])
    tiny.save_label(root / "SegmentationClassAug/d.png", np.full(tiny.SIZE, 20, np.uint8))
    (problem,) = check(root).problems
    assert "more than one split" in problem
    assert "'trainaug/d = trainval/d = val/d'" in problem


def test_lists_of_one_s_own_are_splits(tiny, tmp_path) -> None:
    voc, gta = tiny.write("voc", tmp_path / "voc"), tiny.write("gta5", tmp_path / "gta5")
    tiny.write_list(voc / "ImageSets/Segmentation/train_half.txt", ["a", "", "b.jpg"])
    assert open_split(voc, "train_half").ids == ("a", "b")
    assert check(voc).problems == []
    tiny.write_list(gta / "val.txt", ["images/d.png"])
    assert open_split(gta, "val").ids == ("d",)
    for path in gta.glob("*.txt"):
        path.unlink()
    assert list_splits(gta) == ["train"]
    assert open_split(gta, "train").ids == ("a", "b", "c.1", "d")


def test_train_and_val_of_one_list_data_set_must_not_overlap(tiny, tmp_path) -> None:
    root = tiny.write("voc", tmp_path / "voc")
    tiny.write_list(root / "ImageSets/Segmentation/val.txt", ["d", "a"])
    (problem,) = check(root).problems
    assert "1 images are in more than one split" in problem
    (problem,) = check(root, ["train", "val"]).problems
    assert "'train/a = val/a'" in problem


PARTS = st.lists(st.sampled_from(["SegNet", "CamVid", "data", "x.y"]), max_size=4)


@given(parts=PARTS, absolute=st.booleans(), backslashes=st.booleans())
def test_paths_of_other_machines_count_by_their_last_two_parts(parts, absolute, backslashes, tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("lists")
    tiny.write("camvid", root)
    prefix = "".join(f"{part}/" for part in parts)
    line = " ".join(f"{'/nowhere/' * absolute}{prefix}{place}/a.png" for place in ("train", "trainannot"))
    tiny.write_list(root / "train.txt", [line.replace("/", "\\") if backslashes else line])
    split = open_split(root, "train")
    assert split.ids == ("a",)
    sample = split.samples[0]
    assert sample.image.path == root / "train/a.png"
    assert sample.labels["segmentation"].path == root / "trainannot/a.png"


def test_paths_that_exist_are_used_as_they_are(tiny, tmp_path) -> None:
    root = tiny.write("camvid", tmp_path / "camvid")
    tiny.save_image(tmp_path / "else_where/train/z.png")
    tiny.write_list(root / "train.txt", [f"{tmp_path}/else_where/train/z.png trainannot/a.png"])
    split = open_split(root, "train")
    assert (split.ids, split.samples[0].image.path) == (("z",), tmp_path / "else_where/train/z.png")
    assert split.has_label(0)


def test_a_path_that_exists_wins_over_a_prefix_and_a_drive_is_none(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write("folder", tmp_path / "voc:set")
    assert find_layout("voc:set").layout.name == "folder"
    assert split_prefix("C:/data/VOC2012") == (None, Path("C:/data/VOC2012"))
    assert split_prefix("C:\\data") == (None, Path("C:\\data"))
    assert split_prefix("/data/a:b/voc:c") == (None, Path("/data/a:b/voc:c"))
    assert split_prefix("voc:C:/data") == ("voc", Path("C:/data"))
    assert split_prefix("voc:~/x") == ("voc", Path("~/x").expanduser())
    assert len(open_split("scenes:32x48,train=2", "train")) == 2


@given(st.dictionaries(st.integers(0, 254), st.integers(0, 255), max_size=40))
def test_numbers_that_no_table_lists_stay_and_never_become_classes(class_of_number) -> None:
    classes = set(class_of_number.values()) - {IGNORE_INDEX}
    if classes & (set(range(255)) - class_of_number.keys()):
        with pytest.raises(AssertionError):
            id_table(class_of_number)
        return
    table = id_table(class_of_number)
    assert [int(i) for i in table] == [class_of_number.get(number, number) for number in range(256)]
    assert not table.flags.writeable
