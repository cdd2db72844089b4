"""LabelMe: a JSON file next to each image, and the folders that labelme2voc makes of them.

    a.jpg  a.json                       polygons, rectangles, circles and masks; also in train/ and val/, or JSON in a
                                        folder next to that of the images
    labels.txt                          the order of the classes, if it lies there; else they are sorted
    JPEGImages/  class_names.txt        labelme2voc: SegmentationClassPNG/ or SegmentationClass/ with .png

An image without a JSON file has no label. Pixels of no shape are `_background_`, those of `__ignore__` are void.
Source: https://github.com/wkentaro/labelme, examples/semantic_segmentation.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.exports.base import (
    IGNORED,
    Export,
    files_of,
    head_has,
    is_part,
    read_json,
    read_text,
    split_of,
    unreadable,
)
from kdcache.data.layouts.exports.shapes import Item, Shape
from kdcache.data.layouts.label_ids import LabelIds
from kdcache.data.layouts.pictures import is_mask
from kdcache.data.layouts.scan import WHOLE, Scan, composed, names_below, scan_folders
from kdcache.data.sample import ClassList, voc_colour

_KINDS = {"mask": "png", "oriented_rectangle": "polygon", "rotation": "polygon"}
"""Kinds of shapes by their names in the files; rotation is X-AnyLabeling's."""
LISTED = "labels.txt"
IMAGES, NAMES = "JPEGImages", "class_names.txt"
PNGS = ("SegmentationClass", "SegmentationClassPNG")


class LabelMe(Export):
    """The layout of LabelMe's JSON files, one for each image."""

    name: ClassVar[str] = "labelme"
    looks_for: ClassVar[str] = "JSON files of LabelMe (shapes, imagePath), next to the images or in folders"

    def found(self, root: Path) -> str:
        """Return the first JSON file with shapes, as a path below `root`, or ''."""
        shaped = (path for path in files_of(root, ".json") if head_has(path, "{", "shapes") and is_part(path, root))
        return next((path.relative_to(root).as_posix() for path in shaped), "")

    def items(self, root: Path) -> dict[str, list[Item]]:
        """Return split name -> its images with their shapes, for the export in `root`.

        An image without a JSON file has no label.
        """
        items: dict[str, list[Item]] = defaultdict(list)
        labelled: set[str] = set()
        for path in files_of(root, ".json", depth=8):
            if head_has(path, "{", "shapes"):
                item = _read(path, path.stat().st_mtime_ns, path.relative_to(root).as_posix())
                items[split_of(item.file)].append(item)
                labelled.add(composed(posixpath.basename(item.file).removesuffix(".json")))
        for name, picture in names_below(root).items():
            if posixpath.basename(name) not in labelled and not is_mask(picture):
                items[split_of(picture)].append(Item(picture, "", None))
        return items

    def names(self, root: Path) -> list[str]:
        """Return the class names in the order of labels.txt in `root`.

        Without that file, return the shapes' classes, sorted.
        """
        if (root / LISTED).is_file():
            return [line.strip() for line in read_text(root / LISTED).splitlines() if line.strip()]
        return super().names(root)


class LabelMeVoc(Layout):
    """The layout of the folders that LabelMe's script labelme2voc writes."""

    name: ClassVar[str] = "labelme2voc"
    live: ClassVar[bool] = False
    looks_for: ClassVar[str] = f"{IMAGES}/, {NAMES} and {PNGS[0]}/"
    split_is: ClassVar[str] = f"{WHOLE!r}, which is all of it"

    def matches(self, root: Path) -> bool:
        """Return whether `root` has class_names.txt and JPEGImages/."""
        return (root / NAMES).is_file() and (root / IMAGES).is_dir()

    def splits(self, root: Path) -> list[str]:
        """Return ["train"], the only split of this layout."""
        return [WHOLE]

    def lists_classes(self, root: Path) -> bool:
        """Return False, because classes come from class_names.txt and never from a `classes.txt`."""
        return False

    def why(self, root: Path) -> str:
        """Return a phrase for messages: class_names.txt identifies `root` as this layout, and lists its classes."""
        return f"{NAMES} next to {IMAGES}/; its classes"

    def _classes(self, root: Path) -> ClassList:
        lines = [line.strip() for line in read_text(root / NAMES).splitlines()]
        names = tuple(line for line in lines if line and line != IGNORED)
        return ClassList(names, tuple(voc_colour(number) for number in range(len(names))))

    def _scan(self, root: Path, split: str) -> Scan:
        ids = LabelIds("Label ids are the lines of class_names.txt, or 255 (void).", f"Complete {NAMES}.")
        place = next((place for place in PNGS if any(files_of(root / place, ".png", 8))), PNGS[0])
        return scan_folders(root, IMAGES, place, ids)


@lru_cache(maxsize=1 << 17)
def _read(path: Path, changed: int, file: str) -> Item:
    """Return the image and the shapes of a JSON file, cached until the file changes.

    Raises: DataError for an invalid file.
    """
    content = read_json(path)
    try:
        size = content.get("imageHeight"), content.get("imageWidth")
        declared = None if None in size else (int(size[0]), int(size[1]))
        shapes = tuple(_shape(entry) for entry in content["shapes"])
        name = str(content.get("imagePath") or f"{path.stem}.jpg")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(path, error) from error
    return Item(name, file, shapes, declared, (posixpath.dirname(file),))


def _shape(entry: dict[str, Any]) -> Shape:
    label, kind = str(entry["label"]), str(entry.get("shape_type") or "polygon")
    points = tuple((float(x), float(y)) for x, y in entry["points"])
    if kind == "circle" and len(points) == 2:
        (cx, cy), (px, py) = points
        radius = float(np.hypot(px - cx, py - cy))
        return Shape(label, "ellipse", ((cx - radius, cy - radius), (cx + radius, cy + radius)))
    if kind == "rectangle" and len(points) == 4:
        kind = "polygon"
    return Shape(label, _KINDS.get(kind, kind), points, entry.get("mask"))
