"""The summary of a cache, complete or not, that `kdcache inspect` prints."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.display import bare
from kdcache.store import ledger
from kdcache.store.backend.base import Place
from kdcache.store.backend.open import open_place
from kdcache.store.format.eight_bits import describe
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.schema import record_arrays
from kdcache.store.ledger import ShardRecord
from kdcache.store.reader import Cache, open_cache, read_manifest
from kdcache.store.subset import evenly_spread

_MASS_RECORDS = 16  # records whose tails are read for the top-k mass


@dataclass(frozen=True)
class ArraySummary:
    """The size of one array of a cache.

    Attributes:
        path: the array's path in the cache.
        shape: shape of one record.
        dtype: name of the dtype.
        bytes_plain: uncompressed size of all written records, in bytes.
        bytes_on_disk: size of all written shard files, in bytes.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes_plain: int
    bytes_on_disk: int

    @property
    def ratio(self) -> float:
        """The compression ratio: uncompressed bytes divided by bytes on disk, or 0 if nothing is written."""
        return self.bytes_plain / self.bytes_on_disk if self.bytes_on_disk else 0.0


@dataclass(frozen=True)
class StoreSummary:
    """The summary of a cache, finished or not.

    Attributes:
        path: the cache's folder or address.
        manifest: the cache's manifest.
        complete: True if the cache is finished.
        shards_written: number of finished shards.
        records_written: number of records in finished shards.
        arrays: the size of each array.
        topk_mass: mean total probability of the k stored classes, 0 to 1. None if unknown or if all are stored.
        seal: digest of the seal, or None for an unfinished cache.
        missing: numbers of the shards that are not finished, ascending.
    """

    path: str
    manifest: Manifest
    complete: bool
    shards_written: int
    records_written: int
    arrays: tuple[ArraySummary, ...]
    topk_mass: float | None
    seal: str | None = None
    missing: tuple[int, ...] = ()

    @property
    def bytes_on_disk(self) -> int:
        """The size of all arrays on disk, in bytes."""
        return sum(array.bytes_on_disk for array in self.arrays)

    @property
    def bytes_per_record(self) -> float:
        """The bytes on disk per written record."""
        return self.bytes_on_disk / max(self.records_written, 1)

    @property
    def target_bytes_per_record(self) -> float:
        """The bytes on disk that the teacher's targets take per written record."""
        targets = sum(array.bytes_on_disk for array in self.arrays if array.path.startswith("targets/"))
        return targets / max(self.records_written, 1)

    @property
    def full_resolution_bytes(self) -> int:
        """The bytes per record that float16 outputs of all heads at view size would take, for comparison."""
        height, width = self.manifest.view.size
        channels = sum(head.classes for head in self.manifest.categorical.values())
        channels += sum(head.channels for head in self.manifest.regressions.values())
        return channels * height * width * 2

    @property
    def saving(self) -> float:
        """How many times larger float16 outputs at view size would be than the stored targets, or 0 without targets."""
        return self.full_resolution_bytes / self.target_bytes_per_record if self.target_bytes_per_record else 0.0

    def facts(self) -> list[tuple[str, str]]:
        """Return the summary as (name, value) pairs of text, for a printed table."""
        m = self.manifest
        state = "complete" if self.complete else "incomplete: run the same command again to continue"
        rows = [
            ("cache", f"{self.path} (format {m.version}, {m.created_by}, {m.created})"),
            ("state", f"{state}; {self.shards_written} of {m.shards} shards, {self.records_written} records"),
            ("data", f"{m.dataset.name}, split {m.dataset.split}: {m.dataset.samples} samples, "
                     f"{m.dataset.labelled} labelled, {len(m.dataset.class_names)} classes"),
            ("view", f"{m.view.kind} at {_size(m.view.size)}, pixels {m.view.pixels}{_drawn(m)}"),
            ("teacher", f"{bare(m.teacher.spec)}, {m.teacher.precision}, weights "
                        f"{m.teacher.weights[:12]}{_several(m)}"),
            ("targets", "; ".join(_targets(m)) or f"none, features alone: {', '.join((*m.features, *m.statistics))}"),
            ("codec", m.codec),
            ("built", f"batch {m.build.batch_size}, {m.build.device}, {m.build.threads} threads, "
                      f"shards of {m.build.shard_records} records"),
            ("size", f"{self.bytes_on_disk:,} bytes, {self.bytes_per_record:,.0f} per record, "
                     f"targets {self.target_bytes_per_record:,.0f}"
                     + (f": full-resolution fp16 {'values' if m.segmentation is None else 'logits'} would be "
                        f"{self.full_resolution_bytes:,}, {self.saving:.1f} times as much" if m.heads else "")),
        ]  # fmt: skip
        if self.missing:
            rows.append(("missing", f"shards {_ranges(self.missing)}; shard k is one of --worker I/N with I = k mod N"))
        if m.depth is not None and m.depth.labelled:
            zoom = {"none": "", "divide": ", divided by the zoom of each view", "keep": ", not divided by a zoom"}
            place = "in the data set" if m.view.pixels == "source" else "stored"
            text = f"labels of {m.depth.labelled} samples in metres, {place}{zoom[m.depth.zoom]}"
            rows.insert(3, ("depth", text))
        if m.teacher.parents:
            at = next(row for row, (name, _) in enumerate(rows) if name == "targets")
            rows.insert(at, ("parents", f"the teacher is a student of {', '.join(m.teacher.parents)}"))
        if m.fidelity is not None:
            at = next(row for row, (name, _) in enumerate(rows) if name == "built")
            rows.insert(at, ("fidelity", m.fidelity.describe()))
        if m.features:
            taps = ", ".join(f"{tap} {f.channels}x{f.size[0]}x{f.size[1]} {f.dtype}" for tap, f in m.features.items())
            rows[6:6] = [("features", taps), *(("", line) for line in describe(m.features, m.feature_fidelity))]
        if m.statistics:
            names = ", ".join(f"{name} {_size(statistic.size)}" for name, statistic in m.statistics.items())
            rows.insert(6, ("statistics", names))
        if self.topk_mass is not None:
            rows.append(("top-k mass", f"{100 * self.topk_mass:.3f} % of the probability is inside the kept classes"))
        if self.seal is not None:
            rows.append(("seal", self.seal))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values, including its arrays and its manifest."""
        names = ["path", "complete", "seal", "shards_written", "records_written", "bytes_on_disk", "bytes_per_record"]
        names += ["target_bytes_per_record", "full_resolution_bytes", "topk_mass", "missing"]
        arrays = [{**asdict(array), "ratio": array.ratio} for array in self.arrays]
        manifest = self.manifest.model_dump(mode="json")
        return {
            **{name: getattr(self, name) for name in names},
            "arrays": arrays,
            "manifest": manifest,
        }


def inspect_store(location: str | Path | Place) -> StoreSummary:
    """Return the summary of the cache at `location`, finished or not.

    Raises: StoreError if there is no cache; VersionError for an unsupported format; CorruptError for a damaged cache.
    """
    place = open_place(location)
    manifest = read_manifest(place)
    if ledger.read_completion(place) is not None:
        return summarise(open_cache(place))
    records = [record for shard in range(manifest.shards) if (record := ledger.read_shard_record(place, shard))]
    written = {record.shard for record in records}
    missing = tuple(shard for shard in range(manifest.shards) if shard not in written)
    return replace(_summary(str(place), manifest, records, None), missing=missing)


def summarise(cache: Cache) -> StoreSummary:
    """Return the summary of an open cache.

    Raises: CorruptError if a file is missing or has another size.
    """
    cache.check_files()
    records = [] if cache.ledger is None else [cache.ledger.record(shard) for shard in range(len(cache.ledger))]
    return _summary(str(cache.place), cache.manifest, records, cache)


def _summary(name: str, manifest: Manifest, records: Sequence[ShardRecord], cache: Cache | None) -> StoreSummary:
    written = sum(record.records[1] - record.records[0] for record in records)
    sizes: dict[str, int] = {}
    for record in records:
        for key, file in record.files.items():
            array = key.rsplit("/c/", 1)[0]
            sizes[array] = sizes.get(array, 0) + file.bytes
    arrays = tuple(
        ArraySummary(spec.path, spec.shape, spec.dtype, spec.record_bytes * written, sizes.get(spec.path, 0))
        for spec in record_arrays(manifest)
    )
    head = manifest.segmentation
    mass = None if cache is None or head is None or head.dense else _topk_mass(cache)
    seal = None if cache is None or cache.ledger is None else cache.ledger.completion.digest
    return StoreSummary(name, manifest, cache is not None, len(records), written, arrays, mass, seal)


def _ranges(numbers: Sequence[int]) -> str:
    """Return the numbers 0, 3, 4, 5 as '0, 3-5'."""
    ends = [[number, number] for number in numbers[:1]]
    for number in numbers[1:]:
        if number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _targets(manifest: Manifest) -> Iterator[str]:
    """Yield a line of text for each head: what is stored of it."""
    for head in manifest.categorical.values():
        classes = "all classes" if head.dense else f"top {head.k} of {head.classes} classes"
        grid = "averaged" if head.resampled else "native stride"
        yield f"{classes} at {_size(head.size)} ({grid})" + (", and every pixel's largest logit" if head.raw else "")
    for name, regression in manifest.regressions.items():
        bounds = "" if regression.range is None else f" from {regression.range[0]:g} to {regression.range[1]:g}"
        yield (
            f"{name}{bounds} {regression.unit} at {_size(regression.size)} (native stride, {regression.dtype}, "
            f"{regression.parameterisation})"
        )


def _several(manifest: Manifest) -> str:
    """Return the members of an ensemble, and how they are combined."""
    teacher = manifest.teacher
    members = ", ".join(f"{member.share:.0%} {bare(member.spec)}" for member in teacher.members)
    parts = [members] if members else []
    if teacher.folds is not None:
        parts.append(f"one for each of {teacher.folds} folds")
    if teacher.folds_by is not None:
        parts[-1] += f" of the sequences {teacher.folds_by}"
    if teacher.tta is not None:
        scales = ", ".join(f"{scale:g}" for scale in teacher.tta.scales)
        parts.append(f"at scales {scales}" + (" and mirrored" if teacher.tta.flip else ""))
    return "".join(f"; {part}" for part in parts)


def _drawn(manifest: Manifest) -> str:
    view, drawn = manifest.view, manifest.view.drawn
    text = f", taught at {_size(view.teacher_size)}" if view.teacher_size else ""
    text += f", of images at {_size(view.image_size)}" if view.image_size else ""
    if drawn is None:
        return text
    return (
        f"{text}; {view.views_per_sample} per sample, crops zoomed {drawn.scale[0]:g} to {drawn.scale[1]:g} times"
        f"{', half of them mirrored' if drawn.flip else ''}, seed {drawn.seed}"
    )


def _topk_mass(cache: Cache) -> float:
    """Return the mean probability inside the top k over a few records: sigmoid of minus the tail's log-odds."""
    path = "targets/segmentation/tail"
    records = evenly_spread(len(cache), _MASS_RECORDS)
    tails = np.stack([cache.read(record, [path])[path] for record in records]).astype(np.float64)
    return float(np.mean(1.0 / (1.0 + np.exp(np.clip(tails, -700, 700)))))
