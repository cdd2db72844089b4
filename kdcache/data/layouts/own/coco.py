"""COCO's annotations of objects, and the exports that copy it: JSON with polygons or run lengths.

    annotations/instances_train2017.json    images in train2017/ or images/train2017/; the split is `train`
    annotations/SPLIT.json                  images in SPLIT/, images/SPLIT/ or images/
    annotations/instances_default.json      images in images/ or images/default/; the split is `train` (CVAT)
    SPLIT/_annotations.coco.json            images beside it (Roboflow)
    result.json, SPLIT/result.json          or any other name, with images in images/ (Label Studio); else `train`

Names of images may have backslashes, or other folders before them (pictures.py).

Classes are the background and the file's categories in the order of their ids; a category called background takes its
place. A `classes.txt` picks and orders them by name: categories that it does not list are void. polygons.py has the
rule for objects that overlap. A split's annotations are in memory while it is open: convert large sets once.

Source: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from kdcache.data.classes import CLASSES_FILE
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.exports.base import SPLITS, files_of, head_has
from kdcache.data.layouts.label_ids import LabelIds
from kdcache.data.layouts.own.polygons import Annotation, Drawing, PolygonLabels
from kdcache.data.layouts.pictures import Pictures, holds_masks
from kdcache.data.layouts.scan import WHOLE, Scan, composed, folders_in, is_picture
from kdcache.data.sample import IGNORE_INDEX, ClassList
from kdcache.errors import DataError

ANNOTATIONS, ROBOFLOW = "annotations", "_annotations.coco.json"
BACKGROUND = "background"
_OF_OBJECTS = "instances_"
_OTHERS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
_YEAR = re.compile(r"(train|val|test)\d{4}")

LABEL_IDS = LabelIds(
    "Label ids are the background's and the categories', or 255 (void).",
    f"Correct the categories, or the names in {CLASSES_FILE}.",
)


class Coco(Layout):
    """The layout of COCO's annotations."""

    name: ClassVar[str] = "coco"
    looks_for: ClassVar[str] = (
        f"{ANNOTATIONS}/{_OF_OBJECTS}SPLIT.json or {ANNOTATIONS}/SPLIT.json beside SPLIT/ or images/, or "
        f"SPLIT/{ROBOFLOW}, or another JSON file of COCO in the folder or in SPLIT/"
    )
    split_is: ClassVar[str] = f"a file of annotations, {ANNOTATIONS}/{_OF_OBJECTS}SPLIT.json or SPLIT/{ROBOFLOW}"

    restore: ClassVar[str] = "Put the images below this folder, under their own names"

    def matches(self, root: Path) -> bool:
        return bool(_files(root))

    def splits(self, root: Path) -> list[str]:
        return sorted(_files(root))

    def why(self, root: Path) -> str:
        files = ", ".join(file.relative_to(root).as_posix() for file in list(_files(root).values())[:4])
        classes = f"the classes of {CLASSES_FILE}" if self.lists_classes(root) else "background and its categories"
        return f"{files}; {classes}; of objects that overlap the smaller one counts"

    def lists_classes(self, root: Path) -> bool:
        return (root / CLASSES_FILE).is_file()

    def scan(self, root: Path, split: str, images: Path | None = None) -> Scan:
        return replace(super().scan(root, split, images), label_ids=LABEL_IDS)

    def _classes(self, root: Path) -> ClassList:
        categories = _categories(_read(_first(root)))
        return ClassList((_background(categories), *_objects(categories).values()))

    def _scan(self, root: Path, split: str) -> Scan:
        file = _files(root)[split]
        content = _read(file)
        categories = _categories(content)
        if categories != (others := _categories(_read(_first(root)))):
            raise DataError(
                "All splits have the same categories.",
                received=f"{_shown(categories)} in {file}; {_shown(others)} in {_first(root)}",
                remedy="Give both files the categories of both, with the same ids.",
            )
        own = _by_image(content, file)
        place, files = _image_place(root, split, file), dict[str, str]()
        clashes, missing, drawings, numbers = (
            list[tuple[str, str, str]](),
            list[str](),
            dict[str, Drawing](),
            set[Any](),
        )
        pictures = Pictures(root, place)
        for image in content["images"]:
            found = pictures.find(str(image["file_name"]), place, *({"images", ""} if place in ("images", "") else ()))
            path = found or f"{place}/{image['file_name']}".lstrip("/")
            sample = composed(path.removeprefix(f"{place}/").rpartition(".")[0] or path)
            repeated = sample in drawings or image["id"] in numbers
            numbers.add(image["id"])
            drawings[sample] = Drawing((image["height"], image["width"]), own.get(image["id"], []))
            if repeated:
                clashes.append((sample, path, f"image {image['id']} of {file.name}"))
                continue
            if found is None:
                missing.append(path)
                continue
            files[sample] = path
        labels = dict.fromkeys(sorted(files), file.relative_to(root).as_posix()) if ANNOTATIONS in content else {}
        names = {name: number for number, name in enumerate(self.classes(root).names)}
        classes = {category: names.get(name, IGNORE_INDEX) for category, name in categories.items()}
        drawn = PolygonLabels(drawings, classes, names.get(_background(categories), IGNORE_INDEX), file)
        images = {sample: files[sample] for sample in sorted(files)}
        return Scan(images, labels, LABEL_IDS, place, place, clashes=clashes, missing=missing, drawn=drawn)


