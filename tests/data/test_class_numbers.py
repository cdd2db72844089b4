"""Numbers in `classes.txt`: what they mean in labels, of ids and of colours, and lists that contradict themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import ClassList, check, convert, open_split
from kdcache.data.classes import read_classes, read_numbers, write_classes
from kdcache.errors import DataError

SIZE = (8, 12)


def data(root: Path, text: str, *numbers: int) -> Path:
    """A folder of one labelled image in train and val, whose label holds these numbers in equal parts."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text(text, encoding="utf-8")
    for seed, split in enumerate(("train", "val")):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{split}/a.png")
        Image.fromarray(np.resize(np.array(numbers, np.uint8), SIZE)).save(root / f"labels/{split}/a.png")
    return root


@pytest.mark.parametrize(
    ("text", "names", "numbers"),
    [
        ("sky\nroad\n", ("sky", "road"), None),
        ("0 sky\n1 road\n", ("sky", "road"), None),
        ("1: road\n0: sky\n", ("sky", "road"), None),
        ("void: 0\nsky\nroad\n", ("sky", "road"), {0: 255, 1: 0, 2: 1}),
        ("sky\nroad\nUnlabeled: 2\n", ("sky", "road"), {0: 0, 1: 1, 2: 255}),
        ("sky\nvoid = 1\nroad\n", ("sky", "road"), {0: 0, 1: 255, 2: 1}),
        ("void: 255\nsky\nroad\n", ("sky", "road"), None),
        ("void 0\nignore: 7\nsky\nroad\n", ("sky", "road"), {0: 255, 7: 255, 1: 0, 2: 1}),
        ("0 void\n1 sky\n2 road\n", ("sky", "road"), {0: 255, 1: 0, 2: 1}),
        ("7 road 1 2 3\n23: sky #010204\n", ("road", "sky"), {7: 0, 23: 1}),
        ("road: 7 1 2 3\nsky = 23\n", ("road", "sky"), {7: 0, 23: 1}),
        ("3, traffic light\n4)\tcar\n5. bus\n", ("traffic light", "car", "bus"), {3: 0, 4: 1, 5: 2}),
        ("3 wheels\nroad\n", ("3 wheels", "road"), None),
        ("0\n1\n", ("0", "1"), None),
        ("lane 1\nlane 2\n", ("lane 1", "lane 2"), None),
        ("void 1 2 3\nvoid: 4 5 6\nroad 7 8 9\n", ("void", "road"), None),
        ("sky # 3 lines\nvoid: 0 # no class\nroad\n", ("sky", "road"), {0: 255, 1: 0, 2: 1}),
    ],
)
def test_a_line_may_give_the_number_that_its_name_has_in_labels(text, names, numbers, tmp_path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    assert read_classes(tmp_path).names == names
    assert read_numbers(tmp_path) == numbers


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0: sky\nroad\n", "has no number, but line 1"),
        ("sky: 3\nroad\ncar: 4\n", "has no number, but line 1"),
        ("name: id\nsky: 0\nroad: 1\n", "has no number, but line 2"),
        ("1 sky\n1 road\n", "lines 1 and 2 have 1"),
        ("0: sky\n1: road\nvoid: 1\n", "lines 2 and 3 have 1"),
        ("0: sky\n255: road\n", "line 2 has 255"),
        ("0: sky\n300: road\n", "line 2 has 300"),
        ("sky\nroad\nvoid: -1\n", "line 3 has -1"),
        ("sky\nroad\nvoid: 0, 255\n", "'void: 0, 255' gives void no number"),
        ("void:\nsky\nroad\n", "'void:' gives void no number"),
        ("2 wheels\n4 wheels\n", "'wheels' 2 times"),
        ("void: 0\n", "No classes in "),
    ],
)
def test_lists_that_contradict_themselves_name_the_line(text, problem, tmp_path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match="classes") as refused:
        read_classes(tmp_path)
    assert problem in str(refused.value)
    assert refused.value.fix


def test_labels_are_mapped_once_and_the_map_is_part_of_the_digest(tmp_path) -> None:
    plain = open_split(data(tmp_path / "plain", "sky\nroad\ncar\n", 0, 1, 2), "train")
    split = open_split(data(tmp_path / "data", "void: 0\nsky\nroad\ncar\n", 0, 1, 2), "train")
    label = split.label(0)
    assert np.unique(label[plain.label(0) == 0]).tolist() == [255]
    assert np.array_equal(label[label != 255], plain.label(0)[label != 255] - 1)
    assert split.classes.names == plain.classes.names
    assert split.digest() != plain.digest()


