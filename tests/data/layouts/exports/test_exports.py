"""Exports of labelling tools, written as the tools write them: read alike, converted, and named by every other verb."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import check, convert, list_splits, open_split
from kdcache.errors import DataError

SIZE = (24, 32)
BOX = [(4, 6), (20, 6), (20, 12), (4, 12)]
"""A polygon. Pillow's outline belongs to it: columns 4 to 20, rows 6 to 12."""
INNER = [(10, 8), (14, 8), (14, 10), (10, 10)]

# What label_studio_converter 0.0.59's mask2rle makes of a mask of 6 x 8 with rows 1 to 3, columns 2 to 6.
BRUSH = [0, 0, 0, 192, 57, 27, 254, 39, 0, 194, 127, 246, 192, 48, 159, 253, 176, 12, 39, 255, 144, 192, 0]


def expected() -> np.ndarray:
    """The box as class 1 (car) and the later, inner one as class 2 (wheel)."""
    label = np.zeros(SIZE, np.uint8)
    label[6:13, 4:21] = 1
    label[8:11, 10:15] = 2
    return label


def picture(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def mask(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def percent(points: list[tuple[int, int]]) -> list[list[float]]:
    return [[100 * x / SIZE[1], 100 * y / SIZE[0]] for x, y in points]


def labelme(root: Path) -> None:
    shapes = [
        {"label": "car", "points": BOX, "shape_type": "polygon", "group_id": None, "flags": {}},
        {"label": "wheel", "points": [INNER[0], INNER[2]], "shape_type": "rectangle"},
        {"label": "wheel", "points": INNER, "shape_type": "rectangle"},  # as X-AnyLabeling has it
    ]
    for split, names in (("train", "ab"), ("val", "c")):
        for name in names:
            picture(root / split / f"{name}.jpg")
            content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{name}.jpg", "imageData": None}
            size = {"imageHeight": SIZE[0], "imageWidth": SIZE[1]}
            (root / split / f"{name}.json").write_text(json.dumps(content | size))


def labelme2voc(root: Path, arrays: bool = False) -> None:
    (root / "SegmentationClass").mkdir(parents=True)
    (root / "class_names.txt").write_text("__ignore__\n_background_\ncar\nwheel\n")
    for name in "ab":
        picture(root / f"JPEGImages/{name}.jpg")
        if arrays:
            np.save(root / f"SegmentationClass/{name}.npy", expected().astype(np.int32))
        else:
            label = Image.fromarray(expected())
            label.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # as imgviz has it
            label.save(root / f"SegmentationClass/{name}.png")


def yolo(root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text("path: ../x\ntrain: images/train\nval: images/val\nnames:\n  0: car\n  1: wheel\n")
    lines = ""
    for number, points in enumerate((BOX, INNER)):
        lines += f"{number} " + " ".join(f"{x / SIZE[1]:.6f} {y / SIZE[0]:.6f}" for x, y in points) + "\n"
    for split, names in (("train", "ab"), ("val", "c")):
        for name in names:
            picture(root / f"images/{split}/{name}.jpg")
            (root / f"labels/{split}").mkdir(parents=True, exist_ok=True)
            (root / f"labels/{split}/{name}.txt").write_text(lines)


def cvat(root: Path) -> None:
    points = [";".join(f"{x}.0,{y}.0" for x, y in shape) for shape in (BOX, INNER)]
    images = ""
    for number, name in enumerate("ab"):
        picture(root / f"images/{name}.jpg")
        images += f"""<image id="{number}" name="{name}.jpg" width="{SIZE[1]}" height="{SIZE[0]}">
        <polygon label="wheel" source="manual" occluded="0" points="{points[1]}" z_order="1"></polygon>
        <polygon label="car" source="manual" occluded="0" points="{points[0]}" z_order="0"></polygon><tag label="x"/>
        </image>"""
    labels = "".join(f"<label><name>{name}</name><color>#fa3253</color></label>" for name in ("car", "wheel"))
    head = f"<version>1.1</version><meta><task><id>1</id><labels>{labels}</labels></task></meta>"
    (root / "annotations.xml").write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>{head}{images}</annotations>'
    )


def cvat_masks(root: Path) -> None:
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,50,83::\nwheel:51,221,255::\n"
    )
    (root / "ImageSets/Segmentation/default.txt").write_text("a\nb c\n")
    colours = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255)], np.uint8)
    for name in ("a", "b c"):
        picture(root / f"JPEGImages/{name}.jpg")
        mask(root / f"SegmentationClass/{name}.png", colours[expected()])
        mask(root / f"SegmentationObject/{name}.png", colours[expected()])


