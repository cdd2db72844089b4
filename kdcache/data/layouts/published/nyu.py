"""NYU Depth V2 as most depth estimators read it: synchronised frames, and the official test images.

    sync/SCENE/rgb_00045.jpg                            the split train (else official_splits/train)
    sync/SCENE/sync_depth_00045.png                     16-bit PNG of millimetres, 0 where nothing was measured
    official_splits/test/SCENE/rgb_00045.jpg            the split test
    official_splits/test/SCENE/sync_depth_00045.png

Source: Silberman et al. 2012; the folders are those of BTS (Lee et al. 2019).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.depth import NYU_UNIT
from kdcache.data.layouts.label_ids import NO_LABELS
from kdcache.data.layouts.scan import Scan, scan_depth, scan_folders
from kdcache.data.sample import ClassList

PLACES = {"train": ("sync", "official_splits/train"), "test": ("official_splits/test",)}
_IMAGE, _DEPTH = "rgb_", "sync_depth_"


class Nyu(Layout):
    """The layout of NYU Depth V2."""

    name: ClassVar[str] = "nyu"
    looks_for: ClassVar[str] = f"sync/SCENE/ or official_splits/test/SCENE/ with {_IMAGE}*.jpg and {_DEPTH}*.png"
    homes: ClassVar[tuple[str, ...]] = ("", "nyu_depth_v2")
    split_is: ClassVar[str] = "train (sync, else official_splits/train) or test (official_splits/test)"
    pairing: ClassVar[str] = f"The depth of SCENE/{_IMAGE}NUMBER.jpg is SCENE/{_DEPTH}NUMBER.png."

    def matches(self, root: Path) -> bool:
        """Return whether `root` has images with depth files for at least one split."""
        return bool(self.splits(root))

    def splits(self, root: Path) -> list[str]:
        """Return the splits that have depth files in `root`, sorted: "test" and "train"."""
        return sorted(split for split in PLACES if _place(root, split) is not None)

    def _classes(self, root: Path) -> ClassList:
        return ClassList(())

    def _scan(self, root: Path, split: str) -> Scan:
        place = _place(root, split)
        assert place is not None
        scan = scan_folders(root, place, f"{place}/label", NO_LABELS, image_begin=_IMAGE)
        return scan_depth(scan, root, place, NYU_UNIT, depth_begin=_DEPTH, image_of=_image_of)


def _place(root: Path, split: str) -> str | None:
    return next((place for place in PLACES[split] if any((root / place).glob(f"*/{_DEPTH}*.png"))), None)


def _image_of(name: str) -> str:
    scene, _, number = name.rpartition(_DEPTH)
    return f"{scene}{_IMAGE}{number}"
