"""Scores of single images against sets of pixels, and which images are chosen."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.analysis.per_image import ImageScore, Score, best_and_worst, ranked, score_images
from kdcache.data import Numbered, Split, open_split
from kdcache.errors import DataError
from kdcache.metrics import evaluate_model, predictions
from kdcache.models import SegmentationModel

SIZE = (32, 48)


def by_sets(model: SegmentationModel, split: Split, number: int) -> list[float]:
    """IoU per class of one image, by sets of pixels; NaN for a class that is neither in the label nor said."""
    (said,) = next(predictions.predictions(model, split, [number], predictions.Inference(SIZE)))
    label, argmax = said.label.numpy(), said.argmax.numpy()
    counted = label != 255
    found = []
    for c in range(len(split.classes)):
        ours, theirs = (set(np.flatnonzero((ids == c) & counted)) for ids in (argmax, label))
        found.append(len(ours & theirs) / len(ours | theirs) if ours | theirs else np.nan)
    return found


def test_the_score_of_an_image(model: SegmentationModel, split: Split) -> None:
    found = score_images(model, split, SIZE, batch_size=2)
    assert [image.sample for image in found.images] == list(split.ids[:5])
    for image in found.images:
        expected = by_sets(model, split, image.number)
        assert image.iou == pytest.approx(expected, nan_ok=True, abs=2e-3)
        assert image.miou == pytest.approx(np.nanmean(image.iou))
    assert any(np.isnan(image.iou[4]) for image in found.images)


def test_all_images_together_are_the_evaluation(model: SegmentationModel, split: Split) -> None:
    seen: list[tuple[int, int]] = []
    found = score_images(model, split, SIZE, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert found.metrics == evaluate_model(model, split, SIZE, batch_size=2) or np.array_equal(
        found.metrics.iou, evaluate_model(model, split, SIZE, batch_size=2).iou, equal_nan=True
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert found.metrics.miou != pytest.approx(np.mean(found.known()))


def test_predictions_are_not_kept(model: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[predictions.Predicted] = weakref.WeakSet()
    most = 0

    class Watched(predictions.Predicted):
        __hash__ = object.__hash__

        def __init__(self, *values: object) -> None:
            nonlocal most
            super().__init__(*values)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(predictions, "Predicted", Watched)
    model = type(model)("kdcache:tiny", 7, stem=8, widths=(16, 32), depths=(1, 1), decoder=8)
    score_images(model, open_split("scenes:32x48,val=24", "val"), SIZE, batch_size=2)
    assert 2 <= most <= 4


def test_an_image_of_void_has_no_score(model: SegmentationModel, split: Split) -> None:
    void = lambda number: np.full(split.image_size(number), 255, np.uint8)  # noqa: E731
    samples = tuple(
        replace(sample, labels={"segmentation": Numbered(void, number)}) for number, sample in enumerate(split.samples)
    )
    found = score_images(model, replace(split, samples=samples), SIZE)
    assert found.known() == []
    assert ranked([found]) == []
    assert found.to_json()["images"][0]["miou"] is None


def test_without_labels_there_is_nothing_to_score(model: SegmentationModel) -> None:
    with pytest.raises(DataError, match="none of the 3 images"):
        score_images(model, open_split("scenes:32x48,unlabelled=3", "unlabelled"), SIZE)


def test_ranks_are_those_of_the_mean_over_models(model: SegmentationModel, split: Split) -> None:
    torch.manual_seed(9)
    other = score_images(model, split, (48, 64))
    one = score_images(model, split, SIZE)
    order = [image for image, _ in ranked([one, other])]
    means = [(a.miou + b.miou) / 2 for a, b in zip(one.images, other.images, strict=True)]
    assert order == sorted(range(5), key=lambda place: -means[place])


def test_the_smallest_error_of_depth_is_the_best(model: SegmentationModel, split: Split) -> None:
    errors = {"a": 2.0, "b": 0.5, "c": math.nan, "d": 1.0}
    images = tuple(ImageScore(n, name, {"depth": one}, (one,)) for n, (name, one) in enumerate(errors.items()))
    found = replace(score_images(model, split, SIZE), images=images)
    assert ranked([found], Score("depth")) == [(1, 0.5), (3, 1.0), (0, 2.0)]


@given(st.integers(0, 30), st.integers(0, 12), st.integers(0, 12))
def test_no_image_is_both_a_success_and_a_failure(images: int, best: int, worst: int) -> None:
    ranking = [(place, 1 - place / 100) for place in range(images)]
    upper, lower = best_and_worst(ranking, best, worst)
    assert not set(upper) & set(lower)
    assert upper == list(range(len(upper)))
    assert lower == list(range(images - 1, images - 1 - len(lower), -1))
    assert len(upper) <= best
    assert len(lower) <= worst
    assert len(upper) + len(lower) == min(images, best + worst)
    if best == worst:
        assert 0 <= len(upper) - len(lower) <= 1
