"""Stores of crops, and of views that reach beyond their image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.data import Window, draw_view, inside_rectangle, open_split, render
from kdcache.errors import MismatchError, RecipeError
from kdcache.store import CopyChanges, Records, copy_store, inspect_store, open_cache
from kdcache.store.format.manifest_models import Drawn, View
from kdcache.teacher import TeacherProbe, build_cache, compare_teacher, options_of, plan_manifest, score_cache
from kdcache.training import CacheDataset

CPU = torch.device("cpu")
CROPS = {"size": (48, 64), "crop": (32, 40), "views": 3, "view_seed": 2, "view_scale": (0.25, 1.25)}
PATHS = ["records/window", "records/flip", "records/view", "records/source_size", "pixels/image", "labels/segmentation"]


@pytest.fixture
def crops(tmp_path, teacher, folder_data, options):
    """crops(...): a store of three crops of 7 samples, and its split."""

    def build(**changes):
        source = open_split(folder_data, "train")
        build_cache(source, teacher, tmp_path / "s.zarr", options(batch_size=1, **CROPS, **changes))
        return open_cache(tmp_path / "s.zarr"), source

    return build


def test_what_is_stored(crops, teacher) -> None:
    cache, split = crops()
    view = cache.manifest.view
    assert (view.kind, view.size, view.image_size, len(cache)) == ("crop", (32, 40), (48, 64), 21)
    assert view.drawn == Drawn(seed=2, scale=(0.25, 1.25), flip=True)
    assert view.reaches_beyond
    beyond = flips = 0
    for record in range(21):
        sample, number = divmod(record, 3)
        row = cache.read(record, PATHS)
        window, flip = draw_view(2, split.ids[sample], number, (36, 52), (0.25, 1.25), True, (32 / 48, 40 / 64))
        assert (tuple(row["records/window"]), row["records/flip"]) == (window.as_tuple(), flip)
        assert (row["records/view"], row["records/source_size"].tolist()) == (number, [36, 52])
        image, label = render(split.image(sample), split.label(sample), window, flip=flip, size=(32, 40))
        assert np.array_equal(row["pixels/image"], image)
        assert np.array_equal(row["labels/segmentation"], label)
        y0, x0, y1, x1 = inside_rectangle(
            row["records/window"], row["records/flip"], row["records/source_size"], (32, 40)
        )
        y, x = np.arange(32)[:, None] + 0.5, np.arange(40) + 0.5
        inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
        _, marked = render(split.image(sample), np.zeros((36, 52), np.uint8), window, flip=flip, size=(32, 40))
        assert np.array_equal(marked == 0, inside)
        beyond += not inside.all()
        flips += flip
        # s times --size: a crop of 32 rows out of s * 48.
        assert 0.25 <= 32 / 48 * 36 / (window.y1 - window.y0) <= 1.25
    assert 3 < beyond < 18
    assert 3 < flips < 18
    assert compare_teacher(Records(cache, split), teacher, CPU, 21).ok
    assert score_cache(Records(cache, split)) is not None


def test_further_views_and_samples(crops, teacher, tmp_path) -> None:
    cache, split = crops()
    chosen = options_of(cache.manifest, views=5, fidelity=False)
    assert (chosen.size, chosen.crop, chosen.view_scale) == ((48, 64), (32, 40), (0.25, 1.25))
    result = build_cache(split, teacher, tmp_path / "new", chosen, reuse=cache)
    assert (result.records, result.reused) == (14, 21)
    copy_store(cache, tmp_path / "copy", CopyChanges(samples=[1, 4], codec="none"))
    part = open_cache(tmp_path / "copy")
    assert part.column("source_size").tolist() == [[36, 52]] * 6
    for field, change in {"view.size": {"crop": (32, 44)}, "view.image_size": {"size": (40, 64)}}.items():
        other = options_of(cache.manifest, fidelity=False, **change)
        with pytest.raises(MismatchError, match=field):
            build_cache(split, teacher, tmp_path / "other", other, reuse=cache)


def test_replayed_exactly(crops) -> None:
    cache, _ = crops()
    data = CacheDataset(cache, augment="replay")
    for index in range(7):
        for epoch in range(3):
            record = data.record(index, epoch)
            drawn = data.draw(index, epoch, np.random.default_rng(0))
            assert np.array_equal(drawn.label, cache.read(record, PATHS)["labels/segmentation"])


def test_one_crop_is_enough(tmp_path, teacher, split, options) -> None:
    build_cache(split, teacher, tmp_path / "s", options(**{**CROPS, "views": 1, "view_scale": (1.0, 1.0)}))
    cache = open_cache(tmp_path / "s")
    assert (len(cache), cache.manifest.view.reaches_beyond) == (7, False)
    assert "records/source_size" not in cache.specs
    windows = cache.column("window")
    assert np.allclose(windows[:, 2:] - windows[:, :2], (32 / 48 * 36, 40 / 64 * 52))
    assert len(np.unique(windows, axis=0)) == 7


@pytest.mark.parametrize(("crop", "beyond"), [((40, 16), 0), ((12, 60), 1)])
def test_crops_that_reach_beyond_along_one_axis(crop, beyond, tmp_path, teacher, folder_data, options) -> None:
    """Shares of 5/6 and 1/4, or 1/4 and 15/16, at zooms from 0.7: grey along one axis alone must not teach either."""
    split = open_split(folder_data, "train")
    changes = {"size": (48, 64), "crop": crop, "views": 2, "view_seed": 3, "view_scale": (0.7, 0.95)}
    build_cache(split, teacher, tmp_path / "s", options(batch_size=1, **changes))
    cache = open_cache(tmp_path / "s")
    data, grey = CacheDataset(cache, augment="replay"), 0
    for index in range(7):
        for epoch in range(2):
            _, label = render(
                split.image(index),
                np.zeros(split.image(index).shape[:2], np.uint8),
                Window(*cache.column("window")[data.record(index, epoch)]),
                flip=bool(cache.column("flip")[data.record(index, epoch)]),
                size=crop,
            )
            y0, x0, y1, x1 = data.draw(index, epoch, np.random.default_rng(0)).inside.tolist()
            y, x = np.arange(crop[0])[:, None] + 0.5, np.arange(crop[1]) + 0.5
            inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
            assert np.array_equal(inside, label == 0)
            assert inside.any(axis=beyond).all()  # along the other axis it is whole
            grey += not inside.all()
    assert grey >= 2


def test_views_amid_grey(tmp_path, teacher, split, options) -> None:
    """Zooms below 1 without crops: the first view stays the whole image."""
    build_cache(split, teacher, tmp_path / "s", options(views=4, view_scale=(0.5, 1.0)))
    cache = open_cache(tmp_path / "s")
    assert cache.manifest.view.kind == "full"
    shown = inside_rectangle(cache.column("window"), cache.column("flip"), cache.column("source_size"), (32, 48))
    assert shown[::4].tolist() == [[0, 0, 32, 48]] * 7
    part = (shown[:, 2] - shown[:, 0]) / 32
    assert np.allclose(part, (shown[:, 3] - shown[:, 1]) / 48)
    assert 0.5 <= part.min() < 0.75
    assert (part[np.arange(28) % 4 > 0] < 1).all()
    facts = dict(inspect_store(tmp_path / "s").facts())
    assert "0.5 to 1 times" in facts["view"]


def test_crops_that_cannot_be(teacher, split, options) -> None:
    for change in ({"crop": (61, 40)}, {"crop": (32, 81)}, {"crop": (32, 40), "view_scale": (0.1, 0.6)}):
        with pytest.raises(RecipeError, match=r"Crops of \d+x\d+ do not fit"):
            plan_manifest(TeacherProbe(split, teacher, options(**{**CROPS, **change})))
    largest = plan_manifest(TeacherProbe(split, teacher, options(**{**CROPS, "crop": (60, 80)}))).view
    assert (largest.size, largest.image_size) == ((60, 80), (48, 64))
    for scale in ((0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(RecipeError, match="--view-scale"):
            plan_manifest(TeacherProbe(split, teacher, options(**{**CROPS, "view_scale": scale})))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "crop"},
        {"kind": "crop", "image_size": (9, 9)},
        {"kind": "crop", "drawn": Drawn(seed=0, scale=(1.0, 2.0), flip=True)},
        {"image_size": (9, 9)},
        {"drawn": Drawn(seed=0, scale=(1.0, 2.0), flip=True)},
        {"kind": "zoom"},
    ],
)
def test_manifests_that_contradict_themselves(fields) -> None:
    with pytest.raises(ValueError, match=r"kind|drawn"):
        View(size=(4, 4), pixels="stored", **fields)


def test_a_window_says_all(crops) -> None:
    """A reader in another language needs window, flip and size alone."""
    cache, split = crops()
    row = cache.read(10, PATHS)
    window, flip = Window(*row["records/window"]), bool(row["records/flip"])
    assert np.array_equal(render(split.image(3), None, window, flip=flip, size=(32, 40))[0], row["pixels/image"])
