"""Pair labels with images whose names end differently: `a.jpg` and `a_mask.png`.

One rule holds for a whole split: of the endings below, the one that pairs most labels, the first of equals. Names are
never paired by similarity, so a label that the rule leaves without an image is an error like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from kdcache.data.layouts.label_ids import LabelIds
from kdcache.data.layouts.published import cityscapes
from kdcache.data.layouts.scan import Scan, names_below, scan_folders
from kdcache.data.sample import ClassList

LABEL_ENDS = (
    *("", "_mask", "_masks", "_label", "_labels", "_L", "_seg", "_segmentation", "_gt", "_annotation"),
    *("_gtFine_labelIds", "_gtFine_labelTrainIds", "_labelIds", "_labelTrainIds"),
)
"""What names of labels may end with."""
IMAGE_ENDS = ("", "_sat", "_image", "_img", "_leftImg8bit")
"""What names of images may end with that those of their labels do not have."""
BESIDE = ("_color", "_colour", "_instanceIds", "_gtFine_color", "_gtFine_instanceIds")
"""Ends of pictures that lie beside labels and are none."""
_LABEL_IDS_ENDS = ("_gtFine_labelIds", "_labelIds")

Ends = tuple[str, str]
"""What the names of images and of labels end with."""


def scan_pairs(root: Path, image_place: str, label_place: str, label_ids: LabelIds, classes: ClassList | None) -> Scan:
    """Return the files of a split whose labels have names such as `a_mask.png` for `a.jpg`.

    If `classes` are Cityscapes' 19 classes, files named *_labelIds are mapped from Cityscapes' labelIds.

    Args:
        root: the data set's folder.
        image_place: the folder of images, below `root`.
        label_place: the folder of labels, below `root`. It may be the same folder.
        label_ids: how to map the numbers in labels to class ids.
        classes: the classes of the labels, or None.
    """
    together = image_place == label_place
    images, labels = names_below(root / image_place), names_below(root / label_place)
    image_end, label_end = ends_of(images, labels, together=together)
    if label_end in _LABEL_IDS_ENDS and classes is not None and classes.names == cityscapes.CLASSES.names:
        label_ids = cityscapes.LABEL_IDS
    if together and not label_end:  # pictures alone: none of them is a label
        return replace(scan_folders(root, image_place, f"{label_place}/labels", label_ids), label_place=label_place)
    scan = scan_folders(
        root, image_place, label_place, label_ids, image_end=image_end, label_end=label_end, together=together
    )
    if not label_end or together:
        return scan
    known = (label_end, *BESIDE, *(end for end in LABEL_ENDS if end))
    strays = [path for name, path in labels.items() if not name.endswith(known)]
    return replace(scan, orphans=scan.orphans + sorted(strays))


def ends_of(images: Iterable[str], labels: Iterable[str], *, together: bool = False) -> Ends:
    """Return (ending of image names, ending of label names) that pairs the largest number of labels with images.

    A label belongs to an image if the names without these endings are equal. For example, images `a_img` with labels
    `a_mask` give ("_img", "_mask"). If no names pair, the result is ("", "").

    Args:
        images: names of image files without suffix.
        labels: names of label files without suffix.
        together: whether images and labels lie in the same folder. Then label names must have an ending.
    """
    images, labels = list(images), set(labels)
    best, most = ("", ""), 0
    for image_end in IMAGE_ENDS:
        stems = {name.removesuffix(image_end) for name in images if name.endswith(image_end)}
        if image_end and not together and len(stems) < len(images):
            continue  # images that do not end so would be no samples, without a word
        for label_end in LABEL_ENDS:
            if together and not label_end:
                continue
            pairs = sum(name.removesuffix(label_end) in stems for name in labels if name.endswith(label_end))
            if pairs > most:
                best, most = (image_end, label_end), pairs
    return best


def described(scan: Scan) -> str:
    """Return the end of a message about the label names of a split's scan, such as ", labels end with _mask".

    Return '' if labels have the same names as their images.
    """
    return f", labels end with {scan.label_end}" if scan.label_end else ""
