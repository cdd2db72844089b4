"""ADE20K's scene parsing benchmark: 150 classes.

    images/training/NAME.jpg            `train`; `val` is images/validation
    annotations/training/NAME.png       8-bit ids 1 to 150, 0 = void
    objectInfo150.txt                   the names, one a line, in its last column

Class ids are the file's ids minus one, and 0 becomes void ("reduce zero label"). A class is called by the first of its
names. The colours are generated: the usual ones come from a file that the data set does not hold. Source: Zhou et al.
2017.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.label_ids import LabelIds, id_table
from kdcache.data.layouts.scan import Scan, scan_folders
from kdcache.data.sample import ClassList
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

IMAGES, LABELS, NAMES_FILE = "images", "annotations", "objectInfo150.txt"
FOLDERS = {"train": "training", "val": "validation"}
CLASSES = 150

LABEL_IDS = LabelIds(
    f"ADE20K's annotations hold ids 1 to {CLASSES}, and 0 (or 255) for void.",
    "Use the annotations of ADEChallengeData2016 (the full ADE20K has other ids), or the folder layout.",
    id_table({0: IGNORE_INDEX, **{number: number - 1 for number in range(1, CLASSES + 1)}}),
)

_LINE = re.compile(r"\s*(?P<id>\d+)\s+[\d.]+\s+\d+\s+\d+\s+\d+\s+(?P<names>\S.*?)\s*")
"""Idx, Ratio, Train, Val, Stuff, Name."""


class Ade20k(Layout):
    """The layout of ADE20K's scene parsing benchmark (ADEChallengeData2016)."""

    name: ClassVar[str] = "ade20k"
    looks_for: ClassVar[str] = f"{IMAGES}/training/ and {LABELS}/training/ (or validation)"
    homes: ClassVar[tuple[str, ...]] = ("", "ADEChallengeData2016")
    split_is: ClassVar[str] = f"train ({IMAGES}/training) or val ({IMAGES}/validation)"

    def matches(self, root: Path) -> bool:
        """Return whether `root` has images/ and annotations/ with training/ or validation/ in each."""
        return bool(self.splits(root)) and any((root / LABELS / folder).is_dir() for folder in FOLDERS.values())

    def splits(self, root: Path) -> list[str]:
        """Return the splits in `root`: "train" for a folder images/training/, and "val" for images/validation/."""
        return [split for split, folder in FOLDERS.items() if (root / IMAGES / folder).is_dir()]

    def _classes(self, root: Path) -> ClassList:
        path = root / NAMES_FILE
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _no_names(path, error) from error
        entries = [match for line in lines if (match := _LINE.fullmatch(line))]
        if [int(match["id"]) for match in entries] != list(range(1, CLASSES + 1)):
            raise _no_names(path, f"its {len(entries)} lines of classes do not have the ids 1 to {CLASSES}")
        return ClassList(_short_names([match["names"] for match in entries]))

    def _scan(self, root: Path, split: str) -> Scan:
        return scan_folders(root, f"{IMAGES}/{FOLDERS[split]}", f"{LABELS}/{FOLDERS[split]}", LABEL_IDS)


def _short_names(names: list[str]) -> tuple[str, ...]:
    """Return the first of each class's names: "building, edifice" becomes "building".

    Names that would be equal stay whole.
    """
    short = [re.split(r"[,;]", name)[0].strip() for name in names]
    return tuple(first if short.count(first) == 1 else name for first, name in zip(short, names, strict=True))


def _no_names(path: Path, fault: object) -> DataError:
    return DataError(
        f"Cannot read the classes of ADE20K in {path}: {fault}",
        fix=f"Put the {NAMES_FILE} of ADEChallengeData2016.zip next to {IMAGES}/ and {LABELS}/.",
        rule="Its lines are Idx, Ratio, Train, Val, Stuff and Name.",
    )
