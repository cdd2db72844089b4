"""CVAT: "CVAT for images 1.1", an XML file with shapes, and "Segmentation mask 1.1", VOC's folders with a labelmap.txt.

    annotations.xml  images/a.jpg               images/SUBSET/ in exports of projects; the subset default is `train`
    labelmap.txt                                `label:r,g,b:parts:actions`, a line for each class
    SegmentationClass/a.png                     in these colours, or numbers of the lines
    ImageSets/Segmentation/SUBSET.txt           names, one a line
    JPEGImages/a.jpg                            if the export has the images; else any other folder

Shapes are drawn in the order of their layers (z_order), then of the file. Pixels of no shape are the background.
COCO 1.0 is read by coco.py.
Source: https://docs.cvat.ai/docs/dataset_management/formats, xml_format and format-smask
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from kdcache.data.classes import CLASSES_FILE, VOID_NAMES, colour_codes
from kdcache.data.colour_codes import Colour, ColourCodes
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.exports.base import (
    Export,
    files_of,
    head_of,
    read_text,
    sample_id,
    unreadable,
)
from kdcache.data.layouts.exports.shapes import Item, Shape, turned, turned_ellipse
from kdcache.data.layouts.label_ids import LabelIds, id_table
from kdcache.data.layouts.pictures import Pictures
from kdcache.data.layouts.scan import WHOLE, Scan, lists_in
from kdcache.data.sample import ClassList
from kdcache.tasks import IGNORE_INDEX

LABELMAP, LABELS, LISTS = "labelmap.txt", "SegmentationClass", "ImageSets/Segmentation"
SUBSET = "default"
"""CVAT's name of the subset of images that are in none."""


class Cvat(Export):
    """The layout of exports in the format "CVAT for images 1.1"."""

    name: ClassVar[str] = "cvat"
    looks_for: ClassVar[str] = "annotations.xml of CVAT for images 1.1"

    def found(self, root: Path) -> str:
        """Return the name of the XML file with annotations in `root`, or ''."""
        files = [path for path in files_of(root, ".xml", 0) if "<annotations>" in head_of(path)]
        return files[0].name if files else ""

    def names(self, root: Path) -> list[str]:
        """Return the class names in the order of the label list in the XML file in `root`, or sorted without a list."""
        return self._read(root)[0] or super().names(root)

    def items(self, root: Path) -> dict[str, list[Item]]:
        """Return split name -> its images with their shapes, for the export in `root`.

        CVAT's subset "default" becomes the split "train".
        """
        return self._read(root)[1]

    def _read(self, root: Path) -> tuple[list[str], dict[str, list[Item]]]:
        path = root / self.found(root)
        return _read(path, path.stat().st_mtime_ns)


class CvatMasks(Layout):
    """The layout of exports in CVAT's format "Segmentation mask 1.1"."""

    name: ClassVar[str] = "cvat-masks"
    live: ClassVar[bool] = False
    looks_for: ClassVar[str] = f"{LABELMAP} and {LABELS}/ of CVAT's Segmentation mask 1.1"
    split_is: ClassVar[str] = f"a list below {LISTS}; {SUBSET} is {WHOLE}"
    restore: ClassVar[str] = "Export with images, or put them into JPEGImages/"

    def matches(self, root: Path) -> bool:
        """Return whether `root` has labelmap.txt and SegmentationClass/, but no `classes.txt`."""
        return (root / LABELMAP).is_file() and (root / LABELS).is_dir() and not (root / CLASSES_FILE).is_file()

    def splits(self, root: Path) -> list[str]:
        """Return the sorted names of the splits that have a list in ImageSets/Segmentation/ of `root`.

        Without lists, return ["train"].
        """
        return sorted(_split(name) for name in lists_in(root / LISTS)) or [WHOLE]

    def why(self, root: Path) -> str:
        """Return a phrase for messages: labelmap.txt identifies `root` as this layout, and lists its classes."""
        return f"{LABELMAP} next to {LABELS}/; its classes"

    def colour_codes(self, root: Path) -> ColourCodes | None:
        """Return the map from label colours to class ids that labelmap.txt in `root` defines.

        Return None if a class has no unique colour there.

        Raises: DataError for an invalid labelmap.txt.
        """
        colours = [colour for _, colour in _labelmap(root)]
        return colour_codes(colours, [], str(root / LABELMAP))

    def _classes(self, root: Path) -> ClassList:
        rows = [row for row in _labelmap(root) if row[0].lower() not in VOID_NAMES]
        listed = tuple(colour for _, colour in rows if colour is not None)
        return ClassList(tuple(name for name, _ in rows), listed if len(listed) == len(rows) else ())

    def _scan(self, root: Path, split: str) -> Scan:
        names, pictures = self.classes(root).names, Pictures(root)
        numbers = {
            n: names.index(name) if name in names else IGNORE_INDEX for n, (name, _) in enumerate(_labelmap(root))
        }
        ids = LabelIds(
            f"Labels hold the colours of {LABELMAP}, or the numbers of its lines.",
            "Export again from CVAT.",
            None if all(number == index for number, index in numbers.items()) else id_table(numbers),
        )
        files = {_split(name): name for name in lists_in(root / LISTS)}
        masks = {path.relative_to(root / LABELS).as_posix()[:-4]: path for path in files_of(root / LABELS, ".png", 8)}
        listed = (
            [line.strip() for line in read_text(root / LISTS / f"{files[split]}.txt").splitlines()]
            if files
            else list(masks)
        )
        scan = Scan({}, {}, ids, "JPEGImages", LABELS)
        for name in filter(None, listed):
            suffixes = (".jpg", ".png", ".jpeg", ".JPG", ".bmp", ".tif", ".tiff", ".webp")
            found = (pictures.find(f"{name}{suffix}", "JPEGImages", "images") for suffix in suffixes)
            path = next((candidate for candidate in found if candidate is not None), None)
            if path is None:
                scan.missing.append(f"JPEGImages/{name}.jpg")
                continue
            sample = sample_id(path, split)
            scan.images[sample] = path
            if name in masks:
                scan.labels[sample] = masks[name].relative_to(root).as_posix()
            else:
                scan.missing.append(f"{LABELS}/{name}.png")
        return replace(scan, images=dict(sorted(scan.images.items())))


