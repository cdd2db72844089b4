"""The place of a verb's cache, and its machine."""

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
    """Return the place of a cache, with the folder for copies of its files if it is remote."""
    if isinstance(cache, Cache):
        return cache.place
    return open_place(cache, *copies_of(cache_dir, cache_bytes))


def copies_of(cache_dir: str | Path | None, cache_bytes: Any) -> tuple[Path | None, int | None]:
    """Return the folder for copies of remote files, and its limit in bytes. Raises: RecipeError for a wrong limit."""
    room = read_value(entries(CopySettings)["cache_bytes"], cache_bytes)
    return None if cache_dir is None else Path(cache_dir), room


def use_machine(threads: int, device: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` names. Set torch's threads, unless they are 0."""
    if threads:
        torch.set_num_threads(threads)
    return pick_device(device)
