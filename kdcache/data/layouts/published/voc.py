"""PASCAL VOC 2012, and its extension by SBD: 21 classes, one list per split.

    ImageSets/Segmentation/train.txt    names, one a line; any list there is a split
    JPEGImages/NAME.jpg
    SegmentationClass/NAME.png          palette PNG of ids 0 to 20, 255 = void
    SegmentationClassAug/NAME.png       of `trainaug`: SBD's labels as 8-bit ids

Source: Everingham et al. 2015; Hariharan et al. 2011 (SBD).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kdcache.data.classes import CLASSES_FILE
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.label_ids import LabelIds
from kdcache.data.layouts.scan import Scan, keep_listed, lists_in, scan_folders
from kdcache.data.sample import ClassList, voc_colour

NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
CLASSES = ClassList(NAMES, tuple(voc_colour(index) for index in range(len(NAMES))))

LABEL_IDS = LabelIds(
    "VOC's labels hold ids 0 to 20, and 255 for void.",
    "Use SegmentationClass (not SegmentationObject, whose ids count objects), or the folder layout.",
)

IMAGES, LABELS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
AUGMENTED, AUGMENTED_LABELS = "trainaug", "SegmentationClassAug"


class Voc(Layout):
    """The layout of PASCAL VOC 2012's segmentation data."""

    name: ClassVar[str] = "voc"
    looks_for: ClassVar[str] = f"{IMAGES}/ and {LISTS}/"
    homes: ClassVar[tuple[str, ...]] = ("", "VOC2012", "VOCdevkit/VOC2012")
    split_is: ClassVar[str] = f"a list below {LISTS} ({AUGMENTED} needs {AUGMENTED_LABELS}/ too)"
    listed: ClassVar[bool] = True

    def matches(self, root: Path) -> bool:
        """Return whether `root` has JPEGImages/ and ImageSets/Segmentation/, and is not an export of CVAT or LabelMe.

        Such exports have the same folders, but also labelmap.txt or class_names.txt.
        """
        exported = any((root / name).is_file() for name in ("labelmap.txt", "class_names.txt"))
        if exported and not (root / CLASSES_FILE).is_file():
            return False  # of CVAT or LabelMe, with other classes
        return (root / IMAGES).is_dir() and (root / LISTS).is_dir()

    def splits(self, root: Path) -> list[str]:
        """Return the names of the lists in ImageSets/Segmentation/ of `root`.

        The list "trainaug" is left out unless the folder SegmentationClassAug/ exists.
        """
        augmented = (root / AUGMENTED_LABELS).is_dir()
        return [name for name in lists_in(root / LISTS) if name != AUGMENTED or augmented]

    def _classes(self, root: Path) -> ClassList:
        return CLASSES

    def _scan(self, root: Path, split: str) -> Scan:
        labels = AUGMENTED_LABELS if split == AUGMENTED else LABELS
        return keep_listed(scan_folders(root, IMAGES, labels, LABEL_IDS), root, f"{LISTS}/{split}.txt")
