"""The layout `images`: pictures without labels, found if no other layout fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, list_splits, open_split
from kdcache.data.layouts.registry import find_layout
from kdcache.errors import DataError


def draw(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), number, np.uint8)).save(root / path)
    return root


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["a.png", "b.jpg"], {"train": ("a", "b")}),
        (["2020/x/a.png", "2021/a.png"], {"train": ("2020/x/a", "2021/a")}),
        (["train/x/a.png", "val/b.png"], {"train": ("x/a",), "val": ("b",)}),
        (["train/a.png"], {"train": ("a",)}),
        (["train/a.png", "b.png"], {"train": ("b", "train/a")}),  # the picture beside it belongs to no split
        (["images/a.png"], {"train": ("images/a",)}),
    ],
)
def test_pictures_without_labels_are_a_data_set(paths, splits, tmp_path) -> None:
    root = draw(tmp_path / "photos", *paths)
    assert find_layout(str(root)).layout.name == "images"
    assert list_splits(root) == sorted(splits)
    for name, ids in splits.items():
        split = open_split(root, name)
        assert split.ids == ids
        assert (split.classes.names, split.tasks) == ((), ())
        assert split.image(0).shape == (6, 8, 3)
    report = check(root)
    assert report.problems == []
    assert "no classes" in report.why


def test_a_data_set_whose_labels_are_not_found_is_not_taken_for_pictures(tmp_path) -> None:
    other = draw(tmp_path / "other", "images/train/a.png", "segmaps/train/a.png")
    with pytest.raises(DataError, match=r"rename the folder with the labels \(segmaps\) to labels"):
        find_layout(str(other))
    root = draw(tmp_path / "set", "images/train/a.png", "labels/train/a.png")
    with pytest.raises(DataError, match="pictures, at any depth, and no labels"):
        find_layout(f"images:{root}")
    (root / "classes.txt").write_text("road\ncar\n")
    with pytest.raises(DataError) as caught:  # a part of a data set
        find_layout(str(root / "images"))
    assert caught.value.fix == (
        f"Name the folder where the data begin: {root} (folder). "
        f"Or name images:{root}/images for its pictures without labels."
    )
    assert open_split(f"images:{root}/images", "train").ids == ("a",)


def test_a_folder_without_pictures_and_names_that_clash(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for data in (f"{tmp_path}/empty", f"images:{tmp_path}/empty"):
        with pytest.raises(DataError, match="pictures, at any depth, and no labels"):
            open_split(data, "train")
    root = draw(tmp_path / "photos", "a.png", "a.jpg")
    with pytest.raises(DataError, match=r"Repeated sample id 'a' .*: a\.jpg and a\.png"):
        open_split(root, "train")
