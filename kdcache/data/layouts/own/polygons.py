"""Labels drawn from COCO's annotations: run lengths, and polygons by pycocotools (extra `coco`).

Every pixel has one class, so objects that overlap need a rule: **the smaller one lies on top**, by its area in pixels;
of equal ones the later in the file. Crowds (`iscrowd`) lie below all others, whatever their size. Pixels of no object
are the background.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.data.sample import Pixels
from kdcache.errors import DataError

Annotation = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Drawing:
    """The label of an image before it is drawn: its size, (H, W), and its annotations in the order of the file."""

    size: tuple[int, int]
    annotations: Sequence[Annotation]


@dataclass(frozen=True, eq=False)
class PolygonLabels:
    """Labels of a split, drawn when they are read.

    Attributes:
        drawings: by sample.
        class_of: category id -> class id; 255 is void.
        background: the class id of pixels of no object, or 255.
        file: where the annotations are, for messages.
    """

    drawings: Mapping[str, Drawing]
    class_of: Mapping[int, int]
    background: int
    file: Path

    def label(self, sample: str) -> Pixels:
        """The label of a sample, uint8 (H, W). Raises: DataError naming the annotation that cannot be drawn."""
        drawing = self.drawings[sample]
        return draw(drawing, self.class_of, self.background, f"{self.file}, image {sample!r}")

    def digest(self, sample: str) -> str:
        """SHA-256 of a sample's size, annotations and classes, as hex."""
        drawing = self.drawings[sample]
        content = [drawing.size, drawing.annotations, sorted(self.class_of.items()), self.background]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def draw(drawing: Drawing, class_of: Mapping[int, int], background: int, where: str) -> Pixels:
    """Class ids (H, W), uint8, of an image's annotations.

    Args:
        where: the file and the image, for messages.
    Raises: DataError for an annotation without an outline, of no category, or whose outline is none.
    """
    shapes = []
    for order, annotation in enumerate(drawing.annotations):
        name = f"annotation {annotation.get('id', order)} of {where}"
        runs = _runs(annotation.get("segmentation"), drawing.size, name)
        if annotation.get("category_id") not in class_of:
            raise _broken("An annotation has a category that the file lists.", annotation.get("category_id"), name)
        crowd = bool(annotation.get("iscrowd"))
        shapes.append((not crowd, -sum(runs[1::2]), order, class_of[annotation["category_id"]], runs))
    height, width = drawing.size
    label_WH = np.full((width, height), background, np.uint8)  # run lengths go down the columns
    for *_, number, runs in sorted(shapes, key=lambda shape: shape[:3]):
        label_WH[np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height)] = number
    return np.ascontiguousarray(label_WH.T)


def load_pycocotools() -> Any:
    """The module `pycocotools.mask`. Raises: DataError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "Polygons of COCO's annotations are drawn by pycocotools.",
            received="pycocotools, which is not installed",
            remedy="In a clone of kdcache: pip install '.[coco]'.",
        ) from error
    return mask


def _runs(outline: Any, size: tuple[int, int], name: str) -> list[int]:
    """The run lengths of an outline, pixels outside and inside in turn. Raises: DataError."""
    height, width = size
    if isinstance(outline, list) and outline and all(_is_polygon(polygon) for polygon in outline):
        coco = load_pycocotools()
        polygons = [[float(x) for x in polygon] for polygon in outline]
        return decompressed(coco.merge(coco.frPyObjects(polygons, height, width))["counts"].decode("ascii"))
    if isinstance(outline, dict) and list(outline.get("size", ())) == [height, width]:
        counts = outline.get("counts")
        runs: Any = decompressed(counts) if isinstance(counts, str) else counts
        whole = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
        if whole and sum(runs) == height * width:
            return list(runs)
    if outline in (None, [], {}):
        raise _broken("An annotation has an outline (`segmentation`), not a box alone.", "none", name)
    raise _broken(
        "An outline is a list of polygons, [x, y, x, y, ...] with three points or more, or run lengths that cover the "
        f"image, here {height} x {width} (height x width).",
        outline,
        name,
    )


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e6 for x in polygon)


def decompressed(counts: str) -> list[int]:
    """The run lengths of COCO's compressed text; [-1] for text that is none.

    Five bits a character, from 48 on, the sixth says that more follow; from the fourth on, a number is the difference
    to the one two before. Source: rleFrString of the COCO API.
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


def _broken(rule: str, received: Any, name: str) -> DataError:
    text = json.dumps(received, default=str)
    return DataError(
        rule,
        received=f"{text if len(text) < 80 else text[:77] + '...'} in {name}",
        remedy="Correct or remove the annotation; `kdcache data convert` leaves out images that have such.",
    )
