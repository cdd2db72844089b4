"""Draw labels from shapes with Pillow: a later shape covers an earlier one, and the rest is the background.

Pillow draws as LabelMe does: the pixels of an outline belong to the shape.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from kdcache.data.files import image_size
from kdcache.data.layouts.file_split import describe_sizes
from kdcache.data.sample import Pixels
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

Mask = npt.NDArray[np.bool_]
Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """One annotated shape of an image.

    Attributes:
        label: the class name.
        kind: "polygon", "rectangle" and "ellipse" use `points`. "runs", "png", "brush" and "columns" use `data`. Other
            kinds cannot be drawn.
        points: (x, y) of a polygon's corners, or of two opposite corners of a box, in the unit that `scale` gives.
        data: the mask, depending on `kind`.
            - "runs": alternating lengths of runs outside and inside the shape, along the rows of the box `points`.
            - "png": base64 of a PNG mask whose top left corner is the first of `points`.
            - "brush": Label Studio's packed bytes.
            - "columns": alternating lengths of runs outside and inside the shape, down the columns of the image.
        scale: 0 for points in pixels. Otherwise, the coordinate at the image's full width and height: 1 or 100.
    """

    label: str
    kind: str
    points: tuple[Point, ...] = ()
    data: Any = None
    scale: float = 0


@dataclass(frozen=True)
class Item:
    """An image of an export, with its shapes.

    Attributes:
        image: the image's name in the export.
        file: the annotation file, below the data set's folder.
        shapes: the shapes in drawing order, or None if nobody labelled the image.
        size: (height, width) in pixels that the export states, or None.
        folders: folders below the data set's folder in which the image is searched first.
        place: a folder below the data set's folder, in which the image is searched next. The sample's id is the path
            below it, without suffix. None searches the whole data set. The id then lacks leading folders such as
            images/train/ (see `sample_id`).
    """

    image: str
    file: str
    shapes: tuple[Shape, ...] | None
    size: tuple[int, int] | None = None
    folders: tuple[str, ...] = ("",)
    place: str | None = None


@dataclass(frozen=True, eq=False)
class ShapeLabels:
    """The labels of a split, each drawn from shapes when it is read.

    Attributes:
        items: sample id -> image with its shapes.
        images: sample id -> image file.
        class_of: class name -> class id. Other names are void.
        background: the class id of pixels outside all shapes, or 255.
    """

    items: Mapping[str, Item]
    images: Mapping[str, Path]
    class_of: Mapping[str, int]
    background: int

    def label(self, sample: str) -> Pixels:
        """Return a sample's label, uint8 (H, W), drawn from its shapes.

        Raises: DataError for a shape that cannot be drawn, or an image whose size differs from the annotated size.
        """
        item, size = self.items[sample], image_size(self.images[sample])
        if item.size not in (None, size):
            raise DataError(
                f"Cannot draw the label of {self.images[sample].name} from {item.file}: "
                + describe_sizes(item.size or size, size),
                fix="Restore the image that was labelled, or label this one again.",
            )
        return draw(self.shapes(sample), size, self.class_of, self.background, f"{item.file}, image {item.image!r}")

    def shapes(self, sample: str) -> Sequence[Shape]:
        """Return a sample's shapes in drawing order. Raises: DataError for a shape that cannot be drawn."""
        return self.items[sample].shapes or ()

    def digest(self, sample: str) -> str:
        """Return the SHA-256 (hex) of a sample's shapes and of the class ids they are drawn with."""
        shapes = self.items[sample].shapes or ()
        # The empty list had files of masks: the digests of earlier conversions stay what they are.
        content = [[asdict(shape) for shape in shapes], [], sorted(self.class_of.items()), self.background]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def draw(
    shapes: Sequence[Shape], size: tuple[int, int], class_of: Mapping[str, int], background: int, where: str
) -> Pixels:
    """Return a label, uint8 (H, W), with the shapes drawn in order. Later shapes cover earlier ones.

    Args:
        shapes: the shapes.
        size: the image's (height, width) in pixels.
        class_of: class name -> class id. Other names are void.
        background: the class id of pixels outside all shapes, or 255.
        where: the file and the image in words, for messages.

    Raises: DataError for a shape that cannot be drawn.
    """
    canvas = Image.new("L", size[::-1], background)
    pen = ImageDraw.Draw(canvas)
    for number, shape in enumerate(shapes, 1):
        ink = class_of.get(shape.label, IGNORE_INDEX)
        try:
            points = _points(shape, size)
            if shape.kind == "polygon":
                pen.polygon(points, fill=ink, outline=ink)
            elif shape.kind in ("rectangle", "ellipse"):
                (x0, y0), (x1, y1) = points
                box = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
                (pen.rectangle if shape.kind == "rectangle" else pen.ellipse)(box, fill=ink, outline=ink)
            elif shape.kind in _MASKS:
                mask, corner = _MASKS[shape.kind](shape, size)
                canvas.paste(
                    ink, (*corner, corner[0] + mask.shape[1], corner[1] + mask.shape[0]), Image.fromarray(mask)
                )
            else:
                raise ValueError("only polygons, rectangles, ellipses and masks have an area")
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # of numbers that are none, and of decoders: OSError, zlib.error, too many pixels ...
            raise DataError(
                f"Cannot draw shape {number} of {where}, a {shape.kind} of {shape.label!r}: {error}",
                fix="Correct or remove the shape in the tool, and export again. kdcache data convert leaves out such "
                "images.",
            ) from error
    return np.array(canvas)


