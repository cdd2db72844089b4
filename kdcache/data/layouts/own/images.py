"""The `images` layout: pictures without labels, for a teacher's features.

DIR/**.jpg              pictures at any depth are all in `train`
DIR/SPLIT/**.jpg        folders that are all called train, val, test and the like are splits
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kdcache.data.classes import CLASSES_FILE
from kdcache.data.layouts.base import VALIDATION, Layout
from kdcache.data.layouts.own.folder import LABEL_IDS, LABELS
from kdcache.data.layouts.pictures import holds_masks
from kdcache.data.layouts.scan import WHOLE, Scan, folders_in, holds_pictures, names_below, scan_folders
from kdcache.data.sample import ClassList

_SPLITS = {"train", "test", *VALIDATION}


class Images(Layout):
    """The layout of pictures without labels and classes. kdcache tries it after all other layouts."""

    name: ClassVar[str] = "images"
    looks_for: ClassVar[str] = "pictures, at any depth, and no labels"
    split_is: ClassVar[str] = "a folder such as train/ or val/, without pictures or other folders next to it"
    has_labels: ClassVar[bool] = False

    def matches(self, root: Path) -> bool:
        """Return whether `root` has pictures at any depth, but no `classes.txt` and no folder of masks."""
        return not (root / CLASSES_FILE).exists() and bool(names_below(root)) and not holds_masks(root)

    def splits(self, root: Path) -> list[str]:
        """Return the names of the split folders in `root`, such as "train".

        Return ["train"] if the pictures do not lie in split folders.
        """
        return _folders(root) or [WHOLE]

    def _classes(self, root: Path) -> ClassList:
        return ClassList(())

    def _scan(self, root: Path, split: str) -> Scan:
        place = split if _folders(root) else "."
        return scan_folders(root, place, f"{place}/{LABELS}", LABEL_IDS)


def _folders(root: Path) -> list[str]:
    """Return the sorted names of the split folders, or [] if other pictures or folders lie next to them."""
    folders = folders_in(root)
    return folders if {*folders} <= _SPLITS and not holds_pictures(root) else []
