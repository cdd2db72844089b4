"""A small cache of a few real records, which can be rewritten in any setting to measure its size."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache as remember
from pathlib import Path

import numpy as np
import torch

from kdcache.data import Split
from kdcache.data.folds import excerpt
from kdcache.store import Cache, Codec, evenly_spread, open_cache, open_writer, round_targets, summarise
from kdcache.store.format.eight_bits import StoredAs, feature_dtype, stored_features
from kdcache.store.format.shard import ShardArray
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache.teacher.build.build import build_cache
from kdcache.teacher.build.options import BuildOptions
from kdcache.teacher.build.probe import TeacherProbe
from kdcache.teacher.build.render import Array, render_records
from kdcache.teacher.load.forward import teach
from kdcache_kernels import densify, pack

Progress = Callable[[str, int, int], None]
Sizes = dict[str, float]
"""Path of an array -> bytes on disk per record."""
_TAP_RECORDS = 4  # for taps that the options do not name
_TARGET = "targets/segmentation/"
_OF_FEATURES = ("features/", "scales/")


@dataclass(frozen=True)
class Seconds:
    """Measured seconds per record: of a build, of its stages, and of reading a target.

    Attributes:
        build: the whole build.
        render: decoding and resizing the images.
        teach: the teacher's forward pass.
        write: compressing and writing.
        read: reading a target in a student's training, from the operating system's page cache.
    """

    build: float
    render: float
    teach: float
    write: float
    read: float


class Trial:
    """A small temporary cache of a few samples, which can be written again with other settings to measure its size.

    If the build draws crops, half of the records are crops, because crops compress differently.

    Args:
        probe: the split, the teacher and the options of the build.
        records: number of records to predict, at most the number of samples.
        folder: folder of the temporary caches.
        progress: called with (description of the step, records done, total records).

    Attributes:
        taught: number of predicted records.
        taps: names of the taps whose sizes the trial measured: those of the build, and up to three others.
    """

    def __init__(self, probe: TeacherProbe, records: int, folder: Path, progress: Progress) -> None:
        split, teacher, options = probe.split, probe.teacher, probe.options
        self._split, self._teacher, self._folder, self._progress = split, teacher, folder, progress
        self._drawn = options.views > 1 and options.crop is None
        samples = max(1, min(records, len(split)) // (2 if self._drawn else 1))
        self._shard_records = options.shard_records
        # All classes, numbers and pixels are kept, so that fewer can be written from them.
        top_k = len(split.classes) if SEGMENTATION in probe.heads else None
        self._options = replace(options, top_k=top_k, codec="default", pixels="stored", views=1, feature_dtype="fp16")
        self._build("warming up", 1, self._options)  # compiles kernels, which a large build does not notice
        self._whole, seconds = self._build("teaching a few images", samples, self._options)
        self._build_seconds = seconds / samples
        self._both, self.taught = self._whole, samples
        if self._drawn:
            self._both, _ = self._build("and views of them", samples, replace(self._options, views=2), self._whole)
            self.taught = 2 * samples
        others = () if teacher.folds else tuple(tap for tap in teacher.model.taps[-3:] if tap not in options.features)
        self.taps = (*options.features, *others)
        self._more: Cache | None = None
        if others:
            few = replace(self._options, features=others, statistics=())
            self._more, _ = self._build("and further taps", min(_TAP_RECORDS, samples), few)
        self._rewritten = remember(self.rewrite)

    def sizes(
        self, k: int | None, codec: Codec, views: int, features: Sequence[str], dtype: StoredAs = "fp16"
    ) -> Sizes:
        """Return the mean bytes on disk per record of each array, by path, as a cache with these settings would have.

        Args:
            k: number of stored classes, or None without a segmentation head.
            codec: how arrays are compressed: `default`, `small` or `none`.
            views: number of views per sample.
            features: names of the stored taps.
            dtype: data type of stored features, `fp16` or `uint8`.
        """
        first_sizes, all_sizes = (self._rewritten(cache, k, codec, dtype)[0] for cache in (self._whole, self._both))
        sizes = {}
        for path, size in first_sizes.items():
            drawn = 2 * all_sizes[path] - size if self._drawn else size
            sizes[path] = (size + (views - 1) * drawn) / views
        if self._more is not None and not set(features) <= set(self._options.features):
            sizes |= self._rewritten(self._more, _classes_of(self._more), codec, dtype)[0] | sizes
        taps = {f"{folder}{tap}" for tap in features for folder in _OF_FEATURES}
        return {path: size for path, size in sizes.items() if path in taps or not path.startswith(_OF_FEATURES)}

    def error(self, paths: Iterable[str], k: int | None, codec: Codec, dtype: StoredAs = "fp16") -> float:
        """Return the relative standard error of the trial's mean bytes per record, as an estimate for the whole split.

        It is 0 if the trial has all samples of the split.

        Args:
            paths: paths of the arrays to count.
            k: number of stored classes, or None without a segmentation head.
            codec: how arrays are compressed: `default`, `small` or `none`.
            dtype: data type of stored features, `fp16` or `uint8`.
        """
        self._rewritten(self._both, k, codec, dtype)
        arrays = [ShardArray(self._path(self._both, k, codec, dtype) / path) for path in paths]
        sizes_R = [sum(array.bytes_of(record) for array in arrays) for record in range(len(self._both))]
        unseen = 1 - self._whole.manifest.dataset.samples / len(self._split)
        return float(np.std(sizes_R) / np.mean(sizes_R) * (unseen / len(sizes_R)) ** 0.5)

    def seconds(self, k: int | None, codec: Codec, dtype: StoredAs = "fp16") -> Seconds:
        """Measure how long each stage of a build takes, such as the teacher's forward pass, in seconds per record.

        Args:
            k: number of stored classes for each pixel, or None without a segmentation head.
            codec: how arrays are compressed: `default`, `small` or `none`.
            dtype: data type of stored features, `fp16` or `uint8`.
        """
        options, view = self._options, self._whole.manifest.view
        part = self._part(min(options.batch_size, len(self._whole)))
        began = time.perf_counter()
        items = [render_records(part, view, [number])[0] for number in range(len(part))]
        rendered = time.perf_counter()
        pixels = torch.from_numpy(np.stack([item.taught for item in items]))
        model = self._teacher.model_for(0 if self._teacher.folds else None)
        outputs = teach(model, pixels, options.features, options.precision, options.device)
        for output in (*outputs.heads.values(), *outputs.features.values()):
            output.cpu()
        taught = time.perf_counter()
        _, written = self._rewritten(self._whole, k, codec, dtype)
        return Seconds(
            build=self._build_seconds,
            render=(rendered - began) / len(part),
            teach=(taught - rendered) / len(part),
            write=written / len(self._whole),
            read=self._read_seconds(k, codec, dtype),
        )

    def _part(self, samples: int) -> Split:
        """Return a split with some samples. They are spread evenly over those with and without depth labels."""
        labelled = self._split.labelled(DEPTH)
        order = [*labelled, *sorted(set(range(len(self._split))) - set(labelled))]
        return excerpt(self._split, sorted(order[place] for place in evenly_spread(len(order), samples)))

    def _build(self, what: str, samples: int, options: BuildOptions, reuse: Cache | None = None) -> tuple[Cache, float]:
        """Build a cache of some samples. Return it, and the seconds of the teacher's pass."""
        part, out = self._part(samples), self._folder / what.replace(" ", "-")
        # An index has a place for every chunk of a full shard: with smaller ones a record bears as much of it.
        options = replace(options, shard_records=min(self._shard_records, samples * options.views))
        report = lambda done, total: self._progress(what, done, total)  # noqa: E731
        result = build_cache(part, self._teacher, out, options, report, reuse=reuse)
        return open_cache(out), result.seconds

    def _path(self, cache: Cache, k: int | None, codec: Codec, dtype: StoredAs) -> Path:
        return cache.path.with_name(f"{cache.path.name}-{k}-{codec}-{dtype}")

    def rewrite(self, cache: Cache, k: int | None, codec: Codec, dtype: StoredAs) -> tuple[Sizes, float]:
        """Write a small cache again with other settings, and return its sizes and the seconds of writing.

        Args:
            cache: the small cache, with all classes and float16 features.
            k: number of classes to keep, or None without a segmentation head.
            codec: how arrays are compressed in the new cache: `default`, `small` or `none`.
            dtype: data type of features in the new cache, `fp16` or `uint8`.
        Returns: path of each array -> bytes on disk per record, and the seconds.
        """
        out, seconds = self._path(cache, k, codec, dtype), 0.0
        fewer = {} if k is None else {SEGMENTATION: cache.head.model_copy(update={"k": k})}
        features = {
            tap: feature.model_copy(update={"dtype": feature_dtype(dtype, feature.size)})
            for tap, feature in cache.manifest.features.items()
        }
        changes = {"heads": {**cache.manifest.heads, **fewer}, "codec": codec, "features": features}
        manifest = cache.manifest.model_copy(update=changes)
        with open_writer(out, manifest, cache.ids) as writer:
            for shard in writer.claimed():
                rows = _rows(cache, range(*manifest.shard_range(shard)))
                if k is not None and k != cache.head.k:
                    rows = _keep(rows, k, cache.num_classes)
                rows = round_targets(rows, codec)
                began = time.perf_counter()
                rows = stored_features(rows, features)
                writer.write_shard(shard, rows)
                seconds += time.perf_counter() - began
            writer.seal()
        summary = summarise(open_cache(out))
        return {array.path: array.bytes_on_disk / len(cache) for array in summary.arrays}, seconds

    def _read_seconds(self, k: int | None, codec: Codec, dtype: StoredAs) -> float:
        self._rewritten(self._whole, k, codec, dtype)
        cache = open_cache(self._path(self._whole, k, codec, dtype))
        folders = "targets/" if cache.manifest.heads else (*_OF_FEATURES, "statistics/")
        paths = [path for path in cache.specs if path.startswith(folders)]
        for _ in range(2):  # the first time opens shards
            began = time.perf_counter()
            for record in range(len(cache)):
                cache.read(record, paths)
        return (time.perf_counter() - began) / len(cache)


def _classes_of(cache: Cache) -> int | None:
    """Return the number of classes that a cache keeps, or None without a head of classes."""
    head = cache.manifest.segmentation
    return None if head is None else head.k


def _rows(cache: Cache, records: Sequence[int]) -> dict[str, Array]:
    read = [cache.read(record, list(cache.specs)) for record in records]
    return {path: np.stack([row[path] for row in read]) for path in cache.specs}


def _keep(rows: dict[str, Array], k: int, classes: int) -> dict[str, Array]:
    """Return a dense cache's arrays with only k classes of their targets."""
    parts = pack(densify(torch.from_numpy(rows[_TARGET + "values"]), None, None, classes), k)
    names = ("values", "indices", "tail")
    return rows | {_TARGET + name: part.numpy() for name, part in zip(names, parts, strict=True) if part is not None}
