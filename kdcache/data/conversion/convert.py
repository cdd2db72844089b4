"""Convert any data set, also exports of labelling tools, to a folder: `images/SPLIT`, `labels/SPLIT`, `classes.txt`.

    OUT/images/<split>/<id>.jpg     links to the source's images
    OUT/labels/<split>/<id>.png     links if the numbers are class ids already, else drawn, mapped or decoded
    OUT/depth/<split>/...           in the same way
    OUT/classes.txt                 the source's names and colours
    OUT/converted/<split>.csv       what was left out, and why
    OUT/converted.json              the command, and a digest of every image and label that it read. Existing files are
                                    kept only if these are equal. Paths are relative to OUT

A sample that no training could use is left out and listed: an image or a label that cannot be read, a label of another
size or with ids without a class.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from kdcache.data.changes import changed_data, digest_changes
from kdcache.data.concat import parts_of, task_of
from kdcache.data.contents import Contents, read_contents
from kdcache.data.conversion.folder_writer import FolderWriter, Link, link_file, save_png
from kdcache.data.files import channel_bits, read_image
from kdcache.data.layout import list_splits, open_split
from kdcache.data.layouts.base import VALIDATION
from kdcache.data.layouts.converted import SETTINGS, open_defective
from kdcache.data.layouts.file_split import describe_sizes
from kdcache.data.layouts.registry import LayoutRoot, find_layout, split_images, split_prefix
from kdcache.data.prefetch import prefetch
from kdcache.data.sample import Pixels, Split, ids_out_of_range
from kdcache.data.scenes.generate import is_scenes
from kdcache.errors import DataError, RecipeError
from kdcache.files import check_own_folder, read_object, write_whole
from kdcache.tasks import IGNORE_INDEX

REPORTS = "converted"
USUAL = ("train", *VALIDATION, "test")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ConvertedSplit:
    """The result of converting one split.

    Attributes:
        written: the number of images written now.
        kept: the number of images that an earlier, interrupted conversion had written.
        links: "hard link", "link" (symbolic) or "copy" -> number of the images written now.
        labels: "hard link", "link", "copy" or "file" -> number of the labels written now. "file" means that the label
            was drawn, mapped or decoded.
        dropped: sample id or file -> why it was left out.
        one_class: the only class's name if the labels written now have just one class and void, else None.
    """

    written: int
    kept: int
    links: Mapping[str, int]
    labels: Mapping[str, int]
    dropped: Mapping[str, str]
    one_class: str | None = None


@dataclass(frozen=True)
class _Written:
    """How a sample was written.

    Attributes:
        image: "hard link", "link" or "copy".
        label: the same, or "file" for a new file. None if no label was written.
        ids: the class ids in the label.
    """

    image: Link
    label: str | None
    ids: frozenset[int]


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        layout: the name of the source's layout.
        why: what identified the layout, in words.
        splits: split name -> its result.
        unused: names of splits that were not converted.
    """

    layout: str
    why: str
    splits: Mapping[str, ConvertedSplit]
    unused: tuple[str, ...] = ()


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    binary: bool = False,
    bits: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write a data set into a folder with images/SPLIT/, labels/SPLIT/ and classes.txt.

    After an interruption, the same call continues. Samples that no training can use are left out and reported.

    Args:
        source: folder or spec of one data set.
        out: a new folder, or a folder into which the same data were converted.
        splits: names of the splits to convert. None takes train, val and test, or all splits if none of these exists.
        binary: whether labels are masks of two classes: 0 is the first class, and every other number (even 255) is the
            second.
        bits: the number of significant bits, 9 to 16, in images with 16 bits per channel. They become PNGs with 8 bits.
            None leaves such images out.
        threads: the number of threads. None means one per core, at most 8.
        progress: called with (split name, samples done, samples in the split).

    Raises:
        DataError: data that cannot be opened, or without a usable sample.
        RecipeError: `out` holds something else, `binary` without exactly two classes, or invalid `bits`.
        MismatchError: the data have changed since `out` was begun.
    """
    data, folder = os.fspath(source), Path(out)
    if bits is not None and not 8 < bits <= 16:
        raise RecipeError(
            f"Invalid value of --bits: {bits}",
            fix="Give the bits in use of 16, from 9 to 16. Images of 8 bits need no --bits.",
        )
    _check_source(data, folder)
    place = None if is_scenes(data) else find_layout(data)
    names = list_splits(data, exports=True)
    selected = list(splits) if splits is not None else [name for name in names if name in USUAL] or names
    opened = [_open(data, name, place) for name in selected]
    classes = opened[0][0].classes
    if binary and len(classes) != 2:
        raise RecipeError(
            f"Cannot use --binary with {len(classes)} classes: {', '.join(classes.names[:4])}",
            fix="Write two names into classes.txt, the background first, or leave out --binary.",
        )
    layout, why = ("scenes", "drawn, no files") if place is None else (place.layout.name, place.layout.why(place.root))
    threads = min(os.cpu_count() or 1, 8) if threads is None else threads
    spec = data if place is None else _relative(place, folder)
    flags = [*(f"--split={name}" for name in splits or ()), *["--binary"][: int(binary)]]
    flags += [] if bits is None else [f"--bits={bits}"]
    _prepare(
        folder,
        {"layout": layout, "classes": classes.to_json(), "binary": binary, "bits": bits},
        {"command": shlex.join(["kdcache", "data", "convert", spec, ".", *flags]), "source": spec},
        [split for split, _ in opened],
        threads,
    )
    converted = {}
    for split, dropped in opened:
        converted[split.split] = _write_split(split, dropped, folder, binary, bits, threads, progress)
    unused = tuple(name for name in names if name not in converted)
    return Converted(layout, why, converted, unused)


def _check_source(data: str, folder: Path) -> None:
    if len(parts_of(data)) > 1 or task_of(data)[0] is not None:
        raise DataError(
            f"Cannot convert several data sets, or a part of one: {data!r}",
            fix="Convert each data set by itself, with all its labels.",
        )
    if not is_scenes(data) and split_prefix(split_images(data)[0])[1].resolve() == folder.resolve():
        raise DataError(f"Cannot convert {data} into itself", fix="Give another folder to write.")
    check_own_folder(folder, SETTINGS, "Give another folder, or remove what is in it")


def _open(data: str, name: str, place: LayoutRoot | None) -> tuple[Split, dict[str, str]]:
    return (open_split(data, name), {}) if place is None else open_defective(place, name)


def _prepare(folder: Path, settings: dict[str, Any], origin: dict[str, str], splits: list[Split], threads: int) -> None:
    """Begin the folder, or check that this conversion began it.

    `settings` must be equal to continue an interrupted conversion. `origin` has the source's location and the command,
    with paths relative to the folder.

    Raises: RecipeError for other settings. MismatchError for data that have changed since.
    """
    before = read_object(folder / SETTINGS)
    changed = [name for name, value in settings.items() if before and before.get(name) != value]
    if changed:
        raise RecipeError(
            f"Cannot convert into {folder}, which was converted with "
            + ", ".join(f"{name} {json.dumps(before.get(name))}" for name in changed),
            fix="Give another folder, or remove this one.",
        )
    recorded = dict(before.get("splits", {}))
    for split in splits:
        now = read_contents(split, threads=threads)
        if split.split in recorded:
            changes = digest_changes(Contents.from_json(recorded[split.split]), now)
            if changes:
                raise changed_data(folder, changes, split, "Convert into a new folder, or remove this one first.")
        recorded[split.split] = {"digest": now.digest} | now.to_json()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SETTINGS, json.dumps(settings | origin | {"splits": recorded}, indent=1) + "\n")


def _write_split(
    split: Split,
    dropped: dict[str, str],
    folder: Path,
    binary: bool,
    bits: int | None,
    threads: int,
    progress: Progress | None,
) -> ConvertedSplit:
    writer = FolderWriter(split, folder)
    writer.write_beginning()
    links: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    ids: set[int] = set()
    kept = 0
    results = prefetch(partial(_write, writer, binary, bits), range(len(split)), threads=threads, ahead=2 * threads + 1)
    for index, result in enumerate(results):
        if result == "kept":
            kept += 1
        elif isinstance(result, _Written):
            links[result.image] += 1
            labels.update([result.label] if result.label else [])
            ids |= result.ids
        else:
            dropped[split.ids[index]] = result
        if progress is not None:
            progress(split.split, index + 1, len(split))
    report = io.StringIO()
    csv.writer(report, lineterminator="\n").writerows([("left out", "why"), *sorted(dropped.items())])
    (folder / REPORTS).mkdir(exist_ok=True)
    write_whole(folder / REPORTS / f"{split.split}.csv", report.getvalue())
    written = links.total()
    if not written + kept:
        raise DataError(
            f"Cannot use any of {len(split)} samples in {split.data}, split {split.split!r}: "
            f"{next(iter(dropped.values()), 'no images')}",
            fix=f"See {folder / REPORTS / split.split}.csv for every sample, and kdcache data check for fixes.",
        )
    writer.publish()
    held = ids - {IGNORE_INDEX}
    only_class = split.classes.names[held.pop()] if len(held) == 1 and IGNORE_INDEX in ids else None
    return ConvertedSplit(written, kept, links, labels, dropped, only_class)


def _write(writer: FolderWriter, binary: bool, bits: int | None, index: int) -> _Written | str:
    """Write a sample, its image last. Return how it was written, "kept" if it exists, or why it is left out."""
    split = writer.source
    file = split.samples[index].image.path
    scaled = file is not None and bits is not None and channel_bits(file) > 8
    path = writer.image_file(index, ".png" if file is None or scaled else file.suffix)
    if path.exists():
        return "kept"
    if ".." in (parts := PurePosixPath(split.ids[index])).parts or parts.is_absolute():
        return "its name leads out of the folder"
    try:
        image = read_image(file, bits) if file is not None and scaled else split.image(index)
        label = split.raw_label(index)
        if label is not None:
            label = (label != 0).astype(np.uint8) if binary else label
            if why := _unusable(label, image, len(split.classes)):
                return why
        labelled = writer.write_label(index, label if binary else None)
        writer.write_depth(index)
    except DataError as error:
        return error.problem + (f". {error.fix}" if "--bits" in error.fix else "")
    ids = frozenset() if label is None else frozenset(np.unique(label).tolist())
    if file is None or scaled:
        save_png(image, path)
        return _Written("copy", labelled, ids)
    return _Written(link_file(file, path), labelled, ids)


def _unusable(label: Pixels, image: Pixels, classes: int) -> str:
    """Return in words why a label cannot be used, or ''."""
    if label.shape != image.shape[:2]:
        return f"the label has another size: {describe_sizes(label.shape, image.shape[:2])}"
    strays = ids_out_of_range(label, classes)
    return f"the label has ids of no class: {', '.join(map(str, strays))}" if strays else ""


def _relative(place: LayoutRoot, folder: Path) -> str:
    """Return the spec of a data set with paths relative to `folder`, so that no absolute path is stored."""

    def seen(path: Path) -> str:
        try:
            return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
        except ValueError:  # another drive of Windows
            return path.name

    images = "" if place.images is None else f",images={seen(place.images)}"
    return f"{place.layout.name}:{seen(place.root)}{images}"
