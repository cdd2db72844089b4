"""Label Studio: the JSON export.

    project-1-at-2026-01-31-12-00.json          a list of tasks, with shapes in percent, or brush strokes
    task-1-annotation-2-by-1-tag-car-0.png      a mask of one class; the JSON (or JSON-MIN) export says which image a
                                                task has, or the images are called 1.jpg, 2.jpg ... after their tasks

Images lie in any folder below. Their names follow /data/upload/, /data/local-files/?d= and the prefix of eight digits
of an upload. If a task has several annotations, the first that was not cancelled counts. COCO exports are read by
coco.py.
Source: https://labelstud.io/guide/export
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from kdcache.data.layouts.exports.base import Export, files_of, head_has, is_part, read_json, split_of, unreadable
from kdcache.data.layouts.exports.shapes import Item, Point, Shape, turned, turned_ellipse
from kdcache.data.layouts.pictures import Pictures
from kdcache.data.layouts.scan import is_picture

_UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")

Task = dict[str, Any]


class LabelStudio(Export):
    """The layout of Label Studio's JSON export."""

    name: ClassVar[str] = "label-studio"
    looks_for: ClassVar[str] = "the JSON export of Label Studio, a list of tasks with annotations"

    def found(self, root: Path) -> str:
        """Return the first JSON export below `root`, as a relative path, or ''."""
        return next((path.relative_to(root).as_posix() for path in _exported(root)), "")

    def items(self, root: Path) -> dict[str, list[Item]]:
        """Return split name -> its images with their annotated shapes, for the export in `root`.

        Raises: DataError for a file that cannot be read, or an export in the format JSON-MIN.
        """
        items: dict[str, list[Item]] = defaultdict(list)
        pictures = Pictures(root)
        for path in _exported(root):
            file = path.relative_to(root).as_posix()
            for task in _tasks(path, path.stat().st_mtime_ns):
                if "annotations" not in task:
                    raise unreadable(path, "it is JSON-MIN: export the project as JSON")
                name, folders = _image(task, pictures), (file.rpartition("/")[0], "")
                items[split_of(pictures.find(name, *folders) or file)].append(_item(task, name, file, folders))
        return items


def _exported(root: Path) -> list[Path]:
    """Return the files of Label Studio's exports in the formats JSON and JSON-MIN."""
    found = (path for path in files_of(root, ".json", 1) if is_part(path, root))
    return [path for path in found if head_has(path, "[", "annotations", "result") or head_has(path, "[", "annotator")]


@lru_cache(maxsize=16)
def _tasks(path: Path, changed: int) -> list[Task]:
    """Return the tasks of a JSON file, cached until the file changes. Raises: DataError for another kind of file."""
    tasks = read_json(path)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise unreadable(path, "it is no list of tasks")
    return tasks


def _image(task: Task, pictures: Pictures) -> str:
    """Return the name of a task's image: the first value of the task's data that ends like a picture's name."""
    data = task.get("data", task)
    values = [data.get("image"), *data.values()] if isinstance(data, dict) else []
    for value in values:
        if isinstance(value, str):
            name = unquote(value.rpartition("?d=")[2].partition("?")[0])
            if is_picture(name.replace("\\", "/").rpartition("/")[2]):
                folder, slash, tail = name.replace("\\", "/").rpartition("/")
                original = f"{folder}{slash}{_UPLOADED.sub('', tail)}"
                return name if pictures.find(name) is not None else original
    return f"task {task.get('id')}, which has no image"


def _item(task: Task, name: str, file: str, folders: tuple[str, ...]) -> Item:
    try:
        annotations = [entry for entry in task["annotations"] if not entry.get("was_cancelled")]
        regions = [entry for entry in annotations[0]["result"] if _label(entry)] if annotations else []
        sizes = {(int(entry["original_height"]), int(entry["original_width"])) for entry in regions}
        shapes = tuple(_shape(entry) for entry in regions)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise unreadable(Path(file), f"task {task.get('id')}: {type(error).__name__} {error}") from error
    return Item(name, file, shapes if annotations else None, sizes.pop() if len(sizes) == 1 else None, folders)


def _label(region: Task) -> str:
    """Return the class of a region, or '' for an annotation without a class, such as a choice for the whole image."""
    value = region.get("value")
    names = [value[key] for key in value if key.endswith("labels") and value[key]] if isinstance(value, dict) else []
    return str(names[0][0]) if names else ""


def _shape(region: Task) -> Shape:
    """Return a region as a shape. An invalid shape raises no error here, but when the label is drawn."""
    label, value, kind = _label(region), region["value"], str(region.get("type", "")).removesuffix("labels")
    if region.get("image_rotation"):
        return Shape(label, f"image turned by {region['image_rotation']} degrees, and {kind}")
    if "rle" in value:
        return Shape(label, "brush", data=value["rle"])
    if "points" in value:
        return Shape(label, "polygon", tuple((float(x), float(y)) for x, y in value["points"]), scale=100)
    width, height = float(region["original_width"]), float(region["original_height"])
    turn = float(value.get("rotation", 0))
    x, y = float(value.get("x", 0)) * width / 100, float(value.get("y", 0)) * height / 100
    if "radiusX" in value:
        radii = float(value["radiusX"]) * width / 100, float(value["radiusY"]) * height / 100
        return turned_ellipse(label, (x, y), radii, turn)
    if "width" in value and "height" in value and "rectangle" in kind:
        right, bottom = x + float(value["width"]) * width / 100, y + float(value["height"]) * height / 100
        corners: tuple[Point, ...] = ((x, y), (right, y), (right, bottom), (x, bottom))
        if not turn:
            return Shape(label, "rectangle", (corners[0], corners[2]))
        return Shape(label, "polygon", turned(corners, turn, corners[0]))
    return Shape(label, kind)
