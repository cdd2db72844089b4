"""Targets for an augmentation of one's own: those that the library's loader draws for the same windows and flips."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from kdcache.data import Augmentation, open_split
from kdcache.distill import Batch, DistillLoss
from kdcache.errors import DataError, RecipeError
from kdcache.models import build_model
from kdcache.store import Cache, SampleTargets
from kdcache.training import CacheDataset

SIZE = (64, 96)
DATA = "scenes:64x96,train=8,val=1"  # as large as its views; the larger below are twice and 1.5 times as large
LARGER = {2.0: "scenes:128x192,train=8,val=1", 1.5: "scenes:96x144,train=8,val=1"}


def drawn(cache: Cache, seed: int = 0) -> Batch:
    """A batch that the loader warps: zoomed, cropped, flipped."""
    dataset = CacheDataset(cache, augment="warp", augmentation=Augmentation(jitter=0.0))
    rng = np.random.default_rng(seed)
    return default_collate([dataset.draw(index, 0, rng) for index in range(8)])


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (own,) = torch.autograd.grad(loss, logits)
    return own


@pytest.mark.parametrize("which", ["dense", "top 3"])
def test_gradients_are_the_loader_s_to_the_bit(which: str, make_cache: Callable[..., Cache]) -> None:
    cache = make_cache(views=1, **({"top_k": 3} if which == "top 3" else {}))
    batch = drawn(cache)
    assert batch.flip is not None
    assert 0 < batch.flip.sum() < 8
    torch.manual_seed(1)
    model = build_model("kdcache:tiny", 7)
    logits = model(model.normalise(batch.pixels)).logits
    criterion = DistillLoss(cache, ce_weight=0)
    expected = criterion(logits, batch)
    targets = cache.targets_for(list(cache.ids), batch.window, batch.flip)
    losses = criterion(logits, targets, labels=batch.label)
    assert torch.equal(losses.loss, expected.loss)
    assert expected.loss > 0
    assert torch.equal(gradient(losses.loss, logits), gradient(expected.loss, logits))


@pytest.mark.parametrize("times", LARGER)
def test_windows_count_in_pixels_of_the_image(times: float, make_cache: Callable[..., Cache]) -> None:
    """A window is multiplied by `times` and by a rounded ratio of sides: three roundings of 2**-53 of it each."""
    cache = make_cache(LARGER[times], views=1)
    batch = drawn(cache)
    assert batch.window is not None
    targets = cache.targets_for(list(cache.ids), batch.window * times, batch.flip)
    reach = batch.window.abs().max().item()
    assert np.abs(targets.window - batch.window.numpy()).max() <= 4 * 2.0**-53 * reach * (times != 2.0)
    stored = CacheDataset(cache, augment="none")
    for row in range(8):
        expected = stored[row].target
        assert expected is not None
        assert np.array_equal(targets.arrays["targets/segmentation/values"][row], expected.values.numpy())


def test_without_windows_it_is_the_whole_view(dense: Cache) -> None:
    stored: Batch = default_collate([CacheDataset(dense, augment="none")[index] for index in range(8)])
    logits = torch.randn(8, 7, 16, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    criterion = DistillLoss(dense, ce_weight=0)
    expected = criterion(logits, stored)
    losses = criterion(logits, dense.targets_for(list(dense.ids)), labels=stored.label)
    assert torch.equal(losses.loss, expected.loss)


def test_any_order_of_ids_and_repeated_ones(dense: Cache) -> None:
    ids = [dense.ids[3], dense.ids[0], dense.ids[3]]
    rows = dense.targets_for(ids).arrays["targets/segmentation/values"]
    assert np.array_equal(rows[0], rows[2])
    assert np.array_equal(rows[1], dense.read(0, ["targets/segmentation/values"])["targets/segmentation/values"])


def test_a_store_of_several_views_gives_the_whole_one(make_cache: Callable[..., Cache]) -> None:
    """Among views amid grey, too, of which what is outside the image must not teach."""
    cache = make_cache(views=3, view_scale=(0.5, 1.0))
    targets = cache.targets_for(list(cache.ids), [[0, 0, 64, 96]] * 8, [False] * 8)
    whole = cache.read(cache.manifest.record(5, 0), ["targets/segmentation/values"])["targets/segmentation/values"]
    assert np.array_equal(targets.arrays["targets/segmentation/values"][5], whole)
    assert np.array_equal(targets.inside, [[0, 0, *SIZE]] * 8)
    batch = Batch.of_targets(targets)
    labels = torch.zeros((8, *SIZE), dtype=torch.int64)
    loss = DistillLoss(cache, ce_weight=0)(torch.zeros(8, 7, 16, 24), batch, labels=labels).loss
    assert loss > 0


def test_labels_of_any_whole_type_and_void_ones_teach_alike(dense: Cache) -> None:
    targets, logits = dense.targets_for(list(dense.ids)), torch.zeros(8, 7, 16, 24)
    criterion = DistillLoss(dense, ce_weight=0)
    void = torch.full((8, *SIZE), 255, dtype=torch.uint8)
    losses = [criterion(logits, targets, labels=label).loss for label in (void, void.long(), torch.zeros_like(void))]
    assert all(torch.equal(losses[0], other) for other in losses[1:])
    part = DistillLoss(dense, ce_weight=0, distill_void=False)
    assert part(logits, targets, labels=void).loss == 0


def test_it_may_be_made_in_a_worker(dense: Cache) -> None:
    again = pickle.loads(pickle.dumps(dense)).targets_for([dense.ids[1]])
    targets: SampleTargets = pickle.loads(pickle.dumps(again))
    assert np.array_equal(targets.window, dense.targets_for([dense.ids[1]]).window)


MANY = "y0 < y1 and x0 < x1 in pixels"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["scene 12"],), "Unknown id 'scene 12'"),
        (("64x96-seed0/train-000000",), "takes a list of ids"),
        (([0],), "Unknown id 0"),
        ((None, [[0, 0, 32]]), "Cannot match 1 ids"),
        ((None, [[0, 0, 32, 48]] * 2), "Cannot match 1 ids"),
        ((None, [[0, 0, 32, 48]], [True, False]), "Cannot match 1 ids"),
        ((None, [[32, 48, 16, 24]]), MANY),
        ((None, [[0.1, 0.2, 0.9, 0.8]]), "as shares of the image"),
        ((None, [[0, 0, float("nan"), 48]]), MANY),
        ((None, [[64, 0, 128, 96]]), MANY),
    ],
    ids=lambda value: None,
)
def test_what_is_no_window_of_a_sample_is_refused(arguments: tuple[Any, ...], message: str, dense: Cache) -> None:
    ids, *rest = arguments
    with pytest.raises(DataError) as caught:
        dense.targets_for([dense.ids[0]] if ids is None else ids, *rest)
    assert message in str(caught.value)


def test_stores_without_whole_views_and_unknown_heads_are_refused(
    make_cache: Callable[..., Cache], dense: Cache
) -> None:
    crops = make_cache(views=2, crop=(32, 48))
    with pytest.raises(RecipeError, match="is a cache of crops"):
        crops.targets_for([crops.ids[0]])
    for heads in (["depth"], []):
        with pytest.raises(RecipeError, match="Unknown heads"):
            dense.targets_for([dense.ids[0]], heads=heads)


def test_labels_that_are_none_are_refused(dense: Cache) -> None:
    targets, criterion, logits = dense.targets_for([dense.ids[0]]), DistillLoss(dense), torch.zeros(1, 7, 16, 24)
    wrong: list[Any] = [None, torch.zeros(1, *SIZE), torch.zeros(1, 1, *SIZE, dtype=torch.int64), np.zeros((1, *SIZE))]
    for labels in wrong:
        with pytest.raises(DataError, match="Pass labels=masks"):
            criterion(logits, targets, labels=labels)
    with pytest.raises(DataError, match="different lengths: logits of 1, labels of 2"):
        criterion(logits, targets, labels=torch.zeros(2, *SIZE, dtype=torch.int64))
    with pytest.raises(DataError, match="Labels of 64x64 do not fit the window"):
        criterion(logits, targets, labels=torch.zeros(1, 64, 64, dtype=torch.int64))


def test_labels_beside_a_batch_replace_its_own(dense: Cache) -> None:
    batch: Batch = default_collate([CacheDataset(dense, augment="none")[index] for index in range(2)])
    criterion, logits = DistillLoss(dense), torch.zeros(2, 7, 16, 24)
    other = torch.ones_like(batch.label)
    expected = criterion(logits, replace(batch, labels={"segmentation": other}))
    assert torch.equal(criterion(logits, batch, labels=other).loss, expected.loss)
    assert open_split(DATA, "train").ids == dense.ids
