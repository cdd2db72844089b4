"""The samples of a split that lie in files, read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.data.files import LABEL_SUFFIXES, file_digest, image_size, read_image, read_label
from kdcache.data.layouts.depth import check_depth
from kdcache.data.layouts.label_ids import LabelIds, numbers_in
from kdcache.data.layouts.scan import DrawnLabels, Scan
from kdcache.data.sample import ClassList, FileDigest, Pixels, Sample, Source, Split, Values, ids_out_of_range
from kdcache.errors import DataError
from kdcache.tasks import DEPTH, SEGMENTATION


@dataclass(frozen=True, slots=True, eq=False)
class FileSource(Source[Values]):
    """An array in a file, which is read only when the array is.

    Attributes:
        file: an absolute path, because a worker process may run in another directory.
    """

    file: str

    @property
    def path(self) -> Path | None:
        """The path of the file."""
        return Path(self.file)

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the SHA-256 of the file, by `of_file` if given."""
        return (of_file or file_digest)(Path(self.file))


@dataclass(frozen=True, slots=True, eq=False)
class ImageFile(FileSource[Pixels]):
    """An image file.

    Attributes:
        sizes: (H, W) of the files of the split that were decoded. All images of a split share it.
    """

    sizes: dict[str, tuple[int, int]]

    def read(self) -> Pixels:
        """Decode the image and remember its size."""
        pixels = read_image(Path(self.file))
        self.sizes[self.file] = (pixels.shape[0], pixels.shape[1])
        return pixels

    def size(self) -> tuple[int, int]:
        """Return the remembered (H, W), or read it from the file's header."""
        return self.sizes.get(self.file) or image_size(Path(self.file), header_only=True)

    def check_size(self, shape: tuple[int, ...], label: str) -> None:
        """Raise DataError if a label, the file `label`, has another shape than the image."""
        # Remembered from `read`, because a PNG's rotation is stored behind its pixels.
        if (size := self.sizes.get(self.file)) is None:
            size = self.sizes[self.file] = image_size(Path(self.file))
        if shape != size:
            raise DataError(
                f"Label {label} does not fit image {self.file}: {describe_sizes(shape, size)}",
                fix="Resize the labels (nearest), or restore the images they were drawn on. Images of images= need the "
                "size of the data set's own.",
            )


@dataclass(frozen=True, slots=True, eq=False)
class LabelFile(FileSource[Values]):
    """A label of an image in a file.

    Attributes:
        image: the image of the same sample.
        decode: reads such a file as class ids or metres.
        check: raises DataError for a label, from this file, that no training could use.
    """

    image: ImageFile
    decode: Callable[[Path], Values]
    check: Callable[[Values, Path], None]

    def raw(self) -> Values:
        """Return what the file holds."""
        return self.decode(Path(self.file))

    def read(self) -> Values:
        """Return the label. Raises: DataError for another size than the image's, or for what `check` finds."""
        label = self.raw()
        self.image.check_size(label.shape, self.file)
        self.check(label, Path(self.file))
        return label


@dataclass(frozen=True, slots=True, eq=False)
class DrawnLabel(LabelFile[Pixels]):
    """Class ids that are drawn from annotations. Their `file` may also have annotations of other samples."""

    drawn: DrawnLabels
    sample: str

    @property
    def path(self) -> None:
        """No file holds the label."""
        return None

    def raw(self) -> Pixels:
        """Draw the label."""
        return self.drawn.label(self.sample)

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the SHA-256 of everything that the label is drawn from."""
        return self.drawn.digest(self.sample)


@dataclass(frozen=True, eq=False)
class ClassIds:
    """The class ids in label files: what their numbers mean, and the number of classes."""

    label_ids: LabelIds
    classes: int

    def decode(self, path: Path) -> Pixels:
        """Decode a file and map its numbers. Raises: DataError."""
        label = read_label(path, self.label_ids.colours)
        if self.label_ids.check is not None:
            self.label_ids.check(numbers_in(label), path)
        table = self.label_ids.table
        return label if table is None else table.take(label)

    def check(self, label: Pixels, path: Path) -> None:
        """Raise DataError for ids of no class."""
        if bad := ids_out_of_range(label, self.classes):
            raise DataError(
                f"Unknown ids in label {path}: {describe_ids(bad)}",
                fix=self.label_ids.fix,
                rule=self.label_ids.rule.format(last=self.classes - 1),
            )


def file_split(data: str, split: str, classes: ClassList, root: Path, scan: Scan) -> Split:
    """Return one split of a data set on disk.

    Args:
        data: the data set as the user gave it.
        split: the split's name.
        classes: its classes.
        root: the data set's folder, which the paths of `scan` are relative to.
        scan: its files.
    """
    root, sizes = root.absolute(), dict[str, tuple[int, int]]()
    ids = ClassIds(scan.label_ids, len(classes))
    decode, check, samples = ids.decode, ids.check, []
    for name, file in scan.images.items():
        image = ImageFile(str(root / file), sizes)
        labels: dict[str, Source[Any]] = {}
        if (label := scan.labels.get(name)) is not None:
            of_file = str(root / label), image, decode, check
            labels[SEGMENTATION] = LabelFile(*of_file) if scan.drawn is None else DrawnLabel(*of_file, scan.drawn, name)
        if scan.depth is not None and (far := scan.depth.files.get(name)) is not None:
            labels[DEPTH] = LabelFile(str(root / far), image, scan.depth.read, check_depth)
        samples.append(Sample(name, image, labels, image.file))
    return Split(data, split, classes, tuple(samples), scan.label_ids.table)


def describe_ids(bad: dict[int, int]) -> str:
    """Return ids with their counts in words: `id 11 in 250 pixels, id 12 in 3 pixels`."""
    return ", ".join(f"id {i} in {count} pixel{'s' * (count != 1)}" for i, count in bad.items())


def describe_sizes(label: tuple[int, ...], image: tuple[int, ...]) -> str:
    """Return the sizes (H, W) of a label and its image that do not match, in words."""
    return f"label {label[0]} x {label[1]}, image {image[0]} x {image[1]} (height x width)"


def saved_as_png(labels: Iterable[str]) -> str:
    """Return a fix for labels whose names are not PNGs or TIFFs, or ''."""
    others = [name.lower() for name in labels if not name.lower().endswith(LABEL_SUFFIXES)]
    if any(name.endswith((".jpg", ".jpeg")) for name in others):
        return "A JPEG changes numbers and colours: save the original labels as .png."
    return "Save the ids in these files as .png." if others else ""


def describe_some(names: list[str], most: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
