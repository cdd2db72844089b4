"""Labels in the classes of a model that learnt from another data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import ClassList, classes_by_name, open_split
from kdcache.errors import MismatchError


def folder(root: Path, names: str, label: list[list[int]]) -> Path:
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(names.split()))
    Image.new("RGB", (len(label[0]), len(label))).save(root / "images/val/a.png")
    Image.fromarray(np.array(label, np.uint8)).save(root / "labels/val/a.png")
    return root


def test_labels_are_in_the_models_classes(tmp_path: Path) -> None:
    split = open_split(folder(tmp_path, "Sky road lamp CAR", [[0, 1, 2, 3, 255]]), "val")
    joined = classes_by_name(split, ClassList(("car", "road", "person", "sky")))
    match = joined.match
    assert match is not None
    assert joined.label(0).tolist() == joined.raw_label(0).tolist() == [[3, 1, 255, 0, 255]]
    assert (match.shared, match.missing, match.void) == (("car", "road", "sky"), ("person",), ("lamp",))
    assert joined.content_digests(0) == split.content_digests(0)
    assert joined.digest() != split.digest()
    np.testing.assert_array_equal(joined.image(0), split.image(0))


def test_names_that_differ_in_case_alone_are_not_joined(tmp_path: Path) -> None:
    split = open_split(folder(tmp_path, "Car car sky", [[0, 1, 2]]), "val")
    joined = classes_by_name(split, ClassList(("car", "sky", "SKY")))
    assert joined.label(0).tolist() == [[255, 0, 1]]


def test_equal_lists_and_depth_alone_need_no_join(tmp_path: Path) -> None:
    split = open_split(folder(tmp_path, "a b", [[0, 1]]), "val")
    assert classes_by_name(split, split.classes) is split
    assert classes_by_name(split, ClassList(())) is split


def test_nothing_shared_is_refused(tmp_path: Path) -> None:
    split = open_split(folder(tmp_path, "a b", [[0, 1]]), "val")
    with pytest.raises(MismatchError, match=r"(?s)a, b in .*and c, d in the model.*--class-map"):
        classes_by_name(split, ClassList(("c", "d")))
