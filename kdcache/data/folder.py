"""The `folder` layout: a data set as plain files.

    DIR/classes.txt                 names in the order of the ids
    DIR/images/<split>/**.jpg       or png, webp, bmp, tif; folders may nest
    DIR/labels/<split>/**.png       8-bit ids, 255 = void; the same path below <split> as the image

A sample's id is the image's path below `images/<split>` without its last suffix (`a.b.jpg` is `a.b`), with
forward slashes. Labels may be missing, for a split or for single samples; a label without an image is an
error, for it means that names do not match and that training would silently see no labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kdcache.data.classes import CLASSES_FILE, read_classes
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.label_ids import LabelIds
from kdcache.data.layouts.scan import Scan, folders_in, scan_folders
from kdcache.data.sample import IGNORE_INDEX, ClassList

IMAGES, LABELS = "images", "labels"

LABEL_IDS = LabelIds(
    f"Label ids are 0 to {{last}} (the lines of {CLASSES_FILE}) or {IGNORE_INDEX} (void).",
    f"Complete {CLASSES_FILE}, or write {IGNORE_INDEX} where no class applies.",
)


class Folder(Layout):
    """A data set of one's own; also what `write_scenes` and pseudo labels are written as."""

    name: ClassVar[str] = "folder"
    looks_for: ClassVar[str] = f"{IMAGES}/SPLIT/ and {CLASSES_FILE} (or {LABELS}/SPLIT/)"
    split_is: ClassVar[str] = f"a folder below {IMAGES}"

    def matches(self, root: Path) -> bool:
        if not folders_in(root / IMAGES):
            return False
        return (root / CLASSES_FILE).is_file() or bool(folders_in(root / LABELS))

    def splits(self, root: Path) -> list[str]:
        return folders_in(root / IMAGES)

    def classes(self, root: Path) -> ClassList:
        return read_classes(root)

    def _scan(self, root: Path, split: str) -> Scan:
        return scan_folders(root, f"{IMAGES}/{split}", f"{LABELS}/{split}", LABEL_IDS)
