"""Warnings about readable data: labels that train nothing, or something other than intended.

A problem makes a training worthless. A warning may be intended. Each has a number and a remedy.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdcache.data.checks.split_report import SplitReport
from kdcache.data.classes import CLASSES_FILE, VOID_NAMES, says_numbers
from kdcache.data.files import label_palette, read_label
from kdcache.data.layouts.file_split import describe_some
from kdcache.data.layouts.own.folder import DEPTHS, IMAGES, LABELS, Folder
from kdcache.data.layouts.published.cityscapes import CLASSES as CITYSCAPES
from kdcache.data.layouts.published.cityscapes import MOST_LABEL_ID, to_classes
from kdcache.data.layouts.registry import LayoutRoot
from kdcache.data.layouts.scan import folders_in, is_picture, scan_folders
from kdcache.data.sample import ClassList, Pixels, default_colours
from kdcache.tasks import IGNORE_INDEX

MOST_VOID = 0.9
"""Share of void among labelled pixels beyond which a split is warned of."""

MAPPED_TWICE_VOID = 0.25
"""Share of void from which street scenes without plants, sky and cars look mapped twice."""

_HEADS = frozenset(
    ("id", "ids", "index", "idx", "class", "classes", "class_id", "class_name", "name", "names", "label", "labels")
)
_HEADS_BESIDE = frozenset(
    ("color", "colour", "r", "g", "b", "red", "green", "blue", "rgb", "hex", "trainid", "train_id")
)
"""Words of a table's first line; those of the second kind are no header alone."""
_LEADING, _TRAILING = re.compile(r"\d+\s+\S.*"), re.compile(r".*\S\s+\d+")


BACKGROUND = frozenset(("background", "bg", "_background_", "other", "others", "none", "clutter"))
"""Names of a class that 0 usually is; in lower case."""
FROM_ONE = f"if 0 means unlabelled and the classes count from 1, add the line `void: 0` to {CLASSES_FILE}"


