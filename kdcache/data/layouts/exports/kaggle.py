"""The common folder structures of data sets on Kaggle and similar sites.

    SPLIT/images/**.jpg     SPLIT/masks/**.png          SPLIT is train, val or valid, test
    images/SPLIT/**.jpg     masks/SPLIT/**.png
    images/**.jpg           masks/**.png                one split, unless train.txt, val.txt, test.txt divide it
    SPLIT/**.png            SPLIT_labels/**.png         or SPLIT_masks/
    SPLIT/a_sat.jpg         SPLIT/a_mask.png            pairs in one folder; of Roboflow with SPLIT/_classes.csv

Masks may end with `_mask`, `_L` and the like (pairs.py). Classes come from `classes.txt`, else from `class_dict.csv`
(columns name, r, g, b), else from Roboflow's `_classes.csv` (columns Pixel Value and Class). In these tables a name
such as void or unlabeled is not a class.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

from kdcache.data.classes import CLASSES_FILE, VOID_NAMES, colour_codes, read_classes
from kdcache.data.colour_codes import Colour, ColourCodes
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.label_ids import LabelIds, id_table
from kdcache.data.layouts.own.folder import LABEL_IDS
from kdcache.data.layouts.own.pairs import described, ends_of, scan_pairs
from kdcache.data.layouts.scan import WHOLE, Scan, folders_in, holds_pictures, keep_listed, lists_in, names_below
from kdcache.data.sample import ClassList
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "annotations", "labels", "label")
SPLITS = ("train", "val", "valid", "validation", "test")
CLASS_TABLE = "class_dict.csv"
ROBOFLOW_TABLE = "_classes.csv"

Places = dict[str, tuple[str, str]]
"""Split -> folder of images, folder of masks."""


class Kaggle(Layout):
    """The layout of images with masks in one of the folder structures that Kaggle data sets often have."""

    name: ClassVar[str] = "kaggle"
    live: ClassVar[bool] = False
    looks_for: ClassVar[str] = (
        "SPLIT/images/ and SPLIT/masks/; or images/ and masks/; or SPLIT/ and SPLIT_labels/ (or SPLIT_masks/); or "
        f"SPLIT/ with pairs such as a_sat.jpg and a_mask.png; with {CLASSES_FILE}, {CLASS_TABLE} or "
        f"SPLIT/{ROBOFLOW_TABLE}"
    )
    split_is: ClassVar[str] = "train, val (or valid) or test, by folder or by list"
    pairing: ClassVar[str] = "Every mask is a PNG or TIFF with the name of its image, or one that ends with _mask."

    def matches(self, root: Path) -> bool:
        """Return whether `root` has images and masks as `looks_for` says, such as train/images/ and train/masks/."""
        return bool(self._places(root))

    def splits(self, root: Path) -> list[str]:
        """Return the sorted names of the split folders in `root`, such as "train".

        Without such folders, return the names of the lists that exist, such as "val" for val.txt. Without lists, return
        ["train"].
        """
        places = self._places(root)
        return (lists_in(root, SPLITS) or [WHOLE]) if list(places) == [""] else sorted(places)

    def why(self, root: Path) -> str:
        """Return a phrase for messages: what identifies `root` as this layout.

        It names the folders of images and masks, the lists of the splits, and the file of classes.
        """
        places, splits = self._places(root), self.splits(root)
        found = [f"{image}/ with {mask}/" if image != mask else f"pairs in {image}/" for image, mask in places.values()]
        lists = ", divided by " + ", ".join(f"{name}.txt" for name in lists_in(root, SPLITS)) if "" in places else ""
        lists = lists if lists_in(root, SPLITS) else ""
        return (
            f"{', '.join(found[:4])}{lists}{described(self._scan(root, splits[0]))}; the classes of {self._file(root)}"
        )

    def colour_codes(self, root: Path) -> ColourCodes | None:
        """Return the map from label colours to class ids that class_dict.csv or `classes.txt` in `root` defines.

        Return None if a class has no unique colour.

        Raises: DataError for an invalid file.
        """
        if self._file(root) != CLASS_TABLE:
            return super().colour_codes(root)
        rows = _read_table(root / CLASS_TABLE)
        classes = [colour for name, colour in rows if name.lower() not in VOID_NAMES]
        void = [colour for name, colour in rows if name.lower() in VOID_NAMES]
        return colour_codes(classes, void, str(root / CLASS_TABLE))

    def _classes(self, root: Path) -> ClassList:
        if self._file(root) == CLASSES_FILE:
            return read_classes(root)
        if self._file(root) != CLASS_TABLE:
            names = self._roboflow(root).values()
            return ClassList(tuple(name for name in names if name.lower() not in VOID_NAMES))
        rows = [row for row in _read_table(root / CLASS_TABLE) if row[0].lower() not in VOID_NAMES]
        return ClassList(tuple(name for name, _ in rows), tuple(colour for _, colour in rows))

    def _scan(self, root: Path, split: str) -> Scan:
        places, classes = self._places(root), self.classes(root)
        if "" not in places:
            return scan_pairs(root, *places[split], self._label_ids(root, classes), classes)
        scan = scan_pairs(root, *places[""], LABEL_IDS, classes)
        return keep_listed(scan, root, f"{split}.txt") if lists_in(root, SPLITS) else scan

    def _file(self, root: Path) -> str:
        """Return the file that lists the classes, below the root."""
        if (root / CLASSES_FILE).is_file() or (root / CLASS_TABLE).is_file():
            return CLASSES_FILE if (root / CLASSES_FILE).is_file() else CLASS_TABLE
        return next(iter(self._roboflow_tables(root)), CLASSES_FILE)

    def _roboflow_tables(self, root: Path) -> list[str]:
        files = [f"{images}/{ROBOFLOW_TABLE}" for images, _ in self._places(root).values()]
        return [file for file in files if (root / file).is_file()]

    def _roboflow(self, root: Path) -> dict[int, str]:
        """Return number in the masks -> class name, from Roboflow's tables.

        Raises: DataError for a table with other columns, or tables that differ.
        """
        tables = {file: _read_roboflow(root / file) for file in self._roboflow_tables(root)}
        first, *others = tables
        if odd := next((file for file in others if tables[file] != tables[first]), None):
            raise DataError(
                f"Cannot join the splits of {root}: {first} lists {tables[first]}, {odd} lists {tables[odd]}",
                fix="Export all splits at once, or convert each one by itself with --split.",
            )
        return tables[first]

    def _label_ids(self, root: Path, classes: ClassList) -> LabelIds:
        if not self._file(root).endswith(ROBOFLOW_TABLE):
            return LABEL_IDS
        void = {number: IGNORE_INDEX for number, name in self._roboflow(root).items() if name.lower() in VOID_NAMES}
        numbers = {number: n for n, number in enumerate(sorted(self._roboflow(root).keys() - void.keys()))} | void
        table = None if all(number == index for number, index in numbers.items()) else id_table(numbers)
        return LabelIds(
            f"Masks hold the pixel values of {self._file(root)}, or {IGNORE_INDEX} (void).",
            f"Complete {ROBOFLOW_TABLE}, or export again.",
            table,
        )

    def _places(self, root: Path) -> Places:
        """Return split -> folders of images and masks. If folders do not divide the images, the split is ""."""
        splits = [name for name in folders_in(root) if name in SPLITS]
        for make in (_split_first, _split_last, _beside, _together):
            if places := make(root, splits):
                return places
        return {}


def _split_first(root: Path, splits: list[str]) -> Places:
    """Return the folders for the structure SPLIT/images and SPLIT/masks, or {}."""
    places = {}
    for split in splits:
        names = folders_in(root / split)
        images, masks = _first(IMAGES, names), _first(MASKS, names)
        if images:
            places[split] = (f"{split}/{images}", f"{split}/{masks or MASKS[0]}")
    return places if any((root / masks).is_dir() for _, masks in places.values()) else {}


def _split_last(root: Path, splits: list[str]) -> Places:
    """Return the folders for images/SPLIT and masks/SPLIT, or for images and masks, or {}.

    The result is {} if there is a folder `labels`, which other layouts have.
    """
    names = folders_in(root)
    images, masks = _first(IMAGES, names), _first(MASKS[:2], names)
    if not images or not masks or "labels" in names:
        return {}
    below = folders_in(root / images)
    if below and not holds_pictures(root / images):
        return {split: (f"{images}/{split}", f"{masks}/{split}") for split in below}
    return {"": (images, masks)} if holds_pictures(root / images) else {}


def _beside(root: Path, splits: list[str]) -> Places:
    """Return the folders for the structure SPLIT and SPLIT_labels, or {}."""
    names = folders_in(root)
    ends = ("_labels", "_masks", "_annotations")
    places = {split: next((f"{split}{end}" for end in ends if f"{split}{end}" in names), "") for split in splits}
    if not any(places.values()):
        return {}
    return {split: (split, labels or f"{split}{ends[0]}") for split, labels in places.items()}


def _together(root: Path, splits: list[str]) -> Places:
    """Return the folders of splits that contain both images and masks, distinguished by the endings of names, or {}."""
    flat = [split for split in splits if holds_pictures(root / split)]
    pairs = [split for split in flat if ends_of(names := names_below(root / split), names, together=True)[1]]
    return {split: (split, split) for split in flat} if pairs else {}


def _first(candidates: tuple[str, ...], names: list[str]) -> str:
    return next((name for name in candidates if name in names), "")


def _read_table(path: Path) -> list[tuple[str, Colour]]:
    """Return (name, colour) for each line of a class table, including void. Raises: DataError for other columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [{(key or "").strip().lower(): value for key, value in row.items()} for row in csv.DictReader(file)]
        read = [(str(row["name"]).strip(), _colour(row)) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"Cannot read the classes in {path}: {type(error).__name__} {error}",
            fix=f"Write the columns name, r, g and b (0 to 255). Or write a {CLASSES_FILE} next to it: `name r g b`, "
            "one class per line.",
        ) from error
    return read


def _read_roboflow(path: Path) -> dict[int, str]:
    """Return pixel value -> class name, sorted by value. Raises: DataError for a table with other columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            _, *rows = [row for row in csv.reader(file, skipinitialspace=True) if any(map(str.strip, row))]
        names = {int(number): name.strip() for number, name in rows}
        if len(names) < len(rows) or not all(0 <= number < IGNORE_INDEX for number in names):
            raise ValueError("a pixel value twice, or one outside of 0 to 254")
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(
            f"Cannot read the classes in {path}: {type(error).__name__} {error}",
            fix="Write the columns Pixel Value and Class, or a classes.txt in the root, one name per line.",
        ) from error
    return dict(sorted(names.items()))


def _colour(row: dict[str, str]) -> Colour:
    r, g, b = (int(row[channel]) for channel in "rgb")
    if not all(0 <= level <= 255 for level in (r, g, b)):
        raise ValueError(f"the colour {r} {g} {b}")
    return r, g, b
