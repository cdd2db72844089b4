"""Roboflow's semantic segmentation masks: pairs in one folder, and _classes.csv."""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, convert
from kdcache.data import list_splits as list_any_splits
from kdcache.data import open_split as open_any_split
from kdcache.errors import DataError

open_split, list_splits = partial(open_any_split, exports=True), partial(list_any_splits, exports=True)
TABLE = "Pixel Value, Class\n0, background\n1, cat\n2, dog\n"


def write(
    root: Path, table: str = TABLE, values: tuple[int, ...] = (0, 1, 2), splits: str = "train valid test"
) -> None:
    for split in splits.split():
        (root / split).mkdir(parents=True)
        (root / split / "_classes.csv").write_text(table)
        for name in "ab":
            stem = f"{name}_jpg.rf.0123{split}"
            seed = np.random.default_rng(zlib.crc32(stem.encode()))
            Image.fromarray(seed.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(root / split / f"{stem}.jpg")
            Image.fromarray(np.resize(values, (20, 30)).astype(np.uint8)).save(root / split / f"{stem}_mask.png")


def test_the_table_of_classes_is_read(tmp_path: Path) -> None:
    write(tmp_path / "set")
    report = check(tmp_path / "set")
    assert report.problems == []
    assert "test/_classes.csv" in report.why
    assert list_splits(tmp_path / "set") == ["test", "train", "valid"]
    split = open_split(tmp_path / "set", "val")
    assert split.classes.names == ("background", "cat", "dog")
    assert np.array_equal(split.label(0), np.resize([0, 1, 2], (20, 30)))
    convert(tmp_path / "set", tmp_path / "out")
    assert open_split(tmp_path / "out", "train").classes.names == ("background", "cat", "dog")


@pytest.mark.parametrize(
    "table",
    [
        "Pixel Value,Class\r\n1,cat\r\n7,dog\r\n0,unlabeled\r\n",
        "\ufeffPixel Value, Class\n 0, Unlabeled\n 1, cat\n\n 7, dog\n",
    ],
)
def test_pixel_values_are_numbers_of_classes_and_unlabelled_ones_void(table: str, tmp_path: Path) -> None:
    write(tmp_path, table, (0, 1, 7))
    split = open_split(tmp_path, "train")
    assert split.classes.names == ("cat", "dog")
    assert np.array_equal(split.label(0), np.resize([255, 0, 1], (20, 30)))


def test_a_class_list_wins(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\nfeline\ncanine\n")
    assert open_split(tmp_path, "train").classes.names == ("ground", "feline", "canine")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("Pixel Value, Class\nzero, background\n", "invalid literal"),
        ("Pixel Value, Class\n0, a\n0, b\n", "a pixel value twice"),
        ("Pixel Value, Class\n0, a, b\n", "too many values"),
        ("Pixel Value, Class\n0, a\n255, b\n", "outside of 0 to 254"),
    ],
)
def test_a_table_of_another_kind_is_named(table: str, words: str, tmp_path: Path) -> None:
    write(tmp_path, table)
    with pytest.raises(DataError, match=words) as caught:
        open_split(tmp_path, "train")
    assert "_classes.csv" in caught.value.problem


def test_splits_with_other_tables_are_refused(tmp_path: Path) -> None:
    write(tmp_path, splits="train")
    write(tmp_path, "Pixel Value, Class\n0, background\n1, dog\n2, cat\n", splits="valid")
    with pytest.raises(DataError, match=r"train/_classes\.csv lists \{.*\}, valid/_classes\.csv lists \{.*dog.*cat"):
        open_split(tmp_path, "train")


def test_a_value_that_the_table_does_not_list_is_no_class(tmp_path: Path) -> None:
    write(tmp_path, values=(0, 1, 2, 9))
    assert any("9" in problem for problem in check(tmp_path).problems)
