"""The `folder` layout: a data set as plain files.

    DIR/classes.txt                 names in the order of the ids
    DIR/images/<split>/**.jpg       or png, webp, bmp, tif; folders may nest
    DIR/labels/<split>/**.png       8-bit ids, 255 = void; the same path below <split> as the image

A sample's id is the image's path below `images/<split>` without its last suffix (`a.b.jpg` is `a.b`), with
forward slashes. Labels may be missing, for a split or for single samples; a label without an image is an
error, for it means that names do not match and that training would silently see no labels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.data.classes import CLASSES_FILE, read_classes
from kdcache.data.files import IMAGE_SUFFIXES, LABEL_SUFFIX, file_digest, image_size, read_image, read_label
from kdcache.data.sample import IGNORE_INDEX, ClassList, Pixels, Split, ids_out_of_range
from kdcache.errors import DataError

IMAGES, LABELS = "images", "labels"


@dataclass(frozen=True)
class FolderScan:
    """What a split's folders hold, before anything is refused.

    Attributes:
        images: id -> path below `images/<split>`, sorted by id.
        labels: id -> path below `labels/<split>`, of ids that have an image.
        orphans: paths below `labels/<split>` that no image has.
        clashes: (id, first path, second path) of images with one id; the first is in `images`.
        foreign: picture files below `labels/<split>` that are no PNG.
    """

    images: dict[str, str]
    labels: dict[str, str]
    orphans: list[str] = field(default_factory=list)
    clashes: list[tuple[str, str, str]] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


class FolderSplit(Split):
    """One split of a data folder. Built by `open_folder`; reads a file only when asked for its sample."""

    def __init__(self, data: str, split: str, classes: ClassList, scan: FolderScan) -> None:
        self.data = data
        self.split = split
        self.classes = classes
        self.ids = tuple(scan.images)
        # Absolute, because a worker process may run in another directory.
        root = Path(data).expanduser().absolute()
        self._images = root / IMAGES / split
        self._labels = root / LABELS / split
        self._image_files = tuple(scan.images.values())
        self._label_files = tuple(scan.labels.get(sample) for sample in self.ids)
        self._sizes: dict[int, tuple[int, int]] = {}

    def image_path(self, index: int) -> Path:
        """The image's file."""
        return self._images / self._image_files[index]

    def label_path(self, index: int) -> Path | None:
        """The label's file; None without one."""
        name = self._label_files[index]
        return None if name is None else self._labels / name

    def image(self, index: int) -> Pixels:
        pixels = read_image(self.image_path(index))
        self._sizes[index] = (pixels.shape[0], pixels.shape[1])
        return pixels

    def has_label(self, index: int) -> bool:
        return self._label_files[index] is not None

    def label(self, index: int) -> Pixels | None:
        label = self.raw_label(index)
        if label is None:
            return None
        classes, path, size = len(self.classes), self.label_path(index), self._size(index)
        if label.shape != size:
            raise DataError(
                "A label has the size of its image (upright by EXIF).",
                received=f"{describe_sizes(label.shape, size)}: {path}, {self.image_path(index)}",
                remedy="Resize the labels (nearest) or restore the images they were drawn on.",
            )
        if bad := ids_out_of_range(label, classes):
            raise DataError(
                f"Label ids are 0 to {classes - 1} (the lines of {CLASSES_FILE}) or {IGNORE_INDEX} (void).",
                received=f"{describe_ids(bad)} in {path}",
                remedy=f"Complete {CLASSES_FILE}, or write {IGNORE_INDEX} where no class applies.",
            )
        return label

    def raw_label(self, index: int) -> Pixels | None:
        path = self.label_path(index)
        return None if path is None else read_label(path)

    def content_digests(self, index: int) -> tuple[str, str | None]:
        """SHA-256 of the bytes of the image file and of the label file (None without one)."""
        path = self.label_path(index)
        return file_digest(self.image_path(index)), None if path is None else file_digest(path)

    def _size(self, index: int) -> tuple[int, int]:
        """Remembered from `image`, because a PNG's header does not tell its rotation without decoding it."""
        if index not in self._sizes:
            self._sizes[index] = image_size(self.image_path(index))
        return self._sizes[index]


