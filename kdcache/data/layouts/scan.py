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
    """The interface of objects that draw segmentation labels from annotations.

    In its methods, `sample` is a sample's id.
    """

    def label(self, sample: str) -> Pixels:
        """Return a sample's label, uint8 (H, W). Raises: DataError for annotations that cannot be drawn."""

    def digest(self, sample: str) -> str:
        """Return the SHA-256 (hex) of the annotations and class ids that a sample's label is drawn from."""


@dataclass(frozen=True)
class Scan:
    """The files of a split on disk.

    Attributes:
        images: sample id -> image path below the data set's folder, sorted by id.
        labels: sample id -> label path below the data set's folder, for samples that have an image.
        label_ids: how to map the numbers in labels to class ids.
        image_place: the folder that was searched for images, below the data set's folder.
        label_place: the folder that was searched for labels, below the data set's folder.
        orphans: labels without an image, below `label_place`, and further labels of an image that has one.
        foreign: pictures below `label_place` that are neither PNG nor TIFF. If no label was found, also files such as
            .npy that may be labels.
        clashes: (id, first file, second file) of images with the same id. The first one is in `images`.
        missing: files that do not exist, although a list or another file of the sample needs them.
        depth: the depth files, or None if there are none.
        drawn: draws the labels from annotation files, which are the paths in `labels`. None if each file is a label.
        label_end: the ending that label names have in addition to the image names, such as "_mask".
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
    """Find the images below one folder, and their labels below another.

    An image's id is its path below its folder, without suffix. Its label has the same path, but ends with `label_end`
    instead of `image_end`. Files without the required beginning or ending are ignored.

    Args:
        root: the data set's folder.
        image_place: the folder of images, below `root`.
        label_place: the folder of labels, below `root`.
        label_ids: how to map the numbers in labels to class ids.
        image_begin: the beginning of image names.
        image_end: the ending of image names, before the suffix.
        label_end: the ending of label names, before the suffix.
        together: whether images and labels lie in the same folder. Then files that end with `label_end` are labels.
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
    """Return a copy of the scan, with the depth files below a folder added.

    Files whose names do not have `depth_begin` and `depth_end` are ignored. Of the others, a file is listed as an
    orphan if it has no image, or if its image already has a depth file.

    Args:
        scan: the images and labels of the split.
        root: the data set's folder.
        place: the folder of depth files, below `root`.
        read: reads a depth file as metres, float32 (H, W).
        depth_begin: the beginning of depth files' names.
        depth_end: the ending of depth files' names, before the suffix.
        image_of: returns an image's id for a depth file's path without suffix. None means that both are equal.
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
    """Return the scan with only those samples that a list names.

    Each line names a sample by its id, file name or path. If at least one listed sample has a label, the listed samples
    without a label are recorded as missing.

    Args:
        scan: all samples.
        root: the data set's folder.
        listing: the list's file name, below `root`.

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
    """Return the files of one split, for a data set that keeps all images in one folder.

    SPLIT.txt in `root` lists the split's images. If `root` has none of the files that `lists` names, all images are in
    the split.

    Args:
        root: the data set's folder.
        split: the split's name.
        images: the folder of images, below `root`.
        labels: the folder of labels, below `root`.
        label_ids: how to map the numbers in labels to class ids.
        lists: the possible lists' names without .txt, such as "train".

    Raises: DataError if SPLIT.txt cannot be read, or is missing although another list exists.
    """
    everything = scan_folders(root, images, labels, label_ids)
    return keep_listed(everything, root, f"{split}.txt") if lists_in(root, lists) else everything


def replace_images(scan: Scan, folder: Path, split: str) -> Scan:
    """Return the scan with each image replaced by another folder's image with the same sample id.

    The new image is FOLDER/SPLIT/ID.png or FOLDER/ID.png, or has another picture suffix. If FOLDER/SPLIT/ exists, only
    that folder is searched. Samples without a new image are recorded as missing.

    Args:
        scan: the files of the split.
        folder: the folder of the new images.
        split: the split's name.
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
    """Return (line number, words) for each line with words in a text file. Line numbers start at 1.

    Raises: DataError for a file that is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read the list {path}: {error}", fix="Restore it from its source, as text in UTF-8."
        ) from error
    return [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def lists_in(folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """Return the sorted names, without .txt, of the text files in a folder.

    Args:
        folder: the folder. If it does not exist, the result is [].
        names: the only names that count. None means all.
    """
    if not folder.is_dir():
        return []
    lists = (path.stem for path in folder.iterdir() if path.suffix == ".txt" and not path.name.startswith("."))
    return sorted(name for name in lists if names is None or name in names)


def folders_in(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, or [] if the folder does not exist.

    Hidden folders do not count.
    """
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # one call for 25,000 pictures, without a stat of each
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def holds_pictures(folder: Path) -> bool:
    """Return whether at least one picture lies directly in the folder."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) and entry.is_file() for entry in entries)


def pictures_in(folder: Path) -> dict[str, str]:
    """Return name without suffix -> file name, sorted, for the pictures directly in a folder.

    A folder that does not exist gives {}.
    """
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_picture(entry.name))
    return {name[: name.rindex(".")]: name for name in names}


def names_below(folder: Path) -> dict[str, str]:
    """Return path without suffix -> path, for the pictures at any depth below a folder. Paths are relative to it.

    Symbolic links are followed. A folder that does not exist gives {}.
    """
    return dict(_files(folder))


def walk_once(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, subfolder names, file names) of the folder `top` and all folders below it, as `os.walk` does.

    Symbolic links are followed, but each real folder is visited only once.

    The caller may sort or shorten the subfolder names to control the walk.
    """
    visited: set[str] = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        yield folder, folders, names


def is_picture(name: str) -> bool:
    """Return whether a file name has a picture's suffix, such as .jpg or .png.

    Names that begin with a dot do not count.
    """
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _listed_id(word: str) -> str:
    """Return the id that a word of a list names: `a`, `a.png` and `/images/a.png` give `a`.

    Only picture suffixes are removed. Other names keep their dots.
    """
    name = word.replace("\\", "/").rpartition("/")[2]
    return composed(name[: name.rindex(".")] if is_picture(name) else name)


def composed(name: str) -> str:
    """Return a name in Unicode's normal form C. macOS writes é as two characters, and form C has one."""
    return unicodedata.normalize("NFC", name)


def _files(top: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Iterator[tuple[str, str]]:
    """Yield (id in normal form C, path) of the files below `top` with one of the suffixes.

    Each real folder counts once.
    """
    for folder, folders, names in walk_once(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(folder).relative_to(top)
        begin = "" if below == Path() else f"{below.as_posix()}/"
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield composed(begin + name[: name.rindex(".")]), begin + name
