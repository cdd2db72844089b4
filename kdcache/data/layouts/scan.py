"""Finding the images and labels of a split, by folder or by list, before anything is refused."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from kdcache.data.files import IMAGE_SUFFIXES, LABEL_SUFFIXES, UNREAD_LABEL_SUFFIXES
from kdcache.data.layouts.depth import DEPTH_SUFFIXES, DepthReader, DepthScan
from kdcache.data.layouts.label_ids import LabelIds
from kdcache.data.sample import Pixels
from kdcache.errors import DataError

WHOLE = "train"
"""The only split of pictures that neither folders nor lists divide."""

Line = tuple[int, list[str]]
"""Number of a line, from 1, and its words."""


class DrawnLabels(Protocol):
    """Labels of segmentation that are drawn from annotations, by the samples' ids."""

    def label(self, sample: str) -> Pixels:
        """The label, uint8 (H, W). Raises: DataError for annotations that cannot be drawn."""

    def digest(self, sample: str) -> str:
        """SHA-256 of everything that the label is drawn from."""


@dataclass(frozen=True)
class Scan:
    """The files of a split on disk.

    Attributes:
        images: id -> path below the data set's folder, sorted by id.
        labels: id -> path, of ids that have an image.
        label_ids: what the numbers in the labels mean.
        image_place, label_place: the folders that were searched, below the data set's folder.
        orphans: labels that no image has, below `label_place`.
        foreign: pictures below `label_place` that are neither PNG nor TIFF; where there is no label, also other files.
        clashes: (id, first, second) of images with one id; the first is in `images`.
        missing: files that a list or their siblings call for and that are not there.
        depth: the files of depth; None where the layout or the split has none.
        drawn: labels that are drawn from the annotations in the files of `labels`; None where each file is a label.
        label_end: what the names of labels end with beside those of their images.
    """

    images: dict[str, str]
    labels: dict[str, str]
    label_ids: LabelIds
    image_place: str
    label_place: str
    orphans: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    clashes: list[tuple[str, str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    depth: DepthScan | None = None
    drawn: DrawnLabels | None = None
    label_end: str = ""


def scan_folders(
    root: Path,
    image_place: str,
    label_place: str,
    label_ids: LabelIds,
    *,
    image_begin: str = "",
    image_end: str = "",
    label_end: str = "",
    together: bool = False,
) -> Scan:
    """Pair the images below one folder with the labels below another, by their paths without suffix.

    Args:
        image_begin: what the names of images begin with.
        image_end, label_end: what the names of images and labels end with before the suffix; files whose names do
            not are no part of it. A label's path with `image_end` for `label_end` is the id of its image.
        together: both lie in one folder, in which files that end with `label_end` are labels.
    """
    scan = Scan({}, {}, label_ids, image_place, label_place, label_end=label_end)
    for sample, path in sorted(_files(root / image_place)):
        if not sample.endswith(image_end) or not sample.rpartition("/")[2].startswith(image_begin):
            continue
        if together and sample.endswith(label_end):
            continue
        if sample in scan.images:
            first = scan.images[sample].removeprefix(f"{image_place}/")
            scan.clashes.append((sample, first, path))
        scan.images.setdefault(sample, f"{image_place}/{path}")
    for name, path in sorted(_files(root / label_place)):
        if not name.endswith(label_end):
            continue
        sample = name.removesuffix(label_end) + image_end
        if not path.lower().endswith(LABEL_SUFFIXES):
            scan.foreign.append(path)
        elif sample not in scan.images or sample in scan.labels:
            scan.orphans.append(path)
        else:
            scan.labels[sample] = f"{label_place}/{path}"
    if not scan.labels and not together:
        scan.foreign.extend(path for _, path in sorted(_files(root / label_place, UNREAD_LABEL_SUFFIXES)))
    return scan


def scan_depth(
    scan: Scan,
    root: Path,
    place: str,
    read: DepthReader,
    *,
    depth_begin: str = "",
    depth_end: str = "",
    image_of: Callable[[str], str] | None = None,
) -> Scan:
    """The scan with the depth files below a folder, whose paths are those of their images, or made so by `image_of`.

    Args:
        place: the folder, below the data set's.
        read: from a file to metres.
        depth_begin, depth_end: what the names of depth files begin and end with before the suffix; others are none.
        image_of: the id of a depth file's image, from its own path without suffix.
    """
    files: dict[str, str] = {}
    orphans = []
    for name, path in sorted(_files(root / place, DEPTH_SUFFIXES)):
        if not name.endswith(depth_end) or not name.rpartition("/")[2].startswith(depth_begin):
            continue
        sample = name if image_of is None else image_of(name)
        if sample not in scan.images or sample in files:
            orphans.append(path)
        else:
            files[sample] = f"{place}/{path}"
    return replace(scan, depth=DepthScan(files, place, read, orphans))


def keep_listed(scan: Scan, root: Path, listing: str) -> Scan:
    """The samples of a scan that a list names, one a line: by id, by file name, or by a path (its label beside it).

    Where one listed sample has a label all must: the labels of the others are missing. A test list has none at all.

    Raises: DataError for a list that cannot be read.
    """
    lines: dict[str, int] = {}
    clashes = []
    for number, words in read_list(root / listing):
        sample = _listed_id(words[0])
        if sample in lines:
            clashes.append((sample, f"line {lines[sample]}", f"line {number} of {listing}"))
        lines.setdefault(sample, number)
    images = {sample: scan.images[sample] for sample in sorted(lines) if sample in scan.images}
    labels = {sample: scan.labels[sample] for sample in images if sample in scan.labels}
    missing = [f"{scan.image_place}/{sample}" for sample in sorted(lines.keys() - images.keys())]
    if labels:
        missing += [f"{scan.label_place}/{sample}{LABEL_SUFFIXES[0]}" for sample in images if sample not in labels]
    clashes += [clash for clash in scan.clashes if clash[0] in lines]
    return replace(scan, images=images, labels=labels, orphans=[], foreign=[], clashes=clashes, missing=missing)


def scan_whole(root: Path, split: str, images: str, labels: str, label_ids: LabelIds, lists: Sequence[str]) -> Scan:
    """Pictures right in one folder: those that a split's list names, or all of them where `root` has no list."""
    everything = scan_folders(root, images, labels, label_ids)
    return keep_listed(everything, root, f"{split}.txt") if lists_in(root, lists) else everything


def replace_images(scan: Scan, folder: Path, split: str) -> Scan:
    """The scan with its images from another folder, by the ids of the samples: FOLDER/SPLIT/ID.png, or FOLDER/ID.png.

    A sample without an image there is missing; other pictures are no part of it.

    Args:
        folder: where FOLDER/SPLIT is a folder, images are looked for in that alone.
    """
    top = folder.absolute()
    top = top / split if (top / split).is_dir() else top
    images: dict[str, str] = {}
    clashes = []
    for sample, path in sorted(_files(top)):
        if sample in images:
            clashes.append((sample, images[sample], path))
        elif sample in scan.images:
            images[sample] = (top / path).as_posix()
    missing = [(top / f"{sample}.png").as_posix() for sample in scan.images if sample not in images]
    images = {sample: images[sample] for sample in scan.images if sample in images}
    return replace(
        scan, images=images, image_place=top.as_posix(), clashes=scan.clashes + clashes, missing=scan.missing + missing
    )


def read_list(path: Path) -> list[Line]:
    """Lines of a list that are not blank, as words. Raises: DataError for a file that is no text in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read the list {path}: {error}", fix="Restore it from its source, as text in UTF-8."
        ) from error
    return [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def lists_in(folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """Names of the lists (`<name>.txt`) in a folder, sorted; only those in `names` unless it is None."""
    if not folder.is_dir():
        return []
    lists = (path.stem for path in folder.iterdir() if path.suffix == ".txt" and not path.name.startswith("."))
    return sorted(name for name in lists if names is None or name in names)


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # one call for 25,000 pictures, without a stat of each
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def holds_pictures(folder: Path) -> bool:
    """Whether a picture lies in the folder itself; reads no further than the first."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) and entry.is_file() for entry in entries)


def pictures_in(folder: Path) -> dict[str, str]:
    """Names of the pictures right in a folder, by their names without suffix, sorted; none without such a folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_picture(entry.name))
    return {name[: name.rindex(".")]: name for name in names}


def names_below(folder: Path) -> dict[str, str]:
    """Paths of the pictures below a folder, through links, by these without suffix; none without such a folder."""
    return dict(_files(folder))


def walk_once(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what `os.walk` yields, through links, each folder once. The caller may sort or shorten the folders."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield folder, folders, names


def is_picture(name: str) -> bool:
    """Whether a suffix is a picture's. Hidden files are never data: macOS leaves `._a.jpg` beside `a.jpg`."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _listed_id(word: str) -> str:
    """`a`, `a.png` and `/images/a.png` are all `a`; a name of another kind keeps its dots."""
    name = word.replace("\\", "/").rpartition("/")[2]
    return composed(name[: name.rindex(".")] if is_picture(name) else name)


def composed(name: str) -> str:
    """A name in Unicode's normal form C: macOS writes é as two characters where others write one."""
    return unicodedata.normalize("NFC", name)


def _files(top: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Iterator[tuple[str, str]]:
    """(composed id, posix path) below `top`, through links (data sets are often linked together), each folder once."""
    for folder, folders, names in walk_once(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                path = (Path(folder) / name).relative_to(top).as_posix()
                yield composed(path[: path.rindex(".")]), path
