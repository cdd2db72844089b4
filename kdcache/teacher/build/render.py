"""The records of a build as the teacher's input: views of samples, rendered or copied from another cache."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np

from kdcache.data import (
    ClassList,
    Sample,
    Source,
    Split,
    Window,
    draw_view,
    fitted_share,
    pixel_checksum,
    prefetch,
    render,
    render_depth,
    short_digests,
    whole_window,
    zoom_of,
)
from kdcache.data.sample import FileDigest
from kdcache.errors import MismatchError
from kdcache.store import Cache, Manifest
from kdcache.store.format.manifest_models import DepthLabels, View
from kdcache.store.join import check_ids, other_view, pillow_of
from kdcache.tasks import DEPTH, SEGMENTATION

Array = np.ndarray[Any, Any]
_LABEL_DIGESTS = {SEGMENTATION: "records/label_digest", DEPTH: "records/depth_digest"}
DIGESTS = ("records/image_digest", *_LABEL_DIGESTS.values())


@dataclass(frozen=True)
class Rendered:
    """One record of a build, before the teacher predicts it.

    Attributes:
        record: number of the record.
        sample: index of the sample.
        view: number of the view within the sample.
        pixels: the view, uint8 (H, W, 3).
        taught: the teacher's input, uint8 (H', W', 3): `pixels`, or the same window rendered at `teacher_size`.
        label: uint8 (H, W), 255 for void.
        window: the part of the image that the view shows, in pixels of the image.
        flip: whether the view is mirrored left to right.
        source_size: (height, width) of the image in pixels.
        checksum: checksum of `pixels`.
        digests: uint8 (3, 16), first bytes of the SHA-256 of image, label and depth label. Zeros for a missing label.
        label_checksum: checksum of `label`.
        labelled: whether the sample has a segmentation label.
        depth: the depth label, float32 (H, W) in metres with NaN for unknown, or None if no depth labels are stored.
        depth_labelled: whether the sample has a depth label.
        old: number of the same record in an earlier cache, or None if there is none.
        fold: index of the ensemble member that predicts the record, or None without folds.
    """

    record: int
    sample: int
    view: int
    pixels: Array  # uint8 (H, W, 3)
    taught: Array  # uint8 (H', W', 3)
    label: Array  # uint8 (H, W), 255 where unlabelled
    window: Window  # in pixels of the source
    flip: bool
    source_size: tuple[int, int]
    checksum: int
    digests: Array  # uint8 (3, 16), as `short_digests`
    label_checksum: int
    labelled: bool
    depth: Array | None = None  # float32 (H, W) metres, NaN where unknown; None where no depth is stored
    depth_labelled: bool = False
    old: int | None = None
    fold: int | None = None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LikeSplit(Split):
    """A data set whose views must be the same as the views of an existing cache.

    Attributes:
        like: that cache.
        stored: True if views are read from that cache, which stores pixels. False if they are rendered from the data
            set.
    """

    like: Cache
    stored: bool

    @cached_property
    def checksums(self) -> Array:
        """The checksum of the pixels of each record of the existing cache, uint64 (R,)."""
        return self.like.column("pixel_checksum")

    def check(self, rendered: Iterable[Rendered]) -> None:
        """Check that the views `rendered` have the checksums of the existing cache.

        Raises: MismatchError naming the first view that differs.
        """
        for item in rendered:
            if item.checksum != int(self.checksums[item.record]):
                pillow = pillow_of(self.like.manifest)
                fix = f"Give the images that {self.like.place} was built from, with Pillow {pillow}"
                fix += ", or leave --data out to use the stored pixels." if self.like.pixels_stored else "."
                raise other_view(self.like, item.record, self.data, metadata.version("pillow"), fix=fix)


def split_like(like: Cache, split: Split) -> LikeSplit:
    """Return `split` as a data set for a build that renders the same views as the cache `like`.

    That build raises MismatchError at the first view that differs from the cache's.

    Raises: MismatchError if the sample ids differ.
    """
    check_ids(like, split.ids, f"{split.data}, split {split.split!r}")
    content = {field.name: getattr(split, field.name) for field in fields(Split)}
    return LikeSplit(**content, like=like, stored=False)


def stored_split(like: Cache) -> LikeSplit:
    """Return the samples of the cache `like` as a data set whose views are read from that cache.

    Raises: MismatchError if the cache does not store pixels, or does not hold digests of its images.
    """
    dataset = like.manifest.dataset
    if not (like.pixels_stored and like.manifest.records_contents):
        raise MismatchError(
            f"{like.place} does not store {'digests of its images' if like.pixels_stored else 'pixels'}",
            fix=f"Add --data (the folder of {dataset.name!r}).",
        )
    samples = []
    for number, name in enumerate(like.ids):
        first = like.manifest.record(number)
        image = StoredArray(like, first, "pixels/image", DIGESTS[0])
        labels = {
            task: StoredArray(like, first, f"labels/{task}", digest)
            for task, digest in _LABEL_DIGESTS.items()
            if like.labelled[task][number]
        }
        samples.append(Sample(name, image, labels, f"{dataset.name} {dataset.split} {name}"))
    classes, digest = ClassList(dataset.class_names, dataset.class_colours), dataset.ids_digest
    return LikeSplit(dataset.name, dataset.split, classes, tuple(samples), known_digest=digest, like=like, stored=True)


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray(Source[Any]):
    """A sample's image or label, read from a cache. It is stored there with the sample's first view.

    Attributes:
        cache: the cache.
        record: number of the record.
        array: path of the array with the image or label.
        of_content: path of the array with the digest of that image or label.
    """

    cache: Cache
    record: int
    array: str
    of_content: str

    def read(self) -> Array:
        """Return the image or label that the cache has stored. Raises: CorruptError for a damaged cache."""
        return self.cache.read(self.record, [self.array])[self.array]

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the first half of the data set file's SHA-256, as 32 hexadecimal digits. A cache keeps only that half.

        `of_file` is ignored.
        """
        return self.cache.read(self.record, [self.of_content])[self.of_content].tobytes().hex()