def open_folder(data: str, split: str) -> FolderSplit:
    """Open `split` of the folder `data`.

    Raises: DataError for a missing folder or split, no images, a bad class list, clashing ids, or labels
        that belong to no image.
    """
    root = Path(data).expanduser()
    found = scan_split(root, split)
    if found.clashes:
        sample, first, second = found.clashes[0]
        raise DataError(
            "Sample ids (paths without the last suffix) are unique in a split.",
            received=f"{first} and {second} are both {sample!r} ({len(found.clashes)} clashes) "
            f"in {root / IMAGES / split}",
            remedy="Rename or remove one file of each pair.",
        )
    if found.orphans or found.foreign:
        raise DataError(
            "Every label is a PNG with the path of its image (another suffix).",
            received=f"{describe_some(found.orphans + found.foreign)} in {root / LABELS / split}",
            remedy=f"Give each label its image's name, as in {next(iter(found.images.values()))!r}; "
            "remove the labels that have no image.",
        )
    return FolderSplit(data, split, read_classes(root), found)


def list_folder_splits(data: str) -> list[str]:
    """Names of the folders below `images`, sorted.

    Raises: DataError when the folder has no `images`.
    """
    root = Path(data).expanduser()
    images = root / IMAGES
    if not images.is_dir():
        raise DataError(
            f"A data folder has a folder {IMAGES}/<split> per split.",
            received=f"{root} {'has no folder ' + IMAGES if root.is_dir() else 'is no folder'}",
            remedy="Check the path, or lay the data out as images/<split>, labels/<split> and classes.txt.",
        )
    return sorted(entry.name for entry in images.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def scan_split(root: Path, split: str) -> FolderScan:
    """Find the images and labels of a split; refuses only a split that is missing or without images.

    Raises: DataError.
    """
    splits = list_folder_splits(str(root))
    if split not in splits:
        raise DataError(
            f"A split is a folder below {IMAGES}.",
            received=f"{split!r} in {root}; there are: {', '.join(splits) or 'none'}",
            remedy="Name one of the splits that exist.",
        )
    images: dict[str, str] = {}
    clashes: list[tuple[str, str, str]] = []
    for sample, path in sorted(_files(root / IMAGES / split, IMAGE_SUFFIXES)):
        if sample in images:
            clashes.append((sample, images[sample], path))
        images.setdefault(sample, path)
    if not images:
        raise DataError(
            "A split has at least one image.",
            received=f"none in {root / IMAGES / split}",
            remedy=f"Put images there ({', '.join(IMAGE_SUFFIXES)}).",
        )
    scan = FolderScan(images, {}, clashes=clashes)
    for sample, path in sorted(_files(root / LABELS / split, IMAGE_SUFFIXES)):
        if not path.lower().endswith(LABEL_SUFFIX):
            scan.foreign.append(path)
        elif sample not in images or sample in scan.labels:
            scan.orphans.append(path)
        else:
            scan.labels[sample] = path
    return scan


def describe_ids(bad: dict[int, int]) -> str:
    """`id 11 in 250 pixels, id 12 in 3 pixels`."""
    return ", ".join(f"id {i} in {count} pixel{'s' * (count != 1)}" for i, count in bad.items())


def describe_sizes(label: tuple[int, ...], image: tuple[int, ...]) -> str:
    """Both sizes of a label that does not fit."""
    return f"label {label[0]} x {label[1]}, image {image[0]} x {image[1]} (height x width)"


def describe_some(names: list[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest


def _files(top: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(id, posix path) below `top`, through links (data sets are often linked together), each folder once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            # Hidden files are never data: macOS leaves `._a.jpg` beside `a.jpg`.
            if not name.startswith(".") and name.lower().endswith(suffixes):
                path = (Path(folder) / name).relative_to(top).as_posix()
                yield path[: path.rindex(".")], path
