"""Find the images and labels of a split, by folder or by list, before any check."""

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
    """Segmentation labels that are drawn from annotations, by the samples' ids."""

    def label(self, sample: str) -> Pixels:
        """Return the label, uint8 (H, W). Raises: DataError for annotations that cannot be drawn."""

    def digest(self, sample: str) -> str:
        """Return the SHA-256 of everything that the label is drawn from."""


@dataclass(frozen=True)
class Scan:
    """The files of a split on disk.

    Attributes:
        images: id -> path below the data set's folder, sorted by id.
        labels: id -> path, of ids that have an image.
        label_ids: what the numbers in the labels mean.
        image_place, label_place: the folders that were searched, below the data set's folder.
        orphans: labels without an image, below `label_place`.
        foreign: pictures below `label_place` that are neither PNG nor TIFF. Without any label, also other files.
        clashes: (id, first, second) of images with one id. The first is in `images`.
        missing: missing files that a list names, or that belong to existing ones.
        depth: the depth files, or None if the layout or the split has none.
        drawn: labels that are drawn from the annotation files of `labels`, or None if each file is a label.
        label_end: what the names of labels end with in addition to their images' names.
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

    `image_begin`, `image_end` and `label_end` are the beginning and the endings of names before the suffix. Other files
    are ignored. An image's id is its label's path with `image_end` instead of `label_end`. With `together` both lie in
    one folder, in which files that end with `label_end` are labels.
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
    """Add the depth files below the folder `place` to a scan, paired by path, or by `image_of`.

    `read` converts a file to metres. `depth_begin` and `depth_end` are the beginning and ending of names before the
    suffix. Other files are ignored. `image_of` returns the id of the image for a depth file's path without suffix.
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
    """Keep the samples of a scan that a list names, one a line: by id, file name, or path (and its label's path).

    If one listed sample has a label, the other samples' labels count as missing. A test list has no labels at all.

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
    """Return pictures directly in one folder: those that a split's list names, or all if `root` has no list."""
    everything = scan_folders(root, images, labels, label_ids)
    return keep_listed(everything, root, f"{split}.txt") if lists_in(root, lists) else everything


def replace_images(scan: Scan, folder: Path, split: str) -> Scan:
    """Take the images of a scan from another folder, by sample id: FOLDER/SPLIT/ID.png, or FOLDER/ID.png.

    A sample without an image there is missing. Other pictures are ignored. If FOLDER/SPLIT is a folder, only it is
    searched.
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
    """Return the non-blank lines of a list, as words. Raises: DataError for a file that is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read the list {path}: {error}", fix="Restore it from its source, as text in UTF-8."
        ) from error
    return [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def lists_in(folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """Return the sorted names of the lists (`<name>.txt`) in a folder, or only those in `names`."""
    if not folder.is_dir():
        return []
    lists = (path.stem for path in folder.iterdir() if path.suffix == ".txt" and not path.name.startswith("."))
    return sorted(name for name in lists if names is None or name in names)


def folders_in(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, or [] if it does not exist."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # one call for 25,000 pictures, without a stat of each
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def holds_pictures(folder: Path) -> bool:
    """Return whether a picture lies directly in the folder. Stops at the first one."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) and entry.is_file() for entry in entries)


def pictures_in(folder: Path) -> dict[str, str]:
    """Return the pictures directly in a folder by name without suffix, sorted, or {} if it does not exist."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_picture(entry.name))
    return {name[: name.rindex(".")]: name for name in names}


def names_below(folder: Path) -> dict[str, str]:
    """Return the pictures below a folder, through links, by path without suffix, or {} if it does not exist."""
    return dict(_files(folder))


def walk_once(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what `os.walk` yields through links, but each folder once. The caller may sort or shorten the folders."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield folder, folders, names


def is_picture(name: str) -> bool:
    """Return whether a suffix is a picture's. Hidden files never count: macOS leaves `._a.jpg` next to `a.jpg`."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _listed_id(word: str) -> str:
    """Return the id of `a`, `a.png` or `/images/a.png`, which is `a`. Other kinds of names keep their dots."""
    name = word.replace("\\", "/").rpartition("/")[2]
    return composed(name[: name.rindex(".")] if is_picture(name) else name)


def composed(name: str) -> str:
    """Return a name in Unicode's normal form C, because macOS writes é as two characters."""
    return unicodedata.normalize("NFC", name)


def _files(top: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Iterator[tuple[str, str]]:
    """Yield (composed id, posix path) below `top`, through links but each folder once."""
    for folder, folders, names in walk_once(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(folder).relative_to(top)
        begin = "" if below == Path() else f"{below.as_posix()}/"
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield composed(begin + name[: name.rindex(".")]), begin + name