def stored_views(split: LikeSplit, records: Sequence[int]) -> list[Rendered]:
    """Read views from the existing cache `split.like`, instead of rendering them from the data set.

    `records` are the numbers of their records, from 0. Raises: CorruptError for a damaged cache.
    """
    like, read = split.like, list[Rendered]()
    paths = [path for path in like.specs if path.startswith(("pixels/", "labels/", "records/"))]
    for record in records:
        row, (sample, view) = like.read(record, paths), divmod(record, like.manifest.view.views_per_sample)
        read.append(
            Rendered(
                record=record,
                sample=sample,
                view=view,
                pixels=row["pixels/image"],
                taught=row["pixels/image"],
                label=row["labels/segmentation"],
                window=Window(*row["records/window"].tolist()),
                flip=bool(row["records/flip"]),
                source_size=tuple(row.get("records/source_size", np.zeros(2, np.int32)).tolist()),
                checksum=int(row["records/pixel_checksum"]),
                digests=np.stack([row.get(path, np.zeros(16, np.uint8)) for path in DIGESTS]),
                label_checksum=int(row["records/label_checksum"]),
                labelled=split.has_label(sample),
                depth=row.get("labels/depth"),
                depth_labelled=split.has_label(sample, DEPTH),
            )
        )
    return read