def turned(points: Sequence[Point], degrees: float, centre: Point) -> tuple[Point, ...]:
    """Return (x, y) points, rotated by `degrees` around a centre.

    The rotation is clockwise in an image, where y points down.
    """
    angle = np.deg2rad(degrees)
    sine, cosine = float(np.sin(angle)), float(np.cos(angle))
    cx, cy = centre
    return tuple(
        (cx + (x - cx) * cosine - (y - cy) * sine, cy + (x - cx) * sine + (y - cy) * cosine) for x, y in points
    )


def turned_ellipse(label: str, centre: Point, radii: Point, degrees: float, scale: float = 0) -> Shape:
    """Return an ellipse as a shape. A rotated ellipse becomes a polygon of 90 points.

    Args:
        label: the class name.
        centre: (x, y) of the centre.
        radii: half the width and half the height, before rotation.
        degrees: the clockwise rotation.
        scale: 0 for centre and radii in pixels. Otherwise, the coordinate at the image's full width and height: 1 or
            100.
    """
    (cx, cy), (rx, ry) = centre, radii
    if not degrees:
        return Shape(label, "ellipse", ((cx - rx, cy - ry), (cx + rx, cy + ry)), scale=scale)
    angles = np.deg2rad(np.arange(0, 360, 4))
    outline = [(cx + rx * float(np.cos(a)), cy + ry * float(np.sin(a))) for a in angles]
    return Shape(label, "polygon", turned(outline, degrees, centre), scale=scale)


def _points(shape: Shape, size: tuple[int, int]) -> list[Point]:
    """Return a shape's points in pixels. Raises: ValueError for too few points, or points far outside the image."""
    factor = (size[1] / shape.scale, size[0] / shape.scale) if shape.scale else (1.0, 1.0)
    points = [(float(x) * factor[0], float(y) * factor[1]) for x, y in shape.points]
    if shape.scale:  # in files these have six digits: a hundredth of a pixel at most
        points = [(round(x, 2), round(y, 2)) for x, y in points]
    if not all(abs(x) < 1e6 and abs(y) < 1e6 for x, y in points):
        raise ValueError("a point that is no number, or far outside of the image")
    least = {"polygon": 3, "rectangle": 2, "ellipse": 2}.get(shape.kind, 0)
    if len(points) < least:
        raise ValueError(f"{len(points)} points, at least {least} are needed")
    return points


def _of_runs(shape: Shape, size: tuple[int, int]) -> tuple[Mask, tuple[int, int]]:
    (left, top), (right, bottom) = ((int(x), int(y)) for x, y in shape.points)
    height, width = bottom - top, right - left
    runs = [int(run) for run in shape.data]
    if not 0 < height <= size[0] or not 0 < width <= size[1] or min(runs) < 0 or sum(runs) != height * width:
        raise ValueError(f"run lengths that do not cover {height} x {width} pixels (height x width)")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width), (left, top)


def _of_columns(shape: Shape, size: tuple[int, int]) -> tuple[Mask, tuple[int, int]]:
    return np.repeat(np.arange(len(shape.data)) % 2 == 1, shape.data).reshape(size[::-1]).T, (0, 0)


def _of_png(shape: Shape, size: tuple[int, int]) -> tuple[Mask, tuple[int, int]]:
    with Image.open(io.BytesIO(base64.b64decode(shape.data, validate=True))) as image:
        if image.width > size[1] or image.height > size[0]:
            raise ValueError(f"a mask of {image.height} x {image.width} pixels (height x width), larger than the image")
        mask = np.asarray(image.convert("L")) > 0
    (left, top), *_ = shape.points
    return mask, (int(left), int(top))


def _of_brush(shape: Shape, size: tuple[int, int]) -> tuple[Mask, tuple[int, int]]:
    """Return the mask of Label Studio's brush strokes, bool (H, W), and its corner (0, 0).

    The data are the image's RGBA values, with runs packed by rle-pack:

    - 32 bits: the number of values. 5 bits: bits of a value, minus 1. Four times 4 bits: bits of a length, minus 1.
    - For each run: one bit (1: one value that repeats, 0: a value for each position), 2 bits that select the bits of
      the run's length, the length minus 1, and the values.

    Source: https://github.com/thi-ng/umbrella, package rle-pack.
    """
    bits = np.unpackbits(np.array(shape.data, np.uint8))
    place = 0

    def read(count: int, words: int = 1) -> npt.NDArray[np.int64]:
        nonlocal place
        part = bits[place : place + count * words]
        if len(part) < count * words:
            raise ValueError("brush strokes that end too early")
        place += count * words
        return part.reshape(words, count) @ (1 << np.arange(count, dtype=np.int64)[::-1])

    total, word = int(read(32)[0]), int(read(5)[0]) + 1
    lengths = [int(read(4)[0]) + 1 for _ in range(4)]
    if total != size[0] * size[1] * 4:
        raise ValueError(f"brush strokes of {total} values, where the image has {size[0]} x {size[1]} x 4")
    values, done = np.zeros(total, np.uint8), 0
    while done < total:
        same = read(1)[0]
        run = int(read(lengths[int(read(2)[0])])[0]) + 1
        if run > total - done:
            raise ValueError("brush strokes that do not fit the image")
        values[done : done + run] = read(word, 1 if same else run)
        done += run
    return values.reshape(*size, 4)[..., 3] > 0, (0, 0)


_MASKS: dict[str, Callable[[Shape, tuple[int, int]], tuple[Mask, tuple[int, int]]]] = {
    "runs": _of_runs,
    "columns": _of_columns,
    "png": _of_png,
    "brush": _of_brush,
}
