"""The location of the cache that a verb uses, and the device."""

from pathlib import Path
from typing import Any

import torch

from kdcache.settings import entries
from kdcache.settings.shared import CopySettings
from kdcache.settings.validate import read_value
from kdcache.store import Cache
from kdcache.store.backend.base import Place
from kdcache.store.backend.open import open_place
from kdcache.training import pick_device


def place_of(cache: str | Path | Cache, cache_dir: str | Path | None, cache_bytes: Any) -> Place:
    """Return the location of a cache: a folder, or an address with its folder for local copies.

    Args:
        cache: a folder, an address or an open cache.
        cache_dir: folder for local copies of a remote cache's files, or None for the default.
        cache_bytes: maximum size of these copies in bytes, or a text such as "50GiB". None is the default.
    Raises: StoreError for an invalid address; RecipeError for an invalid size.
    """
    if isinstance(cache, Cache):
        return cache.place
    return open_place(cache, *copies_of(cache_dir, cache_bytes))


def copies_of(cache_dir: str | Path | None, cache_bytes: Any) -> tuple[Path | None, int | None]:
    """Return `cache_dir` as a path and `cache_bytes` as an integer.

    They are the folder for local copies of remote files, and its maximum size. None stands for the default.
    `cache_bytes` may be a number of bytes, or a text such as "50GiB".

    Raises: RecipeError for an invalid size.
    """
    room = read_value(entries(CopySettings)["cache_bytes"], cache_bytes)
    return None if cache_dir is None else Path(cache_dir), room


def use_machine(threads: int, device: str) -> torch.device:
    """Set torch's number of threads, unless `threads` is 0, and return the device.

    `device` is "auto", "cpu" or "cuda". "auto" is a GPU if there is one.

    Raises: RecipeError for a device that this machine lacks.
    """
    if threads:
        torch.set_num_threads(threads)
    return pick_device(device)
