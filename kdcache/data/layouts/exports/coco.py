"""COCO's annotations of objects, and the exports that copy it: JSON with polygons or run lengths.

    annotations/instances_train2017.json    images in train2017/ or images/train2017/; the split is `train`
    annotations/SPLIT.json                  images in SPLIT/, images/SPLIT/ or images/
    annotations/instances_default.json      images in images/ or images/default/; the split is `train` (CVAT)
    SPLIT/_annotations.coco.json            images next to it (Roboflow)
    result.json, SPLIT/result.json          or any other name, with images in images/ (Label Studio); else `train`

Classes are the background and the file's categories in the order of their ids. A category called background replaces
the background. Every pixel has one class, so overlapping objects need a rule: **the smaller one lies on top**, by its
area in pixels. Of equal ones, the later in the file is on top. Crowds (`iscrowd`) lie below all others, whatever their
size. pycocotools (extra `coco`) draws polygons.

Source: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from kdcache.data.layouts.exports.base import SPLITS, Export, files_of, head_has, read_json, unreadable
from kdcache.data.layouts.exports.shapes import Item, Shape, ShapeLabels
from kdcache.data.layouts.pictures import holds_masks
from kdcache.data.layouts.scan import WHOLE, folders_in, is_picture
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

ANNOTATIONS, ROBOFLOW = "annotations", "_annotations.coco.json"
_OF_OBJECTS = "instances_"
_OTHERS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
_YEAR = re.compile(r"(train|val|test)\d{4}")
_KEYS = ("id", "category_id", "segmentation", "iscrowd")


class Coco(Export):
    """The layout of COCO's object annotations."""

    name: ClassVar[str] = "coco"
    looks_for: ClassVar[str] = (
        f"{ANNOTATIONS}/{_OF_OBJECTS}SPLIT.json or {ANNOTATIONS}/SPLIT.json beside SPLIT/ or images/, or "
        f"SPLIT/{ROBOFLOW}, or another JSON file of COCO in the folder or in SPLIT/"
    )
    split_is: ClassVar[str] = f"a file of annotations, {ANNOTATIONS}/{_OF_OBJECTS}SPLIT.json or SPLIT/{ROBOFLOW}"
    overlap: ClassVar[str] = "of objects that overlap the smaller one counts"

    def found(self, root: Path) -> str:
        """Return the paths below `root` of up to four annotation files, separated by commas, or ''."""
        return ", ".join(file.relative_to(root).as_posix() for file in list(_files(root).values())[:4])

    def splits(self, root: Path) -> list[str]:
        """Return the names of the splits that have an annotation file in `root`, sorted."""
        return sorted(_files(root))

    def names(self, root: Path) -> list[str]:
        """Return the names of the categories of the export in `root`, in the order of their ids."""
        return list(_categories_of(root).values())

    def items(self, root: Path) -> dict[str, list[Item]]:
        """Return split name -> its images with their shapes, for the export in `root`.

        Raises: DataError for an invalid file, or if splits have different categories.
        """
        categories, items = _categories_of(root), {}
        for split, file in _files(root).items():
            content = _read(file)
            if (others := _categories(content)) != categories:
                raise DataError(
                    f"Splits have different categories: {_shown(others)} in {file}, {_shown(categories)} in "
                    f"{_first(root)}",
                    fix="Give both files the categories of both, with the same ids.",
                )
            place = _image_place(root, split, file)
            folders = (place, *(("images", "") if place in ("images", "") else ()))
            shapes: dict[Any, list[Shape]] = defaultdict(list)
            for annotation in content.get(ANNOTATIONS, []):
                label = categories.get(annotation.get("category_id"), "")
                shapes[annotation["image_id"]].append(
                    Shape(label, "object", data={k: annotation[k] for k in _KEYS if k in annotation})
                )
            items[split] = [
                Item(
                    str(image["file_name"]),
                    file.relative_to(root).as_posix(),
                    tuple(shapes[image["id"]]) if ANNOTATIONS in content else None,
                    (image["height"], image["width"]),
                    folders,
                    place,
                )
                for image in content["images"]
            ]
        return items

    def labels(
        self,
        root: Path,
        items: Mapping[str, Item],
        images: Mapping[str, Path],
        class_of: Mapping[str, int],
        background: int,
    ) -> ShapeLabels:
        """Return the object that draws the labels of one split: a smaller object covers a larger one.

        `root` is the export's folder. `items` and `images` map a sample's id to its image with shapes, and to its image
        file. `class_of` maps class names to ids. `background` is the class id of pixels outside all shapes, or 255.
        """
        return ObjectLabels(items, images, class_of, background, _categories_of(root))


@dataclass(frozen=True, eq=False)
class ObjectLabels(ShapeLabels):
    """Labels drawn from COCO objects: a smaller object covers a larger one.

    Objects that COCO marks as crowds lie below all others.

    Attributes:
        categories: category id -> class name.
    """

    categories: Mapping[int, str]

    def shapes(self, sample: str) -> Sequence[Shape]:
        """Return a sample's objects in drawing order. Each has its mask as run lengths down the image's columns.

        Raises: DataError for an object that cannot be drawn.
        """
        item, runs = self.items[sample], []
        assert item.size is not None
        for order, shape in enumerate(item.shapes or ()):
            crowd = bool(shape.data.get("iscrowd"))
            lengths = _runs(
                shape, item.size, f"annotation {shape.data.get('id', order)} of {item.file}, image {sample!r}"
            )
            runs.append((not crowd, -sum(lengths[1::2]), order, Shape(shape.label, "columns", data=lengths)))
        return [shape for *_, shape in sorted(runs, key=lambda entry: entry[:3])]

    def digest(self, sample: str) -> str:
        """Return the SHA-256 (hex) of a sample's size, annotations and classes."""
        item = self.items[sample]
        class_of = {number: self.class_of.get(name, IGNORE_INDEX) for number, name in self.categories.items()}
        content = [item.size, [shape.data for shape in item.shapes or ()], sorted(class_of.items()), self.background]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(root: Path) -> dict[str, Path]:
    """Return split name -> annotation file. COCO's instances_*.json have priority."""
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
    """Return split name -> annotation file of any name: files in split folders, else files in the root."""
    folders = [name for name in folders_in(root) if name in SPLITS]
    listed = [(name, path) for name in folders for path in files_of(root / name, ".json", 0) if _is_coco(path)]
    if not listed:
        undivided = [path for path in files_of(root, ".json", 0) if _is_coco(path)]
        named = [(path.stem.removeprefix(_OF_OBJECTS), path) for path in undivided]
        listed = [(WHOLE, undivided[0])] if len(undivided) == 1 and named[0][0] not in SPLITS else named
    return dict(listed[::-1])


