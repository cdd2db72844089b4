"""Joined caches: read the targets, features and statistics of several caches of the same views as one cache.

The first cache is the main one. It gives pixels, labels, classes, order and shards. Heads of a further cache keep their
names. Its taps are NAME:TAP, as in `features/sam:last` and `statistics/similarity.sam:last`.

Record n is the same view of the same sample in all of them: drawn views depend on seed, id and view only.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
from annotated_types import Ge

from kdcache.errors import MismatchError, RecipeError
from kdcache.store.format.codec import Array
from kdcache.store.format.manifest import Manifest
from kdcache.store.format.manifest_models import part_differences, unlike
from kdcache.store.format.shard import ShardArray
from kdcache.store.reader import Cache, open_cache
from kdcache.tasks import SEGMENTATION

_NAMED = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.\-]*)=(.+)")
FREE_IN_VIEWS = ("teacher_size", "pixels")
"""The fields of `view` in which joined caches may differ."""


class JoinedManifest(Manifest):
    """The main cache's manifest, with the heads, features and statistics of all joined caches added.

    Attributes:
        joined: names of the caches, the main cache first.
    """

    joined: tuple[str, ...] = ()


class JoinedCache(Cache):
    """Several caches of the same views, read as one cache.

    Use `open_caches`, which checks that their views are the same.

    Args:
        caches: name -> cache. The first is the main cache, which gives pixels, labels, classes and the order of
            records.
    """

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        main = next(iter(caches.values()))
        super().__init__(main.place, _manifest_of(caches), main.ledger)
        self._caches = dict(caches)
        self._further = {
            path: (cache, path_there)
            for name, cache in [*caches.items()][1:]
            for path_there, path in _renamed(name, cache)
        }

    def __reduce__(self) -> tuple[object, ...]:
        return JoinedCache, (self._caches,)

    @property
    def parts(self) -> tuple[Cache, ...]:
        """The joined caches, the main cache first."""
        return tuple(self._caches.values())

    @property
    def remote(self) -> bool:
        """True if any of the joined caches is in an object store."""
        return any(cache.remote for cache in self.parts)

    def unread(self, paths: Sequence[str]) -> list[str]:
        """Return the names of the joined caches, except the main cache, that hold none of the arrays `paths`."""
        read = [self._further[path][0] for path in paths if path in self._further]
        return [name for name, cache in [*self._caches.items()][1:] if cache not in read]

    def check_files(self) -> None:
        """Check that every file of all joined caches exists with the size in the ledger.

        Raises: CorruptError naming the first file that is missing or has another size.
        """
        for cache in self.parts:
            cache.check_files()

    def read_into(self, record: int, path: str, out: Array) -> None:
        """Decode record number `record` of the array `path` into `out`.

        `out` must be a writable C-contiguous array with the record's shape and dtype.

        Raises: CorruptError for a damaged file; IndexError for a missing record; StoreError for another kind of `out`.
        """
        if path in self._further:
            cache, path_there = self._further[path]
            cache.read_into(record, path_there, out)
        else:
            super().read_into(record, path, out)

    def fetch(self, shard: int, path: str) -> None:
        """Download the array `path` for all records of the main cache's shard number `shard`, so later reads are fast.

        Raises: CorruptError for a damaged file; StoreError for one that cannot be read.
        """
        if path not in self._further:
            super().fetch(shard, path)
            return
        cache, path_there = self._further[path]
        first, end = self.manifest.shard_range(shard)
        size = cache.manifest.build.shard_records
        for number in range(first // size, -(-end // size)):
            cache.fetch(number, path_there)

    def _array(self, path: str) -> ShardArray:
        if path in self._further:
            cache, path_there = self._further[path]
            return cache._array(path_there)
        return super()._array(path)


def open_caches(
    locations: str | Path | Sequence[str | Path],
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: Annotated[int, Ge(1)] | None = None,
) -> Cache:
    """Open a cache, or join several caches of the same views.

    >>> import kdcache
    >>> cache = kdcache.open_caches(["streets.zarr", "large=features.zarr"])
    >>> list(cache.manifest.features)
    ['large:stage4']

    Args:
        locations: one location or several: a folder, an address, or NAME=LOCATION. The default name is the folder's
            name without its suffix.
        cache_dir: folder for local copies of remote shards. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes. Default: half of the free space of that disk.

    Raises:
        RecipeError: no location, or two caches of the same name.
        MismatchError: the caches do not have the same views. The message names the first sample and view that differ.
        StoreError: a location is not a complete, intact cache, as in `open_cache`.
    """
    texts = [str(locations)] if isinstance(locations, str | Path) else [str(location) for location in locations]
    if not texts:
        raise RecipeError("Nothing to open: no cache was given", fix="Give a cache, or several to join.")
    places = [_named(text) for text in texts]
    names = [name for name, _ in places]
    if twice := next((name for name in names if names.count(name) > 1), None):
        same_name = [place for name, place in places if name == twice]
        raise RecipeError(
            f"Two joined caches have the name {twice}: {', '.join(same_name)}",
            fix=f"Name one of them: --cache NAME={same_name[-1]}",
        )
    caches = {name: open_cache(place, cache_dir=cache_dir, cache_bytes=cache_bytes) for name, place in places}
    main, *further = caches.values()
    if not further:
        return main
    for cache in further:
        _check_joins(main, cache)
    _check_heads(caches)
    return JoinedCache(caches)


def seal_of(cache: Cache) -> str:
    """Return the ledger's digest from a cache's seal. It identifies the cache's content.

    Return '' for a cache without a seal. For joined caches, the digests are joined by "+", in order.
    """
    return "+".join(part.ledger.completion.ledger_sha256 for part in cache.parts if part.ledger is not None)


def check_ids(main: Cache, ids: Sequence[str], whose: object) -> None:
    """Check that `ids` are the main cache's sample ids in the same order.

    `whose` names the data set or cache that has these ids, for the message.

    Raises: MismatchError naming the first id that differs.
    """
    pairs = enumerate(zip_longest(main.ids, ids))
    number, (main_id, given_id) = next(((n, pair) for n, pair in pairs if pair[0] != pair[1]), (0, (None, None)))
    if main_id is not given_id:
        raise MismatchError(
            f"The samples of {whose} are not those of {main.place}: {len(ids)} against {len(main.ids)} samples, number "
            f"{number} is {_shown(given_id)} against {_shown(main_id)}",
            fix=f"Give the data set and split of {main.place}, or a cache that was built with --like {main.place}.",
        )


def other_view(
    main: Cache, record: int | None, whose: object, pillow: str, more: Sequence[str] = (), fix: str = ""
) -> MismatchError:
    """Return the error for a cache or data set whose views differ from the main cache's views.

    Args:
        main: the main cache.
        record: number of the first record with other pixels, or None if only settings differ.
        whose: the other cache or data set, for the message.
        pillow: the version of Pillow that rendered the views of `whose`.
        more: descriptions of further differences.
        fix: what the user should do. '' proposes to build the other cache with --like.
    """
    manifest, differences = main.manifest, []
    if record is not None:
        sample, view = divmod(record, manifest.view.views_per_sample)
        differences.append(f"view {view} of sample {main.ids[sample]!r} shows other pixels")
    differences += [*more, f"built with Pillow {pillow} against {pillow_of(manifest)}"]
    return MismatchError(
        f"The views of {whose} are not those of {main.place}: {'; '.join(differences)}",
        fix=fix or f"Build it with --like {main.place}, from the same images and with the same version of Pillow.",
    )


def pillow_of(manifest: Manifest) -> str:
    """Return the version of Pillow that the cache with this manifest was built with, or "(unknown)"."""
    return manifest.build.libraries.get("pillow", "(unknown)")


def _named(text: str) -> tuple[str, str]:
    """Return (name, location) of `NAME=LOCATION`, or of a bare location."""
    match = None if Path(text).exists() else _NAMED.fullmatch(text)
    return (match[1], match[2]) if match else (PurePosixPath(text).stem, text)


def _check_joins(main: Cache, cache: Cache) -> None:
    """Check that a further cache has the views of the main one. Raises: MismatchError."""
    check_ids(main, cache.ids, cache.place)
    ours, theirs = main.manifest.view, cache.manifest.view
    differs = part_differences("view", theirs, ours, but=FREE_IN_VIEWS)
    views = min(ours.views_per_sample, theirs.views_per_sample)
    sums = [part.column("pixel_checksum").reshape(len(main.ids), -1)[:, :views] for part in (main, cache)]
    if differs or (sums[0] != sums[1]).any():
        places = np.argwhere(sums[0] != sums[1]).tolist()
        record = main.manifest.record(*places[0]) if places else None
        raise other_view(main, record, cache.place, pillow_of(cache.manifest), differs)
    if SEGMENTATION in cache.manifest.heads and cache.manifest.dataset.class_names != main.manifest.dataset.class_names:
        raise MismatchError(
            f"The classes of {cache.place} are not those of {main.place}: "
            f"{unlike(cache.manifest.dataset.class_names, main.manifest.dataset.class_names)}",
            fix=f"Give the cache with the classes first, or build it with --like {main.place} and --class-map.",
        )
    zooms = {part.manifest.depth.zoom: part for part in (main, cache) if part.manifest.depth is not None}
    if len(zooms) > 1:
        texts = [f"{part.place} has --depth-zoom {zoom}" for zoom, part in zooms.items()]
        raise MismatchError(
            f"A zoom does something else to the metres of {cache.place}: {', '.join(texts)}",
            fix=f"Build it again with --like {main.place}.",
        )


def _check_heads(caches: Mapping[str, Cache]) -> None:
    """Check that each head is in one cache only. Raises: MismatchError."""
    owners: dict[str, Cache] = {}
    for cache in caches.values():
        for head in cache.manifest.heads:
            if head in owners:
                raise MismatchError(
                    f"Two joined caches have a {head} head: {owners[head].place} and {cache.place}",
                    fix=f"Join only one of them. For other arrays of {cache.place}, build it with --features-only, "
                    "or with other --heads.",
                )
            owners[head] = cache


def _manifest_of(caches: Mapping[str, Cache]) -> JoinedManifest:
    main, *others = [*caches.items()]
    fields = dict(main[1].manifest)
    heads, features, statistics = (dict(fields[name]) for name in ("heads", "features", "statistics"))
    for name, cache in others:
        part = cache.manifest
        heads |= part.heads
        features |= {f"{name}:{tap}": feature for tap, feature in part.features.items()}
        statistics |= {
            f"{statistic.kind}.{name}:{statistic.tap}": statistic
            for statistic in part.statistics.values()
            if statistic.tap
        }
        if fields["depth"] is None and part.depth is not None:
            fields["depth"] = part.depth.model_copy(update={"labelled": 0})  # labels are the main cache's
    changed = {"heads": heads, "features": features, "statistics": statistics, "joined": tuple(caches)}
    # Not validated: names of the parts are, and a NAME:TAP is no folder.
    return JoinedManifest.model_construct(**{**fields, **changed})


def _renamed(name: str, cache: Cache) -> Iterator[tuple[str, str]]:
    """Yield (path in this cache, path in the joined cache) for each array that a further cache adds to a join."""
    for path in cache.specs:
        room, _, array = path.partition("/")
        if room == "targets":
            yield path, path
        elif room in ("features", "scales"):
            yield path, f"{room}/{name}:{array}"
        elif room == "statistics" and (tap := cache.manifest.statistics[array].tap):
            yield path, f"{room}/{array.removesuffix(tap)}{name}:{tap}"


def _shown(sample: str | None) -> str:
    return "not there" if sample is None else repr(sample)
