"""Ultralytics' data yaml: where images, masks and depth lie, what numbers and names mean, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, list_splits, open_split
from kdcache.errors import DataError

IDS = np.resize([0, 1, 2, 255], (6, 8)).astype(np.uint8)
NAMES = "names:\n  0: road\n  1: car\n  2: sky\n"


def write(root: Path, yaml: str, masks: str = "masks", ids: np.ndarray = IDS) -> str:
    """Images of two splits with masks (none without a name), and the yaml; returns what kdcache takes."""
    for number, name in enumerate(("train/a", "train/sub/b", "val/c")):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        for folder, content in (("images", pixels), (masks, ids)):
            if folder:
                path = root / folder / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    (root / "streets.yaml").write_text(yaml)
    return f"ultralytics:{root / 'streets.yaml'}"


def test_folders_masks_and_names_are_read(tmp_path: Path) -> None:
    data = write(tmp_path, f"path: {tmp_path}\ntrain: images/train\nval: images/val\nmasks_dir: masks\n{NAMES}")
    assert list_splits(data) == ["train", "val"]
    train = open_split(data, "train")
    assert train.ids == ("a", "sub/b")
    assert train.classes.names == ("road", "car", "sky")
    assert np.array_equal(train.label(1), IDS)
    report = check(data)
    assert report.problems == []
    assert report.layout == "ultralytics"


def test_lists_mappings_and_places_beside_the_yaml_are_read(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("./images/train/a.png\n./images/val/c.png\n")
    yaml = "train: own.txt\nval: [images/val, images/train/sub]\nmasks_dir: other\nnames: [road, car]\n"
    data = write(tmp_path, f"{yaml}label_mapping: {{2: ignore_label, 7: 0}}\n", "other", np.where(IDS == 0, 7, IDS))
    assert open_split(data, "train").ids == ("images/train/a", "images/val/c")
    val = open_split(data, "val")
    assert val.ids == ("images/train/sub/b", "images/val/c")
    assert np.array_equal(val.label(0), np.resize([0, 1, 255, 255], (6, 8)))


def test_one_name_is_a_class_before_a_background(tmp_path: Path) -> None:
    data = write(tmp_path, "train: images/train\nmasks_dir: masks\nnames: [crack]\n", ids=IDS % 2)
    assert open_split(data, "train").classes.names == ("background", "crack")


def test_depth_is_read_where_there_are_no_masks(tmp_path: Path) -> None:
    data = write(tmp_path, "train: images/train\nval: images/val\nnames: [depth]\ndepth_scale: 100\n", "")
    for split in ("train", "val"):
        (tmp_path / "depth" / split).mkdir(parents=True)
    np.save(tmp_path / "depth/train/a.npy", np.full((6, 8), 3, np.float32))
    Image.fromarray(np.full((6, 8), 250, np.uint16)).save(tmp_path / "depth/val/c.png")
    train, val = open_split(data, "train"), open_split(data, "val")
    assert train.classes.names == ()
    assert train.label(0, "depth")[0, 0] == 3
    assert not train.has_label(1, "depth")
    assert val.label(0, "depth")[0, 0] == 2.5


@pytest.mark.parametrize(
    ("yaml", "masks", "problem", "fix"),
    [
        (f"train: images/train\n{NAMES}", "", "has no masks_dir, so its labels are polygons", "data convert yolo:"),
        (f"train: images/train\nmasks_dir: msk\n{NAMES}", "masks", "No masks of train", "/msk/"),
        ("train: images/train\nmasks_dir: masks\nnames: {0: road, 2: car}\n", "masks", "their numbers are 0, 2", "gap"),
        (f"train: pictures\nmasks_dir: masks\n{NAMES}", "masks", "Images not found: ", "train"),
        (f"path: nowhere\ntrain: images\nmasks_dir: masks\n{NAMES}", "masks", "Data folder not found", "absolute path"),
        ("- 1\n", "masks", "it holds list", "train:"),
        (f"train: images/train\nmasks_dir: masks\nlabel_mapping: [a]\n{NAMES}", "masks", "label_mapping", "NUMBER"),
    ],
)
def test_what_cannot_be_read_is_said(yaml: str, masks: str, problem: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem) as raised:
        open_split(write(tmp_path, yaml, masks), "train")
    assert fix in raised.value.fix


def test_a_yaml_without_its_layout_is_named(tmp_path: Path) -> None:
    data = write(tmp_path, f"train: images/train\nmasks_dir: masks\n{NAMES}")
    with pytest.raises(DataError, match="Not a folder") as raised:
        open_split(data.removeprefix("ultralytics:"), "train")
    assert data in raised.value.fix
