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
    """Pixels, label and target of every record, from the cache or from its data set.

    >>> import kdcache
    >>> records = kdcache.Records(kdcache.open_cache("streets.zarr"))
    >>> records.pixels(0).shape, records.target(0)["values"].shape
    ((48, 64, 3), (7, 12, 16))

    Args:
        cache: an open cache.
        split: the data set that it was built from, which a cache without pixels needs.
    Raises: MismatchError for a data set that the cache was not built from.
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
        """Open the records of the cache at a path or address.

        `data` and `split` name its data set. The default split is the one that the cache was built from.

        Raises: as `open_cache` and `open_split`; MismatchError.
        """
        cache = open_cache(store)
        return cls(cache, open_split(data, split or cache.manifest.dataset.split) if data else None)

    @classmethod
    def of(cls, records: "Cache | Records") -> "Records":
        """Return records unchanged, or the records of a cache without a data set."""
        return records if isinstance(records, Records) else cls(records)

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def complete(self) -> bool:
        """Whether pixels and labels are available."""
        return self.cache.pixels_stored or self.split is not None

    def check_complete(self) -> None:
        """Raise MismatchError for a cache without pixels and without its data set."""
        if not self.complete:
            raise MismatchError(
                f"Missing --data: {self.cache.place} was built with --pixels source, so it has no pixels",
                fix=f"Add --data (the folder of {self.cache.manifest.dataset.name!r}).",
            )

    def sample(self, record: int) -> str:
        """Return the id of a record's sample."""
        return self.cache.ids[record // self.cache.manifest.view.views_per_sample]

    def pixels(self, record: int) -> Array:
        """Return the view: uint8 (H, W, 3).

        Raises: CorruptError as `Cache.read`; from the data set, DataError, and MismatchError for an image that renders
            to other pixels than the teacher saw.
        """
        if self.cache.pixels_stored:
            return self.cache.read(record, ["pixels/image"])["pixels/image"]
        return self._checked_view(record)[0]

    def label(self, record: int, task: str = SEGMENTATION) -> Array:
        """Return the view's label of a task: uint8 (H, W) with void 255, or float32 metres with NaN for unknown depth.

        Raises: as `pixels`; StoreError for a cache with pixels but no label of the task.
        """
        if self.cache.pixels_stored:
            return self.cache.read(record, [f"labels/{task}"])[f"labels/{task}"]
        if numeric([task]):
            return self._rendered_numbers(record, task)
        return self._checked_view(record)[1]

    def target(self, record: int, head: str = SEGMENTATION) -> dict[str, Array]:
        """Return the stored target: `values` (k, h, w) float16, for top-k also `indices` (k, h, w) and `tail` (h, w).

        A regression has `values` (c, h, w) in the head's unit, float16 or float32.
        Raises: CorruptError as `Cache.read`; StoreError for a head that the cache does not have.
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
        """Return a record's window in its image, and whether it is mirrored. It needs a data set."""
        return Window(*self._windows[record].tolist()), bool(self._flips[record])

    def render(self, record: int, size: tuple[int, int] | None = None) -> tuple[Array, Array]:
        """Render pixels and label from the data set, without a check, at `size` (H, W), by default the view's.

        Raises: DataError.
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
        """Return whether pixels equal the view that the teacher saw, bit for bit."""
        return pixel_checksum(pixels) == int(self._checksums[record])

    def check_image(self, record: int, image: Array, label: Array | None = None) -> None:
        """Raise MismatchError if an image, or its label, renders differently than at the build.

        `image` and `label` are the data set's. A label of None is not compared. Each record is rendered once.
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