def _split(subset: str) -> str:
    return WHOLE if subset.lower() == SUBSET else subset.lower()


def _labelmap(root: Path) -> list[tuple[str, Colour | None]]:
    """Return (class name, colour or None) for each line of labelmap.txt. Raises: DataError for a malformed line."""
    rows: list[tuple[str, Colour | None]] = []
    path = root / LABELMAP
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *fields = line.strip().split(":")
        try:
            levels = [int(level) for level in fields[0].split(",")] if fields and fields[0].strip() else []
            if not name.strip() or len(levels) not in (0, 3) or not all(0 <= level <= 255 for level in levels):
                raise ValueError(line.strip())
        except ValueError:
            raise unreadable(path, f"line {number} is {line.strip()!r}, not `label:r,g,b:parts:actions`") from None
        rows.append((name.strip(), (levels[0], levels[1], levels[2]) if levels else None))
    return rows


def _shape(element: Element) -> Shape:
    """Return a shape of the XML file. An invalid shape raises no error here, but when the label is drawn."""
    get = element.attrib
    label = get.get("label", "")
    try:
        turn = float(get.get("rotation", 0))
        if element.tag == "polygon":
            pairs = (pair.split(",") for pair in get["points"].split(";"))
            return Shape(label, "polygon", tuple((float(x), float(y)) for x, y in pairs))
        if element.tag == "box":
            x0, y0, x1, y1 = (float(get[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
            if not turn:
                return Shape(label, "rectangle", ((x0, y0), (x1, y1)))
            corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
            return Shape(label, "polygon", turned(corners, turn, ((x0 + x1) / 2, (y0 + y1) / 2)))
        if element.tag == "ellipse":
            cx, cy, rx, ry = (float(get[key]) for key in ("cx", "cy", "rx", "ry"))
            return turned_ellipse(label, (cx, cy), (rx, ry), turn)
        if element.tag == "mask":
            left, top, width, height = (int(get[key]) for key in ("left", "top", "width", "height"))
            runs = tuple(int(run) for run in get["rle"].split(","))
            return Shape(label, "runs", ((left, top), (left + width, top + height)), runs)
    except (KeyError, ValueError) as error:
        return Shape(label, f"{element.tag} with {type(error).__name__} {error}")
    return Shape(label, element.tag)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> tuple[list[str], dict[str, list[Item]]]:
    """Return class names, and split name -> images, of a CVAT XML file. The result is cached until the file changes.

    Raises: DataError for a malformed file.
    """
    tree = _parse(path)
    items: dict[str, list[Item]] = defaultdict(list)
    try:
        if tree.find("track") is not None:
            raise ValueError("tracks of a video: export as CVAT for images 1.1")
        for image in tree.iterfind("image"):
            subset = image.get("subset", SUBSET)
            size = int(image.attrib["height"]), int(image.attrib["width"])
            ordered = sorted(
                (element for element in image if element.tag != "tag"),
                key=lambda element: int(element.get("z_order", 0)),
            )
            shapes = tuple(_shape(element) for element in ordered)
            folders = (f"images/{subset}", "images", subset, "")
            items[_split(subset)].append(Item(image.attrib["name"], path.name, shapes, size, folders))
    except (ValueError, KeyError) as error:
        raise unreadable(path, error) from error
    return [label.findtext("name") or "" for label in tree.iterfind("meta/*/labels/label")], items


def _parse(path: Path) -> Element:
    """Return the root element of an XML file.

    Raises: DataError for malformed XML, or a DTD, whose entities could expand.
    """

    def refuse(*_: Any) -> None:
        raise ValueError("a document type (DTD), which CVAT does not write")

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(read_text(path), True)
        return builder.close()
    except (expat.ExpatError, ValueError, AssertionError) as error:
        raise unreadable(path, error) from error
