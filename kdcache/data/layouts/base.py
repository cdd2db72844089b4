"""The interface of a layout: whether a folder has it, and its splits and their contents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from kdcache.data.classes import CLASSES_FILE, read_classes, read_colour_codes, read_numbers
from kdcache.data.colour_codes import ColourCodes
from kdcache.data.files import IMAGE_SUFFIXES
from kdcache.data.layouts.file_split import describe_some, file_split, saved_as_png
from kdcache.data.layouts.label_ids import LabelIds, Seen, id_table
from kdcache.data.layouts.scan import WHOLE, Scan, composed, replace_images
from kdcache.data.sample import ClassList, Split
from kdcache.errors import DataError, suggest
from kdcache.tasks import IGNORE_INDEX

VALIDATION = ("val", "valid", "validation")
"""Names of one split: where a data set has one of them, the others mean it too."""

HOW_TO_SPLIT = " Or keep a fifth of train for validation: train with --fold 0/5 --val-split train --val-fold 0/5."


def _numbers_of_lines(layout: str) -> LabelIds:
    return LabelIds(
        f"Label ids are 0 to {{last}} (the lines of {CLASSES_FILE}) or {IGNORE_INDEX} (void).",
        f"Complete {CLASSES_FILE}, write {IGNORE_INDEX} for pixels of no class, or remove {CLASSES_FILE} if the labels "
        f"hold the numbers that {layout} is published with.",
    )


def _numbers_of_classes(numbers: Mapping[int, int]) -> LabelIds:
    """Return how to map labels that hold the numbers of `classes.txt`. `numbers` maps them to class ids or 255."""
    classes = {index for index in numbers.values() if index != IGNORE_INDEX}
    # Numbers that are not listed stay as they are, so they are no class; those that would pass for one are refused.
    unlisted = sorted(classes - numbers.keys())
    fix = f"Add a line for it to {CLASSES_FILE}: `NAME: NUMBER`, or `void: NUMBER` if it means no class."

    def check(occurring: Seen, path: Path) -> None:
        if strange := [number for number in unlisted if occurring[number]]:
            raise DataError(
                f"Cannot read {path}: {CLASSES_FILE} does not list its number {', '.join(map(str, strange))}", fix=fix
            )

    table = id_table({**dict.fromkeys(unlisted, IGNORE_INDEX), **numbers})
    return LabelIds(f"Labels hold the numbers of {CLASSES_FILE}, or {IGNORE_INDEX} (void).", fix, table, check)


class Layout(ABC):
    """One way in which data sets lie on disk.

    In all methods, `root` is the top folder of the data set, as the method `find` returns it.

    A subclass sets `name`, `looks_for` and `split_is`. It defines `matches`, `splits`, `_classes` and `_scan`.

    Attributes:
        name: the prefix in `--data`, as in `voc:/data/VOC2012`.
        looks_for: what identifies a folder of this layout, in words for messages.
        homes: subfolders of the folder that the user names, '' for that folder. The first that matches is the top
            folder of the data set.
        split_is: what a split is in this layout, in words for messages.
        pairing: which label belongs to which image, in words for messages.
        listed: whether splits are lists of names. Several lists may name the same image on purpose.
        live: whether all commands read it directly. Other layouts are for `data convert` and `data check` only.
        of_file: whether a file instead of a folder identifies a data set.
        has_labels: whether its data sets may have labels. A layout without labels is tried last.
        restore: the fix for missing files of a split, without a full stop, for messages.
    """

    name: ClassVar[str]
    looks_for: ClassVar[str]
    homes: ClassVar[tuple[str, ...]] = ("",)
    split_is: ClassVar[str]
    pairing: ClassVar[str] = "Every label is a PNG or TIFF with the path of its image (another suffix)."
    listed: ClassVar[bool] = False
    live: ClassVar[bool] = True
    of_file: ClassVar[bool] = False
    has_labels: ClassVar[bool] = True
    restore: ClassVar[str] = "Restore the files from their source"

    @abstractmethod
    def matches(self, root: Path) -> bool:
        """Return whether `root` is the top folder of a data set of this layout."""

    @abstractmethod
    def splits(self, root: Path) -> list[str]:
        """Return the names of the splits of the data set in `root`, sorted."""

    @abstractmethod
    def _classes(self, root: Path) -> ClassList:
        """Return the class names and colours that the layout defines. Raises: DataError if their file is malformed."""

    @abstractmethod
    def _scan(self, root: Path, split: str) -> Scan:
        """Return the files of a split from `splits`. Raises: DataError for a list that cannot be read."""

    def find(self, folder: Path) -> Path | None:
        """Return the top folder of the data set, or None if `folder` does not have this layout.

        The top folder is `folder` itself or one of its subfolders in `homes`.
        """
        return next((folder / home for home in self.homes if self.matches(folder / home)), None)

    def classes(self, root: Path) -> ClassList:
        """Return the class names and colours of the data set in `root`.

        They come from `classes.txt` in `root` if it lists other names than the layout defines, else from the layout.

        Raises: DataError for a malformed file.
        """
        return read_classes(root) if self.lists_classes(root) else self._classes(root)

    def lists_classes(self, root: Path) -> bool:
        """Return whether a `classes.txt` in `root` lists other names than the layout defines.

        If so, the numbers in label files are ids in that file.

        Raises: DataError for an invalid `classes.txt`.
        """
        if not (root / CLASSES_FILE).is_file():
            return False
        listed = read_classes(root)
        try:
            return listed.names != self._classes(root).names
        except DataError:  # no file with the layout's own names
            return True

    def why(self, root: Path) -> str:
        """Return a phrase for messages: what identifies `root` as this layout, and where its classes come from.

        Raises: DataError for a malformed class file.
        """
        if self.lists_classes(root):
            classes = f"the classes of {CLASSES_FILE}"
        else:
            classes = "the layout's own classes" if self._classes(root) else "no classes"
        return f"{self.looks_for}; {classes}"

    @property
    def requirement(self) -> str:
        """The files and folders that a data set of this layout has, in words for messages."""
        below = " or ".join(f"{home}/" for home in self.homes if home)
        return f"{self.looks_for}, here or in {below}" if below else self.looks_for

    def colour_codes(self, root: Path) -> ColourCodes | None:
        """Return the map from label colours to class ids that `classes.txt` in `root` defines.

        Return None if that file is missing, or if a class has no unique colour in it. Then labels cannot be RGB images.

        Raises: DataError for an invalid `classes.txt`.
        """
        return read_colour_codes(root)

    def split_named(self, root: Path, split: str) -> str:
        """Return the name of the existing split in `root` that the user means with `split`.

        A name that exists stays the same. "val", "valid" and "validation" mean each other. An unknown name is returned
        unchanged.
        """
        names = self.splits(root)
        if split in names:
            return split
        if split not in VALIDATION:
            return next((name for name in names if composed(name) == composed(split)), split)
        return next((name for name in VALIDATION if name in names), split)

    def scan(self, root: Path, split: str, images: Path | None = None) -> Scan:
        """Find the image and label files of a split, without reading them.

        Defects such as labels without an image are part of the result, not errors.

        Args:
            root: the data set's folder.
            split: the split's name.
            images: a folder with other images for the same samples, such as translated ones, or None.

        Raises: DataError for an unknown split, a split without images, or a list that cannot be read.
        """
        split = self.split_named(root, split)
        if split not in (names := self.splits(root)):
            raise DataError(
                f"Unknown split {split!r} in {root}, which has {', '.join(names) or 'none'}",
                fix=suggest(split, names, "Name one of the splits that exist.")
                + (HOW_TO_SPLIT if split in VALIDATION and not {*VALIDATION} & {*names} and WHOLE in names else ""),
                rule=f"A split is {self.split_is}.",
            )
        scan = self._scan(root, split)
        if scan.drawn is None and (numbers := read_numbers(root)) is not None:
            scan = replace(scan, label_ids=_numbers_of_classes(numbers))
        elif self.lists_classes(root):
            scan = replace(scan, label_ids=_numbers_of_lines(self.name))
        if (colours := self.colour_codes(root)) is not None and scan.label_ids.colours is None:
            scan = replace(scan, label_ids=replace(scan.label_ids, colours=colours))
        if images is not None:
            scan = replace_images(scan, images, split)
        if not scan.images and scan.missing:
            raise self._missing(root, split, scan)
        if not scan.images:
            raise DataError(
                f"No images in {root / scan.image_place}" + (f" for split {split!r}" if self.listed else ""),
                fix=f"Put images there ({', '.join(IMAGE_SUFFIXES)})"
                + (", and their names into the list." if self.listed else ", or remove the folder."),
            )
        return scan

    def open(self, data: str, root: Path, split: str, images: Path | None = None) -> Split:
        """Return a split that is ready for use.

        Args:
            data: the data set as the user named it.
            root: the data set's folder.
            split: the split's name.
            images: a folder with other images for the same samples, such as translated ones, or None.

        Raises: DataError for an unknown split, no images, an invalid class list, repeated ids, labels without an image,
            or missing files.
        """
        split = self.split_named(root, split)
        scan = self.scan(root, split, images)
        if scan.missing:
            raise self._missing(root, split, scan)
        if scan.clashes:
            sample, first, second = scan.clashes[0]
            alike = ", which differ only in Unicode normalisation" if composed(first) == composed(second) else ""
            raise DataError(
                f"Repeated sample id {sample!r} in {root / scan.image_place}: {first} and {second}{alike} "
                f"({len(scan.clashes)} clashes)",
                fix="Rename or remove one file of each pair"
                + (", or the repeated lines of the list." if self.listed else "."),
                rule="An id is a path without its last suffix.",
            )
        if scan.orphans or scan.foreign:
            raise DataError(
                f"Labels without an image in {root / scan.label_place}: {describe_some(scan.orphans + scan.foreign)}",
                fix=saved_as_png(scan.orphans + scan.foreign)
                or f"Give each label its image's name, as in {next(iter(scan.images.values()))!r}. "
                "Remove the labels that have no image.",
                rule=self.pairing,
            )
        if scan.depth is not None and scan.depth.orphans:
            raise DataError(
                f"Depth files without an image in {root / scan.depth.place}: {describe_some(scan.depth.orphans)}",
                fix=f"Give each one its image's name, as in {next(iter(scan.images))!r}. Remove the others.",
            )
        return file_split(data, split, self.classes(root), root, scan)

    def may_share(self, one: str, other: str) -> bool:
        """Return whether the splits named `one` and `other` may have images in common on purpose.

        For example, the list "trainval" contains the images of "train", and "trainaug" extends "train". If splits are
        folders, the result is always False.
        """
        if not self.listed:
            return False
        names = {one, other}
        held_out = {name for name in names if not name.startswith("train")}
        return not held_out or ("trainval" in names and all(name.startswith("val") for name in held_out))

    def _missing(self, root: Path, split: str, scan: Scan) -> DataError:
        if other_images := [path for path in scan.missing if Path(path).is_absolute()]:
            return DataError(
                f"Missing images for {len(other_images)} of {len(other_images) + len(scan.images)} samples of {root}, "
                f"split {split!r}: {describe_some(other_images)}",
                fix="Add them to the folder of images= as SPLIT/ID.png or ID.png, or leave out images=."
                + (" Or take these samples out of the list." if self.listed else ""),
            )
        return DataError(
            f"Missing files in {root}, split {split!r}: {describe_some(scan.missing)}",
            fix=self.restore + (", or take their lines out of the list." if self.listed else "."),
        )
