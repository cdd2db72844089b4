"""Data that can be read and are wrong all the same: each is named with a number and a remedy, sound data are not."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kdcache.data import CheckReport, check, write_scenes
from kdcache.data.classes import write_classes
from kdcache.data.layouts.published.cityscapes import CLASSES as CITYSCAPES
from kdcache.data.layouts.published.cityscapes import to_classes

NAMES = ("road", "car", "sky")
TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tiny.py")))


def fill(builder, *values: int, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Two labelled images a split, whose labels hold these numbers in equal parts."""
    for split in splits:
        for name in ("a", "bcdefg"):
            builder.image(f"{split}{name}.png", split)
            builder.label(f"{split}{name}.png", np.resize(np.array(values, np.uint8), (6, 8)), split)
    return builder.root


def the(sentences: list[str]) -> str:
    assert len(sentences) == 1, sentences
    return sentences[0]


def other_warnings(report: CheckReport) -> list[str]:
    """The warnings but the one that every class list without void gets, which test_class_numbers.py looks at."""
    return [text for text in report.warnings if "if 0 means unlabelled" not in text]


def sound(report: CheckReport) -> bool:
    return report.problems == [] and other_warnings(report) == []


def test_sound_data_are_not_doubted(builder, tmp_path) -> None:
    assert sound(check(fill(builder, 0, 1, 2, 255)))
    assert sound(check("scenes:64x96,train=6,val=2"))
    assert sound(check(write_scenes(tmp_path / "scenes", "scenes:64x96,train=6,val=2,unlabelled=2")))


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("id,name\nroad\ncar\nsky\n", "problem", "('id,name')"),
        ("Name\nroad\ncar\nsky\n", "problem", "moves 3 classes by one"),
        ("id name r g b\n0 road\n1 car\n2 sky\n", "problem", "is a header"),
        ("0 road\n1 car\n2 sky\n", "sound", ""),
        ("2 sky\n0 road\n1 car\n", "sound", ""),
        ("1 road\n2 car\n3 sky\n", "problem", "classes.txt does not list its number 0"),
        ("0 road\n1 car\nsky\n", "warning", "all class names but 'sky' begin with a number"),
        ("road 0\ncar 1\nsky 2\n", "warning", "all 3 class names end with a number (such as 'road 0')"),
        ("road\nvoid\nsky\n", "warning", "class 1 is called 'void' and counts like any other class"),
        ("road,128,64,128\ncar,0,0,1\nsky,0,0,2\n", "warning", "all 3 class names have commas"),
        ("road\n4 wheels\nsky\n", "sound", ""),
        ("red\ngreen\nblue\n", "sound", ""),
        ("0\n1\n2\n", "sound", ""),
        ("class 7\nroad\nsky, cloudy\n", "sound", ""),
    ],
)
def test_class_lists_that_are_tables(builder, text: str, kind: str, message: str) -> None:
    builder.classes(text)
    root = fill(builder, *range(sum(bool(line) for line in text.splitlines())))
    report = check(root)
    assert bool(report.problems) == (kind in ("problem", "both"))
    assert bool(other_warnings(report)) == (kind in ("warning", "both"))
    assert kind == "sound" or message in " ".join(report.problems + report.warnings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 255), "masks of 0 and 255"),
        ((0,), "nothing to tell apart"),
        ((2,), "one class, 'sky' (2)"),
        ((1, 255), "one class, 'car' (1)"),
        ((255,), "all pixels of 2 labels are void"),
    ],
)
def test_labels_that_teach_nothing_are_a_problem(builder, values, message: str) -> None:
    report = check(fill(builder, *values))
    assert len(report.problems) == 2  # one for each split
    assert all(message in problem for problem in report.problems)
    assert the(check(builder.root, ["train"]).problems).startswith("train: ")


def test_one_class_in_val_alone_may_be_meant(builder) -> None:
    fill(builder, 0, 1, 2, splits=("train",))
    assert sound(check(fill(builder, 1, splits=("val",))))


def test_one_class_in_train_alone_is_a_problem(builder) -> None:
    fill(builder, 1, splits=("train",))
    assert the(check(fill(builder, 0, 1, 2, splits=("val",))).problems).startswith(
        "train: the labels (2) hold one class"
    )


@pytest.mark.parametrize(("labelled", "warned"), [(4, True), (5, False)])
def test_void_above_ninety_percent_is_warned_of_with_its_share(builder, labelled: int, warned: bool) -> None:
    values = [number % 3 if number < labelled else 255 for number in range(48)]
    report = check(fill(builder, *values, splits=("train",)))
    assert report.problems == []
    assert bool(report.warnings) == warned
    assert not warned or "train: 91.7 % of the labelled pixels are void" in the(report.warnings)


def test_classes_that_no_label_has(builder) -> None:
    warning = the(check(fill(builder, 0, 2)).warnings)
    assert "1 of 3 classes are in no label: 'car'" in warning
    assert "leave them out of the class list" in warning


