"""Joined data sets, and those with the labels of one task alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import ClassList, check, list_splits, open_split
from kdcache.data.classes import write_classes
from kdcache.errors import DataError

CITY, FAR = "scenes:32x48,train=3,val=2", "scenes:32x48,train=4,val=3,seed=1,depth=exact"


def test_one_task_hides_the_labels_of_the_others() -> None:
    whole = open_split(FAR, "val")
    depth, classes = (open_split(f"{task}:{FAR}", "val") for task in ("depth", "segmentation"))
    assert (depth.tasks, classes.tasks) == (("depth",), ("segmentation",))
    assert (depth.classes.names, classes.classes) == ((), whole.classes)
    assert [depth.label(1), depth.raw_label(1), classes.label(1, "depth"), classes.raw_label(1, "depth")] == [None] * 4
    np.testing.assert_array_equal(depth.label(1, "depth"), whole.label(1, "depth"))
    np.testing.assert_array_equal(classes.label(1), whole.label(1))
    np.testing.assert_array_equal(depth.image(1), whole.image(1))
    assert depth.digest() != whole.digest()


def test_joined_samples_are_those_of_all_parts() -> None:
    joined = open_split(f"{CITY} + depth:{FAR}", "val")
    parts = {
        name: (part, i) for part in (open_split(CITY, "val"), open_split(FAR, "val")) for i, name in enumerate(part.ids)
    }
    assert list(joined.ids) == sorted(parts)
    assert joined.tasks == ("segmentation", "depth")
    assert joined.classes == open_split(CITY, "val").classes
    for index, name in enumerate(joined.ids):
        part, own = parts[name]
        np.testing.assert_array_equal(joined.image(index), part.image(own))
        of_city = part.data == CITY
        assert (joined.has_label(index), joined.has_label(index, "depth")) == (of_city, not of_city)
        np.testing.assert_array_equal(joined.label(index, "depth"), part.label(own, "depth"))
    assert list_splits(f"{CITY} + depth:{FAR}") == ["train", "val"]
    assert joined.digest() != open_split(CITY, "val").digest()


def test_ids_that_occur_twice_have_the_number_of_their_part() -> None:
    joined = open_split(f"{CITY} + depth:{CITY},depth=exact", "val")
    assert [name[:2] for name in joined.ids] == ["1/", "1/", "2/", "2/"]


def test_other_classes_are_refused_and_depth_alone_is_not(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name / "val").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "val" / "a.png")
    write_classes(tmp_path, ClassList(("a", "b")))
    with pytest.raises(DataError, match="a, b"):
        open_split(f"{CITY} + {tmp_path}", "val")
    assert len(open_split(f"{CITY} + depth:{tmp_path}", "val")) == 3


def test_a_folder_of_such_a_name_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a + b").mkdir()
    with pytest.raises(DataError, match="layout"):
        open_split("a + b", "val")


def test_a_check_is_of_one_data_set() -> None:
    with pytest.raises(DataError) as caught:
        check(f"{CITY} + depth:{FAR}")
    assert f"{CITY}, then {FAR}" in caught.value.fix
