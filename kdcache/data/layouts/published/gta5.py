"""GTA5 ("Playing for Data"): game frames with Cityscapes' ids.

    images/00001.png
    labels/00001.png                    palette PNG of labelIds, 34 = license plate
    train.txt, val.txt, test.txt        names, one a line; without lists all of it is `train`

Some labels of the public release have another size than their image. They fail when read, and `data check` lists all
of them. Source: Richter et al. 2016.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.label_ids import LabelIds, id_table
from kdcache.data.layouts.published.cityscapes import CLASSES, refuse_train_ids, to_classes
from kdcache.data.layouts.scan import WHOLE, Scan, holds_pictures, lists_in, scan_whole
from kdcache.data.sample import ClassList

IMAGES, LABELS = "images", "labels"
SPLITS = ("train", "val", "test", "trainval")
MOST_LABEL_ID = 34

LABEL_IDS = LabelIds(
    f"GTA5's labelIds are 0 to {MOST_LABEL_ID} (255 is void too).",
    "Restore the labels from their source, or use the folder layout with a classes.txt.",
    id_table(to_classes(MOST_LABEL_ID)),
    refuse_train_ids,
)


class Gta5(Layout):
    """The layout of GTA5 ("Playing for Data")."""

    name: ClassVar[str] = "gta5"
    looks_for: ClassVar[str] = f"pictures right in {IMAGES}/ and in {LABELS}/"
    split_is: ClassVar[str] = f"a list (train.txt, val.txt, ...); without lists, {WHOLE!r} is all of it"
    listed: ClassVar[bool] = True

    def matches(self, root: Path) -> bool:
        """Return whether images/ and labels/ in `root` directly contain pictures."""
        return holds_pictures(root / IMAGES) and holds_pictures(root / LABELS)

    def splits(self, root: Path) -> list[str]:
        """Return the sorted names of the splits that have a list in `root`, such as "val" for val.txt.

        Without lists, return ["train"].
        """
        return lists_in(root, SPLITS) or [WHOLE]

    def _classes(self, root: Path) -> ClassList:
        return CLASSES

    def _scan(self, root: Path, split: str) -> Scan:
        return scan_whole(root, split, IMAGES, LABELS, LABEL_IDS, SPLITS)
