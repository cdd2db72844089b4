"""The samples of a split that lie in files, read one by one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kdcache.data.files import LABEL_SUFFIXES, file_digest, image_size, read_image, read_label
from kdcache.data.layouts.depth import DepthUnit, check_depth
from kdcache.data.layouts.label_ids import numbers_in
from kdcache.data.layouts.scan import Scan
from kdcache.data.sample import ClassList, Depth, FileDigest, Pixels, Split, ids_out_of_range
from kdcache.errors import DataError
from kdcache.tasks import DEPTH, SEGMENTATION


class FileSplit(Split):
    """One split of a data set on disk. Each file is read only when its sample is read.

    Args:
        data: the data set as the user gave it.
        root: the data set's folder, which the paths of `scan` are relative to.
    """

    def __init__(self, data: str, split: str, classes: ClassList, root: Path, scan: Scan) -> None:
        self.data = data
        self.split = split
        self.classes = classes
        self.ids = tuple(scan.images)
        self.label_map = scan.label_ids.table
        # Absolute, because a worker process may run in another directory.
        self._root = root.absolute()
        self._label_ids = scan.label_ids
        self._drawn = scan.drawn
        self._image_files = tuple(scan.images.values())
        self._label_files = tuple(scan.labels.get(sample) for sample in self.ids)
        self._read_depth = None if scan.depth is None else scan.depth.read
        self._depth_files = tuple(None if scan.depth is None else scan.depth.files.get(sample) for sample in self.ids)
        self._sizes: dict[int, tuple[int, int]] = {}

    def image_path(self, index: int) -> Path:
        """Return the absolute path of the image's file."""
        return self._root / self._image_files[index]

    def origin(self, index: int) -> str:
        """Return the path of the image file."""
        return str(self.image_path(index))

    def label_path(self, index: int) -> Path | None:
        """Return the absolute path of the label's file, or None without one, and for drawn labels."""
        name = None if self._drawn is not None else self._label_files[index]
        return None if name is None else self._root / name

    def image(self, index: int) -> Pixels:
        """Decode the image file and remember its size."""
        pixels = read_image(self.image_path(index))
        self._sizes[index] = (pixels.shape[0], pixels.shape[1])
        return pixels

    def image_size(self, index: int) -> tuple[int, int]:
        """Return the remembered (H, W), or read it from the file's header."""
        return self._sizes.get(index) or image_size(self.image_path(index), header_only=True)

    def has_label(self, index: int, task: str = SEGMENTATION) -> bool:
        """Return whether the sample has a label file of the task."""
        files = {SEGMENTATION: self._label_files, DEPTH: self._depth_files}.get(task)
        return files is not None and files[index] is not None

    def _segmentation(self, index: int) -> Pixels | None:
        """See `Split.label`. Raises: DataError for a label of another size than its image, or ids of no class."""
        label = self.raw_label(index)
        if label is None:
            return None
        path = self._root / str(self._label_files[index])
        self._check_size(index, label.shape, path)
        if bad := ids_out_of_range(label, len(self.classes)):
            raise DataError(
                f"Unknown ids in label {path}: {describe_ids(bad)}",
                fix=self._label_ids.fix,
                rule=self._label_ids.rule.format(last=len(self.classes) - 1),
            )
        return label

    def raw_label(self, index: int) -> Pixels | None:
        """Draw the label, or decode its file and map its numbers."""
        if self._drawn is not None and self._label_files[index] is not None:
            return self._drawn.label(self.ids[index])
        path = self.label_path(index)
        if path is None:
            return None
        label = read_label(path, self._label_ids.colours)
        if self._label_ids.check is not None:
            self._label_ids.check(numbers_in(label), path)
        return label if self.label_map is None else self.label_map.take(label)

    def depth_path(self, index: int) -> Path | None:
        """Return the absolute path of the depth's file, or None without one."""
        name = self._depth_files[index]
        return None if name is None else self._root / name

    @property
    def depth_unit(self) -> DepthUnit | None:
        """The unit of the numbers in depth files, or None without such files or with a camera for each."""
        return self._read_depth if isinstance(self._read_depth, DepthUnit) else None

    def raw_depth(self, index: int) -> Depth | None:
        """Read the depth file in metres."""
        path = self.depth_path(index)
        return None if path is None or self._read_depth is None else self._read_depth(path)

    def _depth(self, index: int) -> Depth | None:
        """See `Split.label`. Raises: DataError for depth of another size than its image, or that cannot be metres."""
        depth, path = self.raw_depth(index), self.depth_path(index)
        if depth is None or path is None:
            return None
        self._check_size(index, depth.shape, path)
        check_depth(depth, path)
        return depth

    def content_digests(self, index: int, of_file: FileDigest | None = None) -> tuple[str | None, ...]:
        """Return the SHA-256 of the image file, of the label file (or None) and, if any, of the depth file."""
        digest_of = of_file or file_digest
        path, depth = self.label_path(index), self.depth_path(index)
        label = None if path is None else digest_of(path)
        if self._drawn is not None and self._label_files[index] is not None:
            label = self._drawn.digest(self.ids[index])
        digests = digest_of(self.image_path(index)), label
        return digests if depth is None else (*digests, digest_of(depth))

    def _check_size(self, index: int, shape: tuple[int, ...], path: Path | None) -> None:
        if shape != (size := self._size(index)):
            raise DataError(
                f"Label {path} does not fit image {self.image_path(index)}: {describe_sizes(shape, size)}",
                fix="Resize the labels (nearest), or restore the images they were drawn on. Images of images= need the "
                "size of the data set's own.",
            )

    def _size(self, index: int) -> tuple[int, int]:
        """Return (height, width), remembered from `image`, because a PNG's rotation is stored behind its pixels."""
        if index not in self._sizes:
            self._sizes[index] = image_size(self.image_path(index))
        return self._sizes[index]


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
    """Return the first few names and the number of further ones."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
