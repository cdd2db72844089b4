"""Labels and targets of depth through every way of the loader, beside what the store and the data set have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from kdcache.data import Augmentation, open_split
from kdcache.distill import Batch
from kdcache.store import Records, open_cache
from kdcache.training import CacheDataset
from kdcache.training.input.device_prefetch import feed
from kdcache.training.input.loader import Draws, make_loader
from kdcache.training.input.resident_records import DeviceTargets, RamRecords

DATA = "scenes:32x48,train=6,val=3,depth=exact,tasks=halves"
BOTH = ("segmentation", "depth")
CPU = torch.device("cpu")
AUGMENTS: dict[str, dict[str, Any]] = {
    "replay": {"augment": "replay"},
    "warp": {"augment": "warp", "depth_zoom": "divide", "augmentation": Augmentation(scale=(1.4, 2.5))},
}


def dataset_of(path: Path, **changes: Any) -> CacheDataset:
    cache = open_cache(path)
    records = Records(cache, None if cache.pixels_stored else open_split(DATA, "train"))
    return CacheDataset(records, **{"tasks": BOTH, "augment": "none", **changes})


def batches(dataset: CacheDataset, workers: int = 0) -> list[Batch]:
    loader = make_loader(Draws(dataset, 3), first=0, last=5, batch_size=4, workers=workers, pin_memory=False)
    drawn = feed(loader, CPU, dataset.on_device)
    return [pytree.tree_map_only(torch.Tensor, torch.clone, batch) for batch in drawn if isinstance(batch, Batch)]


def resident(dataset: CacheDataset) -> CacheDataset:
    dataset.records = RamRecords(dataset.cache, dataset.paths)
    return dataset


def on_device(dataset: CacheDataset) -> CacheDataset:
    dataset.on_device = DeviceTargets.load(dataset.cache, CPU, dataset.heads)
    return dataset


WAYS: dict[str, Callable[[CacheDataset], list[Batch]]] = {
    "threads": lambda dataset: batches(dataset, 2),
    "memory": lambda dataset: batches(resident(dataset)),
    "device": lambda dataset: batches(on_device(dataset), 1),
}


def same(one: Batch, other: Batch) -> bool:
    mine, others = one.to_dict(), other.to_dict()
    mine.pop("record", None), others.pop("record", None)
    return mine.keys() == others.keys() and all(
        mine[name].dtype == others[name].dtype and mine[name].numpy().tobytes() == others[name].numpy().tobytes()
        for name in mine
    )


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_draws_the_same_depth(depth_paths: dict[str, Path], augment: str, way: str) -> None:
    plain = batches(dataset_of(depth_paths["stored"], **AUGMENTS[augment]))
    drawn = WAYS[way](dataset_of(depth_paths["stored"], **AUGMENTS[augment]))
    assert len(plain) == len(drawn) == 5
    assert all(map(same, plain, drawn))


@pytest.mark.slow
@pytest.mark.parametrize("augment", AUGMENTS)
def test_worker_processes_draw_the_same_depth(depth_paths: dict[str, Path], augment: str) -> None:
    one, two = (batches(dataset_of(depth_paths["source"], **AUGMENTS[augment]), workers) for workers in (0, 2))
    assert len(one) == len(two) == 5
    assert all(map(same, one, two))


@pytest.mark.parametrize("store", ["stored", "source"])
def test_a_replay_has_the_targets_and_labels_of_its_views(depth_paths: dict[str, Path], store: str) -> None:
    dataset, split = dataset_of(depth_paths[store], augment="replay"), open_split(DATA, "train")
    records, flipped, labelled = Records(dataset.cache, split), 0, 0
    draws = Draws(dataset, 0)
    for draw in range(12):
        batch, record = draws[draw], dataset.record(*draws.visit(draw))
        assert isinstance(batch, Batch)
        assert batch.zoom is None
        assert batch.targets is not None
        assert np.array_equal(batch.targets["depth"].values.numpy(), records.target(record, "depth")["values"])
        assert list(batch.targets) == ["segmentation", "depth"]
        window, flip = records.window(record)
        assert window.as_tuple() == (0, 0, 32, 48)  # nothing is zoomed
        metres = split.label(record // 2, "depth")
        wanted = np.full((32, 48), np.nan, np.float32) if metres is None else metres[:, ::-1] if flip else metres
        assert np.array_equal(batch.labels["depth"].numpy(), wanted, equal_nan=True)
        assert np.array_equal(records.label(record, "depth"), wanted, equal_nan=True)
        assert (batch.label == 255).all() == (split.label(record // 2) is None)
        flipped, labelled = flipped + flip, labelled + (metres is not None)
    assert 0 < flipped < 12
    assert labelled == 6


@pytest.mark.parametrize("store", ["stored", "source"])
@pytest.mark.parametrize("how", ["divide", "keep"])
def test_a_warp_divides_labels_and_targets_alike(depth_paths: dict[str, Path], store: str, how: Any) -> None:
    chosen = {**AUGMENTS["warp"], "depth_zoom": how}
    dataset, split = dataset_of(depth_paths[store], **chosen), open_split(DATA, "train")
    draws = Draws(dataset, 1)
    for draw in range(12):
        batch, sample = draws[draw], draws.visit(draw)[0]
        assert isinstance(batch, Batch)
        assert batch.window is not None
        assert batch.flip is not None
        y0, x0, y1, x1 = batch.window.tolist()
        zoom = math.sqrt(32 / (y1 - y0) * 48 / (x1 - x0)) if how == "divide" else 1.0
        assert (batch.zoom is not None) == (how == "divide")
        assert batch.zoom is None or batch.zoom.item() == pytest.approx(zoom, rel=1e-12)
        metres = split.label(sample, "depth")
        if metres is None:
            assert batch.labels["depth"].isnan().all()
            continue
        rows = np.floor(y0 + (np.arange(32) + 0.5) * (y1 - y0) / 32).astype(int)
        columns = np.floor(x0 + (np.arange(48) + 0.5) * (x1 - x0) / 48).astype(int)
        picked = metres[rows][:, columns].astype(np.float64)
        picked = picked[:, ::-1] if batch.flip else picked
        label = batch.labels["depth"].double().numpy()
        known = np.isfinite(picked)
        assert known.any()
        np.testing.assert_allclose(label[known], picked[known] / zoom, rtol=1e-6)


def test_zoomed_views_have_the_metres_of_their_store(depth_paths: dict[str, Path]) -> None:
    dataset, split = dataset_of(depth_paths["zoomed"], augment="replay"), open_split(DATA, "train")
    records, nearer = Records(dataset.cache, split), []
    for sample in range(6):
        if (metres := split.label(sample, "depth")) is None:
            continue
        for view in range(3):
            record = dataset.cache.manifest.record(sample, view)
            window, _ = records.window(record)
            zoom = math.sqrt(32 / (window.y1 - window.y0) * 48 / (window.x1 - window.x0))
            label = dataset.cache.read(record, ["labels/depth"])["labels/depth"]
            shown = metres[int(window.y0) : math.ceil(window.y1), int(window.x0) : math.ceil(window.x1)]
            assert set(np.unique(label[np.isfinite(label)])) <= set(np.unique(shown / np.float32(zoom)))
            nearer.append(zoom)
    assert min(nearer) == 1
    assert max(nearer) > 1.5


def test_a_sample_brings_the_heads_that_are_read(depth_paths: dict[str, Path]) -> None:
    for heads in (("depth",), ("segmentation",), ()):
        dataset = dataset_of(depth_paths["stored"], targets=heads, tasks=("segmentation",))
        batch = Draws(dataset, 0)[0]
        assert isinstance(batch, Batch)
        assert tuple(batch.targets or ()) == heads
        assert list(batch.labels) == ["segmentation"]
        assert {path.split("/")[1] for path in dataset.target_paths} == set(heads)
    only = dataset_of(depth_paths["stored"], tasks=("depth",), labelled_only=True)
    assert len(only) == 3
    batch = Draws(only, 0)[0]
    assert isinstance(batch, Batch)
    assert (batch.label == 255).all()
    assert batch.labels["depth"].isfinite().any()
