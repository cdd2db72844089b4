"""The common part of labelling tools' exports: from a tool's images and shapes to the samples of a split.

Splits are folders or subsets called train, val, valid, validation or test. Everything else is `train`. Classes are the
background and the tool's classes, in the tool's order, else by name. A `classes.txt` in the export selects and orders
them: names that it does not list are void, and so are unlabelled pixels if it lists no background.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from kdcache.data.classes import CLASSES_FILE
from kdcache.data.layouts.base import VALIDATION, Layout
from kdcache.data.layouts.exports.shapes import Item, ShapeLabels
from kdcache.data.layouts.label_ids import LabelIds
from kdcache.data.layouts.pictures import MASKS, Pictures
from kdcache.data.layouts.scan import WHOLE, Scan, composed, folders_in, holds_pictures
from kdcache.data.sample import ClassList
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

SPLITS = ("train", *VALIDATION, "test")
IMAGES = ("images", "jpegimages", "data")
"""Folders of images, in lower case, which are no part of a sample's id."""
PARTS = (*SPLITS, *IMAGES, *MASKS, "json", "jsons", "ann", "annotation")
"""Names of folders, in lower case, that are parts of an export."""
BACKGROUND = "background"
BACKGROUNDS = (BACKGROUND, "_background_")
IGNORED = "__ignore__"
MOST_BYTES = 1 << 30
"""The largest file of annotations that is read."""

LABEL_IDS = LabelIds(
    "Label ids are the background's and the tool's classes, or 255 (void).",
    f"Correct the classes, or the names in {CLASSES_FILE}.",
)


class Export(Layout):
    """A labelling tool's export. kdcache draws its labels from shapes in annotation files.

    A subclass sets `name` and `looks_for`, and defines `found` and `items`.

    Attributes:
        overlap: which of several overlapping shapes counts, in words for messages.
    """

    live: ClassVar[bool] = False
    split_is: ClassVar[str] = f"a folder or a subset of the export ({', '.join(SPLITS)}); all else is {WHOLE}"
    restore: ClassVar[str] = "Put the images below this folder, under their own names"
    overlap: ClassVar[str] = "of shapes that overlap the later one counts"

    @abstractmethod
    def found(self, root: Path) -> str:
        """Return the file that identifies this export, as a path below `root`, or '' if `root` has none."""

    @abstractmethod
    def items(self, root: Path) -> dict[str, list[Item]]:
        """Return split name -> its images with their shapes, for the export in `root`.

        Raises: DataError for a file that cannot be read.
        """

    def names(self, root: Path) -> list[str]:
        """Return the class names of the export in `root`, in the tool's order.

        This base class returns the classes of all shapes, sorted.
        """
        items = (item for split in self.items(root).values() for item in split)
        return sorted({shape.label for item in items for shape in item.shapes or ()})

    def matches(self, root: Path) -> bool:
        """Return whether `root` has the file that identifies this export."""
        return bool(self.found(root))

    def splits(self, root: Path) -> list[str]:
        """Return the names of the splits with images of the export in `root`, sorted."""
        return sorted(self.items(root))

    def why(self, root: Path) -> str:
        """Return a phrase that tells the user why `root` was read as this export: the file that identifies it.

        The phrase also says where its classes come from, and which of several overlapping shapes counts.
        """
        classes = f"the classes of {CLASSES_FILE}" if self.lists_classes(root) else f"{BACKGROUND} and its classes"
        return f"{self.found(root)}; {classes}; {self.overlap}"

    def labels(
        self,
        root: Path,
        items: Mapping[str, Item],
        images: Mapping[str, Path],
        class_of: Mapping[str, int],
        background: int,
    ) -> ShapeLabels:
        """Return the object that draws the labels of one split.

        Args:
            root: the export's folder.
            items: sample id -> image with its shapes.
            images: sample id -> image file.
            class_of: class name -> class id.
            background: the class id of pixels outside all shapes, or 255.
        """
        return ShapeLabels(items, images, class_of, background)

    def lists_classes(self, root: Path) -> bool:
        """Return whether `root` has a `classes.txt`."""
        return (root / CLASSES_FILE).is_file()

    def _classes(self, root: Path) -> ClassList:
        names = list(dict.fromkeys(name for name in self.names(root) if name != IGNORED))
        background = next((name for name in names if name.lower() in BACKGROUNDS), BACKGROUND)
        objects = [name for name in names if name.lower() not in BACKGROUNDS]
        if not objects:
            raise DataError(
                f"Cannot find a labelled shape in {root}: {self.found(root)} labels nothing",
                fix="Label the images in the tool, and export again.",
            )
        return ClassList((background, *objects))

    def _scan(self, root: Path, split: str) -> Scan:
        pictures, names = dict[str, Pictures](), self.classes(root).names
        scan = Scan({}, {}, LABEL_IDS, "", "")
        items: dict[str, Item] = {}
        for item in self.items(root)[split]:
            place = item.place or ""
            path = pictures.setdefault(place, Pictures(root, place)).find(item.image, *item.folders)
            if path is None:
                scan.missing.append(item.image.replace("\\", "/").rpartition("/")[2])
                continue
            sample = sample_id(path, split) if item.place is None else stem_of(path.removeprefix(f"{place}/"))
            if sample in items:
                scan.clashes.append((sample, scan.images[sample], path))
                continue
            items[sample], scan.images[sample] = item, path
            if item.shapes is not None:
                scan.labels[sample] = item.file
        images = dict(sorted(scan.images.items()))
        class_of = {name: number for number, name in enumerate(names)} | {IGNORED: IGNORE_INDEX}
        background = next((class_of[name] for name in names if name.lower() in BACKGROUNDS), IGNORE_INDEX)
        class_of |= dict.fromkeys(BACKGROUNDS, background)
        drawn = self.labels(root, items, {name: root / path for name, path in images.items()}, class_of, background)
        return Scan(images, scan.labels, LABEL_IDS, "", "", clashes=scan.clashes, missing=scan.missing, drawn=drawn)


