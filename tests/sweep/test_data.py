"""Data of streams: what does not go together is refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_plan import HYDRA, KNOWN

from kdcache.data import ClassList, open_split
from kdcache.data.classes import write_classes
from kdcache.errors import DataError, KDCacheError, MismatchError, RecipeError
from kdcache.sweep import check_data, plan_sweep, read_recipe

CITY = "scenes:32x48,train=2,val=2"
FAR = "scenes:32x48,train=2,val=2,seed=1,depth=sparse,tasks=depth"
TERM = [{"kind": "depth-silog"}]


def check(sources: dict[str, str], *, data: str | None = None, **far: Any) -> None:
    stream = ({"name": "city"}, {"name": "far", "cache": "@store", "term": TERM, **far})
    check_data(plan_sweep(replace(HYDRA, stream=stream), data, Path("out"), KNOWN, sources))


def folder(path: Path, *names: str) -> str:
    for split in ("train", "val"):
        (path / "images" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path / "images" / split / "a.png")
    write_classes(path, ClassList(names))
    return str(path)


def test_data_that_go_together_pass() -> None:
    check({"city": CITY, "far": FAR})


def test_other_classes_are_refused_with_the_fix_of_their_kind(tmp_path: Path) -> None:
    other = folder(tmp_path, "a", "b")
    with pytest.raises(MismatchError, match=r"stream far .*has other classes.*a, b against") as caught:
        check({"city": CITY, "far": other}, term=[])
    assert "--set stream.far.class-map=FILE" in caught.value.fix
    with pytest.raises(MismatchError, match=r"stream far .*no classes against") as caught:
        check({"city": CITY, "far": f"depth:{other}"}, term=[])
    assert "classes.txt" in caught.value.fix
    check({"city": CITY, "far": other}, term=[], class_map="map.txt", data=CITY)
    with pytest.raises(MismatchError, match=r"to judge on, has other classes \(a, b\)"):
        check({"city": CITY, "far": FAR}, data=other)


@pytest.mark.parametrize(
    ("far", "keys", "named"),
    [
        (CITY, {}, "learn depth in the stream far: none of the 2 samples of scenes:32x48,train=2,val=2, split 'train'"),
        (FAR, {"labels": "segmentation"}, "only of depth"),
        ("NOWHERE", {}, "stream far: Data folder not found: NOWHERE"),
    ],
)
def test_a_stream_without_the_labels_that_it_learns_is_named(far: str, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError) as caught:
        check({"city": CITY, "far": far}, **keys)
    assert named in caught.value.problem
    assert isinstance(caught.value, KDCacheError)


def test_more_labels_than_there_are_fail_before_any_training() -> None:
    """The recipe of few labels limits its teachers and its students."""
    few = read_recipe("few-labels", changes=["student.limit-labels=[2,9]"])
    check_data(plan_sweep(few, "scenes:32x48,train=9,val=2", Path("out"), KNOWN))
    with pytest.raises(RecipeError, match=r"job teacher 9: Cannot use --limit-samples 9 of 8 samples") as caught:
        check_data(plan_sweep(few, "scenes:32x48,train=8,val=2", Path("out"), KNOWN))
    assert "from 1 to 8" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["student.limit-labels=[2]", "LIST"], "Use either --labels-from or --limit-labels, not both"),
        (['student.limit-labels=""', "LIST"], "Unknown id 'zebra' in --labels-from"),
        (['student.limit-labels=""', "ALL"], "No image is left to distil without its label"),
    ],
)
def test_a_list_of_labels_fails_before_any_training(changes: list[str], named: str, tmp_path: Path) -> None:
    ids = open_split("scenes:32x48,train=4,val=2", "train").ids
    (tmp_path / "LIST").write_text(f"{ids[0]}\nzebra\n")
    (tmp_path / "ALL").write_text("\n".join(ids))
    (tmp_path / "two").write_text("\n".join(ids[:2]))
    lists = [f'student.labels-from=["{tmp_path / "two"}","{tmp_path / changes[1]}"]']
    few = read_recipe("few-labels", changes=[changes[0], *lists])
    with pytest.raises(RecipeError) as caught:
        check_data(plan_sweep(few, "scenes:32x48,train=4,val=2", Path("out"), KNOWN))
    assert named in caught.value.problem
    assert caught.value.fix
