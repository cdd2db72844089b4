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
    """The manifest of the main cache, with the heads, features and statistics of all caches.

    Attributes:
        joined: names of the caches, the main one first.
    """

    joined: tuple[str, ...] = ()


class JoinedCache(Cache):
    """Several caches read as one. `open_caches` checks that they belong together.

    Args:
        caches: the caches by name. The first is the main one.
    """

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        main = next(iter(caches.values()))
        super().__init__(main.place, _manifest_of(caches), main.ledger)
        self._caches = dict(caches)
        self._further = {
            path: (cache, own) for name, cache in [*caches.items()][1:] for own, path in _renamed(name, cache)
        }

    def __reduce__(self) -> tuple[object, ...]:
        return JoinedCache, (self._caches,)

    @property
    def parts(self) -> tuple[Cache, ...]:
        """The caches of the join, the main one first."""
        return tuple(self._caches.values())

    @property
    def remote(self) -> bool:
        """Whether any of the caches is remote."""
        return any(cache.remote for cache in self.parts)

    def unread(self, paths: Sequence[str]) -> list[str]:
        """Return the names of the further caches that hold none of these arrays."""
        read = [self._further[path][0] for path in paths if path in self._further]
        return [name for name, cache in [*self._caches.items()][1:] if cache not in read]

    def check_files(self) -> None:
        """Check that every file of all caches exists with its size."""
        for cache in self.parts:
            cache.check_files()

    def read_into(self, record: int, path: str, out: Array) -> None:
        """Decode a record from the cache that has the array. Raises: as `Cache.read_into`."""
        if path in self._further:
            cache, own = self._further[path]
            cache.read_into(record, own, out)
        else:
            super().read_into(record, path, out)

    def fetch(self, shard: int, path: str) -> None:
        """Download the records of a shard of the main cache, from the array's cache. Raises: as `read_into`."""
        if path not in self._further:
            super().fetch(shard, path)
            return
        cache, own = self._further[path]
        first, end = self.manifest.shard_range(shard)
        size = cache.manifest.build.shard_records
        for number in range(first // size, -(-end // size)):
            cache.fetch(number, own)

    def _array(self, path: str) -> ShardArray:
        if path in self._further:
            cache, own = self._further[path]
            return cache._array(own)
        return super()._array(path)


def open_caches(
    locations: str | Path | Sequence[str | Path],
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: Annotated[int, Ge(1)] | None = None,
) -> Cache:
    """Open a cache, or join several.

    >>> import kdcache
    >>> cache = kdcache.open_caches(["streets.zarr", "large=features.zarr"])
    >>> list(cache.manifest.features)
    ['large:stage4']

    Args:
        locations: where the caches lie, as in `open_cache`, or NAME=LOCATION. The default name is the folder's stem.
        cache_dir: for each cache as in `open_cache`.
        cache_bytes: for each cache as in `open_cache`.
    Raises: as `open_cache`; RecipeError for two caches of one name; MismatchError for caches that do not belong
        together, with the first sample and view that differ.
    """
    texts = [str(locations)] if isinstance(locations, str | Path) else [str(location) for location in locations]
    if not texts:
        raise RecipeError("Nothing to open: no cache was given", fix="Give a cache, or several to join.")
    places = [_named(text) for text in texts]
    names = [name for name, _ in places]
    if twice := next((name for name in names if names.count(name) > 1), None):
        own = [place for name, place in places if name == twice]
        raise RecipeError(
            f"Two joined caches have the name {twice}: {', '.join(own)}",
            fix=f"Name one of them: --cache NAME={own[-1]}",
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
    """Return the digest of a cache's ledger, or of all ledgers of a join in order. '' if it is not sealed."""
    return "+".join(part.ledger.completion.ledger_sha256 for part in cache.parts if part.ledger is not None)


def check_ids(main: Cache, ids: Sequence[str], whose: object) -> None:
    """Check that ids are the main cache's ids, in its order. Raises: MismatchError with the first that differs."""
    pairs = enumerate(zip_longest(main.ids, ids))
    number, (its, own) = next(((n, pair) for n, pair in pairs if pair[0] != pair[1]), (0, (None, None)))
    if its is not own:
        raise MismatchError(
            f"The samples of {whose} are not those of {main.place}: {len(ids)} against {len(main.ids)} samples, number "
            f"{number} is {_shown(own)} against {_shown(its)}",
            fix=f"Give the data set and split of {main.place}, or a cache that was built with --like {main.place}.",
        )


def other_view(
    main: Cache, record: int | None, whose: object, pillow: str, more: Sequence[str] = (), fix: str = ""
) -> MismatchError:
    """Return the error for a view that differs from the main cache's view.

    Args:
        main: the main cache.
        record: the first record of the main cache that differs. None if only settings differ.
        whose: the other cache or data set.
        pillow: its version of Pillow.
        more: further differences.
        fix: default: the fix for a cache to join.
    """
    manifest, shown = main.manifest, []
    if record is not None:
        sample, view = divmod(record, manifest.view.views_per_sample)
        shown.append(f"view {view} of sample {main.ids[sample]!r} shows other pixels")
    shown += [*more, f"built with Pillow {pillow} against {pillow_of(manifest)}"]
    return MismatchError(
        f"The views of {whose} are not those of {main.place}: {'; '.join(shown)}",
        fix=fix or f"Build it with --like {main.place}, from the same images and with the same version of Pillow.",
    )


def pillow_of(manifest: Manifest) -> str:
    """Return the Pillow version of a cache's build."""
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
        own = cache.manifest
        heads |= own.heads
        features |= {f"{name}:{tap}": feature for tap, feature in own.features.items()}
        statistics |= {f"{one.kind}.{name}:{one.tap}": one for one in own.statistics.values() if one.tap}
        if fields["depth"] is None and own.depth is not None:
            fields["depth"] = own.depth.model_copy(update={"labelled": 0})  # labels are the main cache's
    changed = {"heads": heads, "features": features, "statistics": statistics, "joined": tuple(caches)}
    # Not validated: names of the parts are, and a NAME:TAP is no folder.
    return JoinedManifest.model_construct(**{**fields, **changed})


def _renamed(name: str, cache: Cache) -> Iterator[tuple[str, str]]:
    """Yield the paths of the arrays of a further cache that are joined: in the cache, and in the join."""
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