def test_the_classes_of_a_public_layout_give_way_to_a_list_of_ones_own(tmp_path) -> None:
    root = TINY.write("voc", tmp_path / "set")
    for file in (root / "SegmentationClass").glob("*.png"):
        TINY.save_label(file, TINY.numbers("folder", file.stem))
    warning = the(check(f"voc:{root}").warnings)
    assert "18 of 21 classes are in no label" in warning
    assert warning.endswith(f"list the data's own classes in {root / 'classes.txt'}")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    assert sound(check(f"voc:{root}"))


def test_classes_that_train_lacks(builder) -> None:
    fill(builder, 0, 1, splits=("train",))
    warning = the(check(fill(builder, 0, 1, 2, splits=("val",))).warnings)
    assert "1 of 3 classes are in no label of train, but in another split: 'sky'" in warning
    assert sound(check(builder.root, ["val"]))


def test_ids_that_are_no_class_are_listed_by_number_files_and_pixels(builder) -> None:
    root = fill(builder, 0, 1, 2, splits=("train",))
    builder.label("traina.png", np.resize(np.array([0, 1, 2, 7], np.uint8), (6, 8)))
    builder.label("trainbcdefg.png", np.resize(np.array([0, 1, 2, 7, 7, 200], np.uint8), (6, 8)))
    problem = the(check(root).problems)
    assert "2 labels have ids that are no class (7 in 2 files, 28 pixels; 200 in 1 file, 8 pixels)" in problem
    many = np.arange(48, dtype=np.uint8).reshape(6, 8)
    builder.label("traina.png", many)
    assert "and 40 more ids)" in the(check(root).problems)  # 3 to 47 and 200, of which six are shown


@pytest.mark.parametrize("place", ["gt/{split}", "annotations/{split}"])
def test_labels_in_another_folder(builder, place: str) -> None:
    root = fill(builder, 0, 1, 2)
    for split in ("train", "val"):
        target = root / place.format(split=split)
        target.parent.mkdir(exist_ok=True)
        (root / "labels" / split).rename(target)
    (root / "labels").rmdir()
    problems = check(root).problems
    assert len(problems) == 2
    assert (
        "none of 2 images has a label in labels/train/, but 2 have one in " + place.format(split="train") in problems[0]
    )
    # The remedy works.
    (root / place.partition("/")[0]).rename(root / "labels")
    assert sound(check(root))


def test_unsplit_labels_in_another_folder(builder) -> None:
    root = unsplit(fill(builder, 0, 1, 2))
    (root / "labels").rename(root / "gt")
    assert "none of 4 images has a label in labels/, but 4 have one in gt/" in the(check(root).problems)


def unsplit(root: Path) -> Path:
    for kind in ("images", "labels"):
        for split in list((root / kind).iterdir()):
            for path in split.iterdir():
                path.rename(root / kind / path.name)
            split.rmdir()
    return root


def test_no_label_at_all(builder) -> None:
    for split in ("train", "val"):
        builder.image(f"{split}.png", split)
    assert "none of 2 images has a label" in the(check(builder.root).problems)
    assert sound(check(builder.root, ["val"]))  # it was asked for by name


def test_only_train_needs_labels(builder) -> None:
    fill(builder, 0, 1, 2, splits=("val",))
    builder.image("x.png", "train")
    assert the(check(builder.root).problems).startswith("train: none of 1 images has a label")
    builder.label("x.png", np.resize(np.arange(3, dtype=np.uint8), (6, 8)))
    builder.image("yy.png", "extra")
    assert sound(check(builder.root))


def test_pictures_beside_the_folders_of_splits(builder) -> None:
    root = fill(builder, 0, 1, 2)
    Image.new("RGB", (8, 6)).save(root / "images/loose.png")
    assert "1 pictures right in images/ belong to no split" in the(check(root).warnings)


def palette(colours: list[tuple[int, int, int]]) -> Callable[[np.ndarray], Image.Image]:
    def make(indices: np.ndarray) -> Image.Image:
        image = Image.fromarray(indices)
        image.putpalette([channel for colour in colours for channel in colour])
        return image

    return make


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("classes", "colours", "message"),
    [
        ("a #ff0000\nb #00ff00\nc #0000ff\n", [BLUE, RED, GREEN], "index 0 has the colour of 'c'"),
        ("a #ff0000\nb #00ff00\nc #0000ff\n", [RED, BLUE, GREEN], "index 1 has the colour of 'c'"),
        ("a #ff0000\nb #00ff00\nc #0000ff\n", [RED, GREEN, BLUE], ""),
        ("a #ff0000\nb #00ff00\nc #0000ff\n", [(1, 2, 3), (4, 5, 6), (7, 8, 9)], ""),
        ("a\nb\nc\n", [(0, 0, 0), (128, 0, 0), (0, 128, 0)], ""),  # VOC's palette, and colours that nobody chose
        ("a\nb\nc\n", [(2,) * 3, (0,) * 3, (1,) * 3], "index 0 is grey 2"),
        ("a\nb\nc\n", [(0,) * 3, (1,) * 3, (255,) * 3], "index 2 is grey 255"),
        ("a\nb\nc\n", [(0,) * 3, (1,) * 3, (2,) * 3], ""),
        ("a\nb\nc\n", [(0,) * 3, (100,) * 3, (200,) * 3], ""),  # shades to look at
    ],
)
def test_palettes_that_contradict_their_indices(builder, classes: str, colours, message: str) -> None:
    builder.classes(classes)
    root = fill(builder, 0, 1, 2, splits=("train",))
    indices = np.resize(np.arange(3, dtype=np.uint8), (6, 8))
    for path in (root / "labels/train").iterdir():
        palette(colours)(indices).save(path)
    report = check(root)
    assert bool(report.problems) == bool(message)
    assert (
        not message
        or f"2 palette labels have colours that say other ids than their indices, which count ('traina': {message}"
        in the(report.problems)
    )


