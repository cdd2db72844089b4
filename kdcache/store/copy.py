"""Copy a cache: into another codec or other shards, in part, without some arrays, to and from object stores.

An array with unchanged shards is copied file by file, and each file is compared with the ledger's digest. Any other
array is read row by row, rounded if the codec asks for it, and encoded again.

A copy is written like any cache: it continues after an interruption, and several workers may share it. It keeps the
source's `created`, the time when its teacher ran, which distinguishes it from a copy of another cache. A copy names
the teacher's code without the folder that caches of earlier versions have.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kdcache.data import ids_digest
from kdcache.errors import MismatchError, StoreError, suggest
from kdcache.store.backend.open import open_place
from kdcache.store.format.codec import Array, round_targets
from kdcache.store.format.damage import damaged, unreadable
from kdcache.store.format.eight_bits import (
    FeatureFidelity,
    StoredAs,
    check_cells,
    feature_dtype,
    measure,
    stored_features,
)
from kdcache.store.format.manifest import Codec, Manifest
from kdcache.store.format.manifest_models import Dataset, Feature, Fidelity
from kdcache.store.format.schema import ArraySpec, record_arrays, shard_key
from kdcache.store.reader import Cache
from kdcache.store.subset import SAMPLE_RECORDS, evenly_spread
from kdcache.store.worker import Worker
from kdcache.store.writer import StoreWriter, open_writer
from kdcache.tasks import DEPTH, SEGMENTATION


@dataclass(frozen=True)
class CopyChanges:
    """The differences between a copy and its source cache. None keeps the source's value.

    Attributes:
        codec: how arrays are compressed: `default`, `small` or `none`. `small` also rounds logits.
        shard_records: records per shard.
        samples: which samples to copy, as ascending indices of the source's samples. All their views are copied.
        features: names of the taps to copy. An empty sequence copies none.
        feature_dtype: data type of stored features, `fp16` or `uint8`. Taps with fewer than 16 cells are always fp16.
        pixels: `stored` copies images and labels, `source` leaves them out.
    """

    codec: Codec | None = None
    shard_records: int | None = None
    samples: Sequence[int] | None = None
    features: Sequence[str] | None = None
    pixels: Literal["stored", "source"] | None = None
    feature_dtype: StoredAs | None = None


@dataclass(frozen=True)
class CopyResult:
    """The result of `copy_store`.

    Attributes:
        manifest: the copy's manifest.
        records: number of records that this call copied.
        skipped: number of records that an earlier call had already copied.
        seconds: duration of the copying.
        complete: False if other workers have not finished their shards yet.
    """

    manifest: Manifest
    records: int
    skipped: int
    seconds: float
    complete: bool


def copy_store(
    source: Cache,
    destination: str | Path,
    changes: CopyChanges | None = None,
    *,
    fidelity: Fidelity | None = None,
    worker: Worker | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CopyResult:
    """Copy an open cache. After an interruption, the same call continues.

    If the copy is already finished, its files are checked and damaged shards are copied again.

    Args:
        source: the cache to copy.
        destination: a new or empty folder or object-store address, or an unfinished copy.
        changes: how the copy differs from the source. None copies everything unchanged.
        fidelity: the measured error of rounded logits, for the copy's manifest, or None if it was not measured. Used
            only if the codec of `changes` rounds (see `rounds`).
        worker: this process's part of a copy that several processes share. Default: all of it.
        progress: called with (records done, total records). Records of earlier calls count as done.

    Raises:
        CorruptError: a file of the source is damaged. Its shard does not count as copied.
        StoreError: `changes` are impossible for this source, or the destination cannot be written.
        MismatchError: the destination holds another cache.
    """
    changes = changes or CopyChanges()
    _check_elsewhere(source, destination)
    numbers = _numbers(source, changes)
    manifest = copied_manifest(source, changes, fidelity)
    with open_writer(destination, manifest, [source.ids[number] for number in numbers], worker) as writer:
        if writer.manifest.created != manifest.created:
            raise MismatchError(
                f"Cannot continue {writer.place}: it copies a cache built {writer.manifest.created}, but "
                f"{source.place} was built {manifest.created}",
                fix="Copy into a new or empty place.",
            )
        copying = _Copying(source, writer, numbers)
        mine = sum(map(manifest.shard_records, writer.worker.shards(manifest.shards)))
        already = mine - sum(map(manifest.shard_records, writer.missing))
        copied = 0
        began = time.perf_counter()
        for shard in itertools.chain.from_iterable(writer.passes()):
            writer.write_shard(shard, _Shard(copying, shard))
            copied += manifest.shard_records(shard)
            if progress is not None:
                progress(already + copied, mine)
        seconds = time.perf_counter() - began
        return CopyResult(writer.manifest, copied, mine - copied, seconds, writer.seal())


def _check_elsewhere(source: Cache, destination: str | Path) -> None:
    """Check that source and destination differ: a damaged cache copied onto itself would lose its seal."""
    place = open_place(destination)
    same = str(place).rstrip("/") == str(source.place).rstrip("/")
    if same or (not place.remote and not source.remote and place.folder.resolve() == source.path.resolve()):
        raise StoreError(f"Source and destination are the same cache: {place}", fix="Give another folder or address.")


def rounds(source: Manifest, codec: Codec | None) -> bool:
    """Return True if a copy with the codec `codec` rounds targets that the source cache stores unrounded.

    `source` is the source's manifest. If `codec` is None, the copy keeps the source's codec.
    """
    return codec == "small" and source.codec != "small"


def _numbers(source: Cache, changes: CopyChanges) -> list[int]:
    return list(range(source.manifest.dataset.samples) if changes.samples is None else changes.samples)


def copied_manifest(source: Cache, changes: CopyChanges, fidelity: Fidelity | None = None) -> Manifest:
    """Return the manifest that a copy by `copy_store` would have, without copying.

    `fidelity` is the measured error of rounded logits, or None if it was not measured. It is used only if the codec of
    `changes` rounds (see `rounds`).

    Raises: StoreError if `changes` are impossible for this source; RecipeError if they ask for 8-bit features, but all
        taps have fewer than 16 cells.
    """
    manifest, numbers = source.manifest, _numbers(source, changes)
    _check(source, changes)
    features = _features(manifest, changes)
    pixels = changes.pixels or manifest.view.pixels
    return manifest.model_copy(
        update={
            "records": len(numbers) * manifest.view.views_per_sample,
            "dataset": manifest.dataset if changes.samples is None else _part_of_dataset(source, numbers),
            "depth": manifest.depth
            if changes.samples is None or manifest.depth is None
            else manifest.depth.model_copy(update={"labelled": int(np.count_nonzero(source.labelled[DEPTH][numbers]))}),
            "view": manifest.view.model_copy(update={"pixels": pixels}),
            "features": features,
            "feature_fidelity": _feature_fidelity(source, features),
            "build": manifest.build.model_copy(
                update={"shard_records": changes.shard_records or manifest.build.shard_records}
            ),
            "codec": changes.codec or manifest.codec,
            "teacher": manifest.teacher.without_folders(),
            "fidelity": fidelity if rounds(manifest, changes.codec) else manifest.fidelity,
        }
    )


def _features(manifest: Manifest, changes: CopyChanges) -> dict[str, Feature]:
    """Return the manifest's entries for the taps of a copy. Raises: RecipeError if no tap can be stored in 8 bits."""
    kept = {
        tap: feature
        for tap, feature in manifest.features.items()
        if changes.features is None or tap in changes.features
    }
    if changes.feature_dtype is None:
        return kept
    check_cells(changes.feature_dtype, {tap: feature.size for tap, feature in kept.items()})
    return {
        tap: feature.model_copy(update={"dtype": feature_dtype(changes.feature_dtype, feature.size)})
        for tap, feature in kept.items()
    }