def render_records(
    split: Split,
    view: View,
    records: Iterable[int],
    depth: DepthLabels | None = None,
    of_file: FileDigest | None = None,
) -> list[Rendered]:
    """Render some views of one sample, whose files are read once.

    Args:
        split: the data set.
        view: how views are drawn and rendered.
        records: numbers of the records. All must belong to the same sample.
        depth: how depth labels are stored, or None to store none.
        of_file: a function that returns a file's digest, such as one that remembers digests. None reads the file.
    Raises: DataError for an image or label that cannot be read; MismatchError if `split` is a `LikeSplit` and the views
        differ from its cache's views.
    """
    numbers = list(records)
    if isinstance(split, LikeSplit) and split.stored:
        return stored_views(split, numbers)
    sample = numbers[0] // view.views_per_sample
    image, label = split.image(sample), split.label(sample)
    depth_labelled = depth is not None and split.has_label(sample, DEPTH)
    stored = depth is not None and bool(depth.labelled) and view.pixels == "stored"
    metres = split.label(sample, "depth") if stored and depth_labelled else None
    digests = short_digests(split, sample, of_file)
    rendered = []
    source_size = image.shape[0], image.shape[1]
    for record in numbers:
        number = record - sample * view.views_per_sample
        window, flip = _drawn(split, view, sample, number, source_size)
        pixels, small = render(image, label, window, flip=flip, size=view.size)
        taught = pixels
        if view.teacher_size is not None:
            taught, _ = render(image, None, window, flip=flip, size=view.teacher_size)
        far = None
        if depth is not None and stored:
            zoom = zoom_of(window, source_size, _share(view, source_size)) if depth.zoom == "divide" else 1.0
            far = render_depth(metres, window, flip=flip, size=view.size, zoom=zoom)
        rendered.append(
            Rendered(
                record=record,
                sample=sample,
                view=number,
                pixels=pixels,
                taught=taught,
                label=small,
                window=window,
                flip=flip,
                source_size=source_size,
                checksum=pixel_checksum(pixels),
                digests=digests,
                label_checksum=pixel_checksum(small),
                labelled=label is not None,
                depth=far,
                depth_labelled=depth_labelled,
            )
        )
    if isinstance(split, LikeSplit):
        split.check(rendered)
    return rendered


def render_batches(
    split: Split,
    manifest: Manifest,
    shards: Iterable[int],
    *,
    threads: int,
    ahead: bool,
    of_file: FileDigest | None = None,
) -> Iterator[Rendered]:
    """Yield the rendered records of some shards in order. Several threads render them.

    Args:
        split: the data set.
        manifest: the manifest of the build.
        shards: numbers of the shards.
        threads: number of threads. 0 renders in the calling thread.
        ahead: True renders several batches ahead, for a teacher on a GPU. False renders one batch at a time, because a
            teacher on the CPU needs all cores.
        of_file: a function that returns a file's digest, such as one that remembers digests. None reads the file.
    Raises: DataError for an image or label that cannot be read.
    """
    work = lambda records: render_records(split, manifest.view, records, manifest.depth, of_file)  # noqa: E731
    step, views = manifest.build.batch_size, manifest.view.views_per_sample
    batches = (_by_sample(batch, views) for shard in shards for batch in batches_of(manifest, shard))
    if ahead:
        most = max(1, 4 * step // views)
        yield from itertools.chain.from_iterable(
            prefetch(work, itertools.chain.from_iterable(batches), threads=threads, ahead=most)
        )
        return
    for batch in batches:
        for rendered in list(prefetch(work, batch, threads=threads, ahead=len(batch))):
            yield from rendered


def batches_of(manifest: Manifest, shard: int) -> list[range]:
    """Return the record numbers of shard number `shard`, divided into the teacher's batches."""
    first, last = manifest.shard_range(shard)
    step = manifest.build.batch_size
    return [range(at, min(at + step, last)) for at in range(first, last, step)]


def _by_sample(records: Sequence[int], views: int) -> list[list[int]]:
    return [list(same) for _, same in itertools.groupby(records, lambda record: record // views)]


def _drawn(split: Split, view: View, sample: int, number: int, image_size: tuple[int, int]) -> tuple[Window, bool]:
    if view.drawn is None:
        return whole_window(view.fit, image_size, view.size), False
    drawn, fitted = view.drawn, fitted_share(view.fit, image_size, view.image_size or view.size)
    return draw_view(
        drawn.seed, split.ids[sample], number, image_size, drawn.scale, drawn.flip, view.share, fitted=fitted
    )


def _share(view: View, image_size: tuple[int, int]) -> tuple[float, float]:
    """Return the size of a view at zoom 1, as fractions of the image's height and width."""
    fitted = fitted_share(view.fit, image_size, view.image_size or view.size)
    crop_share = view.share or (1.0, 1.0)
    return crop_share[0] * fitted[0], crop_share[1] * fitted[1]