def test_a_mask_of_black_and_white_may_hold_the_ids_0_and_1(builder) -> None:
    builder.classes("a\nb\n")
    root = fill(builder, 0, 1, splits=("train",))
    for path in (root / "labels/train").iterdir():
        palette([(0, 0, 0), (255, 255, 255)])(np.resize(np.arange(2, dtype=np.uint8), (6, 8))).save(path)
    assert sound(check(root))


CLASS_OF_ID = to_classes(33)


def street(path: Path, numbers: np.ndarray, colours: dict[int, tuple[int, int, int]] | None = None) -> None:
    """Write labels, grey or with a palette of these colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers.astype(np.uint8))
    if colours is not None:
        image.putpalette([channel for i in range(256) for channel in colours.get(i, (0, 0, 0))])
    image.save(path)


def streets(layout: str, root: Path, numbers: np.ndarray, colours: dict[int, tuple[int, int, int]] | None = None):
    """A data set of one layout with two images whose labels hold these numbers; its report."""
    if layout == "folder":
        root.mkdir()
        write_classes(root, CITYSCAPES)
    for name in ("a", "b"):
        image, label = {
            "gta5": (f"images/{name}.png", f"labels/{name}.png"),
            "folder": (f"images/train/{name}.png", f"labels/train/{name}.png"),
            "labelIds": (f"leftImg8bit/train/x/{name}_leftImg8bit.png", f"gtFine/train/x/{name}_gtFine_labelIds.png"),
            "trainIds": (
                f"leftImg8bit/train/x/{name}_leftImg8bit.png",
                f"gtFine/train/x/{name}_gtFine_labelTrainIds.png",
            ),
        }[layout]
        street(root / label, numbers, colours)
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*numbers.shape, 3), ord(name), np.uint8)).save(root / image)
    return check(root)


IDS = np.resize(np.repeat(np.array([0, 7, 8, 11, 17, 18, 20, 21, 23, 24, 26, 33]), 4), (6, 16))
"""labelIds of a street, pole group among them, whose colour is that of a pole."""
COLOURS = {
    **{n: CITYSCAPES.colours[c] for n, c in CLASS_OF_ID.items() if c != 255},
    18: (153, 153, 153),
    5: (111, 74, 0),
}
TRAIN_COLOURS = dict(enumerate(CITYSCAPES.colours))


def mapped(numbers: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda n: CLASS_OF_ID.get(n, 255))(numbers)


@pytest.mark.parametrize("layout", ["gta5", "labelIds"])
def test_palettes_of_label_ids_are_those_of_their_classes(layout, tmp_path) -> None:
    assert streets(layout, tmp_path / "own", IDS, COLOURS).problems == []
    shifted = {n: colour for n, (_, colour) in zip(COLOURS, [*list(COLOURS.items())[1:], (0, (1, 2, 3))], strict=True)}
    report = streets(layout, tmp_path / "shifted", IDS, shifted)
    assert "2 palette labels have colours that say other ids" in the(report.problems)
    assert "index 7 has the colour of 'sidewalk'" in the(report.problems)


@pytest.mark.parametrize("layout", ["folder", "trainIds"])
def test_palettes_of_train_ids_are_those_of_their_classes(layout, tmp_path) -> None:
    assert streets(layout, tmp_path / "own", mapped(IDS), TRAIN_COLOURS).problems == []
    report = streets(layout, tmp_path / "ids", mapped(IDS), COLOURS)
    assert "index 7 has the colour of 'road'" in the(report.problems)
    order = sorted(set(IDS.reshape(-1).tolist()), reverse=True)
    greys = {place: (number,) * 3 for place, number in enumerate(order)}
    places = np.vectorize(order.index)(IDS)
    assert "index 0 is grey 33" in the(streets(layout, tmp_path / "greys", places, greys).problems)


@pytest.mark.parametrize("layout", ["folder", "trainIds"])
def test_ids_that_were_mapped_twice(layout, tmp_path) -> None:
    report = streets(layout, tmp_path / "twice", mapped(mapped(IDS)))
    assert "look mapped to train ids twice" in the(report.problems)
    assert streets(layout, tmp_path / "once", mapped(IDS)).problems == []
    wall = np.resize(np.array([0, 1, 2, 3]), (6, 16))
    assert streets(layout, tmp_path / "tunnel", wall).problems == []
