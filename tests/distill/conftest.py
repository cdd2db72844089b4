"""A teacher, a dense store and a top-k store of eight procedural scenes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kdcache.data import open_split
from kdcache.models import SegmentationModel, build_model
from kdcache.store import Cache, open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache

DATA = "scenes:64x96,train=8,val=1"
SIZE = (64, 96)


@pytest.fixture(scope="session")
def teacher() -> SegmentationModel:
    """Random but decided, in eval mode."""
    torch.manual_seed(21)
    model = build_model("kdcache:base", 7)
    with torch.no_grad():
        model.classifier.weight.mul_(60)
        # A pass over the data gives BatchNorm its statistics, as training would.
        for _ in range(10):
            split = open_split(DATA, "train")
            model(model.normalise(torch.stack([torch.from_numpy(split.image(index)) for index in range(8)])))
    return model.eval()


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory: pytest.TempPathFactory, teacher: SegmentationModel) -> Callable[..., Cache]:
    def make(data: str = DATA, **options: object) -> Cache:
        path = tmp_path_factory.mktemp("store") / "cache.zarr"
        split = open_split(data, "train")
        build_cache(split, Teacher(teacher, "test"), path, BuildOptions(**{"size": SIZE, "views": 1, **options}))
        return open_cache(path)

    return make


@pytest.fixture(scope="session")
def dense(make_cache: Callable[..., Cache]) -> Cache:
    return make_cache()


@pytest.fixture(scope="session")
def sparse(make_cache: Callable[..., Cache]) -> Cache:
    return make_cache(top_k=3)
