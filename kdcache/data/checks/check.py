"""`check`: read a whole data set once and report everything that would fail, or go unnoticed, later.

Opening a split fails at the first defect. A check collects all of them. Its pixel counts also give the class weights.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdcache.data.checks.depth_report import DepthCounts
from kdcache.data.checks.split_report import SplitReport
from kdcache.data.checks.warnings import doubts_of, wrong_palette
from kdcache.data.classes import read_numbers
from kdcache.data.concat import parts_of, task_of
from kdcache.data.files import label_kind
from kdcache.data.layout import list_splits, open_split
from kdcache.data.layouts.converted import source_changes
from kdcache.data.layouts.file_split import describe_sizes, describe_some, file_split
from kdcache.data.layouts.registry import LayoutRoot, find_layout
from kdcache.data.prefetch import prefetch
from kdcache.data.rendering.view import pixel_checksum
from kdcache.data.sample import ClassList, Split, ids_out_of_range
from kdcache.data.scenes.generate import is_scenes
from kdcache.errors import DataError, RecipeError
from kdcache.tasks import DEPTH, IGNORE_INDEX, SEGMENTATION

WeightKind = Literal["none", "median", "sqrt"]
Progress = Callable[[str, int, int], None]


@dataclass
class CheckReport:
    """The result of checking a data set.

    Attributes:
        data: the data set as the user named it.
        layout: the layout's name, or "scenes" for the built-in data set.
        folder: the data set's top folder, which may be below the named one. Empty for scenes.
        classes: names and colours of the classes.
        splits: split name -> its report.
        problems: sentences about defects that must be fixed before training. Empty without defects.
        warnings: sentences about things that are valid, but rarely intended.
        why: what identified the layout, and where its classes come from, in words.
        numbers: number in the labels -> class id or 255 (void), from `classes.txt`. Empty if the numbers are class ids.
    """

    data: str
    layout: str
    folder: str
    classes: ClassList
    splits: dict[str, SplitReport]
    problems: list[str]
    warnings: list[str] = field(default_factory=list)
    why: str = ""
    numbers: dict[int, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a dict of JSON values.

        Each split also has the share of pixels of each class and of void.
        """
        splits = {}
        for name, report in self.splits.items():
            class_shares, void_share = report.shares()
            splits[name] = asdict(report) | {"class_shares": class_shares, "void_share": void_share}
            del splits[name]["ids"]
        return {
            "data": self.data,
            "layout": self.layout,
            "why": self.why,
            "classes": self.classes.to_json(),
            "splits": splits,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


@dataclass
class _Reading:
    """The size, label kind, pixel counts and defects of one sample, read by one thread.

    `defects` maps a field of `SplitReport` to the defect. `depth` has the counts, or why the label's size does not fit.
    """

    size: tuple[int, int] | None = None
    kind: str | None = None
    counts: npt.NDArray[np.int64] | int = 0
    digests: tuple[str | None, ...] | None = None
    pixels: int | None = None
    depth: DepthCounts | str | None = None
    defects: dict[str, Any] = field(default_factory=dict)


def check(
    data: str | os.PathLike[str],
    splits: Sequence[str] | None = None,
    *,
    max_depth: float | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> CheckReport:
    """Read a whole data set and report its defects.

    Args:
        data: folder or spec of the data set.
        splits: names of the splits to check. None checks all.
        max_depth: the largest possible depth in metres, above 0. None allows any depth.
        progress: called after every sample with (split name, samples done, samples in the split).
        threads: the number of threads that read files. None means one per core, at most 8.

    Raises:
        DataError: the folder or a split does not exist, or there are no images or no class list.
        RecipeError: `max_depth` is not above 0.
    """
    if max_depth is not None and not max_depth > 0:
        raise RecipeError(
            f"Invalid value of --max-depth: {max_depth:g}", fix="Give metres above 0, for example --max-depth 80"
        )
    data = os.fspath(data)
    if len(parts_of(data)) > 1 or task_of(data)[0] is not None:
        raise DataError(
            f"Cannot check several data sets, or a part of one: {data!r}",
            fix="Check " + ", then ".join(task_of(part)[1] for part in parts_of(data)) + ".",
        )
    layout_root = None if is_scenes(data) else find_layout(data)
    threads = min(os.cpu_count() or 1, 8) if threads is None else threads
    reports: dict[str, SplitReport] = {}
    where: dict[int, list[str]] = {}
    classes: ClassList | None = None
    mapped = False
    for name in splits if splits is not None else list_splits(data, exports=True):
        split, report = _open(data, name, layout_root)
        report.depth.max_depth = max_depth
        classes, mapped = split.classes, mapped or split.label_map is not None
        for sample, pixels in _read_split(split, report, progress, threads):
            where.setdefault(pixels, []).append(f"{name}/{sample}")
        reports[name] = report
    if classes is None:
        raise DataError(f"No split to check in {data}", fix="Name a split, or add data.")
    problems = [problem for report in reports.values() for problem in report.problems()]
    place, why, numbers = ("scenes", ""), "drawn, no files", None
    if layout_root is not None:
        layout, root, _ = layout_root
        place, why, numbers = (layout.name, str(root)), layout.why(root), read_numbers(root) if mapped else None
    doubts = doubts_of(reports, classes, layout_root, whole=splits is None)
    problems += [*_repeats(where, layout_root), *doubts.problems]
    warnings = _twins(where) + doubts.warnings
    if layout_root is not None:
        warnings += filter(None, (source_changes(layout_root.root, name) for name in reports))
    return CheckReport(data, *place, classes, reports, problems, warnings, why, numbers or {})


def class_weights(counts: Sequence[int] | npt.NDArray[np.integer[Any]], kind: WeightKind) -> npt.NDArray[np.float64]:
    """Return a weight for each class in the cross-entropy, float64 (C,), from the classes' pixel counts.

    The weights' mean over all pixels is 1, so the loss keeps its scale. A class without pixels gets 1.

    Args:
        counts: number of pixels of each class, without void, such as `SplitReport.class_pixels`.
        kind: "none" makes all weights 1. "median" divides the median frequency by the class's frequency (Eigen and
            Fergus 2015, with frequencies over the whole split). "sqrt" takes the square root of that, which is milder.

    Raises: ValueError for another kind, or negative counts.
    """
    pixels = np.asarray(counts, np.float64)
    if kind not in ("none", "median", "sqrt") or pixels.ndim != 1 or (pixels < 0).any():
        raise ValueError(f"class_weights takes counts >= 0 and none, median or sqrt; got {kind!r}, {counts}")
    weights = np.ones_like(pixels)
    present = pixels > 0
    if kind == "none" or not present.any():
        return weights
    frequency = pixels[present] / pixels.sum()
    raw = np.median(frequency) / frequency
    raw = np.sqrt(raw) if kind == "sqrt" else raw
    weights[present] = raw / (raw * frequency).sum()
    return weights


def _open(data: str, name: str, layout_root: LayoutRoot | None) -> tuple[Split, SplitReport]:
    """Return the split, opened despite defects in its file names, and its report with these defects."""
    report = SplitReport(name)
    if layout_root is None:
        split = open_split(data, name)
    else:
        layout, root, images = layout_root
        scan = layout.scan(root, name, images)
        split = file_split(data, name, layout.classes(root), root, scan)
        report.clashes = [path for _, _, path in scan.clashes]
        report.without_image = scan.orphans + scan.foreign
        report.depth.without_image = [] if scan.depth is None else scan.depth.orphans
        report.missing = scan.missing
    report.images = len(split)
    report.without_label = [sample for i, sample in enumerate(split.ids) if not split.has_label(i)]
    report.labelled = len(split) - len(report.without_label)
    report.depth.labelled = len(split.labelled(DEPTH))
    report.class_pixels = [0] * len(split.classes)
    return split, report


def _read_split(split: Split, report: SplitReport, progress: Progress | None, threads: int) -> list[tuple[str, int]]:
    """Read all samples of a split into its report.

    Return (sample id, checksum of its pixels) for each readable image.
    """
    counts = np.zeros(256, np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    kinds: Counter[str] = Counter()
    total = hashlib.sha256(split.digest().encode("ascii"))
    images, digested = [], 0
    read = partial(_read, split, max_depth=report.depth.max_depth)
    readings = prefetch(read, range(len(split)), threads=threads, ahead=2 * threads + 1)
    for index, (sample, reading) in enumerate(zip(split.ids, readings, strict=True)):
        if reading.size is not None:
            sizes[reading.size] += 1
        if reading.kind is not None:
            kinds[reading.kind] += 1
        counts += reading.counts
        if len(split.classes) == 2 and not isinstance(reading.counts, int):
            report.ids[sample] = tuple(np.flatnonzero(reading.counts).tolist())
        for table, defect in reading.defects.items():
            if defect:
                getattr(report, table)[sample] = defect
        if isinstance(reading.depth, DepthCounts):
            report.depth.add(sample, reading.depth)
        elif reading.depth is not None:
            report.depth.mismatched[sample] = reading.depth
        if reading.digests is not None:
            total.update(repr(reading.digests).encode("ascii"))
            digested += 1
        if reading.pixels is not None:
            images.append((sample, reading.pixels))
        if progress is not None:
            progress(split.split, index + 1, len(split))
    report.class_pixels = counts[: len(split.classes)].tolist()
    report.void_pixels = int(counts[IGNORE_INDEX])
    report.sizes = {f"{h}x{w}": count for (h, w), count in sorted(sizes.items())}
    report.label_kinds = dict(kinds.most_common())
    report.digest = total.hexdigest() if digested == len(split) else None
    return images


def _read(split: Split, index: int, *, max_depth: float | None) -> _Reading:
    reading = _Reading()
    try:
        reading.digests = split.content_digests(index)
        image = split.image(index)
        reading.size = (image.shape[0], image.shape[1])
        reading.pixels = pixel_checksum(image)
        label = split.raw_label(index)
        source = split.samples[index].labels.get(SEGMENTATION)
        path = None if source is None else source.path
        if path is not None:
            reading.kind = label_kind(path)
        if label is not None and label.shape != reading.size:
            reading.defects["mismatched"] = describe_sizes(label.shape, reading.size)
        elif label is not None:
            reading.counts = np.bincount(label.reshape(-1), minlength=256).astype(np.int64)
            strays = ids_out_of_range(label, len(split.classes))
            reading.defects["out_of_range"] = {str(number): count for number, count in strays.items()}
            if path is not None:
                reading.defects["palettes"] = wrong_palette(path, split.classes, split.label_map)
        depth = split.raw_label(index, DEPTH)
        if depth is not None:
            fits = depth.shape == reading.size
            reading.depth = DepthCounts.of(depth, max_depth) if fits else describe_sizes(depth.shape, reading.size)
    except DataError as error:
        reading.defects["unreadable"] = f"{error.problem}. {error.fix}"
    return reading


def _twins(where: dict[int, list[str]]) -> list[str]:
    """Return a warning about images that are in one split under two ids, or []. Two folds may then share them."""
    pairs = [
        " = ".join(twins)
        for places in where.values()
        for _, group in itertools.groupby(places, lambda place: place.partition("/")[0])
        if len(twins := list(group)) > 1
    ]
    if not pairs:
        return []
    return [f"{len(pairs)} images are in a split more than once: {describe_some(pairs)}; remove all but one of each"]


def _repeats(where: dict[int, list[str]], place: LayoutRoot | None) -> list[str]:
    """Return a problem about equal images in two splits that should not share any, or []. They falsify every score."""
    across = [places for places in where.values() if _falsify({name.partition("/")[0] for name in places}, place)]
    examples = describe_some([" = ".join(places) for places in across])
    return [f"{len(across)} images are in more than one split: {examples}; take them out of one"] if across else []


def _falsify(splits: set[str], place: LayoutRoot | None) -> bool:
    return any(place is None or not place.layout.may_share(*pair) for pair in itertools.combinations(splits, 2))
