"""KITTI's semantic segmentation benchmark of 2015: 200 training images, in Cityscapes' classes.

    training/image_2/000000_10.png      `train`
    training/semantic/000000_10.png     8-bit labelIds as Cityscapes has them
    testing/image_2/000000_10.png       `test`, without labels

Source: Alhaija et al. 2018; the benchmark's development kit ("data format and metrics conform with Cityscapes").
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.published.cityscapes import CLASSES, LABEL_IDS
from kdcache.data.layouts.scan import Scan, scan_folders
from kdcache.data.sample import ClassList

IMAGES, LABELS = "image_2", "semantic"
FOLDERS = {"train": "training", "test": "testing"}


class KittiSemantic(Layout):
    """The layout of KITTI's semantic segmentation benchmark (2015)."""

    name: ClassVar[str] = "kitti-semantic"
    looks_for: ClassVar[str] = f"training/{IMAGES}/ and training/{LABELS}/"
    homes: ClassVar[tuple[str, ...]] = ("", "data_semantics")
    split_is: ClassVar[str] = f"train (training/{IMAGES}) or test (testing/{IMAGES})"

    def matches(self, root: Path) -> bool:
        """Return whether `root` has training/image_2/ and training/semantic/."""
        return all((root / FOLDERS["train"] / name).is_dir() for name in (IMAGES, LABELS))

    def splits(self, root: Path) -> list[str]:
        """Return "train" if training/image_2/ exists in `root`, and "test" if testing/image_2/ does, sorted."""
        return sorted(split for split, folder in FOLDERS.items() if (root / folder / IMAGES).is_dir())

    def _classes(self, root: Path) -> ClassList:
        return CLASSES

    def _scan(self, root: Path, split: str) -> Scan:
        return scan_folders(root, f"{FOLDERS[split]}/{IMAGES}", f"{FOLDERS[split]}/{LABELS}", LABEL_IDS)
