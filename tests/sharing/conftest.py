"""A small store that a network without training has taught, and ways onto the stand-in of the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

import kdcache
from kdcache.data import write_scenes


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (a folder) and store.zarr, with pixels: 6 samples, 2 views, 3 shards; not to be touched."""
    root = tmp_path_factory.mktemp("shared")
    write_scenes(root / "data", "scenes:36x52,train=6,val=2")
    split = kdcache.open_split(str(root / "data"), "train")
    teacher = kdcache.build_model("kdcache:tiny", len(split.classes.names))
    settings = {"size": (32, 48), "views": 2, "shard_records": 4, "threads": 1, "progress": False}
    kdcache.build_cache(split, teacher, root / "store.zarr", **settings)
    return root