def _feature_fidelity(source: Cache, features: Mapping[str, Feature]) -> dict[str, FeatureFidelity]:
    """Return what the taps of a copy lose: the source's figures, or the loss of 8 bits against float16."""
    known, lost = source.manifest.feature_fidelity, dict[str, FeatureFidelity]()
    for tap, feature in features.items():
        if feature.dtype == "uint8" and source.manifest.features[tap].dtype == "float16" and tap not in known:
            lost[tap] = measure(source.feature(record, tap) for record in evenly_spread(len(source), SAMPLE_RECORDS))
        elif tap in known:
            lost[tap] = known[tap]
    return lost


def _part_of_dataset(source: Cache, numbers: Sequence[int]) -> Dataset:
    manifest = source.manifest
    return manifest.dataset.model_copy(
        update={
            "samples": len(numbers),
            "labelled": int(np.count_nonzero(source.labelled[SEGMENTATION][numbers])),
            "ids_digest": ids_digest(manifest.dataset.class_names, [source.ids[number] for number in numbers]),
        }
    )


_MORE_TAPS = (
    "To add taps, build a cache from it: kdcache build-teacher-cache --from OLD --data DATA --teacher TEACHER "
    "--features TAP --out NEW"
)


def _check(source: Cache, changes: CopyChanges) -> None:
    """Raise StoreError for changes that the source does not allow."""
    manifest = source.manifest
    unknown = sorted(set(changes.features or ()) - set(manifest.features))
    if unknown:
        raise StoreError(
            f"Unknown tap {', '.join(unknown)}: {source.place} has {', '.join(manifest.features) or 'no taps'}",
            fix=suggest(unknown[0], manifest.features, _MORE_TAPS),
        )
    if changes.pixels == "stored" and manifest.view.pixels != "stored":
        raise StoreError(
            f"Cannot copy pixels: {source.place} was built with --pixels source",
            fix="Render them from the data set: kdcache build-teacher-cache --from OLD --pixels stored",
        )
    if changes.samples is not None and (changes.pixels or manifest.view.pixels) == "source":
        raise StoreError(
            "Cannot copy some of the samples without pixels: no data set would fit the copy",
            fix="Copy all samples, or copy from a cache with pixels. Onto the Hub, copy with --pixels stored",
        )


