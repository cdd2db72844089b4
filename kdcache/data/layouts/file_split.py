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
    """A source whose array is in a file. The file is read only when the array is requested.

    Attributes:
        file: the absolute path, because a worker process may run in another directory.
    """

    file: str

    @property
    def path(self) -> Path | None:
        """The path of the file."""
        return Path(self.file)

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the SHA-256 (hex) of the file's bytes.

        `of_file` is a function that returns a file's digest, such as one that remembers digests. None reads the file.
        """
        return (of_file or file_digest)(Path(self.file))


@dataclass(frozen=True, slots=True, eq=False)
class ImageFile(FileSource[Pixels]):
    """A source that reads an image file.

    Attributes:
        sizes: file -> (height, width) of the images that were decoded so far. All images of a split share this dict.
    """

    sizes: dict[str, tuple[int, int]]

    def read(self) -> Pixels:
        """Decode the image and remember its size. Return uint8 (H, W, 3), RGB.

        Raises: DataError for a file that cannot be read.
        """
        pixels = read_image(Path(self.file))
        self.sizes[self.file] = (pixels.shape[0], pixels.shape[1])
        return pixels

    def size(self) -> tuple[int, int]:
        """Return the image's (height, width) in pixels: the remembered size, or the size in the file's header."""
        return self.sizes.get(self.file) or image_size(Path(self.file), header_only=True)

    def check_size(self, shape: tuple[int, ...], label: str) -> None:
        """Raise DataError if a label's shape (H, W) differs from the image's size.

        `label` is the label file, for the message.
        """
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
    """A source that reads a label file of an image.

    Attributes:
        image: the image of the same sample.
        decode: reads a label file as class ids, uint8 (H, W), or as metres, float32 (H, W).
        check: called with a decoded label and its file. It raises DataError for a label that no training can use.
    """

    image: ImageFile
    decode: Callable[[Path], Values]
    check: Callable[[Values, Path], None]

    def raw(self) -> Values:
        """Return the decoded label without checks: class ids, uint8 (H, W), or metres, float32 (H, W)."""
        return self.decode(Path(self.file))

    def read(self) -> Values:
        """Return the decoded label: class ids, uint8 (H, W), or metres, float32 (H, W).

        Raises: DataError if the label's size differs from the image's size, or if the function `check` finds values
            that no training can use.
        """
        label = self.raw()
        self.image.check_size(label.shape, self.file)
        self.check(label, Path(self.file))
        return label


@dataclass(frozen=True, slots=True, eq=False)
class DrawnLabel(LabelFile[Pixels]):
    """The source of a segmentation label that is drawn from annotations.

    Attributes:
        drawn: draws the labels of all samples of the split.
        sample: the id of this label's sample.
    """

    drawn: DrawnLabels
    sample: str

    @property
    def path(self) -> None:
        """None, because no file holds the label itself."""
        return None

    def raw(self) -> Pixels:
        """Return the drawn label, uint8 (H, W), without checks. Raises: DataError for a shape that cannot be drawn."""
        return self.drawn.label(self.sample)

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the SHA-256 (hex) of the annotations and class ids that the label is drawn from.

        `of_file` is unused.
        """
        return self.drawn.digest(self.sample)


@dataclass(frozen=True, eq=False)
class ClassIds:
    """A reader of label files that returns class ids.

    Attributes:
        label_ids: how to map the numbers in label files to class ids.
        classes: the number of classes.
    """

    label_ids: LabelIds
    classes: int

    def decode(self, path: Path) -> Pixels:
        """Return the class ids in a label file, uint8 (H, W). Unknown ids are not an error here, but in `check`.

        Raises: DataError for a file that cannot be read, or whose numbers contradict its name (see `LabelIds.check`).
        """
        label = read_label(path, self.label_ids.colours)
        if self.label_ids.check is not None:
            self.label_ids.check(numbers_in(label), path)
        table = self.label_ids.table
        return label if table is None else table.take(label)

    def check(self, label: Pixels, path: Path) -> None:
        """Raise DataError if a label, uint8 (H, W), has ids that are neither a class nor void. `path` is its file."""
        if bad := ids_out_of_range(label, self.classes):
            raise DataError(
                f"Unknown ids in label {path}: {describe_ids(bad)}",
                fix=self.label_ids.fix,
                rule=self.label_ids.rule.format(last=self.classes - 1),
            )


def file_split(data: str, split: str, classes: ClassList, root: Path, scan: Scan) -> Split:
    """Return a split of a data set on disk.

    Args:
        data: the data set as the user named it.
        split: the split's name.
        classes: the data set's classes.
        root: the data set's folder. Paths in `scan` are relative to it.
        scan: the split's files.
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
        if scan.depth is not None and (depth_path := scan.depth.files.get(name)) is not None:
            labels[DEPTH] = LabelFile(str(root / depth_path), image, scan.depth.read, check_depth)
        samples.append(Sample(name, image, labels, image.file))
    return Split(data, split, classes, tuple(samples), scan.label_ids.table)


def describe_ids(bad: dict[int, int]) -> str:
    """Describe counts in words: {11: 250, 12: 3} becomes "id 11 in 250 pixels, id 12 in 3 pixels".

    `bad` maps an id to the number of its pixels.
    """
    return ", ".join(f"id {i} in {count} {'pixel' if count == 1 else 'pixels'}" for i, count in bad.items())


def describe_sizes(label: tuple[int, ...], image: tuple[int, ...]) -> str:
    """Describe two sizes (H, W) in words, such as "label 48 x 64, image 96 x 128 (height x width)"."""
    return f"label {label[0]} x {label[1]}, image {image[0]} x {image[1]} (height x width)"


def saved_as_png(labels: Iterable[str]) -> str:
    """Return advice for label files that are neither PNG nor TIFF, or '' if all names end with .png, .tif or .tiff."""
    others = [name.lower() for name in labels if not name.lower().endswith(LABEL_SUFFIXES)]
    if any(name.endswith((".jpg", ".jpeg")) for name in others):
        return "A JPEG changes numbers and colours: save the original labels as .png."
    return "Save the ids in these files as .png." if others else ""


def describe_some(names: list[str], most: int = 3) -> str:
    """Describe a list of names in words, such as "'a', 'b', 'c' and 7 more". `most` is how many are named."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
