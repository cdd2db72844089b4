"""Every refusal of the folder layout, from real files: the problem and the fix."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, list_splits, open_split
from kdcache.errors import DataError


def refusal(action) -> DataError:
    with pytest.raises(DataError) as caught:
        action()
    assert caught.value.problem
    assert caught.value.fix
    return caught.value


def test_no_folder(tmp_path) -> None:
    error = refusal(lambda: open_split(tmp_path / "nowhere", "train"))
    assert error.problem == f"Data folder not found: {tmp_path / 'nowhere'}"
    assert "folder: images/SPLIT/ and classes.txt" in refusal(lambda: list_splits(tmp_path)).rule


def test_a_missing_split_names_those_that_exist(builder) -> None:
    builder.pair("a").pair("b", split="val")
    assert (
        f"'test' in {builder.root}, which has train, val" in refusal(lambda: open_split(builder.root, "test")).problem
    )
    assert "'..'" in refusal(lambda: open_split(builder.root, "..")).problem


def test_an_empty_split(builder) -> None:
    (builder.root / "images/train").mkdir(parents=True)
    assert f"No images in {builder.root / 'images/train'}" in refusal(lambda: open_split(builder.root, "train")).problem


@pytest.mark.parametrize(
    ("text", "received"),
    [
        (None, "classes.txt"),
        ("", "No classes in "),
        ("# only a comment\n", "No classes in "),
        ("a\nb\na\n", "'a' 2 times"),
        ("a\nb 1 2 300\n", "line 2"),
    ],
)
def test_bad_class_files(new_builder, text, received) -> None:
    bad = new_builder("bad").pair("a")
    if text is not None:
        bad.classes(text)
    error = refusal(lambda: open_split(bad.root, "train"))
    assert received in error.problem
    assert "classes.txt" in error.problem


def test_a_class_file_that_is_no_text(builder) -> None:
    builder.pair("a")
    (builder.root / "classes.txt").write_bytes(b"\xff\xfe\x00road")
    error = refusal(lambda: open_split(builder.root, "train"))
    assert f"{builder.root / 'classes.txt'}: 'utf-8' codec can't decode" in error.problem
    assert "UTF-8" in error.fix


def test_two_images_with_one_id(builder) -> None:
    builder.image("x/a.jpg")
    builder.image("x/a.png")
    problem = refusal(lambda: open_split(builder.root, "train")).problem
    assert "x/a.jpg" in problem
    assert "x/a.png" in problem


@pytest.mark.parametrize("name", ["b.png", "a_of_b.png", "a.PNG.png", "a.jpg"])
def test_labels_that_belong_to_no_image_or_are_no_png(builder, name) -> None:
    builder.image("a.png")
    builder.label(name)
    assert name in refusal(lambda: open_split(builder.root, "train")).problem


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("damage", ["truncated", "rubbish", "empty"])
def test_damaged_images_are_named(builder, name, damage) -> None:
    path = builder.image(name, size=(64, 64))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "rubbish": b"\x00" * 500, "empty": b""}[damage])
    split = open_split(builder.root, "train")
    assert str(path) in refusal(lambda: split.image(0)).problem


def test_an_image_that_vanished(builder) -> None:
    path = builder.image("a.png")
    split = open_split(builder.root, "train")
    path.unlink()
    assert str(path) in refusal(lambda: split.image(0)).problem


def test_a_truncated_label_is_named(builder) -> None:
    builder.image("a.png")
    path = builder.label("a.png", np.random.default_rng(0).integers(0, 3, (6, 8), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:50])
    assert str(path) in refusal(lambda: open_split(builder.root, "train").label(0)).problem


def test_a_16_bit_image(builder) -> None:
    path = builder.image("a.png")
    Image.fromarray(np.full((6, 8), 60000, np.uint16)).save(path)
    assert "16 bits per channel" in refusal(lambda: open_split(builder.root, "train").image(0)).problem


def test_a_label_of_another_size_shows_both(builder) -> None:
    builder.image("a.png")
    builder.label("a.png", np.zeros((8, 6), np.uint8))
    problem = refusal(lambda: open_split(builder.root, "train").label(0)).problem
    assert "label 8 x 6, image 6 x 8" in problem
    assert "a.png" in problem


def test_ids_beyond_the_classes_are_counted(builder) -> None:
    builder.image("a.png")
    ids = np.full((6, 8), 255, np.uint8)
    ids[0, :3], ids[1, 0] = 3, 200
    builder.label("a.png", ids)
    split = open_split(builder.root, "train")
    problem = refusal(lambda: split.label(0)).problem
    assert "id 3 in 3 pixels, id 200 in 1 pixel" in problem
    assert np.array_equal(split.raw_label(0), ids)


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (np.full((6, 8), 26001, np.uint16), "48 numbers are outside 0 to 255, such as 26001 (16-bit grey)"),
        (np.zeros((6, 8, 3), np.uint8), "a.png: it is 8-bit RGB,"),
        (np.zeros((6, 8, 4), np.uint8), "a.png: it is 8-bit RGBA,"),
        (np.zeros((6, 8, 2), np.uint8), "a.png: it is 8-bit grey with alpha"),
    ],
)
def test_labels_of_another_kind_of_png(builder, ids, kind) -> None:
    builder.image("a.png")
    builder.label("a.png", ids)
    assert kind in refusal(lambda: open_split(builder.root, "train").label(0)).problem


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_labels_of_few_bits(builder, bits: int) -> None:
    """Pillow stretches their ids: 6 of 4 bits becomes 102."""
    builder.image("a.png")
    path = builder.label("a.png")
    rows = b"".join(b"\0" + bytes([0b01100110] * (8 * bits // 8)) for _ in range(6))
    header = struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with Image.open(path) as image:
        assert image.size == (8, 6)  # a sound file
        assert np.asarray(image).max() > 15
    builder.classes("".join(f"class {number}\n" for number in range(7)))
    label = open_split(builder.root, "train").label(0)
    assert np.array_equal(label, np.resize([1, 2] if bits == 2 else [6], (6, 8)))


@pytest.mark.parametrize(("kind", "name"), [(bool, "a.png"), (np.uint16, "a.png"), (np.uint16, "a.tif")])
def test_labels_of_one_and_of_sixteen_bits(builder, kind, name) -> None:
    builder.image("a.jpg")
    ids = np.resize([0, 1], (6, 8)).astype(kind)
    Image.fromarray(ids).save(builder.label("a.png").with_name(name))
    if name != "a.png":
        (builder.root / "labels/train/a.png").unlink()
    assert np.array_equal(open_split(builder.root, "train").label(0), ids.astype(np.uint8))


def test_two_labels_of_one_image(builder) -> None:
    """`a.PNG` beside `a.png`: which one is meant is not guessed."""
    builder.image("a.jpg")
    builder.label("a.PNG", np.zeros((6, 8), np.uint8))
    builder.label("a.png")
    if len(list((builder.root / "labels/train").iterdir())) < 2:
        pytest.skip("names of this disk do not tell cases apart")
    error = refusal(lambda: open_split(builder.root, "train"))
    assert "'a.png'" in error.problem
    assert "Remove" in error.fix
    report = check(builder.root)
    assert report.splits["train"].without_image == ["a.png"]
    assert "1 labels belong to no image: 'a.png'" in report.problems[0]


def test_masks_saved_as_jpeg_and_numbers_from_1_are_named_for_what_they_are(builder, new_builder) -> None:
    builder.image("a.png")
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(builder.label("a.png").with_suffix(".jpg"))
    (builder.root / "labels/train/a.png").unlink()
    assert "A JPEG changes numbers and colours: save the original labels" in check(builder.root).problems[0]
    assert "A JPEG changes" in refusal(lambda: open_split(builder.root, "train")).fix
    other = new_builder("other").classes()
    other.image("a.png")
    other.label("a.png", np.resize([1, 2, 3], (6, 8)).astype(np.uint8))
    assert "count from 1: add the line `void: 0`" in check(other.root).problems[0]


@pytest.mark.parametrize("suffix", ["gif", "npy"])
def test_labels_of_another_format_alone_are_named(builder, suffix) -> None:
    builder.image("a.png")
    (builder.root / "labels/train").mkdir(parents=True)
    (builder.root / f"labels/train/a_mask.{suffix}").write_bytes(b"x")
    assert f"1 labels belong to no image: 'a_mask.{suffix}'" in check(builder.root).problems[0]
    assert "Save the ids in these files as .png." in check(builder.root).problems[0]
    builder.label("a.png")
    assert "belong" not in " ".join(check(builder.root).problems)


def test_a_tiff_of_pages_is_refused_and_one_with_an_overview_read(builder) -> None:
    builder.image("a.png")
    pages = [Image.fromarray(np.zeros(size, np.uint8)) for size in ((6, 8), (6, 8), (3, 4))]
    path = builder.label("a.png").with_suffix(".tif")
    (builder.root / "labels/train/a.png").unlink()
    pages[0].save(path, save_all=True, append_images=pages[1:2])
    assert "a.tif: it is a TIFF of 2 pages" in refusal(lambda: open_split(builder.root, "train").label(0)).problem
    pages[0].save(path, save_all=True, append_images=pages[2:])
    assert open_split(builder.root, "train").label(0).shape == (6, 8)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("set.zip", "Unpack it, and name the folder."),
        ("set/images/train", "Name the folder where the data begin: {root}/set (folder)."),
    ],
)
def test_an_archive_and_a_folder_within_the_data_have_a_remedy(new_builder, tmp_path, name, remedy) -> None:
    new_builder("set").classes().pair("a")
    (tmp_path / "set.zip").write_bytes(b"PK")
    assert refusal(lambda: open_split(tmp_path / name, "train")).fix.startswith(remedy.format(root=tmp_path))


def test_a_second_label_of_an_image_is_named_by_its_file(builder) -> None:
    for name in "ab":
        builder.image(f"{name}.png")
        builder.label(f"{name}_mask.png")
    builder.label("a.png")
    problem = check(builder.root).problems[0]
    assert "1 labels belong to no image: 'a.png'" in problem
    assert "an image has one label" in problem


def test_a_label_that_only_pretends_to_be_png(builder) -> None:
    builder.image("a.png")
    path = builder.label("a.png")
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(path, format="JPEG")
    assert "a.png: JPEG is neither PNG nor TIFF" in refusal(lambda: open_split(builder.root, "train").label(0)).problem