class _Copying:
    """The source of a copy's shards.

    Args:
        numbers: numbers of the copied samples.
    """

    def __init__(self, source: Cache, writer: StoreWriter, numbers: Sequence[int]) -> None:
        self.source = source
        self.manifest = writer.manifest
        self.specs = {spec.path: spec for spec in record_arrays(writer.manifest)}
        self.numbers = numbers
        self.whole = set[str]()
        if source.ledger is not None and len(numbers) == source.manifest.dataset.samples:
            source_metadata = source.ledger.completion.metadata
            same_codec = source.manifest.codec == self.manifest.codec  # then nothing is rounded
            self.whole = {
                path
                for path in self.specs
                if (same_codec or not path.startswith("targets/"))
                and writer.place.digest(f"{path}/zarr.json") == source_metadata.get(f"{path}/zarr.json")
            }

    def content(self, path: str, shard: int) -> Array | bytes:
        """Return a shard of an array: the file of the source, or its rows."""
        spec = self.specs[path]
        return self._file(spec, shard) if path in self.whole else self._rows(spec, shard)

    def _file(self, spec: ArraySpec, shard: int) -> bytes:
        """Return the bytes of a shard's file of the source. Raises CorruptError if the ledger has another digest."""
        assert self.source.ledger is not None
        place, key = self.source.place, shard_key(spec, shard)
        expected = self.source.ledger.file(shard, key)
        try:
            content = place.read(key, expected.bytes, expected.sha256)
        except (OSError, ValueError) as error:
            raise unreadable(place.describe(key), "the file cannot be read", error) from error
        if hashlib.sha256(content).hexdigest() == expected.sha256:
            return content
        raise damaged(place.describe(key), "its bytes are not those that were written")

    def _rows(self, spec: ArraySpec, shard: int) -> Array:
        first, last = self.manifest.shard_range(shard)
        views = self.manifest.view.views_per_sample
        if spec.path == "records/sample":
            return np.arange(first, last, dtype=spec.dtype) // views
        if spec.path not in self.source.specs or self.source.specs[spec.path].dtype != spec.dtype:
            return self._converted(spec, shard)
        rows = np.empty((last - first, *spec.shape), spec.dtype)
        for place, record in enumerate(range(first, last)):
            self.source.read_into(self._source_record(record), spec.path, rows[place, ...])
        return round_targets({spec.path: rows}, self.manifest.codec)[spec.path]

    def _converted(self, spec: ArraySpec, shard: int) -> Array:
        """Return a shard of features, or of their scales, that the source stores in another type."""
        tap = spec.path.partition("/")[2]
        first, last = self.manifest.shard_range(shard)
        maps = np.stack([self.source.feature(self._source_record(record), tap) for record in range(first, last)])
        return stored_features({f"features/{tap}": maps}, self.manifest.features)[spec.path]

    def _source_record(self, record: int) -> int:
        views = self.manifest.view.views_per_sample
        return self.source.manifest.record(self.numbers[record // views], record % views)


class _Shard(dict[str, Array | bytes]):
    """The arrays of one shard. Each is made when it is used and then dropped, so memory holds one of them."""

    def __init__(self, copying: _Copying, shard: int) -> None:
        self._copying, self._number = copying, shard

    def __missing__(self, path: str) -> Array | bytes:
        return self._copying.content(path, self._number)
