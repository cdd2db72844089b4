"""CamVid as the SegNet tutorial distributes it: 11 classes, one list per split.

    train.txt                       lines such as /SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png train/a.png
    images trainannot/a.png                8-bit ids 0 to 10, 11 = void

The lists have the paths of their authors' machine, so only the last two parts count, below the folder of the lists. A
line without an annotation is a sample without a label.
Source: Badrinarayanan et al. 2017; Brostow et al. 2009. Colours are from SegNet's scripts.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import ClassVar

from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.label_ids import LabelIds, id_table
from kdcache.data.layouts.scan import Scan, lists_in, read_list
from kdcache.data.sample import ClassList
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

COLOURS = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
CLASSES = ClassList(tuple(COLOURS), tuple(COLOURS.values()))
UNLABELLED = 11

LABEL_IDS = LabelIds(
    "CamVid's annotations hold ids 0 to 10, and 11 or 255 for void.",
    "Use the annotations of the SegNet tutorial, or the folder layout with a classes.txt.",
    id_table({**{index: index for index in range(len(CLASSES))}, UNLABELLED: IGNORE_INDEX}),
)

SPLITS = ("train", "val", "test", "trainval")


class CamVid(Layout):
    """The layout of CamVid as the SegNet tutorial distributes it."""

    name: ClassVar[str] = "camvid"
    looks_for: ClassVar[str] = "train.txt, val.txt or test.txt beside a folder such as trainannot/"
    homes: ClassVar[tuple[str, ...]] = ("", "CamVid")
    split_is: ClassVar[str] = "a list (train.txt, val.txt, test.txt, trainval.txt)"
    listed: ClassVar[bool] = True

    def matches(self, root: Path) -> bool:
        """Return whether `root` has a list, such as train.txt, and an annotation folder, such as trainannot/."""
        return bool(self.splits(root)) and any((root / f"{split}annot").is_dir() for split in SPLITS)

    def splits(self, root: Path) -> list[str]:
        """Return the sorted names of the splits that have a list in `root`: train.txt is the split "train"."""
        return lists_in(root, SPLITS)

    def _classes(self, root: Path) -> ClassList:
        return CLASSES

    def _scan(self, root: Path, split: str) -> Scan:
        listing = f"{split}.txt"
        images: dict[str, str] = {}
        labels: dict[str, str] = {}
        clashes, missing = [], []
        for number, words in read_list(root / listing):
            image, *annotation = _paths(root, listing, number, words)
            missing += [path for path in (image, *annotation) if not (root / path).is_file()]
            sample = PurePosixPath(image).stem
            if sample in images:
                clashes.append((sample, images[sample], f"{image} (line {number} of {listing})"))
            elif image not in missing:
                images[sample] = image
                labels.update((sample, path) for path in annotation if path not in missing)
        ordered = dict(sorted(images.items()))
        return Scan(ordered, labels, LABEL_IDS, split, f"{split}annot", clashes=clashes, missing=missing)


def _paths(root: Path, listing: str, number: int, words: list[str]) -> list[str]:
    """Return the paths of the image and, if the line has one, its annotation."""
    if len(words) > 2:
        raise DataError(
            f"Cannot read line {number} of {root / listing}: it has {len(words)} words",
            fix="Write the path of an image and the path of its annotation, without spaces. Rename files with spaces.",
        )
    return [_resolve(root, word) for word in words]


def _resolve(root: Path, word: str) -> str:
    """Return a path of a list, or its last two parts if it does not exist, relative to `root`."""
    path = PurePosixPath(word.replace("\\", "/"))
    if (root / path).is_file():  # an absolute path takes the place of root
        return str(path)
    return "/".join(path.parts[-2:])
