"""Names that differ only in Unicode normalisation: macOS writes é as two characters."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, open_split
from kdcache.data.classes import read_classes
from kdcache.errors import DataError

COMPOSED, TWO = "caf\u00e9", "cafe\u0301"


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def sample(root: Path, image: str, label: str, split: str = "train") -> None:
    save(root / f"images/{split}/{image}.png", np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    save(root / f"labels/{split}/{label}.png", np.resize(np.array([0, 1, 255], np.uint8), (6, 8)))
    (root / "classes.txt").write_text("sky\nroad\n")


@pytest.mark.parametrize(("image", "label"), [(COMPOSED, TWO), (TWO, COMPOSED), (TWO, TWO)])
@pytest.mark.parametrize("end", ["", "_mask"])
def test_image_and_label_belong_together_under_one_id(image, label, end, tmp_path) -> None:
    sample(tmp_path, f"{image}/{image}", f"{label}/{label}{end}")
    split = open_split(tmp_path, "train")
    assert split.ids == (f"{COMPOSED}/{COMPOSED}",)
    assert split.label(0) is not None
    assert split.image(0).shape == (6, 8, 3)


def test_a_list_names_a_file_in_either_form(tmp_path) -> None:
    for path in ("images", "labels"):
        save(tmp_path / path / f"{TWO}.png", np.zeros((6, 8, 3)[: 3 if path == "images" else 2], np.uint8))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    (tmp_path / "train.txt").write_text(f"{COMPOSED}\n", encoding="utf-8")
    assert open_split(tmp_path, "train").ids == (COMPOSED,)


def test_other_images_and_splits_are_found_in_either_form(tmp_path) -> None:
    sample(tmp_path / "data", TWO, COMPOSED, split=f"train-{TWO}")
    save(tmp_path / "other" / f"{COMPOSED}.png", np.zeros((6, 8, 3), np.uint8))
    split = open_split(f"{tmp_path / 'data'},images={tmp_path / 'other'}", f"train-{COMPOSED}")
    assert split.ids == (COMPOSED,)
    assert not split.image(0).any()


def test_annotations_name_a_file_in_either_form(tmp_path) -> None:
    save(tmp_path / f"train/{TWO}.png", np.zeros((6, 8, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": f"{COMPOSED}.png", "height": 6, "width": 8}],
        "annotations": [],
        "categories": [{"id": 1, "name": "car"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.json").write_text(json.dumps(content))
    assert open_split(f"coco:{tmp_path}", "train", exports=True).ids == (COMPOSED,)


def test_two_files_that_look_the_same_are_told_apart_in_words(tmp_path) -> None:
    sample(tmp_path, COMPOSED, COMPOSED)
    save(tmp_path / f"images/train/{TWO}.png", np.zeros((6, 8, 3), np.uint8))
    if len(list((tmp_path / "images/train").iterdir())) < 2:
        pytest.skip("the file system takes both forms for one name")
    with pytest.raises(DataError, match="Repeated sample id") as refused:
        open_split(tmp_path, "train")
    assert "differ only in Unicode normalisation" in refused.value.problem
    assert check(tmp_path).problems


def test_class_names_are_composed(tmp_path) -> None:
    (tmp_path / "classes.txt").write_text(f"{TWO}\nroad\n", encoding="utf-8")
    assert read_classes(tmp_path).names == (COMPOSED, "road")
    assert unicodedata.is_normalized("NFC", read_classes(tmp_path).names[0])
