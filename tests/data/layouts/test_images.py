"""LAYOUT:FOLDER,images=FOLDER2: the images of the same samples from another folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, list_splits, open_split
from kdcache.data.layouts.registry import split_images
from kdcache.errors import DataError


def translate(source: str, folder: Path, split: str, suffix: str = ".png") -> None:
    """Images of the same ids, inverted."""
    opened = open_split(source, split)
    for index, sample in enumerate(opened.ids):
        path = folder / f"{sample}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - opened.image(index)).save(path)


@pytest.mark.parametrize("layout", ["folder", "camvid", "voc", "cityscapes", "gta5", "ade20k"])
@pytest.mark.parametrize("by_split", [True, False])
def test_images_come_from_the_other_folder_and_labels_stay(layout, by_split, tiny, tmp_path) -> None:
    root = tiny.write(layout, tmp_path / "set")
    for split in ("train", "val"):
        translate(str(root), tmp_path / "other" / (split if by_split else ""), split, ".png")
    shutil.copy(next((tmp_path / "other").rglob("*.png")), tmp_path / "other" / "of no sample.png")
    spec = f"{layout}:{root},images={tmp_path / 'other'}"
    assert list_splits(spec) == list_splits(root)
    for split in ("train", "val"):
        own, other = open_split(root, split), open_split(spec, split)
        assert (other.ids, other.classes, other.data) == (own.ids, own.classes, spec)
        for index in range(len(own)):
            np.testing.assert_array_equal(other.image(index), 255 - own.image(index))
            np.testing.assert_array_equal(other.label(index), own.label(index))
    assert check(spec, ["train", "val"]).problems == []


def test_a_sample_without_its_image_is_named(tiny, tmp_path) -> None:
    root = tiny.write("gta5", tmp_path / "set")
    translate(str(root), tmp_path / "other", "train")
    (tmp_path / "other" / "a.png").unlink()
    with pytest.raises(DataError, match=r"other/a\.png") as refused:
        open_split(f"{root},images={tmp_path / 'other'}", "train")
    assert "for 1 of 3 samples" in refused.value.problem
    assert "leave out images=" in refused.value.fix
    assert any("other/a.png" in problem for problem in check(f"{root},images={tmp_path / 'other'}", ["train"]).problems)
    Image.new("RGB", (48, 32)).save(tmp_path / "other" / "a.png")
    Image.new("RGB", (48, 32)).save(tmp_path / "other" / "a.jpg")
    with pytest.raises(DataError, match=r"Repeated sample id 'a'.*a\.jpg and .*a\.png"):
        open_split(f"{root},images={tmp_path / 'other'}", "train")


def test_images_of_another_size_than_the_labels_are_refused(tiny, tmp_path) -> None:
    root = tiny.write("gta5", tmp_path / "set")
    for sample in open_split(root, "train").ids:
        (tmp_path / "other").mkdir(exist_ok=True)
        Image.new("RGB", (24, 16)).save(tmp_path / "other" / f"{sample}.png")
    split = open_split(f"gta5:{root},images={tmp_path / 'other'}", "train")
    with pytest.raises(DataError, match="label 32 x 48, image 16 x 24") as refused:
        split.label(0)
    assert "images=" in refused.value.fix
    (problem,) = check(f"gta5:{root},images={tmp_path / 'other'}", ["train"]).problems
    assert "3 labels have another size" in problem
    assert "images=" in problem


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_folder_that_is_none_is_refused(folder, tiny, tmp_path) -> None:
    root = tiny.write("gta5", tmp_path / "set")
    with pytest.raises(DataError, match=f"Not a folder: images='{folder}'"):
        open_split(f"gta5:{root},images={folder}", "train")


def test_a_folder_of_that_name_is_that_folder(tmp_path) -> None:
    odd = tmp_path / "a,images=b"
    odd.mkdir()
    assert split_images(str(odd)) == (str(odd), None)
    assert split_images(f"{odd},images={tmp_path}") == (str(odd), tmp_path)
    assert split_images("a, images=" + str(tmp_path)) == ("a", tmp_path)
