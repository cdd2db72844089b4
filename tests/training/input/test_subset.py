"""Parts of a training set: nested, the same every time, and without what is held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.data import Fold, folds_of, open_split
from kdcache.errors import KDCacheError, RecipeError
from kdcache.store import open_cache
from kdcache.training import CacheDataset, LabelledDataset
from kdcache.training.input.subset import Part

IDS = [f"drive/{number:04d}" for number in range(50)]


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_larger_part_holds_a_smaller_one(one: int, two: int) -> None:
    small, large = (Part(samples=count).choose(IDS) for count in sorted((one, two)))
    assert len(small.samples) == min(one, two)
    assert set(small.samples) <= set(large.samples)
    assert small.samples == sorted(small.samples)


@given(st.permutations(range(20)))
def test_a_part_does_not_depend_on_the_order(order: list[int]) -> None:
    ids = IDS[:20]
    selection = {ids[n] for n in Part(samples=0.3).choose(ids).samples}
    shuffled = [ids[n] for n in order]
    assert {shuffled[n] for n in Part(samples=0.3).choose(shuffled).samples} == selection


def test_labels_are_a_part_of_the_samples() -> None:
    selection = Part(samples=20, labels=0.25).choose(IDS)
    assert len(selection.samples) == 20
    assert len(selection.labelled) == 5
    assert selection.labelled < set(selection.samples)


def test_a_share_is_the_nearest_number_and_at_least_one_sample_is_one() -> None:
    assert len(Part(samples=0.55).choose(IDS[:5]).samples) == 3
    assert len(Part(samples=1).choose(IDS).samples) == 1
    assert len(Part(samples=20, labels=0.99).choose(IDS).labelled) == 20


def test_a_fold_is_left_out_first() -> None:
    folds = folds_of(IDS, 5)
    selection = Part(without=Fold(2, 5)).choose(IDS).samples
    assert selection == np.flatnonzero(folds != 2).tolist()
    assert set(Part(without=Fold(2, 5), samples=0.5).choose(IDS).samples) <= set(selection)


@pytest.mark.parametrize("part", [Part(samples=51), Part(samples=0.001), Part(samples=10, labels=11)])
def test_a_part_that_cannot_be_is_refused(part: Part) -> None:
    with pytest.raises(RecipeError, match="--limit"):
        part.choose(IDS)


def test_samples_without_labels_keep_their_targets(cache_path) -> None:
    cache = open_cache(cache_path)
    dataset = CacheDataset(cache, augment="none", part=Part(samples=4, labels=2))
    assert len(dataset) == 4
    void = [bool((dataset[n].label == 255).all()) for n in range(4)]
    assert void == [number not in dataset.labelled for number in dataset.indices]
    assert sum(void) == 2
    for n in range(4):
        path = "targets/segmentation/values"
        assert np.array_equal(dataset[n].target.values, cache.read(dataset.indices[n], [path])[path])
        assert dataset.sample_id(n) == cache.ids[dataset.indices[n]]
    only = CacheDataset(cache, augment="none", part=Part(samples=4, labels=2), labelled_only=True)
    assert only.indices == dataset.labelled


def test_a_data_folder_s_part_has_labels(scenes) -> None:
    split = open_split(scenes, "train")
    assert len(LabelledDataset(split, (32, 48), part=Part(samples=4, labels=3))) == 3


def test_views_are_limited_to_the_first(make_cache) -> None:
    cache = open_cache(make_cache(views=4))
    dataset = CacheDataset(cache, augment="replay", part=Part(views=2))
    visited = [{dataset.record(n, epoch) % 4 for epoch in range(8)} for n in range(len(dataset))]
    assert visited == [{0, 1}] * len(dataset)
    with pytest.raises(KDCacheError, match="--limit-views"):
        CacheDataset(cache, part=Part(views=5))
