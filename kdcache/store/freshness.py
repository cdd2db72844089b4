"""The one comparison that every command makes between a data set and the cache that was built from it.

A file with another digest is not yet a change: it is rendered again, and counts as changed only if its pixels or its
label differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdcache.data import Changes, Contents, Split, Window, pixel_checksum, prefetch, read_contents, render
from kdcache.data.changes import name_changes
from kdcache.store.format.codec import Array
from kdcache.store.format.manifest import Manifest
from kdcache.store.reader import Cache

COLUMNS = ("image_digest", "label_digest", "label_checksum", "pixel_checksum", "window", "flip")


@dataclass(frozen=True)
class Recorded:
    """The facts that a cache's records hold about its data set, to find out whether the data set has changed.

    Attributes:
        ids: the sample ids.
        class_names: names of the classes.
        views: number of records per sample.
        columns: name, such as `image_digest` or `window` -> that array of all R records, (R, ...). Empty if the cache
            does not hold digests.
        known: bool (R,). False for records that could not be read, whose rows in `columns` mean nothing.
        size: (H, W) of the views in pixels.
    """

    ids: Sequence[str]
    class_names: tuple[str, ...]
    views: int
    columns: Mapping[str, Array]
    known: Array
    size: tuple[int, int]


@dataclass(frozen=True)
class BuiltFrom:
    """The data set of a build. A build that continues uses it to check that the data did not change meanwhile.

    Attributes:
        split: the data set. None compares only checksums of rendered views.
        checksums: called with a shard's number. It renders the shard's records again and returns their checksums: path
            of the checksum array -> uint64 (records of the shard,).
    """

    split: Split | None
    checksums: Callable[[int], Mapping[str, Array]]


def recorded_in(cache: Cache) -> Recorded:
    """Return what a complete cache records about the data set that it was built from: ids, classes and digests.

    They show later whether the data set has changed.
    """
    manifest = cache.manifest
    names = columns_of(manifest)
    return Recorded(
        ids=cache.ids,
        class_names=manifest.dataset.class_names,
        views=manifest.view.views_per_sample,
        columns={name: cache.column(name) for name in names},
        known=np.full(len(cache), bool(names)),
        size=manifest.view.size,
    )


def columns_of(manifest: Manifest) -> tuple[str, ...]:
    """Return the names of the `records/` arrays that are needed to detect a changed data set, such as `image_digest`.

    Empty if the cache with this manifest does not hold digests of its images and labels.
    """
    if not manifest.records_contents:
        return ()
    return (*COLUMNS, "depth_digest") if manifest.depth is not None and manifest.depth.labelled else COLUMNS


def renewal(place: object, data: str) -> str:
    """Return the `kdcache build-teacher-cache` command that builds a cache again from the current data, as text.

    `place` is the earlier cache, and `data` is the data set's folder or spec.
    """
    return f"kdcache build-teacher-cache --from {place} --data {data} --teacher TEACHER --out NEW"


def data_changes(
    source: Cache | Recorded,
    split: Split,
    *,
    indexed: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Changes:
    """Compare a data set with the data set that a cache was built from.

    Args:
        source: the cache, or what it records about its data set.
        split: the current data set.
        indexed: True takes the digests of files with unchanged size and time from an index, without reading them. False
            reads every file.
        progress: called with (samples read, total samples).
    Returns: the changes: ids of the samples that were added, removed or changed, and changed classes.
    Raises: DataError for a file that cannot be read. CorruptError for a damaged cache.
    """
    recorded = recorded_in(source) if isinstance(source, Cache) else source
    changes = name_changes(recorded.class_names, recorded.ids, split)
    if not recorded.columns:
        return Changes(**changes, recorded=False)
    numbers = {sample: number for number, sample in enumerate(split.ids)}
    known = recorded.known.reshape(-1, recorded.views).max(1)
    shared = [number for number, sample in enumerate(recorded.ids) if known[number] and sample in numbers]
    contents = read_contents(split, [numbers[recorded.ids[n]] for n in shared], indexed=indexed, progress=progress)
    return Changes(**changes, **_content_changes(recorded, split, shared, contents))


@dataclass
class _Found:
    images: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    depths: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)


def _content_changes(recorded: Recorded, split: Split, shared: Sequence[int], contents: Contents) -> dict[str, Any]:
    """Return the fields of `Changes` that follow from the samples' contents, by field name.

    `shared` has the indices of the recorded samples that the split also has. `contents` has their current digests in
    the same order.
    """
    columns, views = recorded.columns, recorded.views
    records = (np.array(shared, np.int64)[:, None] * views + np.arange(views)).reshape(-1)
    records = records[recorded.known[records]]
    at = np.searchsorted(shared, records // views)
    digests = {"image_digest": contents.image, "label_digest": contents.label, "depth_digest": contents.depth}
    differs = {name: (columns[name][records] != rows[at]).any(1) for name, rows in digests.items() if name in columns}
    doubtful = differs["image_digest"] | differs["label_digest"]
    found = _Found()
    by_sample: dict[int, list[int]] = {}
    for place in np.flatnonzero(doubtful).tolist():
        by_sample.setdefault(int(at[place]), []).append(int(records[place]))
    numbers = {sample: number for number, sample in enumerate(split.ids)}

    def again(item: tuple[int, list[int]]) -> tuple[bool, bool]:
        return _rendered_changes(recorded, split, numbers[contents.ids[item[0]]], item[1])

    for (sample, its), (image, label) in zip(
        by_sample.items(), prefetch(again, by_sample.items(), threads=2, ahead=8), strict=True
    ):
        had, has = columns["label_digest"][its[0]].any(), contents.label[sample].any()
        name = contents.ids[sample]
        found.images += [name] if image else []
        found.labels += [name] if label or bool(had) != bool(has) else []
        found.same += [name] if not (image or label or bool(had) != bool(has)) else []
    if "depth_digest" in differs:
        found.depths = [contents.ids[sample] for sample in np.unique(at[differs["depth_digest"]]).tolist()]
    return {name: tuple(ids) for name, ids in vars(found).items()}


def _rendered_changes(recorded: Recorded, split: Split, number: int, records: Sequence[int]) -> tuple[bool, bool]:
    """Render a sample's records again. Return whether any pixels changed, and whether any labels changed."""
    image, label = split.image(number), split.label(number)
    columns, images, labels = recorded.columns, False, False
    for record in records:
        window, flip = Window(*columns["window"][record].tolist()), bool(columns["flip"][record])
        pixels, small = render(image, label, window, flip=flip, size=recorded.size)
        images |= pixel_checksum(pixels) != int(columns["pixel_checksum"][record])
        labels |= pixel_checksum(small) != int(columns["label_checksum"][record])
    return images, labels
