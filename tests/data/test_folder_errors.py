"""Every refusal of the folder layout, from real files: the rule, what was received, a remedy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kdcache.data import list_splits, open_split
from kdcache.errors import DataError


def refusal(action) -> DataError:
    with pytest.raises(DataError) as caught:
        action()
    assert caught.value.rule
    assert caught.value.remedy
    return caught.value


def test_no_folder(tmp_path) -> None:
    error = refusal(lambda: open_split(tmp_path / "nowhere", "train"))
    assert "nowhere is no folder" in error.received
    assert "folder: images/SPLIT/ and classes.txt" in refusal(lambda: list_splits(tmp_path)).received


def test_a_missing_split_names_those_that_exist(builder) -> None:
    builder.pair("a").pair("b", split="val")
    assert "there are: train, val" in refusal(lambda: open_split(builder.root, "test")).received
    assert "'..'" in refusal(lambda: open_split(builder.root, "..")).received


def test_an_empty_split(builder) -> None:
    (builder.root / "images/train").mkdir(parents=True)
    assert "none in" in refusal(lambda: open_split(builder.root, "train")).received


@pytest.mark.parametrize(
    ("text", "received"),
    [
        (None, "classes.txt"),
        ("", "0 classes"),
        ("# only a comment\n", "0 classes"),
        ("a\nb\na\n", "'a' 2 times"),
        ("a\nb 1 2 300\n", "line 2"),
    ],
)
def test_bad_class_files(new_builder, text, received) -> None:
    bad = new_builder("bad").pair("a")
    if text is not None:
        bad.classes(text)
    error = refusal(lambda: open_split(bad.root, "train"))
    assert received in error.received
    assert "classes.txt" in error.received


def test_a_class_file_that_is_no_text(builder) -> None:
    builder.pair("a")
    (builder.root / "classes.txt").write_bytes(b"\xff\xfe\x00road")
    assert "UTF-8" in refusal(lambda: open_split(builder.root, "train")).rule


def test_two_images_with_one_id(builder) -> None:
    builder.image("x/a.jpg")
    builder.image("x/a.png")
    received = refusal(lambda: open_split(builder.root, "train")).received
    assert "x/a.jpg" in received
    assert "x/a.png" in received


@pytest.mark.parametrize("name", ["b.png", "a_labelIds.png", "a.PNG.png", "a.jpg"])
def test_labels_that_belong_to_no_image_or_are_no_png(builder, name) -> None:
    builder.image("a.png")
    builder.label(name)
    assert name in refusal(lambda: open_split(builder.root, "train")).received


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("damage", ["truncated", "rubbish", "empty"])
def test_damaged_images_are_named(builder, name, damage) -> None:
    path = builder.image(name, size=(64, 64))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "rubbish": b"\x00" * 500, "empty": b""}[damage])
    split = open_split(builder.root, "train")
    assert str(path) in refusal(lambda: split.image(0)).received


def test_an_image_that_vanished(builder) -> None:
    path = builder.image("a.png")
    split = open_split(builder.root, "train")
    path.unlink()
    assert str(path) in refusal(lambda: split.image(0)).received


def test_a_truncated_label_is_named(builder) -> None:
    builder.image("a.png")
    path = builder.label("a.png", np.random.default_rng(0).integers(0, 3, (6, 8), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:50])
    assert str(path) in refusal(lambda: open_split(builder.root, "train").label(0)).received


def test_a_16_bit_image(builder) -> None:
    path = builder.image("a.png")
    Image.fromarray(np.full((6, 8), 60000, np.uint16)).save(path)
    assert "I;16" in refusal(lambda: open_split(builder.root, "train").image(0)).received


def test_a_label_of_another_size_shows_both(builder) -> None:
    builder.image("a.png")
    builder.label("a.png", np.zeros((8, 6), np.uint8))
    received = refusal(lambda: open_split(builder.root, "train").label(0)).received
    assert "label 8 x 6, image 6 x 8" in received
    assert "a.png" in received


def test_ids_beyond_the_classes_are_counted(builder) -> None:
    builder.image("a.png")
    ids = np.full((6, 8), 255, np.uint8)
    ids[0, :3], ids[1, 0] = 3, 200
    builder.label("a.png", ids)
    split = open_split(builder.root, "train")
    received = refusal(lambda: split.label(0)).received
    assert "id 3 in 3 pixels, id 200 in 1 pixel in" in received
    assert np.array_equal(split.raw_label(0), ids)


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (np.zeros((6, 8), np.uint16), "16-bit grey"),
        (np.zeros((6, 8, 3), np.uint8), "8-bit RGB"),
        (np.zeros((6, 8, 4), np.uint8), "8-bit RGBA"),
        (np.zeros((6, 8, 2), np.uint8), "8-bit grey with alpha"),
        (np.zeros((6, 8), bool), "1-bit grey"),
    ],
)
def test_labels_of_another_kind_of_png(builder, ids, kind) -> None:
    builder.image("a.png")
    builder.label("a.png", ids)
    assert f"{kind} in" in refusal(lambda: open_split(builder.root, "train").label(0)).received


def test_a_label_that_only_pretends_to_be_png(builder) -> None:
    builder.image("a.png")
    path = builder.label("a.png")
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(path, format="JPEG")
    assert "no PNG" in refusal(lambda: open_split(builder.root, "train").label(0)).received
