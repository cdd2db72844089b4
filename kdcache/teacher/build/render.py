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
    """One record before the teacher sees it.

    Attributes:
        taught: the teacher's input: the pixels, or a larger rendering of the same window.
        old: the equal record of an earlier cache, if any. fold: the member of the teacher that predicts it.
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
    """A data set whose views must equal a cache's, record by record.

    Attributes:
        like: the cache.
        stored: whether the views are read from the cache, which stores their pixels, instead of rendered.
    """

    like: Cache
    stored: bool

    @cached_property
    def checksums(self) -> Array:
        """The checksum of the pixels of every view, (R,) uint64."""
        return self.like.column("pixel_checksum")

    def check(self, rendered: Iterable[Rendered]) -> None:
        """Check that views equal the cache's. Raises: MismatchError naming the first that differs."""
        for item in rendered:
            if item.checksum != int(self.checksums[item.record]):
                pillow = pillow_of(self.like.manifest)
                fix = f"Give the images that {self.like.place} was built from, with Pillow {pillow}"
                fix += ", or leave --data out to use the stored pixels." if self.like.pixels_stored else "."
                raise other_view(self.like, item.record, self.data, metadata.version("pillow"), fix=fix)


def split_like(like: Cache, split: Split) -> LikeSplit:
    """Return a data set whose views must equal a cache's. Raises: MismatchError for other samples than its."""
    check_ids(like, split.ids, f"{split.data}, split {split.split!r}")
    content = {field.name: getattr(split, field.name) for field in fields(Split)}
    return LikeSplit(**content, like=like, stored=False)


def stored_split(like: Cache) -> LikeSplit:
    """Return the samples of a cache with pixels, which need no rendering.

    Raises: MismatchError for a cache without pixels, or without digests of its images.
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
    """An array of a sample's first view in a cache, and the path of its digest there."""

    cache: Cache
    record: int
    array: str
    of_content: str

    def read(self) -> Array:
        """Return the array of the view. Raises: CorruptError as `Cache.read`."""
        return self.cache.read(self.record, [self.array])[self.array]

    def digest(self, of_file: FileDigest | None = None) -> str:
        """Return the first half of the digest, which is all that a cache has."""
        return self.cache.read(self.record, [self.of_content])[self.of_content].tobytes().hex()


def stored_views(split: LikeSplit, records: Sequence[int]) -> list[Rendered]:
    """Return the views of the cache. Raises: CorruptError as `Cache.read`."""
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
    """Return views of one sample, which is read once.

    `depth` says how depth labels are stored. None stores none. `of_file` is as in `Split.content_digests`.

    Raises: DataError as `Split.image` and `Split.label`.
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
    """Yield the records of some shards in order, rendered by threads: far ahead, or one batch of the teacher at a time.

    A CPU teacher's threads meet at a barrier after every operation. Rendering at the same time takes one of their cores
    and makes the others wait: with a small teacher that took a third of the build's CPU time.
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
    """Return the records of a shard in the teacher's batches."""
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
    """Return the size of a view at zoom 1, as a part of the image's height and width."""
    fitted = fitted_share(view.fit, image_size, view.image_size or view.size)
    shown = view.share or (1.0, 1.0)
    return shown[0] * fitted[0], shown[1] * fitted[1]
