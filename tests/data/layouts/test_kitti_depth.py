"""KITTI's depth prediction: raw images wherever they lie, with depth of their drive, camera and number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, list_splits, open_split
from kdcache.errors import DataError

SIZE = (6, 8)
DRIVE = "2011_09_26_drive_0001_sync"
DEPTH = (np.arange(48).reshape(SIZE) % 5 == 0) * (np.arange(48).reshape(SIZE) * 100).astype(np.uint16)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(array.dtype)).save(path)


def kitti(root: Path, annotated: str, raw: str, cameras: tuple[str, ...] = ("image_02", "image_03")) -> Path:
    for split, drive in (("train", DRIVE), ("val", DRIVE.replace("0001", "0002"))):
        for camera in ("image_02", "image_03"):
            for number in (5, 6):
                name = f"{camera}/{number:010d}.png"
                save(root / annotated / split / drive / "proj_depth/groundtruth" / name, DEPTH.astype(np.uint16))
            for number in (4, 5, 6) if camera in cameras else ():
                folder = root / raw.format(split=split, date=drive[:10]) / drive / camera / "data"
                pixels = np.full((*SIZE, 3), (number, int(camera[-1]), len(split)), np.uint8)
                save(folder / f"{number:010d}.png", pixels)
    return root


@pytest.mark.parametrize("annotated", ["", "data_depth_annotated"])
@pytest.mark.parametrize("raw", ["{date}", "kitti_raw/{date}"])
def test_images_are_found_where_people_keep_them(tmp_path, annotated, raw) -> None:
    root = kitti(tmp_path / "kitti", annotated, raw)
    assert list_splits(root) == ["train", "val"]
    split = open_split(root, "train")
    assert split.ids == tuple(f"{DRIVE}/{c}/{n:010d}" for c in ("image_02", "image_03") for n in (5, 6))
    assert (split.tasks, split.classes.names) == (("depth",), ())
    assert [int(split.image(i)[0, 0, 0]) for i in range(4)] == [5, 6, 5, 6]
    depth = split.label(1, "depth")
    np.testing.assert_array_equal(depth, np.where(DEPTH > 0, DEPTH / np.float32(256), np.nan).astype(np.float32))
    report = check(root, max_depth=80)
    assert (report.layout, report.problems) == ("kitti-depth", [])
    assert report.splits["train"].depth.share == pytest.approx(9 / 48)


def test_raw_drives_may_lie_beside_the_depth_of_their_drive(tmp_path) -> None:
    assert len(open_split(kitti(tmp_path / "kitti", "", "{split}"), "val")) == 4


def test_the_annotations_alone_may_be_named(tmp_path) -> None:
    root = kitti(tmp_path, "data_depth_annotated", "{date}")
    split = open_split(f"kitti-depth:{root}/data_depth_annotated", "train")
    assert int(split.image(0)[0, 0, 0]) == 5


def test_one_camera_is_enough(tmp_path) -> None:
    root = kitti(tmp_path / "kitti", "", "{date}", cameras=("image_02",))
    assert open_split(root, "train").ids == tuple(f"{DRIVE}/image_02/{n:010d}" for n in (5, 6))


@pytest.mark.parametrize("cameras", [(), ("image_02", "image_03")])
def test_missing_images_are_named(tmp_path, cameras) -> None:
    root = kitti(tmp_path / "kitti", "", "{date}", cameras=cameras)
    lost = f"2011_09_26/{DRIVE}/image_02/data/0000000006.png"
    (root / lost).unlink(missing_ok=True)
    with pytest.raises(DataError, match="Missing files") as caught:
        open_split(root, "train")
    assert lost in str(caught.value)
    if cameras:
        assert lost in check(root).splits["train"].missing


def test_the_selection_is_a_split(tmp_path) -> None:
    place = tmp_path / "depth_selection/val_selection_cropped"
    stem = "2011_09_26_drive_0002_sync_{}_0000000005_image_02.png"
    save(place / "image" / stem.format("image"), np.zeros((*SIZE, 3), np.uint8))
    save(place / "groundtruth_depth" / stem.format("groundtruth_depth"), DEPTH.astype(np.uint16))
    split = open_split(tmp_path, "val_selection_cropped")
    assert split.ids == ("2011_09_26_drive_0002_sync_image_0000000005_image_02",)
    assert np.nanmax(split.label(0, "depth")) == pytest.approx(4500 / 256)


def test_a_class_list_in_the_root_is_the_data_s(tmp_path) -> None:
    root = kitti(tmp_path / "kitti", "", "{date}")
    (root / "classes.txt").write_text("road\nsky\n")
    assert open_split(root, "train").classes.names == ("road", "sky")
