"""Every refusal of the public layouts, from real files: the problem and the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcache.data import check, open_split
from kdcache.data.layouts.registry import LAYOUTS
from kdcache.errors import DataError

LISTS = "ImageSets/Segmentation"


def refusal(action: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as caught:
        action()
    assert caught.value.problem
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("layout", [name for name, one in LAYOUTS.items() if name != "folder" and not one.of_file])
def test_no_folder_and_a_folder_of_another_layout(layout, tiny, tmp_path) -> None:
    assert (
        f"Data folder not found: {tmp_path}/nowhere"
        == refusal(lambda: open_split(f"{layout}:{tmp_path}/nowhere", "train")).problem
    )
    tiny.write("folder", tmp_path / "mine")
    error = refusal(lambda: open_split(f"{layout}:{tmp_path}/mine", "train"))
    assert LAYOUTS[layout].looks_for in error.rule
    assert f"not of layout {layout}, but of layout folder" in error.problem
    assert f"folder:{tmp_path}/mine" in error.fix
    (tmp_path / "file").write_text("x")
    assert f"Not a folder: {tmp_path}/file" == refusal(lambda: open_split(f"{layout}:{tmp_path}/file", "train")).problem
    assert repr(f"{layout}:") in refusal(lambda: open_split(f"{layout}:", "train")).problem


@pytest.mark.parametrize("layout", ["folder", "camvid", "voc", "cityscapes", "gta5", "ade20k"])
def test_a_missing_split_names_those_that_exist(layout, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / "set")
    problem = refusal(lambda: open_split(root, "tset")).problem
    assert "'tset'" in problem
    assert "train" in problem
    assert "val" in problem
    assert "'../train'" in refusal(lambda: open_split(root, "../train")).problem


def test_a_folder_of_no_layout_lists_what_was_looked_for(tmp_path) -> None:
    rule = refusal(lambda: open_split(tmp_path, "train")).rule
    assert all(f"{name}: {layout.looks_for}" in rule for name, layout in LAYOUTS.items())


@pytest.mark.parametrize("above", ["data", "downloads/data"])
def test_a_folder_above_the_data_names_where_they_begin(above, tiny, tmp_path) -> None:
    root = tiny.write("mmseg", tmp_path / above / "street")
    (tmp_path / above / "notes").mkdir()
    error = refusal(lambda: open_split(tmp_path / above.split("/")[0], "train"))
    assert error.fix == f"Name the folder where the data begin: {root} (mmseg)."


def test_a_folder_of_two_layouts_names_both(tiny, tmp_path) -> None:
    tiny.write("voc", tmp_path / "VOCdevkit/VOC2012")
    tiny.write("ade20k", tmp_path / "ADEChallengeData2016")
    error = refusal(lambda: open_split(tmp_path, "train"))
    assert "VOC2012" in error.problem
    assert "ADEChallengeData2016" in error.problem
    assert f"ade20k:{tmp_path} or voc:{tmp_path}" in error.fix
    assert len(open_split(f"voc:{tmp_path}", "train")) == 3


@pytest.mark.parametrize(
    ("prefix", "near"),
    [("vco", "voc"), ("VOC", "voc"), ("cityscape", "cityscapes"), ("ade", "ade20k"), ("gta", "gta5")],
)
def test_an_unknown_prefix_gets_the_nearest_name(prefix, near) -> None:
    error = refusal(lambda: open_split(f"{prefix}:/data/set", "train"))
    assert repr(prefix) in error.problem
    assert error.fix == f"Did you mean {near}?"
    assert all(name in error.rule for name in (*LAYOUTS, "scenes"))


def test_a_prefix_that_is_near_to_none(tmp_path) -> None:
    assert "layout" in refusal(lambda: open_split("s3://bucket/data", "train")).fix


def remove(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


def add_line(name: str, line: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text((root / name).read_text() + line + "\n")


BROKEN_LISTS = {
    "camvid image": ("camvid", remove("train/a.png"), "split 'train': 'train/a.png'"),
    "camvid annotation": ("camvid", remove("trainannot/a.png"), "split 'train': 'trainannot/a.png'"),
    "camvid line": (
        "camvid",
        add_line("train.txt", "train/x.png trainannot/x.png"),
        "'train/x.png', 'trainannot/x.png'",
    ),
    "camvid words": ("camvid", add_line("train.txt", "train/a b.png trainannot/a b.png"), "train.txt: it has 4 words"),
    "camvid twice": (
        "camvid",
        add_line("train.txt", "train/a.png"),
        "train/a.png and train/a.png (line 4 of train.txt)",
    ),
    "voc image": ("voc", remove("JPEGImages/a.jpg"), "split 'train': 'JPEGImages/a'"),
    "voc label": ("voc", remove("SegmentationClass/a.png"), "split 'train': 'SegmentationClass/a.png'"),
    "voc line": ("voc", add_line(f"{LISTS}/train.txt", "2007_000032"), "split 'train': 'JPEGImages/2007_000032'"),
    "voc twice": (
        "voc",
        add_line(f"{LISTS}/train.txt", "b"),
        "line 1 and line 4 of ImageSets/Segmentation/train.txt",
    ),
    "gta5 image": ("gta5", remove("images/a.png"), "split 'train': 'images/a'"),
    "gta5 label": ("gta5", remove("labels/a.png"), "split 'train': 'labels/a.png'"),
    "gta5 line": ("gta5", add_line("train.txt", "00009.png"), "split 'train': 'images/00009'"),
    "cityscapes orphan": (
        "cityscapes",
        remove("leftImg8bit/train/trainstadt/trainstadt_a_leftImg8bit.png"),
        "train: 'trainstadt/trainstadt_a_gtFine_labelIds.png'",
    ),
    "ade20k orphan": ("ade20k", remove("images/training/ADE_train_a.jpg"), "training: 'ADE_train_a.png'"),
}


@pytest.mark.parametrize("case", BROKEN_LISTS)
def test_files_that_are_not_there(case, tiny, tmp_path) -> None:
    layout, damage, received = BROKEN_LISTS[case]
    root = tiny.write(layout, tmp_path / "set")
    damage(root)
    error = refusal(lambda: open_split(root, "train"))
    assert received in error.problem
    assert str(root) in error.problem
    if "words" not in case:
        (problem,) = check(root, ["train"]).problems
        assert problem.startswith("train: ")


@pytest.mark.parametrize(
    ("layout", "name"), [("camvid", "train.txt"), ("voc", f"{LISTS}/train.txt"), ("gta5", "train.txt")]
)
def test_lists_that_are_empty_or_no_text(layout, name, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / "set")
    (root / name).write_text("\n  \n")
    error = refusal(lambda: open_split(root, "train"))
    assert "No images in " in error.problem
    assert "'train'" in error.problem
    assert refusal(lambda: check(root, ["train"])).problem == error.problem
    (root / name).write_bytes(b"\xff\xfe\x00a")
    assert str(root / name) in refusal(lambda: open_split(root, "train")).problem


def test_a_list_of_which_nothing_is_there_says_so(tiny, tmp_path) -> None:
    root = tiny.write("voc", tmp_path / "set")
    (root / LISTS / "train.txt").write_text("x\ny\n")
    for action in (lambda: open_split(root, "train"), lambda: check(root)):
        assert "split 'train': 'JPEGImages/x', 'JPEGImages/y'" in refusal(action).problem


TWICE = {
    "all classes and void": [*range(19), 255],
    "some classes and void": [0, 1, 255],
    "without void": [0, 2, 5, 8, 10, 13],
}


def put_label(tiny, layout: str, root: Path, numbers: list[int]) -> Path:
    """Overwrite the label of the first training sample."""
    name = {
        "cityscapes": "gtFine/train/trainstadt/trainstadt_a_gtFine_labelIds.png",
        "gta5": "labels/a.png",
        "camvid": "trainannot/a.png",
        "voc": "SegmentationClass/a.png",
        "ade20k": "annotations/training/ADE_train_a.png",
    }[layout]
    tiny.save_label(root / name, np.resize(numbers, tiny.SIZE).astype(np.uint8))
    return root / name


@pytest.mark.parametrize("layout", ["cityscapes", "gta5"])
@pytest.mark.parametrize("numbers", TWICE.values(), ids=TWICE)
def test_ids_that_were_mapped_already_are_refused(layout, numbers, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / "set")
    path = put_label(tiny, layout, root, numbers)
    split = open_split(root, "train")
    for action in (lambda: split.label(0), lambda: split.raw_label(0)):
        error = refusal(action)
        assert f"{path} as labelIds: it has train ids ({', '.join(map(str, numbers))})" in error.problem
        assert "labelTrainIds" in error.fix
    report = check(root, ["train"])
    assert list(report.splits["train"].unreadable) == [split.ids[0]]
    (problem,) = report.problems
    assert "it has train ids" in problem


@pytest.mark.parametrize(
    "numbers",
    [[0, 1, 2, 3], [1, 4, 7, 8, 12, 16, 17], [7, 11, 255, 26], [7], [0, 7, 8, 9, 11]],
    ids=["held back", "tunnel", "with 255", "road alone", "parking"],
)
def test_streets_that_show_little_are_not_taken_for_mapped(numbers, tiny, tmp_path) -> None:
    root = tiny.write("cityscapes", tmp_path / "set")
    put_label(tiny, "cityscapes", root, numbers)
    label = open_split(root, "train").label(0)
    class_of = {7: 0, 8: 1, 11: 2, 12: 3, 17: 5, 26: 13}
    assert set(np.unique(label)) == {class_of.get(number, 255) for number in numbers}


BEYOND = {"cityscapes": 34, "gta5": 35, "camvid": 12, "voc": 21, "ade20k": 151}


@pytest.mark.parametrize("layout", BEYOND)
def test_numbers_that_are_no_class_are_counted_as_the_file_has_them(layout, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / "set")
    wrong = BEYOND[layout]
    path = put_label(tiny, layout, root, [*tiny.NUMBERS[layout], wrong, 254])
    split = open_split(root, "train")
    problem = refusal(lambda: split.label(0)).problem
    assert f"id {wrong} in " in problem
    assert "id 254 in " in problem
    assert str(path) in problem
    raw = split.raw_label(0)
    assert {wrong, 254} <= set(np.unique(raw))
    out = check(root, ["train"]).splits["train"].out_of_range
    assert {sample: set(ids) for sample, ids in out.items()} == {split.ids[0]: {str(wrong), "254"}}


def test_train_ids_beside_label_ids_of_other_samples(tiny, tmp_path) -> None:
    root = tiny.write("cityscapes", tmp_path / "set")
    path = root / "gtFine/train/trainstadt/trainstadt_a_gtFine_labelIds.png"
    path.rename(path.with_name("trainstadt_a_gtFine_labelTrainIds.png"))
    assert "trainstadt_a_gtFine_labelIds.png" in refusal(lambda: open_split(root, "train")).problem
    (problem,) = check(root, ["train"]).problems
    assert "1 files are missing" in problem


def test_train_id_files_that_hold_label_ids(tiny, tmp_path) -> None:
    root = tiny.write("cityscapes", tmp_path / "set")
    for path in sorted(root.rglob("*_labelIds.png")):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    error = refusal(lambda: open_split(root, "train").label(0))
    assert "0 to 18" in error.rule
    assert "id 33 in" in error.problem


def test_a_gta5_label_of_another_size(tiny, tmp_path) -> None:
    root = tiny.write("gta5", tmp_path / "set")
    tiny.save_label(root / "labels/a.png", np.full((30, 48), 7, np.uint8))
    assert "label 30 x 48, image 32 x 48" in refusal(lambda: open_split(root, "train").label(0)).problem
    assert list(check(root, ["train"]).splits["train"].mismatched) == ["a"]


def test_colours_are_no_ids(tiny, tmp_path) -> None:
    root = tiny.write("voc", tmp_path / "set")
    tiny.save_image(root / "SegmentationClass/a.png")
    assert "8-bit RGB" in refusal(lambda: open_split(root, "train").label(0)).problem


@pytest.mark.parametrize("content", [None, "", "Idx\tName\n1\twall\n", b"\xff\xfe"])
def test_ade20k_without_its_names(content, tiny, tmp_path) -> None:
    root = tiny.write("ade20k", tmp_path / "set")
    names = root / "objectInfo150.txt"
    if content is None:
        names.unlink()
    else:
        names.write_bytes(content if isinstance(content, bytes) else content.encode())
    for action in (lambda: open_split(root, "train"), lambda: check(root)):
        error = refusal(action)
        assert str(names) in error.problem
        assert "objectInfo150.txt" in error.fix


def test_ade20k_names_that_skip_an_id(tiny, tmp_path) -> None:
    root = tiny.write("ade20k", tmp_path / "set")
    lines = (root / "objectInfo150.txt").read_text().splitlines()
    (root / "objectInfo150.txt").write_text("\n".join([*lines[:20], *lines[21:]]))
    assert "its 149 lines of classes" in refusal(lambda: open_split(root, "train")).problem