def _files(root: Path) -> dict[str, Path]:
    """The file of annotations of every split; of COCO's own those of objects."""
    files: dict[str, Path] = {}
    folder = root / ANNOTATIONS
    listed = sorted(path for path in folder.glob("*.json") if not path.name.startswith((*_OTHERS, ".")))
    objects = [path for path in listed if path.name.startswith(_OF_OBJECTS)]
    names = {path.stem.removeprefix(_OF_OBJECTS): path for path in objects or listed}
    plain = [match[1] for name in names if (match := _YEAR.fullmatch(name))]
    for name, path in names.items():
        match = _YEAR.fullmatch(name)
        # train2014 beside train2017 keep their years.
        files[match[1] if match and plain.count(match[1]) == 1 and match[1] not in names else name] = path
    for name in folders_in(root):
        if name != ANNOTATIONS and (root / name / ROBOFLOW).is_file():
            files.setdefault(name, root / name / ROBOFLOW)
    if not files and (found := _anywhere(root)) and not holds_masks(root):
        files = found
    return {WHOLE: files["default"]} if list(files) == ["default"] else files


def _anywhere(root: Path) -> dict[str, Path]:
    """Files of annotations of any name: in folders of splits, else in the root, where one alone is `train`."""
    folders = [name for name in folders_in(root) if name in SPLITS]
    listed = [(name, path) for name in folders for path in files_of(root / name, ".json", 0) if _is_coco(path)]
    if not listed:
        whole = [path for path in files_of(root, ".json", 0) if _is_coco(path)]
        named = [(path.stem.removeprefix(_OF_OBJECTS), path) for path in whole]
        listed = [(WHOLE, whole[0])] if len(whole) == 1 and named[0][0] not in SPLITS else named
    return dict(listed[::-1])


def _is_coco(path: Path) -> bool:
    return any(head_has(path, "{", key) for key in ("images", "annotations", "categories")) and not head_has(
        path, "{", "shapes"
    )


def _first(root: Path) -> Path:
    """The file whose categories count: that of train, else the first."""
    files = _files(root)
    return files.get("train", next(iter(files.values())))


def _image_place(root: Path, split: str, file: Path) -> str:
    """The folder of a split's images below the root."""
    if file.name == ROBOFLOW or (file.parent != root and file.parent.name != ANNOTATIONS):
        return file.parent.name
    name = file.stem.removeprefix(_OF_OBJECTS)
    for place in (name, f"images/{name}", split, f"images/{split}", "images", ""):
        if (root / place).is_dir() and (place or any(is_picture(path.name) for path in root.iterdir())):
            return place
    return name if file.parent.name == ANNOTATIONS else ""


def _read(file: Path) -> dict[str, Any]:
    return _read_version(file, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=4)
def _read_version(file: Path, changed: int) -> dict[str, Any]:
    """The content of a file of annotations, read once. Raises: DataError for another kind of file."""
    try:
        content = json.loads(file.read_bytes())
        images = [(i["id"], str(i["file_name"]), int(i["height"]), int(i["width"])) for i in content["images"]]
        wrong = [image for image in images if min(image[2:]) < 1 or max(image[2:]) > 2**16]
        named = [(int(category["id"]), str(category["name"])) for category in content["categories"]]
        annotated = content.get(ANNOTATIONS, [])
        if (
            wrong
            or len(dict(named)) < max(len(named), 1)
            or not all(isinstance(one, dict) and "image_id" in one for one in annotated)
        ):
            raise ValueError(
                f"image {wrong[0]}" if wrong else "no categories, two of one id, or annotations without image_id"
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            "A file of COCO annotations has images (id, file_name, height, width), categories (id, name) and "
            "annotations (image_id, category_id, segmentation).",
            received=f"{file}: {type(error).__name__} {str(error)[:120]}",
            remedy="Restore the file from its source, or export it again as COCO segmentation.",
        ) from error
    return dict(content)


def _by_image(content: dict[str, Any], file: Path) -> dict[Any, list[Annotation]]:
    """What is drawn of the annotations, by image. Raises: DataError for those of images that the file does not list."""
    annotations, numbers = content.get(ANNOTATIONS, []), {image["id"] for image in content["images"]}
    strange = [one for one in annotations if one["image_id"] not in numbers]
    if strange:
        raise DataError(
            "An annotation belongs to an image that its file lists.",
            received=f"{len(strange)} of {len(annotations)} that do not, such as one of image "
            f"{strange[0]['image_id']} in {file}",
            remedy="Restore the file from its source, or remove these annotations.",
        )
    own: dict[Any, list[Annotation]] = defaultdict(list)
    keys = ("id", "category_id", "segmentation", "iscrowd")
    for one in annotations:
        own[one["image_id"]].append({key: one[key] for key in keys if key in one})
    return own


def _categories(content: dict[str, Any]) -> dict[int, str]:
    """Names by category id, in the order of the ids; without one that stands for the whole (Roboflow's number 0)."""
    used = {one.get("category_id") for one in content.get(ANNOTATIONS, [])}
    listed = sorted(((int(c["id"]), c) for c in content["categories"]), key=lambda pair: pair[0])
    parents = {str(category.get("supercategory")) for _, category in listed}
    return {
        number: str(category["name"])
        for number, category in listed
        if not (number == 0 and number not in used and category["name"] in parents and len(listed) > 1)
    }


def _background(categories: dict[int, str]) -> str:
    return next((name for name in categories.values() if name.lower() == BACKGROUND), BACKGROUND)


def _objects(categories: dict[int, str]) -> dict[int, str]:
    return {number: name for number, name in categories.items() if name.lower() != BACKGROUND}


def _shown(categories: dict[int, str]) -> str:
    text = ", ".join(f"{number} {name}" for number, name in categories.items())
    return text if len(text) < 100 else f"{text[:97]}..."
