"""The `folder` layout: a data set as plain files.

    DIR/classes.txt                 names in the order of the ids
    DIR/images/<split>/**.jpg       or png, webp, bmp, tif; folders may nest
    DIR/labels/<split>/**.png       ids, 255 = void; the same path below <split> as the image, or one that ends with
                                    _mask or the like (pairs.py)
    DIR/depth/<split>/**.npy        depth; or npz, tiff, png; the same path below <split> as the image
    DIR/depth.toml                  the unit of depth in whole numbers, and what means unknown

Pictures directly in `images/` are divided by lists of their names, `train.txt`, `val.txt` and `test.txt`. Without lists
all of them are `train`.

A sample's id is the image's path below `images/<split>` without its last suffix (`a.b.jpg` is `a.b`), with forward
slashes. Labels may be missing, for a split or for single samples. A label without an image is an error, because names
that do not match would make training silently ignore labels. The same holds for depth. Data with depth and without
labels need no classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from kdcache.data.classes import CLASSES_FILE, read_classes
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.depth import read_unit
from kdcache.data.layouts.label_ids import LabelIds
from kdcache.data.layouts.own.pairs import described, scan_pairs
from kdcache.data.layouts.scan import (
    WHOLE,
    Scan,
    folders_in,
    holds_pictures,
    keep_listed,
    lists_in,
    scan_depth,
)
from kdcache.data.sample import ClassList
from kdcache.tasks import IGNORE_INDEX

IMAGES, LABELS, DEPTHS = "images", "labels", "depth"
SPLITS = ("train", "val", "test")
MASKS = ("masks", "mask")
"""Folders beside `images/` that make it another layout, unless there is `labels/` too."""

LABEL_IDS = LabelIds(
    f"Label ids are 0 to {{last}} (the lines of {CLASSES_FILE}) or {IGNORE_INDEX} (void).",
    f"Complete {CLASSES_FILE}, or write {IGNORE_INDEX} for pixels of no class. kdcache data check counts all of them.",
)


class Folder(Layout):
    """The layout of your own data set: images/SPLIT/, labels/SPLIT/ and classes.txt.

    `kdcache data convert` writes data sets in this layout.
    """

    name: ClassVar[str] = "folder"
    looks_for: ClassVar[str] = (
        f"{IMAGES}/SPLIT/ and {CLASSES_FILE} (or {LABELS}/SPLIT/, or {DEPTHS}/SPLIT/); or pictures right in {IMAGES}/"
    )
    split_is: ClassVar[str] = f"a folder below {IMAGES}, or a list of pictures right in it"

    def matches(self, root: Path) -> bool:
        """Return whether `root` has images/ and also `classes.txt`, labels/ or depth/.

        It must not have masks/ or mask/ instead of labels/, because that is another layout.
        """
        has_classes, has_depth = (root / CLASSES_FILE).is_file(), (root / DEPTHS).is_dir()
        if not (root / LABELS).is_dir() and any((root / name).is_dir() for name in MASKS):
            return False
        if folders_in(root / IMAGES):
            return has_classes or has_depth or bool(folders_in(root / LABELS))
        return (has_classes or has_depth) and holds_pictures(root / IMAGES)

    def splits(self, root: Path) -> list[str]:
        """Return the names of the folders in images/ of `root`.

        Without such folders, return the names of the lists that exist, such as "val" for val.txt. Without lists, return
        ["train"].
        """
        return folders_in(root / IMAGES) or lists_in(root, SPLITS) or [WHOLE]

    def why(self, root: Path) -> str:
        """Return a phrase for messages: what identifies `root` as this layout.

        It names the folders or lists of the splits, `classes.txt` or depth/, and the ending of label names.
        """
        folders, lists = folders_in(root / IMAGES), lists_in(root, SPLITS)
        folders_text = ", ".join(f"{IMAGES}/{name}/" for name in folders[:4]) or f"pictures right in {IMAGES}/"
        divided = "" if folders else f", divided by {', '.join(f'{name}.txt' for name in lists)}" if lists else ""
        identifier = CLASSES_FILE if (root / CLASSES_FILE).is_file() or not (root / DEPTHS).is_dir() else f"{DEPTHS}/"
        ends = described(self._scan(root, self.splits(root)[0]))
        return f"{folders_text} and {identifier}{divided}{ends}"

    def _classes(self, root: Path) -> ClassList:
        depth_only = (root / DEPTHS).is_dir() and not (root / LABELS).is_dir() and not (root / CLASSES_FILE).is_file()
        return ClassList(()) if depth_only else read_classes(root)

    def _scan(self, root: Path, split: str) -> Scan:
        undivided = not folders_in(root / IMAGES)
        below = "" if undivided else f"/{split}"
        scan = scan_pairs(root, f"{IMAGES}{below}", f"{LABELS}{below}", LABEL_IDS, self.classes(root))
        if undivided and lists_in(root, SPLITS):
            scan = keep_listed(scan, root, f"{split}.txt")
        place = DEPTHS if undivided else f"{DEPTHS}/{split}"
        if not (root / place).is_dir():
            return scan
        scan = scan_depth(scan, root, place, read_unit(root))
        if scan.depth is not None and undivided and lists_in(root, SPLITS):  # the depth of other lists' images
            scan = replace(scan, depth=replace(scan.depth, orphans=[]))
        return scan
