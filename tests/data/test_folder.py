"""What the folder layout finds and decodes."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from kdcache.data import list_splits, open_split
from kdcache.data.classes import read_classes, write_classes

ODD_NAMES = [
    "a.b.c.jpg",
    "with space.PNG",
    "größe 街.png",
    "deep/er/x.1.tif",
    "UPPER.JPG",
    "deep/y.bmp",
    "w.webp",
]


def test_odd_names_keep_their_ids_and_find_their_labels(builder) -> None:
    for name in ODD_NAMES:
        builder.image(name)
        builder.label(name.rpartition(".")[0] + ".png")
    builder.root.joinpath("images/train/notes.txt").write_text("no image")
    builder.root.joinpath("images/train/._UPPER.JPG").write_bytes(b"left by a file manager")
    split = open_split(builder.root, "train")
    assert split.ids == tuple(sorted(name.rpartition(".")[0] for name in ODD_NAMES))
    for index in range(len(split)):
        assert split.has_label(index)
        image, label = split.image(index), split.label(index)
        assert image.shape == (6, 8, 3)
        assert image.dtype == label.dtype == np.uint8
        assert (label == 1).all()
        for array in (image, label):
            assert array.flags.writeable
            assert array.flags.c_contiguous
            assert array.flags.owndata


def test_splits_may_be_unlabelled_wholly_or_partly(builder) -> None:
    builder.pair("a").image("b.png")
    builder.image("c.png", split="extra")
    train, extra = open_split(builder.root, "train"), open_split(str(builder.root), "extra")
    assert [train.has_label(i) for i in range(2)] == [True, False]
    assert train.label(1) is None
    assert extra.label(0) is None
    assert not extra.has_label(0)
    assert list_splits(builder.root) == ["extra", "train"]
    assert (train.data, train.split) == (str(builder.root), "train")


def test_linked_folders_are_followed_once(builder) -> None:
    builder.pair("a")
    elsewhere = builder.root.parent / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(elsewhere / "b.png")
    os.symlink(elsewhere, builder.root / "images/train/linked")
    os.symlink(builder.root / "images/train", elsewhere / "loop")
    assert open_split(builder.root, "train").ids == ("a", "linked/b")


def test_a_split_survives_pickling_and_a_change_of_directory(builder, monkeypatch, tmp_path) -> None:
    builder.pair("a")
    monkeypatch.chdir(tmp_path)
    split = open_split("data", "train")
    copy = pickle.loads(pickle.dumps(split))
    monkeypatch.chdir("/")
    assert copy.digest() == split.digest()
    assert np.array_equal(copy.image(0), split.image(0))
    assert np.array_equal(copy.label(0), split.label(0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("label_first", [True, False])
def test_exif_orientation_is_applied_before_sizes_are_compared(builder, orientation, suffix, label_first) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = builder.image(f"a.{suffix}", exif=exif)
    upright = (8, 6) if orientation >= 5 else (6, 8)
    builder.label("a.png", np.zeros(upright, np.uint8))
    split = open_split(builder.root, "train")
    if label_first:
        assert split.label(0).shape == upright
    image = split.image(0)
    assert image.shape == (*upright, 3)
    assert split.label(0).shape == upright
    with Image.open(path) as stored:
        raw = np.array(stored.convert("RGB"))
    undo = {
        1: raw,
        2: raw[:, ::-1],
        3: raw[::-1, ::-1],
        4: raw[::-1],
        5: raw.swapaxes(0, 1),
        6: raw[::-1].swapaxes(0, 1),
        7: raw[::-1, ::-1].swapaxes(0, 1),
        8: raw[:, ::-1].swapaxes(0, 1),
    }
    assert np.array_equal(image, undo[orientation])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_labels_give_indices_not_colours(builder, bits) -> None:
    builder.image("a.png")
    ids = np.arange(48, dtype=np.uint8).reshape(6, 8) % min(2**bits, 3)
    image = Image.fromarray(ids).convert("P")
    image.putdata(ids.reshape(-1).tolist())
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    path = builder.label("a.png")
    image.save(path, bits=bits)
    assert np.array_equal(open_split(builder.root, "train").label(0), ids)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_images_of_every_8_bit_mode_become_rgb(builder, mode) -> None:
    path = builder.image("a.tif" if mode == "CMYK" else "a.png")
    with Image.open(path) as image:
        converted = image.convert(mode)
    converted.save(path, **({"transparency": bytes(range(256))} if mode == "P" else {}))
    assert open_split(builder.root, "train").image(0).shape == (6, 8, 3)


def test_classes_file_with_colours_comments_and_blanks(builder) -> None:
    text = "\ufeff# the classes\nroad 128 64 128  # drivable\n\ntraffic light #FAAA1e\n  sky\nclass 7\n"
    text += "lane 2 #x\n"
    classes = read_classes(builder.classes(text).root)
    assert classes.names == ("road", "traffic light", "sky", "class 7", "lane 2")
    assert classes.colours[:2] == ((128, 64, 128), (250, 170, 30))
    assert len(set(classes.colours)) == 5
    write_classes(builder.root, classes)
    assert read_classes(builder.root) == classes
