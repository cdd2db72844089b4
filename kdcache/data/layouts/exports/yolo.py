"""YOLO's polygons: a text file for each image, `class x y x y ...` in parts of the image's width and height.

    data.yaml                           names, as a list or by number; or classes.txt, a name a line
    images/train/a.jpg  labels/train/a.txt      or train/images/ and train/labels/, or images/ and labels/

Classes are the background and the names. If its split has any text files, an image without one shows only background,
as in Ultralytics.
Source: https://docs.ultralytics.com/datasets/segment
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from kdcache.data.classes import CLASSES_FILE
from kdcache.data.layouts.exports.base import Export, files_of, read_text, split_of, unreadable
from kdcache.data.layouts.exports.shapes import Item, Shape
from kdcache.data.layouts.scan import composed, folders_in, is_picture, names_below
from kdcache.errors import DataError

IMAGES, LABELS = "images", "labels"


class Yolo(Export):
    """The layout of YOLO's polygons in text files."""

    name: ClassVar[str] = "yolo"
    looks_for: ClassVar[str] = f"{IMAGES}/ and {LABELS}/ with text files, data.yaml or {CLASSES_FILE}"

    def found(self, root: Path) -> str:
        """Return the name of the file in `root` that lists the classes. Without such a file, return the label folder.

        The text is for messages. It is '' if `root` is not a YOLO export: it has no folders images and labels, or its
        labels are not text files.
        """
        places = _places(root)
        if not places or not all(_holds_texts(root / labels) for labels in places.values() if (root / labels).is_dir()):
            return ""
        return next((path.name for path in _tables(root)), next(iter(places.values())) + "/")

    def lists_classes(self, root: Path) -> bool:
        """Return False: a `classes.txt` in a YOLO export lists the layout's own class names, which `names` returns."""
        return False

    def names(self, root: Path) -> list[str]:
        """Return the class names of the export in `root`, in the order of their numbers."""
        return list(_names(root).values())

    def items(self, root: Path) -> dict[str, list[Item]]:
        """Return split name -> its images with their polygons, for the export in `root`."""
        items: dict[str, list[Item]] = defaultdict(list)
        names = _names(root)
        for images, labels in _places(root).items():
            texts = {
                composed(path.relative_to(root / labels).as_posix().removesuffix(".txt")): path
                for path in files_of(root / labels, ".txt", depth=8)
            }
            labelled = {split_of(f"{labels}/{sample}") for sample in texts}
            for sample, image in names_below(root / images).items():
                split, path = split_of(f"{images}/{image}"), texts.pop(sample, None)
                empty = () if split in labelled else None
                shapes = empty if path is None else _read(path, path.stat().st_mtime_ns, tuple(names.items()))
                items[split].append(Item(f"{images}/{image}", f"{labels}/{sample}.txt", shapes))
            for sample in sorted(texts):  # of no image
                items[split_of(f"{labels}/{sample}")].append(Item(f"{images}/{sample}.jpg", "", None))
        return items


def _places(root: Path) -> dict[str, str]:
    """Return folder of images -> folder of labels, both below the root."""
    splits = [name for name in folders_in(root) if (root / name / IMAGES).is_dir() and (root / name / LABELS).is_dir()]
    undivided = {IMAGES: LABELS} if (root / IMAGES).is_dir() and (root / LABELS).is_dir() else {}
    return undivided | {f"{name}/{IMAGES}": f"{name}/{LABELS}" for name in splits}


def _holds_texts(folder: Path) -> bool:
    """Return whether the first label below a folder is a text file. Lists of class names do not count."""
    for _, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in names:
            if is_picture(name):
                return False
            if name.endswith(".txt") and name != CLASSES_FILE:
                return True
    return False


def _tables(root: Path) -> list[Path]:
    return [*files_of(root, ".yaml", 0), *files_of(root, ".yml", 0), *(p for p in [root / CLASSES_FILE] if p.is_file())]


def _names(root: Path) -> dict[int, str]:
    """Return class number -> class name. Raises: DataError if no file lists the names."""
    for path in _tables(root):
        if path.name == CLASSES_FILE:
            return dict(enumerate(line.strip() for line in read_text(path).splitlines() if line.strip()))
        content = read_yaml(path)
        if isinstance(content, dict) and content.get("names") is not None:
            return class_names(path, content)
    raise DataError(
        f"Missing data.yaml in {root}: the polygons in {LABELS}/ have no class names",
        fix=f"Write data.yaml with `names: [first, second]`, or {CLASSES_FILE} with one name per line.",
    )


def class_names(path: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """Return class number -> class name from a data.yaml, sorted by number. Raises: DataError for invalid names.

    Args:
        path: the YAML file, for the message.
        content: the YAML file's content, with `names` as a list or a dict.
    """
    names = content.get("names")
    try:
        numbered = names if isinstance(names, dict) else dict(enumerate(names or ()))
        listed = {int(number): str(name) for number, name in numbered.items()}
        if not listed or len(listed) != int(content.get("nc", len(listed))):
            raise ValueError(f"nc is {content.get('nc')}, names lists {len(listed)}")
    except (TypeError, ValueError) as error:
        raise unreadable(path, error) from error
    return dict(sorted(listed.items()))


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises: DataError if it cannot be read or is larger than 1 MiB."""
    import yaml

    if path.stat().st_size > 1 << 20:
        raise unreadable(path, "it is larger than 1 MiB")
    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise unreadable(path, error) from error


@lru_cache(maxsize=1 << 17)
def _read(path: Path, changed: int, names: tuple[tuple[int, str], ...]) -> tuple[Shape, ...]:
    """Return the polygons of a text file, cached until the file changes.

    An invalid polygon fails when the label is drawn.
    """
    return tuple(
        _shape(line.split(), dict(names), number)
        for number, line in enumerate(read_text(path).splitlines(), 1)
        if line.strip()
    )


def _shape(words: list[str], names: dict[int, str], line: int) -> Shape:
    try:
        numbers = [float(word) for word in words]
        name = names[int(words[0])]
    except (ValueError, KeyError):
        return Shape("", f"line {line}, {' '.join(words[:3])!r}, which is of no class and")
    if len(numbers) < 7 or len(numbers) % 2 == 0:
        kind = "a box alone" if len(numbers) == 5 else f"{len(numbers)} numbers, no polygon,"
        return Shape(name, f"line {line}, {kind}")
    if not all(-0.01 <= x <= 1.01 for x in numbers[1:]):
        return Shape(name, f"line {line}, numbers that are no parts of the image's size (0 to 1),")
    return Shape(name, "polygon", tuple(zip(numbers[1::2], numbers[2::2], strict=True)), scale=1)
