"""Open and read a cache.

Opening checks the manifest, the seal, all metadata and the layout of every array. The first use of a shard checks its
ledger entry and its files' sizes, and every read checks a crc32c. `check_files` looks for every file beforehand, and
`verify` checks every byte.
Reads go straight to the shards (shard.py). An array with another layout than our writer's is an error.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from kdcache.data import inside_rectangle
from kdcache.display import facts_table, line
from kdcache.errors import CorruptError, IncompleteError, MismatchError, RecipeError, StoreError, VersionError
from kdcache.store import ledger
from kdcache.store.backend.base import Place
from kdcache.store.backend.open import open_place
from kdcache.store.format.codec import Array
from kdcache.store.format.damage import AGAIN, damaged_metadata, unreadable, unreadable_metadata, without_spare
from kdcache.store.format.eight_bits import restore
from kdcache.store.format.manifest import Manifest, parse_manifest
from kdcache.store.format.manifest_models import Head
from kdcache.store.format.schema import LABEL_BITS, metadata_keys, record_arrays, shard_key
from kdcache.store.format.shard import ShardArray
from kdcache.store.ledger import Ledger
from kdcache.store.recovery import ROOT, SPARE, check_metadata, read_spare
from kdcache.store.sample_ids import SampleIds, read_ids
from kdcache.store.targets import SampleTargets, sample_numbers, view_windows, view_zooms
from kdcache.tasks import SEGMENTATION

_REMAINS = (SPARE, ledger.COMPLETE, ledger.WHOLE, ledger.record_key(0))  # of what was a store once


class Cache:
    """A complete cache, open for reading. Use `open_cache` to open one.

    Several threads may read at once. It can be pickled, and used after a fork.

    Attributes:
        place: the location of its files.
        manifest: its description: teacher, data set, views and arrays.
        ledger: sizes and checksums of its files, which are checked in reading. None skips these checks.
        specs: path -> shape and dtype of one record, for each array.
    """

    def __init__(self, place: Place | Path, manifest: Manifest, ledger: Ledger | None = None) -> None:
        self.place = open_place(place)
        self.manifest = manifest
        self.ledger = ledger
        self.specs = {spec.path: spec for spec in record_arrays(manifest)}
        self.open_arrays: dict[str, ShardArray] = {}
        self._columns: dict[str, Array] = {}

    def __len__(self) -> int:
        """Return the number of records."""
        return self.manifest.records

    def __repr__(self) -> str:
        return line("Cache", {"cache": self.place, **self.manifest.facts})

    def _repr_html_(self) -> str:
        return facts_table("Cache", {"cache": self.place, **self.manifest.facts})

    def __reduce__(self) -> tuple[object, ...]:
        return Cache, (self.place, self.manifest, self.ledger)

    @property
    def parts(self) -> tuple["Cache", ...]:
        """The joined caches, the main cache first. For a single cache, a tuple with only itself."""
        return (self,)

    @property
    def path(self) -> Path:
        """The cache's folder. For a remote cache, the folder with local copies of its files."""
        return self.place.folder

    @property
    def head(self) -> Head:
        """The manifest's entry for the segmentation head. Raises: StoreError if the cache does not have that head."""
        if self.manifest.segmentation is None:
            raise StoreError(
                f"{self.place} has no {SEGMENTATION} head, only {', '.join(self.manifest.heads) or 'features'}",
                fix="Train with terms on what it has (--method none with --term hint for features, or --term "
                f"depth-silog,reference=teacher for depth). Or build a cache with the teacher's {SEGMENTATION}.",
            )
        return self.manifest.segmentation

    @property
    def num_classes(self) -> int:
        """The number of classes of the data set that the cache was built from. 0 if it has no classes."""
        return len(self.manifest.dataset.class_names)

    @property
    def view_size(self) -> tuple[int, int]:
        """(H, W) of the stored views in pixels."""
        return self.manifest.view.size

    @property
    def align_corners(self) -> bool:
        """True if the teacher resizes its logits to the view with aligned corners.

        False without a segmentation head.
        """
        return self.manifest.segmentation is not None and self.manifest.segmentation.align_corners

    @property
    def pixels_stored(self) -> bool:
        """True if the cache holds images and labels."""
        return self.manifest.view.pixels == "stored"

    @property
    def remote(self) -> bool:
        """True if the cache is in an object store, where a read may have to download a shard first."""
        return self.place.remote

    @cached_property
    def ids(self) -> SampleIds:
        """The sample ids, in the order of the samples. Raises: CorruptError if they are damaged."""
        try:
            sealed = {} if self.ledger is None else self.ledger.completion.metadata
            return read_ids(self.place, self.manifest, sealed)
        except CorruptError:
            self._check_place()
            raise

    def check_files(self) -> None:
        """Check that every shard file exists with the size in the ledger.

        Raises: CorruptError naming the first file that is missing or has another size.
        """
        self._check_place()
        if self.ledger is not None:
            self.ledger.check_files()

    def check_arrays(self) -> None:
        """Check that every array has the manifest's shape and dtype, and a supported layout.

        Raises: VersionError naming the unsupported setting; CorruptError naming the damaged zarr.json.
        """
        for path in self.specs:
            self._array(path)

    def _check_place(self) -> None:
        """Raise StoreError if the cache is gone, which is not damage."""
        if not self.remote and not self.path.is_dir():
            raise StoreError(
                f"Cache not found: {self.place} was moved or deleted since it was opened",
                fix="Put it back, or open it where it is now.",
            )

    def column(self, name: str) -> Array:
        """Return the array `records/NAME` of all R records, (R, ...), where NAME is `name`, such as "flip" or "window".

        Raises: CorruptError for a damaged file; StoreError if there is no such array.
        """
        path = f"records/{name}"
        try:
            return self._array(path).read_all()
        except CorruptError:
            if not self._forget(path, range(self.manifest.shards)):
                raise
            return self._array(path).read_all()

    @cached_property
    def labelled(self) -> dict[str, Array]:
        """Task name -> bool (N,): whether each of the N samples has a label for that task."""
        bits = self.column("labelled")[:: self.manifest.view.views_per_sample]
        return {task: np.not_equal(bits & bit, 0) for task, bit in LABEL_BITS.items()}

    def read(self, record: int, paths: Sequence[str]) -> dict[str, Array]:
        """Read record number `record` of the arrays `paths`, such as "features/stage4".

        Returns: path -> new array with the shape and dtype of one record.
        Raises: CorruptError if a file fails its checksum. StoreError if the cache has no such array.
        """
        rows = {}
        for path in paths:
            array = self._array(path)
            rows[path] = np.empty(array.shape[1:], array.dtype)
            self.read_into(record, path, rows[path])
        return rows

    def read_into(self, record: int, path: str, out: Array) -> None:
        """Decode record number `record` of the array `path` into `out`.

        `out` must be a writable C-contiguous array with the record's shape and dtype.

        Raises: CorruptError for a damaged file, which leaves `out` undefined; IndexError for a missing record;
            StoreError for an unsuitable `out`.
        """
        try:
            self._array(path).read_into(record, out)
        except CorruptError:
            if not self._forget(path, [record // self.manifest.build.shard_records]):
                raise
            self._array(path).read_into(record, out)

    def feature(self, record: int, tap: str) -> Array:
        """Return the features of the tap `tap` for record number `record`, (c, h, w).

        They are float16, or float32 if the cache stores them in 8 bits.

        Raises: CorruptError for a damaged file; StoreError if the cache does not have the tap.
        """
        path, scales = f"features/{tap}", f"scales/{tap}"
        rows = self.read(record, [path, scales] if scales in self.specs else [path])
        return restore(rows[path], rows[scales]) if scales in rows else rows[path]

    def fetch(self, shard: int, path: str) -> None:
        """Download shard number `shard` of the array `path`, so that later reads are fast.

        For a local cache, this only checks that the file has the size in the ledger.

        Raises: CorruptError for a damaged file; StoreError for one that cannot be read.
        """
        key = shard_key(self.specs[path], shard)
        try:
            os.close(self._open_shard(path, shard, key.removeprefix(f"{path}/"))[0])
        except (OSError, ValueError) as error:
            raise unreadable(self.place.describe(key), "the shard cannot be opened", error) from error

    def target_paths(self, head: str = SEGMENTATION) -> list[str]:
        """Return the paths of the arrays with a head's target. Empty if the cache does not have the head."""
        return [path for path in self.specs if path.startswith(f"targets/{head}/")]

    def targets_for(
        self,
        ids: Sequence[str],
        windows: Any = None,
        flips: Any = None,
        *,
        heads: Sequence[str] | None = None,
        depth_zoom: str | None = None,
    ) -> SampleTargets:
        """Return the stored targets of samples whose images your augmentation cropped, resized and then flipped.

            losses = DistillLoss(cache, ce_weight=0)(logits, cache.targets_for(ids, windows, flips), labels=masks)

        The loss moves the whole image's targets with each crop, as `CacheDataset(augment="warp")` does.

        Args:
            ids: ids of B samples, such as a list from a batch.
            windows: (B, 4) edges (y0, x0, y1, x1) of your crops: an array, a tensor or lists. They are in pixels of the
                image after its EXIF rotation and before any mirroring. They may reach beyond the image. None is the
                whole view.
            flips: (B,), whether your augmentation mirrored each crop left to right. None mirrors nothing.
            heads: the heads to read. None reads all.
            depth_zoom: what happens to depth in metres in a zooming crop: "divide" by the zoom, or "keep". None forbids
                zooming if a head is in metres.

        Raises:
            DataError: unknown ids or invalid windows.
            RecipeError: the cache has only crops, there is no such head, or crops zoom metres and `depth_zoom` is None.
            CorruptError: a damaged file.
        """
        if self.manifest.view.kind == "crop":
            raise RecipeError(
                f"Cannot move targets with windows: {self.place} is a cache of crops",
                fix="Replay its crops with CacheDataset(cache), or build a cache without --crop",
            )
        names = tuple(self.manifest.heads) if heads is None else tuple(heads)
        if (unknown := [name for name in names if name not in self.manifest.heads]) or not names:
            raise RecipeError(
                f"Unknown heads {', '.join(unknown) or '(none given)'}: {self.place} has "
                f"{', '.join(self.manifest.heads) or 'none'}",
                fix="Leave heads out to read all of them.",
            )
        records = [self.manifest.record(number, 0) for number in sample_numbers(ids, self._numbers, self.place)]
        window, flip = view_windows(windows, flips, self._column("window")[records], self.view_size)
        zoom = None
        if any(name in self.manifest.regressions for name in names):
            zoom = view_zooms(window, self.view_size, depth_zoom)
        arrays = {path: self._rows(records, path) for name in names for path in self.target_paths(name)}
        inside = None
        if self.manifest.view.reaches_beyond:
            visible, mirrored, source = (self._column(name)[records] for name in ("window", "flip", "source_size"))
            inside = inside_rectangle(visible, mirrored, source, self.view_size)
        return SampleTargets(arrays, window, flip, inside, zoom)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Sample id -> index of the sample."""
        return {sample: number for number, sample in enumerate(self.ids)}

    def _column(self, name: str) -> Array:
        """Return the result of `column`, which is read only once."""
        if name not in self._columns:
            self._columns[name] = self.column(name)
        return self._columns[name]

    def _rows(self, records: Sequence[int], path: str) -> Array:
        spec = self.specs[path]
        rows: Array = np.empty((len(records), *spec.shape), spec.dtype)
        for row, record in zip(rows, records, strict=True):
            self.read_into(record, path, row)
        return rows

    def _forget(self, path: str, shards: Sequence[int]) -> bool:
        """Drop the local copies of damaged remote shards, or return False if the cache's own files are damaged.

        Raises: StoreError if the cache itself is gone.
        """
        self._check_place()
        dropped = [self.place.forget(shard_key(self.specs[path], shard)) for shard in shards]
        if any(dropped):
            self.open_arrays.pop(path, None)
        return any(dropped)

    def _array(self, path: str) -> ShardArray:
        array = self.open_arrays.get(path)
        if array is None:
            self._check_place()
            spec = self.specs.get(path)
            if spec is None:
                raise StoreError(
                    f"{self.place} has no array {path}, only {', '.join(self.specs)}",
                    fix="Build the cache with what the run needs (see build-teacher-cache --help).",
                )
            if self.remote and self.ledger is not None:  # its copy may have made room for others
                check_metadata(self.place, self.ledger.completion, [f"{path}/zarr.json"])
            array = ShardArray(self.path / path, partial(self._open_shard, path), self.place.describe(path))
            if array.shape != (len(self), *spec.shape) or array.dtype != np.dtype(spec.dtype):
                raise damaged_metadata(self.place.describe(f"{path}/zarr.json"))
            self.open_arrays[path] = array
        return array

    def _open_shard(self, path: str, shard: int, below: str) -> tuple[int, bytes]:
        """Open a shard with the ledger's size, and return its descriptor and the checksums that its chunks end with."""
        key = f"{path}/{below}"
        if self.ledger is None:
            return self.place.open(key), b""
        expected = self.ledger.file(shard, key)
        return self.place.open(key, expected.bytes, expected.sha256), bytes.fromhex(expected.crc32c)


def open_cache(
    location: str | Path | Place,
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: Annotated[int, Ge(1)] | None = None,
) -> Cache:
    """Open a complete cache.

    >>> import kdcache
    >>> cache = kdcache.open_cache("streets.zarr")
    >>> len(cache), cache.num_classes, cache.view_size
    (32, 7, (48, 64))

    Args:
        location: the cache's folder, or an address such as s3://bucket/prefix.
        cache_dir: folder for local copies of remote shards. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes. Default: half of the free space of that disk.

    Raises:
        IncompleteError: the build is not finished. The message gives the number of finished shards.
        CorruptError: the seal, or metadata that it covers, was changed.
        VersionError: the cache's format, or the layout of an array, is not supported.
        StoreError: there is no cache at the location.
    """
    place = open_place(location, None if cache_dir is None else Path(cache_dir), cache_bytes)
    manifest = read_manifest(place)
    completion = require_complete(place, manifest)
    place = place.at(completion.ledger_sha256)
    check_metadata(place, completion, metadata_keys(manifest))
    cache = Cache(place, manifest, Ledger(place, completion))
    cache.check_arrays()
    return cache


def require_complete(place: Place, manifest: Manifest) -> ledger.Completion:
    """Return the seal of the finished cache at `place`, whose manifest is `manifest`.

    Raises: IncompleteError with the number of finished shards if there is no seal; CorruptError for a damaged seal.
    """
    completion = ledger.read_completion(place)
    if completion is None:
        sizes = place.sizes(ledger.record_key(shard) for shard in range(manifest.shards))
        fix = "Run the command that began it (build-teacher-cache or copy) again: it continues."
        if left := manifest.earlier_statistics:
            fix = f"If kdcache copy began it, repeat that command. Else build a new cache without --statistics {left}"
        raise IncompleteError(
            f"Cache is not complete: {place} has {sum(size is not None for size in sizes)} of {manifest.shards} shards",
            fix=fix,
        )
    if completion.shards != manifest.shards:
        what = f"it seals {completion.shards} shards, the manifest has {manifest.shards}"
        raise damaged_metadata(place.describe(ledger.COMPLETE), what)
    return completion


def store_opens(place: Place) -> bool:
    """Return True if the cache at `place` opens, and its ledger has the digest in the seal."""
    try:
        sealed = open_cache(place).ledger
        assert sealed is not None
        sealed.check_lines()
    except StoreError:
        return False
    return True


def not_continued(place: Place, statistics: str) -> MismatchError:
    """Return the error for an unfinished build at `place` whose `statistics` only earlier versions could compute.

    `statistics` are comma-separated names.
    """
    kept = f" Add --from {place} to keep its targets." if store_opens(place) else ""
    fix = f"Build a new cache: repeat the command without --statistics {statistics} and with another --out folder."
    return MismatchError(
        f"Cannot continue {place}: this version does not compute its statistics {statistics}",
        fix=f"{fix}{kept} {place} stays as it is.",
    )


def store_exists(location: str | Path | Place) -> bool:
    """Return True if the location holds a cache, finished or not."""
    return open_place(location).exists(ROOT, SPARE, ledger.COMPLETE)


def read_manifest(location: str | Path | Place) -> Manifest:
    """Return the manifest of the cache at `location`, finished or not.

    Raises: StoreError if there is no cache; CorruptError for a damaged manifest; VersionError for an unsupported
        format.
    """
    place = open_place(location)
    with suppress(CorruptError, VersionError):
        return _read_root(place)
    try:  # again: what is elsewhere is not called damaged at the first answer
        return _read_root(place)
    except (CorruptError, VersionError) as error:
        if AGAIN in error.fix and read_spare(place) is None:
            raise without_spare(error, place) from error
        raise


def begun_manifest(location: str | Path | Place) -> Manifest | None:
    """Return the manifest of the cache at `location`, finished or not, or None if there is no cache.

    If zarr.json is damaged, the spare copy is read. If both are damaged, the result is None.
    """
    place = open_place(location)
    if not store_exists(place):
        return None
    with suppress(CorruptError):
        return read_manifest(place)
    spare = read_spare(place)
    return None if spare is None else parse_manifest(json.loads(spare)["attributes"], place.describe(SPARE))


def _read_root(place: Place) -> Manifest:
    file = place.describe("zarr.json")
    try:
        metadata = json.loads(place.read("zarr.json"))
        group = isinstance(metadata, dict) and (metadata.get("zarr_format"), metadata.get("node_type")) == (3, "group")
    except (FileNotFoundError, NotADirectoryError) as error:
        if place.exists(*_REMAINS):
            raise damaged_metadata(file, "it is missing") from error
        there = place.remote or place.folder.exists()
        build = f"kdcache build-teacher-cache --data DATA --teacher TEACHER --out {place}"
        raise StoreError(
            f"Cache not found: {file if there else place}",
            fix="Check the path: it is the --out of a build." if there else f"Check the path, or build it: {build}",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable_metadata(file, error, "it is not the metadata of a Zarr group") from error
    attributes = metadata.get("attributes") if group else None
    content = attributes.get("kdcache") if isinstance(attributes, dict) else None
    ours = isinstance(content, dict) and content.get("format") == "kdcache"
    if not group or (not ours and place.exists(*_REMAINS)):
        raise damaged_metadata(file, "it is not the metadata of a cache's Zarr group")
    return parse_manifest(attributes, file)
