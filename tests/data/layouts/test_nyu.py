"""NYU Depth V2: scenes of colour images and millimetres."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, list_splits, open_split
from kdcache.errors import DataError

SIZE = (6, 8)
MILLIMETRES = np.arange(500, 500 + 48 * 100, 100, dtype=np.uint16).reshape(SIZE)


def frame(folder: Path, number: int, *, depth: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SIZE, 3), number, np.uint8)).save(folder / f"rgb_{number:05d}.jpg")
    if depth:
        Image.fromarray(MILLIMETRES).save(folder / f"sync_depth_{number:05d}.png")


@pytest.mark.parametrize("home", ["", "nyu_depth_v2"])
def test_splits_samples_and_millimetres(tmp_path, home) -> None:
    root = tmp_path / home
    frame(root / "sync/kitchen_0028b", 45)
    frame(root / "sync/kitchen_0028b", 46, depth=False)
    frame(root / "official_splits/train/never", 1)
    frame(root / "official_splits/test/bathroom", 7)
    assert list_splits(tmp_path) == ["test", "train"]
    split = open_split(tmp_path, "train")
    assert split.ids == ("kitchen_0028b/rgb_00045", "kitchen_0028b/rgb_00046")
    assert [split.has_label(i, "depth") for i in range(2)] == [True, False]
    np.testing.assert_array_equal(split.label(0, "depth"), MILLIMETRES / np.float32(1000))
    assert open_split(f"nyu:{tmp_path}", "test").ids == ("bathroom/rgb_00007",)
    report = check(tmp_path, max_depth=10)
    assert (report.layout, report.problems) == ("nyu", [])
    assert report.why.endswith("; no classes")


def test_the_official_training_images_where_there_are_no_others(tmp_path) -> None:
    frame(tmp_path / "official_splits/train/bathroom", 3)
    assert open_split(tmp_path, "train").ids == ("bathroom/rgb_00003",)


def test_depth_without_its_image_is_refused(tmp_path) -> None:
    frame(tmp_path / "sync/kitchen", 1)
    frame(tmp_path / "sync/kitchen", 2)
    (tmp_path / "sync/kitchen/rgb_00002.jpg").unlink()
    with pytest.raises(DataError, match=r"sync_depth_00002\.png"):
        open_split(tmp_path, "train")
