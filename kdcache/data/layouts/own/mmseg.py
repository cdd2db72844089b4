"""The folders of mmsegmentation's custom data sets.

    classes.txt                 names in the order of the ids
    img_dir/SPLIT/**.jpg
    ann_dir/SPLIT/**.png        class ids, 255 = void; or ends such as _labelTrainIds before the suffix

Source: mmsegmentation, "Add new datasets".
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kdcache.data.classes import CLASSES_FILE, read_classes
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.own.folder import LABEL_IDS
from kdcache.data.layouts.own.pairs import described, scan_pairs
from kdcache.data.layouts.scan import Scan, folders_in
from kdcache.data.sample import ClassList

IMAGES, LABELS = "img_dir", "ann_dir"


class Mmseg(Layout):
    """The layout of mmsegmentation's custom data sets."""

    name: ClassVar[str] = "mmseg"
    looks_for: ClassVar[str] = f"{IMAGES}/SPLIT/ and {LABELS}/ (and {CLASSES_FILE})"
    split_is: ClassVar[str] = f"a folder below {IMAGES}"

    def matches(self, root: Path) -> bool:
        """Return whether `root` has folders in img_dir/, and a folder ann_dir/."""
        return bool(folders_in(root / IMAGES)) and (root / LABELS).is_dir()

    def splits(self, root: Path) -> list[str]:
        """Return the sorted names of the folders in img_dir/ of `root`."""
        return folders_in(root / IMAGES)

    def why(self, root: Path) -> str:
        """Return a phrase for messages: what identifies `root` as this layout.

        It names the folders of images and labels, and the file of classes.
        """
        splits = self.splits(root)
        folders = ", ".join(f"{IMAGES}/{split}/ with {LABELS}/{split}/" for split in splits[:4])
        return f"{folders}{described(self._scan(root, splits[0]))}; the classes of {CLASSES_FILE}"

    def _classes(self, root: Path) -> ClassList:
        return read_classes(root)

    def _scan(self, root: Path, split: str) -> Scan:
        return scan_pairs(root, f"{IMAGES}/{split}", f"{LABELS}/{split}", LABEL_IDS, self.classes(root))
