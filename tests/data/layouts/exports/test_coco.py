"""COCO's annotations as labels; pycocotools' own masks are the judge."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from kdcache.data import check, convert
from kdcache.data import list_splits as list_any_splits
from kdcache.data import open_split as open_any_split
from kdcache.data.layouts.exports.coco import ObjectLabels, decompressed
from kdcache.data.layouts.exports.shapes import Item, Shape, draw
from kdcache.data.layouts.pictures import Pictures
from kdcache.errors import DataError

open_split, list_splits = partial(open_any_split, exports=True), partial(list_any_splits, exports=True)
SIZE = (24, 32)
SQUARE = [[2, 2, 20, 2, 20, 20, 2, 20]]
SMALL = [[8, 8, 12, 8, 12, 12, 8, 12]]


def write(root: Path, objects: list[dict], split: str = "train", **other: object) -> Path:
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(root / f"images/{split}.png")
    content = {
        "images": [{"id": 7, "file_name": f"{split}.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 3, "name": "car"}, {"id": 1, "name": "road"}],
        "annotations": [{"image_id": 7, **one} for one in objects],
    }
    (root / f"annotations/{split}.json").write_text(json.dumps(content | other))
    return root


def drawn(size: tuple[int, int], annotations: list[dict], class_of: dict[int, int], background: int = 0) -> np.ndarray:
    """The label of annotations whose categories are called by their numbers."""
    shapes = tuple(Shape(str(one["category_id"]), "object", data=one) for one in annotations)
    named = {str(number): index for number, index in class_of.items()}
    labels = ObjectLabels({"a": Item("a", "here", shapes, size)}, {}, named, background, {})
    return draw(labels.shapes("a"), size, named, background, "here")


def own_mask(outline) -> np.ndarray:
    return decoded(coco.merge(coco.frPyObjects(outline, *SIZE)))


def decoded(code) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pycocotools with NumPy 2
        return coco.decode(code).astype(bool)


@pytest.mark.parametrize("order", [1, -1])
def test_of_objects_that_overlap_the_smaller_lies_on_top(order, tmp_path) -> None:
    objects = [{"category_id": 1, "segmentation": SMALL}, {"category_id": 3, "segmentation": SQUARE}][::order]
    split = open_split(write(tmp_path, objects), "train")
    assert split.classes.names == ("background", "road", "car")  # by the ids of categories
    label = split.label(0)
    small, square = own_mask(SMALL), own_mask(SQUARE)
    assert np.array_equal(label == 1, small)
    assert np.array_equal(label == 2, square & ~small)
    assert (label[~square] == 0).all()


def test_crowds_lie_below_and_equals_in_the_order_of_the_file(tmp_path) -> None:
    crowd = {"category_id": 3, "iscrowd": 1, "segmentation": coco_counts(own_mask(SMALL))}
    label = open_split(write(tmp_path, [{"category_id": 1, "segmentation": SQUARE}, crowd]), "train").label(0)
    assert set(np.unique(label)) == {0, 1}
    pair = [{"category_id": number, "segmentation": SQUARE} for number in (1, 3)]
    assert set(np.unique(open_split(write(tmp_path, pair), "train").label(0))) == {0, 2}


def coco_counts(mask: np.ndarray) -> dict:
    flat = np.concatenate([[0], mask.reshape(-1, order="F").astype(int)])
    edges = np.flatnonzero(np.diff(np.concatenate([flat, [1 - flat[-1]]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


BITS = st.lists(st.booleans(), min_size=6 * 7, max_size=6 * 7)


@given(masks=st.lists(BITS, min_size=1, max_size=4), compressed=st.booleans())
def test_run_lengths_are_drawn_as_pycocotools_decodes_them(masks, compressed) -> None:
    arrays = [np.array(bits, np.uint8).reshape(6, 7) for bits in masks]
    annotations, expected = [], np.zeros((6, 7), np.uint8)
    for number, array in enumerate(arrays, 1):
        code = coco.encode(np.asfortranarray(array))
        counts = {"size": [6, 7], "counts": code["counts"].decode()} if compressed else coco_counts(array)
        annotations.append({"category_id": number, "segmentation": counts})
    for number in sorted(range(len(arrays)), key=lambda i: -int(arrays[i].sum())):  # a stable sort
        expected[arrays[number].astype(bool)] = number + 1
    label = drawn((6, 7), annotations, {n: n for n in range(1, 5)})
    assert np.array_equal(label, expected)


POINTS = st.lists(st.tuples(st.floats(-3, 30), st.floats(-3, 20)), min_size=3, max_size=7)


@given(polygons=st.lists(POINTS, min_size=1, max_size=3))
def test_polygons_are_drawn_as_pycocotools_draws_them(polygons) -> None:
    outline = [[x for point in polygon for x in point] for polygon in polygons]
    label = drawn((18, 27), [{"category_id": 4, "segmentation": outline}], {4: 9}, 255)
    mask = decoded(coco.merge(coco.frPyObjects(outline, 18, 27)))
    assert np.array_equal(label, np.where(mask, 9, 255))


@settings(max_examples=300)
@given(counts=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12))
def test_text_that_is_no_run_length_code_is_refused(counts) -> None:
    outline = {"size": [6, 7], "counts": counts}
    runs = decompressed(counts)
    annotations = [{"category_id": 1, "segmentation": outline}]
    if min(runs, default=-1) >= 0 and sum(runs) == 42:
        assert drawn((6, 7), annotations, {1: 1}).shape == (6, 7)
        return
    with pytest.raises(DataError, match="run lengths"):
        drawn((6, 7), annotations, {1: 1})


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"segmentation": []}, "not a box alone"),
        ({"segmentation": [[1, 2, 3, 4]]}, "three points or more"),
        ({"segmentation": [[1, 2, 3, 4, 5, "x"]]}, "three points or more"),
        ({"segmentation": {"size": [3, 3], "counts": [9]}}, "24 x 32"),
        ({"segmentation": {"size": list(SIZE), "counts": [5]}}, "cover the image"),
        ({"category_id": 8}, "a category that the file lists"),
    ],
)
def test_annotations_that_cannot_be_drawn_are_named(change, rule, tmp_path) -> None:
    root = write(tmp_path, [{"id": 55, "category_id": 1, "segmentation": SQUARE, **change}])
    with pytest.raises(DataError, match="Cannot draw annotation 55 of") as caught:
        open_split(root, "train").label(0)
    assert rule in caught.value.problem
    assert len(check(root).splits["train"].unreadable) == 1


@pytest.mark.parametrize(
    ("other", "received"),
    [
        ({"annotations": [{"image_id": 8}]}, "1 annotations of no image, such as one of image 8"),
        ({"images": [{"id": 1}]}, "KeyError 'file_name'"),
        ({"images": [{"id": 7, "file_name": n, "height": 4, "width": 4} for n in "ab"]}, "two images"),
        ({"categories": []}, "no categories"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "categories of one id"),
    ],
)
def test_a_file_of_another_kind_is_refused(other, received, tmp_path) -> None:
    root = write(tmp_path, [], **other)
    with pytest.raises(DataError) as caught:
        open_split(root, "train")
    assert received in caught.value.problem


def test_splits_have_the_same_categories(tmp_path) -> None:
    root = write(tmp_path, [])
    write(root, [], "val", categories=[{"id": 1, "name": "road"}])
    assert list_splits(root) == ["train", "val"]
    with pytest.raises(DataError, match=r"1 road in .*val\.json, 1 road, 3 car in .*train\.json"):
        open_split(root, "val")


def test_roboflow_s_export(tmp_path) -> None:
    """Annotations beside the images, category 0 for the whole, `valid`."""
    categories = [
        {"id": 0, "name": "things", "supercategory": "none"},
        {"id": 1, "name": "car", "supercategory": "things"},
    ]
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / split / "a.jpg")
        content = {
            "images": [{"id": 0, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
            "categories": categories,
            "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "segmentation": SQUARE}],
        }
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    split = open_split(tmp_path, "val")
    assert split.classes.names == ("background", "car")
    assert np.array_equal(split.label(0) == 1, own_mask(SQUARE))
    assert check(tmp_path).layout == "coco"


def test_an_image_that_is_listed_and_not_there_is_missing(tmp_path) -> None:
    root = write(tmp_path, [])
    (root / "images/train.png").rename(root / "images/other.png")
    with pytest.raises(DataError, match=r"train\.png"):
        open_split(root, "train")


def test_contents_are_part_of_the_digest(tmp_path) -> None:
    first = open_split(write(tmp_path, [{"category_id": 1, "segmentation": SQUARE}]), "train").content_digests(0)
    other = open_split(write(tmp_path, [{"category_id": 1, "segmentation": SMALL}]), "train").content_digests(0)
    assert first[0] == other[0]
    assert first[1] != other[1]


def exported(root: Path, name: str, file_name: str) -> None:
    """A file of annotations as tools export it: one image with a square."""
    root.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": 0, "file_name": file_name, "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 0, "name": "car"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "iscrowd": 0, "segmentation": SQUARE}],
    }
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "file_name", "image", "split"),
    [
        ("result.json", "images\\0a1b-a.png", "images/0a1b-a.png", "train"),
        ("result.json", "images/0a1b-a.png", "images/0a1b-a.png", "train"),
        ("val/result.json", "images\\a.png", "val/images/a.png", "val"),
        ("train/_annotations.coco.json", "a_png.rf.01.png", "train/a_png.rf.01.png", "train"),
        ("valid/_annotations.coco.json", "images\\a.png", "valid/images/a.png", "valid"),
        ("annotations/instances_default.json", "a.png", "images/a.png", "train"),
        ("annotations/instances_default.json", "sub/a.png", "images/default/sub/a.png", "train"),
        ("annotations/instances_val2017.json", "C:\\me\\val2017\\a.png", "val2017/a.png", "val"),
        ("annotations.json", "JPEGImages/a.png", "JPEGImages/a.png", "train"),
        ("labels.json", "/home/me/data/a.png", "data/a.png", "train"),
        ("test.json", "a.png", "images/a.png", "test"),
    ],
)
def test_exports_are_found_with_their_images(name, file_name, image, split, tmp_path) -> None:
    exported(tmp_path, name, file_name)
    (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / image)
    report = check(tmp_path)
    assert (list_splits(tmp_path), report.layout, report.problems) == ([split], "coco", [])
    assert name in report.why
    opened = open_split(tmp_path, split)
    assert opened.classes.names == ("background", "car")
    assert np.array_equal(opened.label(0) == 1, own_mask(SQUARE))


def test_a_backslash_of_a_file_name_is_no_separator(tmp_path) -> None:
    exported(tmp_path, "result.json", "a\\b.png")
    for name, level in (("a\\b.png", 9), ("a/b.png", 0)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((*SIZE, 3), level, np.uint8)).save(tmp_path / name)
    assert open_split(tmp_path, "train").image(0).min() == 9


@pytest.mark.parametrize("others", [["a/x.png", "b/x.png"], ["../x.png"], []])
def test_an_image_is_never_one_of_several_nor_outside_of_the_folder(others, tmp_path) -> None:
    exported(tmp_path / "set", "result.json", "gone/x.png")
    for name in [*others, "other.png"]:
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "set" / name)
    with pytest.raises(DataError, match=r"x\.png") as caught:
        open_split(tmp_path / "set", "train")
    assert "Put the images below this folder" in caught.value.fix


def test_an_image_of_another_split_is_never_taken(tmp_path) -> None:
    for split in ("train", "valid"):
        exported(tmp_path, f"{split}/_annotations.coco.json", "a.png")
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "valid/a.png")
    assert open_split(tmp_path, "valid").ids == ("a",)
    with pytest.raises(DataError, match=r"a\.png"):
        open_split(tmp_path, "train")


def test_a_training_names_the_command_and_a_conversion_has_the_same_samples(tmp_path) -> None:
    root = write(tmp_path / "set", [{"category_id": 1, "segmentation": SQUARE}])
    with pytest.raises(DataError, match=r"layout coco \(annotations/train\.json\)") as caught:
        open_any_split(root, "train")
    assert f"kdcache data convert {root} set-folder" in caught.value.fix
    convert(root, tmp_path / "out", threads=1)
    before, after = open_split(root, "train"), open_any_split(tmp_path / "out", "train")
    assert before.digest() == after.digest()  # so that a cache of the one fits the other
    assert np.array_equal(before.label(0), after.label(0))


def test_a_mask_is_never_the_image(tmp_path) -> None:
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "masks/x.png")
    assert Pictures(tmp_path).find("gone/x.png") is None
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "x.png")
    assert Pictures(tmp_path).find("gone/x.png") == "x.png"