@pytest.mark.parametrize("layout", ["folder", "mmseg", "kaggle"])
def test_numbers_hold_in_every_layout_of_ones_own_and_convert_to_class_ids(layout, tmp_path) -> None:
    root = data(tmp_path / "data", "7: sky\n11: road\nvoid: 0\n", 0, 7, 11)
    if layout == "mmseg":
        (root / "images").rename(root / "img_dir")
        (root / "labels").rename(root / "ann_dir")
    elif layout == "kaggle":
        (root / "labels").rename(root / "masks")
    report = check(root)
    assert (report.layout, report.problems) == (layout, [])
    assert report.numbers == {0: 255, 7: 0, 11: 1}
    convert(root, tmp_path / "out")
    for place in (root, tmp_path / "out"):
        assert np.unique(open_split(place, "train", exports=True).label(0)).tolist() == [0, 1, 255]
    assert open_split(tmp_path / "out", "train").label_map is None


def test_a_number_that_no_line_has_is_refused_never_taken_for_a_class(tmp_path) -> None:
    for number in (0, 9):
        root = data(tmp_path / str(number), "1: sky\n2: road\n", 1, 2, number)
        with pytest.raises(DataError, match=r"classes\.txt") as refused:
            open_split(root, "train").label(0)
        assert str(number) in f"{refused.value.problem} {refused.value.problem}"
        assert "`void: NUMBER`" in refused.value.fix
        assert any(str(number) in problem for problem in check(root).problems)


def test_colours_stand_for_the_numbers(tmp_path) -> None:
    root = data(tmp_path / "data", "5: sky 0 0 200\n6: road 90 0 90\nvoid: 0 9 9 9\n", 5, 6)
    ids = np.resize(np.array([0, 1, 2], np.uint8), SIZE)
    Image.fromarray(np.array([(0, 0, 200), (90, 0, 90), (9, 9, 9)], np.uint8)[ids]).save(root / "labels/train/a.png")
    assert np.array_equal(open_split(root, "train").label(0), np.array([0, 1, 255], np.uint8)[ids])


@pytest.mark.parametrize("names", [("3 wheels", "4 wheels"), ("car: 3", "bus"), ("2 legs", "sky")])
def test_names_with_numbers_survive_writing(names, tmp_path) -> None:
    write_classes(tmp_path, ClassList(names))
    assert read_classes(tmp_path) == ClassList(names)
    assert read_numbers(tmp_path) is None


def test_labels_that_may_count_from_1_are_doubted_with_the_line_to_write(tmp_path) -> None:
    every = check(data(tmp_path / "every", "sky\nroad\ncar\n", 0, 1, 2))
    assert every.problems == []
    assert "if 0 means unlabelled" in every.warnings[0]
    assert check(data(tmp_path / "void", "sky\nroad\ncar\n", 0, 1, 2, 255)).warnings == []
    assert check(data(tmp_path / "said", "0: sky\n1: road\n2: car\n", 0, 1, 2)).warnings == []
    last = check(data(tmp_path / "last", "sky\nroad\ncar\nbus\n", 0, 1, 2))
    assert "`void: 0`" in last.warnings[0]
    beyond = check(data(tmp_path / "beyond", "sky\nroad\n", 0, 1, 2))
    assert "`void: 0`" in beyond.problems[0]


@pytest.mark.parametrize("across", [False, True])
def test_masks_of_0_and_255_among_masks_of_0_and_1_are_found_per_file(across, tmp_path) -> None:
    root = data(tmp_path / "data", "background\nlesion\n", 0, 1)
    Image.fromarray(np.resize(np.array([0, 255], np.uint8), SIZE)).save(
        root / f"labels/{'val' if across else 'train'}/{'a' if across else 'b'}.png"
    )
    Image.fromarray(np.full((*SIZE, 3), 7, np.uint8)).save(root / "images/train/b.png")
    (problem,) = check(root).problems
    assert repr("val/a" if across else "train/b") in problem
    assert "--binary" in problem
    convert(root, tmp_path / "out", binary=True)
    assert check(tmp_path / "out").problems == []


def test_void_borders_of_binary_masks_are_not_doubted(tmp_path) -> None:
    root = data(tmp_path / "data", "background\nlesion\n", 0, 1, 255)
    Image.fromarray(np.resize(np.array([0, 255], np.uint8), SIZE)).save(root / "labels/val/a.png")
    assert check(root).problems == []
