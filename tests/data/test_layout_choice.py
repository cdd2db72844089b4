"""Which layout a folder has when more than one could be meant, whose class names count, and the messages about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.data import check, list_splits, open_split
from kdcache.data.layouts.registry import LAYOUTS, find_layout
from kdcache.errors import DataError

OWN = ("lane", "wheel", "cloud")


def own_data(tiny, root: Path, classes: tuple[str, ...] = OWN) -> Path:
    """images/, labels/ and classes.txt, without splits; labels hold all ids and void."""
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    for name in "abcdef":
        tiny.save_image(root / f"images/{name}.png")
        ids = np.resize([*range(len(classes)), 255], tiny.SIZE)
        tiny.save_label(root / f"labels/{name}.png", ids.astype(np.uint8))
    return root


@pytest.mark.parametrize("classes", [OWN, LAYOUTS["gta5"].classes(Path("/nowhere")).names])
def test_one_s_own_pictures_without_splits_are_not_gta5(classes, tiny, tmp_path) -> None:
    """Not even with Cityscapes' names: GTA5's release has no classes.txt, and its ids would void most of the labels."""
    root = own_data(tiny, tmp_path / "mine", classes)
    assert find_layout(str(root)) == (LAYOUTS["folder"], root, None)
    assert list_splits(root) == ["train"]
    split = open_split(root, "train")
    assert (split.ids, split.classes.names) == (tuple("abcdef"), classes)
    assert set(np.unique(split.label(0))) == {*range(len(classes)), 255}
    report = check(root)
    assert (report.problems, report.warnings) == ([], [])
    assert report.why == "pictures right in images/ and classes.txt"


def test_lists_divide_one_s_own_pictures(tiny, tmp_path) -> None:
    root = own_data(tiny, tmp_path / "mine")
    tiny.write_list(root / "train.txt", ["a", "images/b.png", "c"])
    tiny.write_list(root / "val.txt", ["d"])
    assert list_splits(root) == ["train", "val"]
    assert open_split(root, "train").ids == ("a", "b", "c")
    assert open_split(root, "val").ids == ("d",)
    assert check(root).why == "pictures right in images/ and classes.txt, divided by train.txt, val.txt"
    tiny.write_list(root / "val.txt", ["d", "x"])
    with pytest.raises(DataError, match="images/x"):
        open_split(root, "val")


def test_a_split_that_is_not_there_says_how_to_make_one(tiny, tmp_path) -> None:
    for layout, root in (
        ("folder", own_data(tiny, tmp_path / "mine")),
        ("gta5", tiny.write("gta5", tmp_path / "gta5")),
    ):
        for path in root.glob("[tv]*.txt"):
            path.unlink()
        with pytest.raises(DataError) as caught:
            open_split(root, "val")
        assert find_layout(str(root)).layout.name == layout
        assert "--fold 0/5 --val-split train --val-fold 0/5" in caught.value.fix
    with pytest.raises(DataError) as caught:
        open_split(tiny.write("folder", tmp_path / "split"), "tset")
    assert "--fold" not in caught.value.fix


def test_gta5_without_a_class_list_stays_gta5(tiny, tmp_path) -> None:
    root = tiny.write("gta5", tmp_path / "set")
    assert find_layout(str(root)).layout.name == "gta5"
    assert "the layout's own classes" in check(root).why
    (root / "classes.txt").write_text("\n".join(LAYOUTS["gta5"].classes(root).names))
    assert find_layout(f"gta5:{root}").layout.name == "gta5"  # who names it means it
    assert check(f"gta5:{root}").problems == []
    # Without a name it is taken for one's own, and labelIds give themselves away.
    assert "no class (19 in" in " ".join(check(root).problems)


@pytest.mark.parametrize("layout", ["camvid", "voc", "cityscapes", "ade20k", "gta5"])
def test_a_class_list_in_the_root_wins_over_the_layout_s_names(layout, tiny, tmp_path) -> None:
    """Names and numbers: labels then hold the lines' numbers, whatever table the layout is published with."""
    root = tiny.write(layout, tmp_path / "set")
    published = open_split(root, "train")
    own = tuple(f"mine {number}" for number in range(152))
    (root / "classes.txt").write_text("\n".join(own))
    split = open_split(f"{layout}:{root}", "train")
    assert split.classes.names == own
    assert split.label_map is None
    name = sorted(tiny.TRAIN)[0]
    assert np.array_equal(split.label(0), tiny.numbers(layout, name))
    assert split.digest() != published.digest()
    report = check(f"{layout}:{root}")
    assert report.classes.names == own
    assert report.why.endswith("the classes of classes.txt")
    # The same names say nothing new.
    (root / "classes.txt").write_text("\n".join(published.classes.names))
    again = open_split(f"{layout}:{root}", "train")
    assert again.digest() == published.digest()
    assert again.classes == published.classes
    assert check(f"{layout}:{root}").why.endswith("the layout's own classes")