@dataclass
class Doubts:
    """Sentences about suspicious data. Each says how many cases there are, and how to fix them.

    Attributes:
        problems: sentences about defects that make a training worthless.
        warnings: sentences about data that may be intended.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def doubts_of(
    reports: Mapping[str, SplitReport], classes: ClassList, place: LayoutRoot | None, *, whole: bool
) -> Doubts:
    """Return what looks wrong about the labels and class names of a data set, as problems and as warnings.

    Args:
        reports: split name -> report of its contents.
        classes: the data set's classes.
        place: the data set's layout and folder, or None for the built-in scenes.
        whole: whether `reports` has all splits of the data set. Only then is it a problem if no image has a label.
    """
    doubts = Doubts()
    lists_classes = place is not None and (isinstance(place.layout, Folder) or place.layout.lists_classes(place.root))
    if lists_classes and classes.names:
        _doubt_names(classes.names, doubts)
    _doubt_labels(reports, place, doubts, whole=whole)
    for report in reports.values():
        _doubt_palettes(report, doubts)
    remedy = "leave them out of the class list"
    if place is not None and not lists_classes:
        remedy = f"list the data's own classes in {place.root / CLASSES_FILE}"
    counted = lists_classes and place is not None and not says_numbers(place.root)
    _doubt_shares(reports, classes, doubts, f"{FROM_ONE}, or {remedy}" if counted else remedy)
    _doubt_mixed_masks(reports, classes, doubts)
    if counted and classes.names and not doubts.problems + doubts.warnings:
        _note_zero(reports, classes, doubts)
    return doubts


def _note_zero(reports: Mapping[str, SplitReport], classes: ClassList, doubts: Doubts) -> None:
    """Note that 0 may mean unlabelled, if labels have no void and never the last class."""
    if classes.names[0].lower() in BACKGROUND or any(report.void_pixels for report in reports.values()):
        return
    if all(sum(pixels) for pixels in zip(*(report.class_pixels for report in reports.values()), strict=True)):
        doubts.warnings.append(f"0 is {classes.names[0]!r} in these labels, and no pixel is void: {FROM_ONE}")


def _doubt_mixed_masks(reports: Mapping[str, SplitReport], classes: ClassList, doubts: Doubts) -> None:
    """Warn about masks of two classes that use 0 and 255 in some files, 0 and 1 in others."""
    if len(classes) != 2:
        return
    kinds = [(f"{report.split}/{sample}", ids) for report in reports.values() for sample, ids in report.ids.items()]
    masks_of_1 = [ids for _, ids in kinds if 1 in ids]
    masks_of_255 = [name for name, ids in kinds if ids == (0, IGNORE_INDEX)]
    if masks_of_1 and masks_of_255 and not any(IGNORE_INDEX in ids for ids in masks_of_1):
        doubts.problems.append(
            f"{len(masks_of_255)} labels hold 0 and 255 alone, {len(masks_of_1)} hold 1 and no 255: "
            f"{describe_some(masks_of_255)}; 255 is void, so {classes.names[1]!r} is lost where it means that "
            "class: kdcache data convert SRC DST --binary writes 0 and 1"
        )


def wrong_palette(path: Path, classes: ClassList, label_map: Pixels | None) -> str:
    """Describe how the palette colours of a label file contradict its indices, or return ''.

    For example, "index 3 has the colour of 'road'", although index 3 means another class. A file without a palette
    gives ''.

    Args:
        path: the label file.
        classes: names and colours of the classes.
        label_map: uint8 (256,), the class id of each index, or None if indices are class ids.
    """
    palette = label_palette(path)
    if palette is None:
        return ""
    names, colours = classes.names, classes.colours
    class_of = np.arange(256) if label_map is None else label_map
    used = [int(i) for i in np.unique(read_label(path)) if i != IGNORE_INDEX and i < len(palette)]
    class_of_colour = {colour: number for number, colour in enumerate(colours)}
    if colours != default_colours(len(colours)):
        matches = [(i, class_of_colour[palette[i]]) for i in used if palette[i] in class_of_colour]
        wrong = [(i, names[number]) for i, number in matches if class_of[i] != number]
        if 2 * len(wrong) > len(matches):  # two classes may share a colour, or a class and something void
            return ", ".join(f"index {i} has the colour of {name!r}" for i, name in wrong[:3])
    greys = {i: palette[i][0] for i in used if len(set(palette[i])) == 1}
    ids, numbers = set(greys.values()), np.flatnonzero((class_of < len(names)) | (class_of == IGNORE_INDEX)).tolist()
    if names == CITYSCAPES.names:  # the greys may be labelIds, although the files are to hold train ids
        numbers += range(MOST_LABEL_ID + 1)
    if len(greys) == len(used) and ids <= set(numbers) and not ids <= {0, IGNORE_INDEX}:
        moved = [f"index {i} is grey {grey}" for i, grey in greys.items() if grey != i]
        return ", ".join(moved[:3])
    return ""


def _doubt_names(names: Sequence[str], doubts: Doubts) -> None:
    """Warn about headers, numbers and commas in class names, and about void as a class."""
    header = re.findall(r"[^\s,;|]+", names[0].lower())
    if _HEADS & set(header) and set(header) <= _HEADS | _HEADS_BESIDE:
        doubts.problems.append(
            f"the first line of {CLASSES_FILE} is a header ({names[0]!r}), which makes it class 0 and moves "
            f"{len(names) - 1} classes by one: remove that line"
        )
        names = names[1:]
    leading, trailing = ([name for name in names if pattern.fullmatch(name)] for pattern in (_LEADING, _TRAILING))
    if len(leading) == len(names) - 1 > 1:
        bare = next(name for name in names if name not in leading)
        doubts.warnings.append(
            f"all class names but {bare!r} begin with a number (such as {leading[0]!r}), which is a part of the name: "
            "where it is the number in the labels, write one in front of every class"
        )
    elif len(trailing) == len(names) > 1:
        doubts.warnings.append(
            f"all {len(names)} class names end with a number (such as {trailing[0]!r}): where that is the number in "
            "the labels, write a colon in front of it (`name: 0`)"
        )
    elif len(names) > 1 and sum("," in name or ";" in name for name in names) == len(names):
        doubts.warnings.append(
            f"all {len(names)} class names have commas in them (such as {names[0]!r}): a line is a name, then `r g b` "
            "or `#rrggbb`, with spaces between"
        )
    void = [f"class {number} is called {name!r}" for number, name in enumerate(names) if name.lower() in VOID_NAMES]
    if void:
        doubts.warnings.append(
            f"{void[0]} and counts like any other class: where it means no class, write `void: NUMBER` in its place, "
            "with its number in the labels"
        )


def _doubt_labels(reports: Mapping[str, SplitReport], place: LayoutRoot | None, doubts: Doubts, *, whole: bool) -> None:
    """Warn about splits to train on without labels, and about labels in other folders."""
    total = sum(report.images for report in reports.values())
    for name, report in reports.items():
        doubts.warnings += report.depth.warnings(name)
        if report.labelled or report.depth.labelled:
            continue
        misplaced = "" if place is None else _labels_elsewhere(place, name)
        if misplaced:
            doubts.problems.append(misplaced)
        elif name == "train" and any(sibling.labelled or sibling.depth.labelled for sibling in reports.values()):
            doubts.problems.append(
                f"{name}: none of {report.images} images has a label: a training on labels learns nothing; add labels, "
                "or train from a cache of a teacher's targets"
            )
    if (
        whole
        and (place is None or place.layout.has_labels)
        and total
        and not doubts.problems
        and not any(report.labelled or report.depth.labelled for report in reports.values())
    ):
        doubts.problems.append(
            f"none of {total} images has a label: a training on labels learns nothing; add labels, or train from a "
            "cache of a teacher's targets"
        )
    if place is not None and isinstance(place.layout, Folder) and folders_in(images := place.root / IMAGES):
        loose = sum(is_picture(path.name) for path in images.iterdir())
        if loose:
            doubts.warnings.append(
                f"{loose} pictures right in {IMAGES}/ belong to no split, for there are folders too: move them into "
                f"{IMAGES}/{next(iter(reports))}/, or away"
            )


def _labels_elsewhere(layout_root: LayoutRoot, split: str) -> str:
    """Return a problem about labels in a folder next to `images/` that the folder layout does not read, or ''."""
    layout, root, _ = layout_root
    if not isinstance(layout, Folder):
        return ""
    scan = layout.scan(root, split)
    for sibling in folders_in(root):
        if sibling in (IMAGES, LABELS, DEPTHS):
            continue
        for place in (f"{sibling}/{split}", sibling):
            pairs = len(scan_folders(root, scan.image_place, place, scan.label_ids).labels)
            if pairs:
                return (
                    f"{split}: none of {len(scan.images)} images has a label in {scan.label_place}/, but {pairs} have "
                    f"one in {place}/: move that to {scan.label_place}/"
                )
    return ""


def _doubt_palettes(report: SplitReport, doubts: Doubts) -> None:
    if not report.palettes:
        return
    sample, why = next(iter(report.palettes.items()))
    doubts.problems.append(
        f"{report.split}: {len(report.palettes)} palette labels have colours that say other ids than their indices, "
        f"which count ({sample!r}: {why}): save the ids as 8-bit grey PNGs"
    )


def _doubt_shares(
    reports: Mapping[str, SplitReport], classes: ClassList, doubts: Doubts, remedy_for_unseen: str
) -> None:
    """Warn about empty labels, labels of one class or of few pixels, and classes in no label."""
    read = {name: report for name, report in reports.items() if sum(report.class_pixels) + report.void_pixels}
    classes_in = {name: {i for i, count in enumerate(report.class_pixels) if count} for name, report in read.items()}
    for name, report in read.items():
        void = report.shares()[1]
        if len(classes_in[name]) == 1 and (
            name == "train" or not any(len(present) > 1 for present in classes_in.values())
        ):
            doubts.problems.append(_one_class(report, next(iter(classes_in[name])), classes))
        elif not classes_in[name]:
            doubts.problems.append(
                f"{name}: all pixels of {report.labelled} labels are void: there is nothing to learn; compare the "
                "numbers in the labels with those of the layout"
            )
        elif void > MOST_VOID:
            doubts.warnings.append(
                f"{name}: {100 * void:.1f} % of the labelled pixels are void: compare the numbers in the labels with "
                "those of the layout"
            )
    _doubt_mapped_twice(read, classes, doubts)
    if not doubts.problems:
        _doubt_unseen(classes_in, classes, doubts, remedy_for_unseen)


def _doubt_mapped_twice(reports: Mapping[str, SplitReport], classes: ClassList, doubts: Doubts) -> None:
    """Warn about street labels mapped twice from labelIds to train ids, which leaves the first classes only."""
    if classes.names != CITYSCAPES.names or not reports:
        return
    class_of = to_classes(MOST_LABEL_ID)
    left = {class_of[number] for number in range(len(classes))}
    pixels = np.sum([report.class_pixels for report in reports.values()], 0)
    void = sum(report.void_pixels for report in reports.values())
    share = void / max(1, void + int(pixels.sum()))
    if share >= MAPPED_TWICE_VOID and set(np.flatnonzero(pixels).tolist()) <= left:
        doubts.problems.append(
            f"the labels look mapped to train ids twice: {100 * share:.1f} % of their pixels are void, and none is "
            "vegetation, sky or a car, but road is left where a traffic sign was, building where a person was: make "
            "them again from the labelIds, mapped once"
        )


def _one_class(report: SplitReport, number: int, classes: ClassList) -> str:
    finding = f"{report.split}: the labels ({report.labelled}) hold one class, {classes.names[number]!r} ({number})"
    if report.void_pixels and number == 0:
        share = 100 * report.shares()[1]
        return (
            f"{finding}, and {share:.1f} % void: where they are masks of 0 and 255, write 0 and 1, for 255 is void "
            "(data convert --binary does)"
        )
    return f"{finding}: there is nothing to tell apart. Write the other classes' ids into the labels"


def _doubt_unseen(classes_in: Mapping[str, Collection[int]], classes: ClassList, doubts: Doubts, remedy: str) -> None:
    everywhere = set().union(*classes_in.values())
    never = [name for number, name in enumerate(classes.names) if number not in everywhere]
    if classes_in and never:
        remedy = remedy if everywhere == set(range(len(everywhere))) else remedy.removeprefix(f"{FROM_ONE}, or ")
        doubts.warnings.append(
            f"{len(never)} of {len(classes)} classes are in no label: {describe_some(never)}; they score nothing, so "
            f"check their ids, or {remedy}"
        )
    if "train" in classes_in:
        not_in_train = [classes.names[number] for number in sorted(everywhere - set(classes_in["train"]))]
        if not_in_train:
            doubts.warnings.append(
                f"{len(not_in_train)} of {len(classes)} classes are in no label of train, but in another split: "
                f"{describe_some(not_in_train)}; they score 0 there, so move some of their images to train"
            )
