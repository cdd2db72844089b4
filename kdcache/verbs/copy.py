"""`kdcache.copy`: a cache into another place, codec or part."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError
from kdcache.progress import progress_bar, progress_of
from kdcache.settings import entries
from kdcache.settings.building import BuildSettings
from kdcache.settings.parse import Count
from kdcache.settings.validate import read_value
from kdcache.sharing import HubAddress, PushResult, hub_address, opened, push_store
from kdcache.store import (
    Cache,
    CopyChanges,
    CopyResult,
    Fidelity,
    Manifest,
    Worker,
    copy_store,
    open_cache,
    spread_samples,
    store_exists,
    summarise,
    worker_of,
)
from kdcache.store.copy import rounds
from kdcache.teacher import copied_fidelity
from kdcache.verbs.places import copies_of, place_of


@dataclass(frozen=True)
class Copied:
    """The result of `kdcache.copy`.

    Attributes:
        destination: folder or address of the copy.
        source: manifest of the copied cache.
        changes: how the copy differs from the source.
        worker: this process's part of the copy.
        result: the result of a copy to a folder or an object store. None for the Hugging Face Hub.
        pushed: the result of a copy to the Hub, otherwise None.
        bytes: size of the copy on disk. 0 until it is complete, and for the Hub.
        source_bytes: size of the source on disk. 0 until the copy is complete, and for the Hub.
    """

    destination: str
    source: Manifest
    changes: CopyChanges
    worker: Worker
    result: CopyResult | None = None
    pushed: PushResult | None = None
    bytes: int = 0
    source_bytes: int = 0


def copy(
    source: str | Path,
    destination: str | Path,
    *,
    codec: str | None = None,
    shard_records: Count | None = None,
    samples: Count | None = None,
    features: str | Iterable[str] | None = None,
    feature_dtype: str | None = None,
    pixels: str | None = None,
    license: str | None = None,
    private: bool = False,
    worker: str | None = None,
    take_over: bool = False,
    cache_dir: str | Path | None = None,
    cache_bytes: Any = None,
    progress: bool = True,
) -> Copied:
    """Copy a cache to another disk, object store or the Hugging Face Hub, as `kdcache copy` does.

    >>> import kdcache
    >>> copied = kdcache.copy("streets.zarr", "half.zarr", samples=4, progress=False)
    >>> len(kdcache.open_cache("half.zarr").ids)
    4

    The copy may have another codec or only a part of the cache. After an interruption, the same call continues.

    Args:
        source: a complete cache: a folder, s3://BUCKET/PREFIX or hf://datasets/USER/NAME.
        destination: a new folder or address, or an unfinished copy.
        codec: "default", "small" or "none", as in `kdcache.build_cache`. Default: the source's.
        shard_records: number of records in a shard file. Default: the source's.
        samples: number of samples to copy, evenly spread over the source. Default: all.
        features: names of the taps to copy, as a list or comma-separated. Empty copies none. Default: all.
        feature_dtype: "fp16" or "uint8". Default: the source's.
        pixels: "source" leaves out images and labels, "stored" copies them. Default: "source" on the Hub, elsewhere the
            source's.
        license: licence of a copy on the Hub, by the Hub's name, such as "cc-by-4.0". Elsewhere it must be None.
        private: whether a copy on the Hub is private.
        worker: "I/N" makes this process worker I of N. "auto" reads both numbers from a job scheduler. None is a
            single worker, unless torchrun started the process.
        take_over: also copy the missing shards of the other workers.
        cache_dir: folder for local copies of a remote source's files. Default: kdcache in the user's cache folder.
        cache_bytes: maximum size of these copies in bytes, or a text such as "50GiB". Default: half of the free space.
        progress: show a progress bar, or lines without a terminal.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    choices = entries(BuildSettings)
    folder, room = copies_of(cache_dir, cache_bytes)
    address = hub_address(str(destination))
    _check(address, license, private, worker, take_over)
    part = worker_of(worker, take_over)
    choices_given = {
        name: None if value is None else read_value(choices[name], value)
        for name, value in {"codec": codec, "feature_dtype": feature_dtype, "pixels": pixels}.items()
    }
    names = features.split(",") if isinstance(features, str) else features
    with opened(str(source), cache_dir=folder, cache_bytes=room, progress=progress) as cache:
        changes = CopyChanges(
            shard_records=shard_records,
            samples=None if samples is None else spread_samples(cache, samples),
            features=None if names is None else tuple(tap for tap in names if tap),
            **choices_given,
        )
        if address is not None:
            pushed = push_store(
                cache,
                address,
                changes,
                licence=license,
                private=private,
                fidelity=_fidelity(cache, changes),
                cache_dir=folder,
                progress=progress,
            )
            return Copied(str(address), cache.manifest, changes, part, pushed=pushed)
        begun = store_exists(destination)  # a copy that was begun has its figures
        with progress_bar(progress) as bar:
            result = copy_store(
                cache,
                destination,
                changes,
                fidelity=None if begun else _fidelity(cache, changes),
                worker=part,
                progress=progress_of(bar, part.describe("copying")),
            )
        if not result.complete:
            return Copied(str(destination), cache.manifest, changes, part, result)
        written = summarise(open_cache(place_of(destination, cache_dir, cache_bytes)))
        sizes = written.bytes_on_disk, summarise(cache).bytes_on_disk
        return Copied(str(destination), cache.manifest, changes, part, result, None, *sizes)


def _check(address: HubAddress | None, license: str | None, private: bool, worker: str | None, take_over: bool) -> None:
    """Check that all settings fit the kind of destination. Raises: RecipeError."""
    on_hub = {"--license": license is not None, "--private": private}
    elsewhere = {"--worker": worker is not None, "--take-over": take_over}
    wrong = [name for name, present in (on_hub if address is None else elsewhere).items() if present]
    if wrong:
        place = "to a folder or an object store" if address is None else "onto the Hub"
        raise RecipeError(
            f"Cannot use {' and '.join(wrong)} for a copy {place}", fix=f"Leave {' and '.join(wrong)} out."
        )


def _fidelity(cache: Cache, changes: CopyChanges) -> Fidelity | None:
    """Return what a copy that rounds loses, or None if the copy does not round."""
    if not rounds(cache.manifest, changes.codec):
        return None
    return copied_fidelity(cache, changes.codec)