def sample_id(path: str, split: str) -> str:
    """Return an image's sample id: its path without suffix and without folders such as images/train/ at its beginning.

    For example, `images/train/city/a.jpg` becomes `city/a`.

    Args:
        path: the image, relative to the data set's folder.
        split: the split's name. A folder of this name is also left out.
    """
    parts = PurePosixPath(path).parts
    while len(parts) > 1 and parts[0].lower() in (*IMAGES, *SPLITS, split.lower()):
        parts = parts[1:]
    return stem_of("/".join(parts))


def stem_of(path: str) -> str:
    """Return a path without its suffix, in Unicode's normal form C."""
    return composed(path.rpartition(".")[0])


def split_of(path: str) -> str:
    """Return the split that a folder in the path of a file names, or "train".

    For example, `images/val/a.json` gives "val", and `images/a.json` gives "train".
    """
    return next((part.lower() for part in PurePosixPath(path).parts[:-1] if part.lower() in SPLITS), WHOLE)


def files_of(root: Path, suffix: str, depth: int = 2) -> Iterator[Path]:
    """Yield the files that end with `suffix` in the folder `root` and its subfolders, sorted within each folder.

    `depth` is how many levels of subfolders are searched. 0 searches only the folder itself.
    """
    yield from sorted(path for path in root.glob(f"*{suffix}") if path.is_file() and not path.name.startswith("."))
    for name in folders_in(root) if depth else ():
        yield from files_of(root / name, suffix, depth - 1)


def is_part(path: Path, root: Path) -> bool:
    """Return whether an annotation file belongs to the export in `root`, and not to another export in a subfolder."""
    strange = [name for name in path.relative_to(root).parts[:-1] if name.lower() not in PARTS]
    images_above = holds_pictures(root) or any(name.lower() in IMAGES for name in folders_in(root))
    return not strange or (len(strange) == 1 and images_above)


def head_of(path: Path) -> str:
    """Return the first 64 KiB of a file as text, without a byte-order mark, or '' if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 16).decode("utf-8-sig", "replace").lstrip()
    except OSError:
        return ""


def head_has(path: Path, begin: str, *keys: str) -> bool:
    """Return whether the first 64 KiB of a JSON file begin with the bracket `begin` and contain all `keys`."""
    head = head_of(path)
    return head.startswith(begin) and all(re.search(rf'"{key}"\s*:', head) for key in keys)


def read_text(path: Path) -> str:
    """Return the text of an annotation file. Raises: DataError if it cannot be read or is larger than 1 GiB."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 30} GiB")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises: DataError if it cannot be read or is not JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception | str) -> DataError:
    """Return the DataError for an annotation file with invalid content. `error` says what is wrong."""
    kind = "" if isinstance(error, str) else f"{type(error).__name__} "
    return DataError(
        f"Cannot read the annotations in {path}: {kind}{str(error)[:160]}", fix="Export again, or remove the file."
    )