def _is_coco(path: Path) -> bool:
    return any(head_has(path, "{", key) for key in ("images", "annotations", "categories")) and not head_has(
        path, "{", "shapes"
    )


def _first(root: Path) -> Path:
    """Return the annotation file whose categories count: the file of "train", else the first."""
    files = _files(root)
    return files.get("train", next(iter(files.values())))


def _image_place(root: Path, split: str, file: Path) -> str:
    """Return the folder of a split's images, below the root."""
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
    """Return the content of an annotation file, cached until the file changes.

    Raises: DataError for another kind of file.
    """
    content = read_json(file)
    try:
        images = {i["id"]: (str(i["file_name"]), int(i["height"]), int(i["width"])) for i in content["images"]}
        named = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        if len(images) < len(content["images"]) or not 0 < len(named) == len(content["categories"]):
            raise ValueError("two images or categories of one id, or no categories")
        if wrong := [image for image in images.values() if not all(0 < side <= 2**16 for side in image[1:])]:
            raise ValueError(f"image {wrong[0]}")
        strange = [annotation for annotation in content.get(ANNOTATIONS, []) if annotation["image_id"] not in images]
        if strange:
            raise ValueError(f"{len(strange)} annotations of no image, such as one of image {strange[0]['image_id']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(file, error) from error
    return dict(content)


def _categories_of(root: Path) -> dict[int, str]:
    return _categories(_read(_first(root)))


def _categories(content: dict[str, Any]) -> dict[int, str]:
    """Return category id -> name, sorted by id, without the unused category 0 that Roboflow adds as a parent of all."""
    used = {annotation.get("category_id") for annotation in content.get(ANNOTATIONS, [])}
    listed = sorted(((int(c["id"]), c) for c in content["categories"]), key=lambda pair: pair[0])
    parents = {str(category.get("supercategory")) for _, category in listed}
    return {
        number: str(category["name"])
        for number, category in listed
        if not (number == 0 and number not in used and category["name"] in parents and len(listed) > 1)
    }


def _shown(categories: dict[int, str]) -> str:
    text = ", ".join(f"{number} {name}" for number, name in categories.items())
    return text if len(text) < 100 else f"{text[:97]}..."


def load_pycocotools() -> Any:
    """Return the module `pycocotools.mask`. Raises: DataError if it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "Cannot draw polygons of COCO: pycocotools is not installed",
            fix="Install it in a clone of kdcache: pip install '.[coco]'",
        ) from error
    return mask


def _runs(shape: Shape, size: tuple[int, int], where: str) -> list[int]:
    """Return an object's run lengths down the columns, alternating between pixels outside and inside, outside first.

    Raises: DataError for an object that cannot be drawn.
    """
    height, width = size
    outline = shape.data.get("segmentation")
    if not shape.label:
        raise _broken("a category that the file lists", shape.data.get("category_id"), where)
    if isinstance(outline, list) and outline and all(_is_polygon(polygon) for polygon in outline):
        coco = load_pycocotools()
        polygons = [[float(x) for x in polygon] for polygon in outline]
        return decompressed(coco.merge(coco.frPyObjects(polygons, height, width))["counts"].decode("ascii"))
    if isinstance(outline, dict) and list(outline.get("size", ())) == [height, width]:
        counts = outline.get("counts")
        runs: Any = decompressed(counts) if isinstance(counts, str) else counts
        valid = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
        if valid and sum(runs) == height * width:
            return list(runs)
    if outline in (None, [], {}):
        raise _broken("an outline (`segmentation`), not a box alone", "none", where)
    raise _broken(
        "a list of polygons, [x, y, x, y, ...] with three points or more, or run lengths that cover the image, here "
        f"{height} x {width} (height x width)",
        outline,
        where,
    )


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e6 for x in polygon)


def decompressed(counts: str) -> list[int]:
    """Return the run lengths of `counts`, COCO's compressed RLE text, or [-1] for invalid text.

    A number is a signed integer in groups of five bits, the lowest first. A character's code minus 48 is one group,
    plus 32 if the number continues. From the fourth number on, the text has the difference to the run length two
    positions before. Source: rleFrString of the COCO API.
    """
    runs, value, shift = list[int](), 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return [-1]
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            signed = value - (1 << shift) if bits & 16 else value
            runs.append(signed + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return [-1] if shift else runs


def _broken(needs: str, found: Any, where: str) -> DataError:
    text = json.dumps(found, default=str)
    return DataError(
        f"Cannot draw {where}: it needs {needs}, and has {text if len(text) < 80 else f'{text[:77]}...'}",
        fix="Correct or remove the annotation. kdcache data convert leaves out such images.",
    )
