"""The records of a cache, and the data set behind it if the cache keeps no pixels.

Record n of a cache is a view of one sample of its data set. Another data set is an error, and so is an image that no
longer renders to the pixels that the teacher saw.
"""

from pathlib import Path
from typing import Any

from kdcache.data import RENDERERS, Split, Window, open_split, pixel_checksum, render, zoom_of
from kdcache.errors import MismatchError, StoreError
from kdcache.store.backend.base import Place
from kdcache.store.format.codec import Array
from kdcache.store.freshness import renewal
from kdcache.store.reader import Cache, open_cache
from kdcache.tasks import SEGMENTATION, numeric


class Records:
    """The pixels, labels and targets of all records of a cache. Pixels and labels may come from its data set.

    >>> import kdcache
    >>> records = kdcache.Records(kdcache.open_cache("streets.zarr"))
    >>> records.pixels(0).shape, records.target(0)["values"].shape
    ((48, 64, 3), (7, 12, 16))

    Args:
        cache: an open cache.
        split: the data set that it was built from. Needed for pixels and labels if the cache does not store them.
    Raises: MismatchError for a data set with other sample ids or classes than the cache's.
    """

    def __init__(self, cache: Cache, split: Split | None = None) -> None:
        self.cache = cache
        self.split = split
        self._checked = set[int]()
        if split is not None:
            _check_digest(cache, split)
            # All at once, and before a DataLoader's workers get copies: a training reads every record.
            self._windows, self._flips, self._checksums = map(cache.column, ("window", "flip", "pixel_checksum"))
            self._labels = cache.column("label_checksum") if cache.manifest.records_contents else None

    @classmethod
    def open(cls, store: str | Path | Place, data: str | None = None, split: str | None = None) -> "Records":
        """Open the cache at a path or address, with its data set if `data` is given.

        Args:
            store: the cache's path or address.
            data: folder or spec of the data set that the cache was built from. None uses only the cache.
            split: name of the split. Default: the split that the cache was built from.
        Raises: MismatchError if the cache was built from another data set; DataError if the data set cannot be opened;
            StoreError if the cache cannot be opened.
        """
        cache = open_cache(store)
        return cls(cache, open_split(data, split or cache.manifest.dataset.split) if data else None)

    @classmethod
    def of(cls, records: "Cache | Records") -> "Records":
        """Return a `Records` unchanged. For a cache, return a new `Records` that has no data set."""
        return records if isinstance(records, Records) else cls(records)

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def complete(self) -> bool:
        """True if pixels and labels are available, from the cache or from its data set."""
        return self.cache.pixels_stored or self.split is not None

    def check_complete(self) -> None:
        """Raise MismatchError if neither the cache nor a data set gives pixels."""
        if not self.complete:
            raise MismatchError(
                f"Missing --data: {self.cache.place} was built with --pixels source, so it has no pixels",
                fix=f"Add --data (the folder of {self.cache.manifest.dataset.name!r}).",
            )

    def sample(self, record: int) -> str:
        """Return the id of the sample that record number `record` shows."""
        return self.cache.ids[record // self.cache.manifest.view.views_per_sample]

    def pixels(self, record: int) -> Array:
        """Return the pixels of record number `record`, uint8 (H, W, 3).

        Raises: CorruptError for a damaged cache; DataError for an image that cannot be read; MismatchError for an image
            that no longer renders to the pixels that the teacher saw.
        """
        if self.cache.pixels_stored:
            return self.cache.read(record, ["pixels/image"])["pixels/image"]
        return self._checked_view(record)[0]

    def label(self, record: int, task: str = SEGMENTATION) -> Array:
        """Return the label of record number `record` for the task `task`, "segmentation" or "depth".

        Returns: uint8 (H, W) with 255 for void, or for depth float32 (H, W) in metres with NaN for unknown.
        Raises: CorruptError for a damaged cache; DataError for a label that cannot be read; MismatchError for an image
            or label that no longer renders as at the build; StoreError if the cache stores no label of the task.
        """
        if self.cache.pixels_stored:
            return self.cache.read(record, [f"labels/{task}"])[f"labels/{task}"]
        if numeric([task]):
            return self._rendered_numbers(record, task)
        return self._checked_view(record)[1]

    def target(self, record: int, head: str = SEGMENTATION) -> dict[str, Array]:
        """Return the arrays that store the target of the head `head` for record number `record`.

        Returns: array name -> array. For segmentation `values`, float16 (k, h, w), and for top-k also `indices`
            (k, h, w) and `tail` (h, w). For a numeric head `values` (c, h, w) in the head's unit, float16 or float32.
        Raises: CorruptError for a damaged cache; StoreError for a head that the cache does not have.
        """
        if head not in self.cache.manifest.heads:
            raise StoreError(
                f"Unknown head {head!r}: {self.cache.place} has {', '.join(self.cache.manifest.heads) or 'none'}",
                fix="Name one of these, or build the cache with that head of the teacher's (build-teacher-cache "
                "--heads).",
            )
        rows = self.cache.read(record, self.cache.target_paths(head))
        return {path.rsplit("/", 1)[1]: row for path, row in rows.items()}

    def window(self, record: int) -> tuple[Window, bool]:
        """Return the part of its image that record number `record` shows, and whether the view is mirrored.

        The part has the edges (y0, x0, y1, x1) in pixels of the data set's image. Records without a data set raise
        AttributeError.
        """
        return Window(*self._windows[record].tolist()), bool(self._flips[record])

    def render(self, record: int, size: tuple[int, int] | None = None) -> tuple[Array, Array]:
        """Render a record's pixels and segmentation label from the data set, without comparing them with the cache.

        Args:
            record: number of the record.
            size: (H, W) of the result. None is the cache's view size.
        Returns: uint8 (H, W, 3) and uint8 (H, W).
        Raises: DataError for a file that cannot be read; MismatchError without a data set.
        """
        self.check_complete()
        assert self.split is not None
        sample = record // self.cache.manifest.view.views_per_sample
        window, flip = self.window(record)
        image, label = self.split.image(sample), self.split.label(sample)
        return render(image, label, window, flip=flip, size=size or self.cache.view_size)

    def _rendered_numbers(self, record: int, task: str) -> Array:
        """Render the label of a numeric task from the data set, in the form of a cache with pixels."""
        self.check_complete()
        assert self.split is not None
        manifest = self.cache.manifest
        sample, (window, flip) = record // manifest.view.views_per_sample, self.window(record)
        zoom = 1.0
        if manifest.depth is not None and manifest.depth.zoom == "divide":
            height, width = self.split.image(sample).shape[:2]
            zoom = zoom_of(window, (height, width), manifest.view.share or (1.0, 1.0))
        numbers: Any = self.split.label(sample, task)
        return RENDERERS[task](numbers, window, flip=flip, size=self.cache.view_size, zoom=zoom)

    def is_same(self, record: int, pixels: Array) -> bool:
        """Return True if `pixels`, uint8 (H, W, 3), are the pixels that the teacher saw for record number `record`.

        Their checksum is compared with the cache's. This needs records that were opened with a data set.
        """
        return pixel_checksum(pixels) == int(self._checksums[record])

    def check_image(self, record: int, image: Array, label: Array | None = None) -> None:
        """Check that an image and its label still render to this record's pixels and label.

        Args:
            record: number of the record. A record that was checked before is skipped.
            image: the data set's image, uint8 (height, width, 3).
            label: the data set's label, uint8 (height, width). None compares only the image.
        Raises: MismatchError if the pixels or the label differ.
        """
        if record in self._checked:
            return
        window, flip = self.window(record)
        pixels, small = render(image, label, window, flip=flip, size=self.cache.view_size)
        self._check_same(record, pixels, None if label is None else small)
        self._checked.add(record)

    def _checked_view(self, record: int) -> tuple[Array, Array]:
        pixels, label = self.render(record)
        self._check_same(record, pixels, label)
        return pixels, label

    def _check_same(self, record: int, pixels: Array, label: Array | None) -> None:
        assert self.split is not None
        where = f"{self.sample(record)!r} of {self.split.data}"
        if not self.is_same(record, pixels):
            raise MismatchError(
                f"Image {where} does not render as at the build: the file or an image library has changed",
                fix="Restore the image, build the cache again, or build with --pixels stored",
            )
        if label is not None and self._labels is not None and pixel_checksum(label) != int(self._labels[record]):
            raise MismatchError(
                f"The label of {where}, split {self.split.split!r}, has changed since {self.cache.place} was built",
                fix=f"Restore the label, or renew the cache: {renewal(self.cache.place, self.split.data)}",
            )


def _check_digest(cache: Cache, split: Split) -> None:
    dataset = cache.manifest.dataset
    if split.digest() != dataset.ids_digest:
        raise MismatchError(
            f"{split.data}, split {split.split!r} ({len(split)} samples, {len(split.classes)} classes) is not what "
            f"{cache.place} was built from: {dataset.name!r}, split {dataset.split!r} ({dataset.samples} samples, "
            f"{len(dataset.class_names)} classes)",
            fix="Give the original data set with --data and --split, or build a cache of this one.",
        )