def region(points: list[tuple[int, int]], label: str) -> dict[str, object]:
    return {
        "original_width": SIZE[1],
        "original_height": SIZE[0],
        "image_rotation": 0,
        "type": "polygonlabels",
        "value": {"points": percent(points), "closed": True, "polygonlabels": [label]},
    }


def label_studio(root: Path) -> None:
    tasks = []
    for number, name in enumerate("ab", 1):
        picture(root / f"images/0a1b2c3d-{name}.jpg")
        result = [region(BOX, "car"), region(INNER, "wheel"), {"type": "choices", "value": {"choices": ["day"]}}]
        cancelled = {"was_cancelled": True, "result": [region(BOX, "wheel")]}
        tasks.append(
            {
                "id": number,
                "annotations": [cancelled, {"was_cancelled": False, "result": result}],
                "data": {"image": f"/data/upload/1/0a1b2c3d-{name}.jpg"},
            }
        )
    (root / "project-1-at-2026-01-31-12-00-0a1b2c3d.json").write_text(json.dumps(tasks))


WRITERS: dict[str, Callable[[Path], None]] = {
    "cvat": cvat,
    "cvat-masks": cvat_masks,
    "labelme": labelme,
    "labelme2voc": labelme2voc,
    "label-studio": label_studio,
    "yolo": yolo,
}
FOUND = {
    "cvat": "annotations.xml",
    "cvat-masks": "labelmap.txt",
    "labelme": "train/a.json",
    "labelme2voc": "class_names.txt",
    "label-studio": "project-1-at-2026-01-31-12-00-0a1b2c3d.json",
    "yolo": "data.yaml",
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_export_is_converted_and_named_by_other_verbs(name: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    WRITERS[name](root)
    report = check(root)
    assert (report.layout, report.problems) == (name, [])
    assert FOUND[name] in report.why
    with pytest.raises(DataError) as caught:
        open_split(root, "train")
    assert FOUND[name] in caught.value.problem
    assert f"kdcache data convert {root} set-folder" in caught.value.fix
    convert(root, tmp_path / "out", threads=1)
    out = open_split(tmp_path / "out", "train")
    assert len(out) == 2
    assert out.classes.names[1:] == ("car", "wheel")
    for index in range(2):
        assert np.array_equal(out.label(index), expected())
    assert check(tmp_path / "out").problems == []


@pytest.mark.parametrize("name", ["labelme", "yolo"])
def test_folders_of_splits_are_splits_and_no_part_of_ids(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    assert list_splits(tmp_path, exports=True) == ["train", "val"]
    assert open_split(tmp_path, "train", exports=True).ids == ("a", "b")
    assert open_split(tmp_path, "val", exports=True).ids == ("c",)


def test_a_class_list_orders_classes_and_says_what_is_void(tmp_path: Path) -> None:
    labelme(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nwheel\n")
    label = open_split(tmp_path, "train", exports=True).label(0)
    assert np.array_equal(label, np.where(expected() == 2, 1, 255))


def test_ignored_shapes_are_void_and_named_backgrounds_are_the_background(tmp_path: Path) -> None:
    labelme(tmp_path)
    path = tmp_path / "train/a.json"
    content = json.loads(path.read_text())
    content["shapes"].append({"label": "__ignore__", "points": INNER, "shape_type": "polygon"})
    content["shapes"].append({"label": "_background_", "points": [[0, 0], [3, 3]], "shape_type": "rectangle"})
    path.write_text(json.dumps(content))
    split = open_split(tmp_path, "train", exports=True)
    assert split.classes.names == ("_background_", "car", "wheel")
    assert np.array_equal(split.label(0), np.where(expected() == 2, 255, expected()))


def test_labelme_draws_circles_masks_and_images_of_windows(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.jpg")
    picture(tmp_path / "images/unlabelled.jpg")
    file = io.BytesIO()
    Image.fromarray(np.array([[255, 0], [0, 255]], np.uint8)).save(file, "PNG")
    shapes = [
        {"label": "car", "points": [[16, 12], [16, 8]], "shape_type": "circle"},
        {
            "label": "wheel",
            "points": [[1.9, 2.2], [3, 3]],
            "shape_type": "mask",
            "mask": base64.b64encode(file.getvalue()).decode(),
        },
    ]
    (tmp_path / "json").mkdir()
    (tmp_path / "json/a.json").write_text(json.dumps({"shapes": shapes, "imagePath": "..\\images\\a.jpg"}))
    split = open_split(tmp_path, "train", exports=True)
    assert split.ids == ("a", "unlabelled")
    assert not split.has_label(1)
    label = split.label(0)
    rows, columns = np.nonzero(label == 1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 16, 12, 20)
    assert np.argwhere(label == 2).tolist() == [[2, 1], [3, 2]]


def test_labelme2voc_arrays_alone_are_no_labels(tmp_path: Path) -> None:
    """labelme2voc writes PNGs as well."""
    labelme2voc(tmp_path, arrays=True)
    with pytest.raises(DataError, match=r"a\.npy"):
        open_split(tmp_path, "train", exports=True)


def test_cvat_reads_masks_boxes_and_subsets(tmp_path: Path) -> None:
    picture(tmp_path / "images/Validation/sub/a.jpg")
    (tmp_path / "annotations.xml").write_text(
        f"""<annotations><meta><project><labels><label><name>car</name></label><label><name>wheel</name></label></labels>
        </project></meta><image id="0" name="sub/a.jpg" subset="Validation" width="{SIZE[1]}" height="{SIZE[0]}">
        <mask label="car" rle="1, 2, 3" left="5" top="3" width="3" height="2" z_order="0"></mask>
        <box label="wheel" xtl="20.0" ytl="10.0" xbr="22.0" ybr="12.0" z_order="0"></box>
        <ellipse label="car" cx="10" cy="16" rx="3" ry="2" rotation="90" z_order="0"></ellipse></image></annotations>"""
    )
    assert list_splits(tmp_path, exports=True) == ["validation"]
    split = open_split(tmp_path, "val", exports=True)
    assert split.ids == ("sub/a",)
    label = split.label(0)
    assert np.argwhere(label[:6] == 1).tolist() == [[3, 6], [3, 7]]
    assert np.array_equal(np.argwhere(label == 2).ravel()[[0, 1, -2, -1]], [10, 20, 12, 22])
    rows, columns = np.nonzero(label[7:] == 1)
    assert np.ptp(rows) > np.ptp(columns)  # turned upright


def test_cvat_masks_of_numbers_hold_the_lines_of_the_labelmap(tmp_path: Path) -> None:
    cvat_masks(tmp_path)
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\nunlabeled:9,9,9::\ncar:1,1,1::\n")
    mask(tmp_path / "SegmentationClass/a.png", expected())
    split = open_split(tmp_path, "train", exports=True)
    assert split.classes.names == ("background", "car")
    assert np.array_equal(split.label(0), np.choose(expected(), [0, 255, 1]))


@pytest.mark.parametrize("name", ["0a1b2c3d-a.jpg", "a.jpg"])
@pytest.mark.parametrize("url", ["/data/local-files/?d=sets/one%20two/{}", "s3://bucket/{}?x=1", "C:\\data\\{}", "{}"])
def test_label_studio_images_are_found_wherever_the_server_had_them(name: str, url: str, tmp_path: Path) -> None:
    picture(tmp_path / "images" / name)
    task = {"id": 1, "data": {"image": url.format("0a1b2c3d-a.jpg")}, "annotations": [{"result": [region(BOX, "car")]}]}
    (tmp_path / "export.json").write_text(json.dumps([task]))
    assert open_split(tmp_path, "train", exports=True).label(0).sum() == 7 * 17


def test_label_studio_draws_brushes_and_turned_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (6, 8))
    size = {"original_width": 8, "original_height": 6, "image_rotation": 0}
    brush = {"type": "brushlabels", "value": {"format": "rle", "rle": BRUSH, "brushlabels": ["car"]}}
    box = {
        "type": "rectanglelabels",  # turned by 90 degrees around its corner at (7, 0)
        "value": {"x": 87.5, "y": 0, "width": 20, "height": 25, "rotation": 90, "rectanglelabels": ["sky"]},
    }
    task = {"id": 1, "data": {"image": "a.png"}, "annotations": [{"result": [size | brush, size | box]}]}
    (tmp_path / "export.json").write_text(json.dumps([task]))
    split = open_split(tmp_path, "train", exports=True)
    assert split.classes.names == ("background", "car", "sky")
    label = split.label(0)
    assert np.argwhere(label == 1).tolist() == [[y, x] for y in range(1, 4) for x in range(2, 7) if label[y, x] != 2]
    assert label[0, 6] == label[1, 7] == 2


def test_images_without_a_text_file_show_the_background_if_others_have_one(tmp_path: Path) -> None:
    yolo(tmp_path)
    picture(tmp_path / "images/train/empty.jpg")
    picture(tmp_path / "images/test/t.jpg")
    (tmp_path / "labels/test").mkdir()
    split = open_split(tmp_path, "train", exports=True)
    assert not split.label(split.ids.index("empty")).any()
    assert not open_split(tmp_path, "test", exports=True).has_label(0)


@pytest.mark.parametrize(("names", "folders"), [("names: [car, wheel]\nnc: 2\n", "{split}/{kind}"), ("", "{kind}")])
def test_yolo_of_other_folders(names: str, folders: str, tmp_path: Path) -> None:
    split = "valid"
    images, labels = (tmp_path / folders.format(split=split, kind=kind) for kind in ("images", "labels"))
    picture(images / "a.jpg")
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("1 0 0 0.5 0 0.5 0.5\n")
    (tmp_path / ("data.yaml" if names else "classes.txt")).write_text(names or "car\nwheel\n")
    (opened,) = (open_split(tmp_path, name, exports=True) for name in list_splits(tmp_path, exports=True))
    assert opened.split == (split if names else "train")
    assert opened.classes.names == ("background", "car", "wheel")
    assert set(np.unique(opened.label(0))) == {0, 2}


def test_a_folder_of_exports_is_none(tmp_path: Path) -> None:
    for name in ("labelme", "label-studio"):
        WRITERS[name](tmp_path / f"my {name}")
    with pytest.raises(DataError) as caught:
        check(tmp_path)
    assert f"{tmp_path / 'my labelme'} (labelme)" in caught.value.fix


def test_masks_beside_annotations_are_the_labels(tmp_path: Path, tiny) -> None:
    root = tiny.write("folder", tmp_path / "set")
    labelme(tmp_path / "other")
    for file in (tmp_path / "other/train/a.json", tmp_path / "other/train/b.json"):
        file.rename(root / "images/train" / file.name)
    assert open_split(root, "train").data == str(root)


def broken(root: Path, file: str, **changes: object) -> None:
    content = json.loads((root / file).read_text())
    (root / file).write_text(json.dumps(content | changes))


def bomb() -> str:
    """A PNG in base64 whose header names 60000 x 60000 pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    head, tail = file.getvalue()[:16], file.getvalue()[24:29]
    size = (60000).to_bytes(4, "big") * 2
    checksum = zlib.crc32(b"IHDR" + size + tail[:5]).to_bytes(4, "big")
    return base64.b64encode(head + size + tail[:5] + checksum + file.getvalue()[33:]).decode()


WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "entity": (
        "cvat",
        lambda root: (root / "annotations.xml").write_text(
            '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]>\n<annotations><image name="&a;"/></annotations>'
        ),
        "document type",
    ),
    "cut": (
        "cvat",
        lambda root: (root / "annotations.xml").write_text("<annotations><image"),
        "annotations.xml",
    ),
    "video": (
        "cvat",
        lambda root: (root / "annotations.xml").write_text('<annotations><track id="0"/></annotations>'),
        "export as CVAT for images 1.1",
    ),
    "labelmap": (
        "cvat-masks",
        lambda root: (root / "labelmap.txt").write_text("background:0,0,0::\ncar:300,0,0::\n"),
        "line 2",
    ),
    "names": ("yolo", lambda root: (root / "data.yaml").unlink(), "names: [first, second]"),
    "count": ("yolo", lambda root: (root / "data.yaml").write_text("nc: 3\nnames: [a, b]\n"), "nc is 3"),
    "yaml": ("yolo", lambda root: (root / "data.yaml").write_text("names: [a\n"), "data.yaml"),
    "shapes": ("labelme", lambda root: broken(root, "train/a.json", shapes=[{"points": []}]), "train/a.json"),
    "empty": (
        "labelme",
        lambda root: [broken(root, f"{file}.json", shapes=[]) for file in ("train/a", "train/b", "val/c")],
        "labels nothing",
    ),
    "minimal": (
        "label-studio",
        lambda root: next(root.glob("*.json")).write_text('[{"id": 1, "image": "a.jpg", "annotator": 1}]'),
        "export the project as JSON",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_wrong_are_named(case: str, tmp_path: Path) -> None:
    name, spoil, words = WRONG[case]
    WRITERS[name](tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(DataError) as caught:
        convert(f"{name}:{tmp_path / 'set'}", tmp_path / "out")
    assert words in str(caught.value)


LEFT_OUT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "box": (
        "yolo",
        lambda root: (root / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.2\n"),
        "a box alone",
    ),
    "pixels": (
        "yolo",
        lambda root: (root / "labels/train/a.txt").write_text("0 10 10 20 10 20 20\n"),
        "no parts of the image's size",
    ),
    "class": ("yolo", lambda root: (root / "labels/train/a.txt").write_text("7 0 0 1 0 1 1\n"), "of no class"),
    "size": ("labelme", lambda root: broken(root, "train/a.json", imageHeight=99), "99 x 32"),
    "line": (
        "labelme",
        lambda root: broken(
            root, "train/a.json", shapes=[{"label": "car", "points": [[1, 1], [5, 5]], "shape_type": "line"}]
        ),
        "line of 'car'",
    ),
    "bomb": (
        "labelme",
        lambda root: broken(
            root,
            "train/a.json",
            shapes=[{"label": "car", "points": [[0, 0], [1, 1]], "shape_type": "mask", "mask": bomb()}],
        ),
        "png of 'car'",
    ),
    "huge": (
        "labelme",
        lambda root: broken(root, "train/a.json", shapes=[{"label": "car", "points": [[1, 1], [5, 1e12], [2, 2]]}]),
        "far outside",
    ),
    "gone": ("cvat", lambda root: (root / "images/a.jpg").unlink(), "not there"),
    "gone png": ("cvat-masks", lambda root: (root / "SegmentationClass/a.png").unlink(), "not there"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_images_that_cannot_be_labelled_are_left_out_and_named(case: str, tmp_path: Path) -> None:
    name, spoil, words = LEFT_OUT[case]
    WRITERS[name](tmp_path / "set")
    spoil(tmp_path / "set")
    dropped = convert(tmp_path / "set", tmp_path / "out", splits=["train"]).splits["train"].dropped
    assert len(dropped) == 1
    assert words in f"{dropped}"