def test_numbers_beyond_one_s_own_classes_are_refused_with_a_way_back(tiny, tmp_path) -> None:
    root = tiny.write("camvid", tmp_path / "set")
    (root / "classes.txt").write_text("\n".join(OWN))
    with pytest.raises(DataError) as caught:
        open_split(root, "train").label(0)
    assert "0 to 2 (the lines of classes.txt)" in caught.value.rule
    assert "id 11 in" in caught.value.problem
    assert "remove classes.txt" in caught.value.fix
    (root / "classes.txt").unlink()
    open_split(root, "train").label(0)


@pytest.mark.parametrize("content", ["", "a\na\n", "only one\n"])
def test_a_class_list_that_is_none_is_refused_in_every_layout(content, tiny, tmp_path) -> None:
    for layout in tiny.NUMBERS:
        root = tiny.write(layout, tmp_path / layout)
        (root / "classes.txt").write_text(content)
        with pytest.raises(DataError) as caught:
            open_split(f"{layout}:{root}", "train", exports=True)
        assert "classes.txt" in caught.value.problem


def test_a_class_list_above_the_data_is_not_passed_over(tiny, tmp_path) -> None:
    root = tiny.write("voc", tmp_path / "VOCdevkit/VOC2012")
    names = open_split(tmp_path, "train").classes.names
    (tmp_path / "classes.txt").write_text("\n".join(names))
    assert open_split(tmp_path, "train").classes.names == names
    (tmp_path / "classes.txt").write_text("\n".join(OWN))
    for data in (tmp_path, f"voc:{tmp_path}"):
        with pytest.raises(DataError) as caught:
            open_split(data, "train")
        assert str(tmp_path / "classes.txt") in caught.value.problem
        assert str(root) in caught.value.fix
    assert open_split(root, "train").classes.names == names
    (tmp_path / "classes.txt").rename(root / "classes.txt")
    assert open_split(tmp_path, "train").classes.names == OWN


def test_what_keeps_a_folder_from_being_one_of_one_s_own(tiny, tmp_path) -> None:
    root = own_data(tiny, tmp_path / "mine")
    (root / "classes.txt").unlink()
    (root / "labels").rename(root / "gt")
    with pytest.raises(DataError) as caught:
        open_split(root, "train")
    assert "add classes.txt" in caught.value.fix
    assert "(gt) to labels" in caught.value.fix
    (root / "gt").rename(root / "labels")
    (root / "classes.txt").write_text("\n".join(OWN))
    assert len(open_split(root, "train")) == 6


def test_a_folder_that_could_be_two_layouts_is_asked_about(tiny, tmp_path) -> None:
    root = tiny.write("folder", tmp_path / "set")
    tiny.write("voc", root)
    with pytest.raises(DataError) as caught:
        open_split(root, "train")
    assert f"folder:{root} or voc:{root}" in caught.value.fix
    assert open_split(f"folder:{root}", "train").classes.names == ("road", "car", "sky")
