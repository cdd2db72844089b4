"""Calibration, coverage and quantiles against torchmetrics and against sorting every pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.metrics.calibration import VALUES_V, ConfidenceCounts

CLASSES = 4


def draw(seed: int, pixels: int = 3000):
    """(predicted, confidence float16, label): surer pixels are right more often, some labels are void."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.26, 0.999, pixels).astype(np.float16)
    predicted = rng.integers(0, CLASSES, pixels).astype(np.uint8)
    other = (predicted + rng.integers(1, CLASSES, pixels)).astype(np.uint8) % CLASSES
    label = np.where(rng.random(pixels) < confidence**2, predicted, other).astype(np.uint8)
    label[rng.random(pixels) < 0.1] = 255
    return predicted, confidence, label


def counted(predicted, confidence, label, parts: int = 3) -> ConfidenceCounts:
    counts = ConfidenceCounts(CLASSES)
    for part in np.array_split(np.arange(len(predicted)), parts):
        counts.update(torch.from_numpy(predicted[part]), torch.from_numpy(confidence[part]), label[part])
    return counts


def test_values_are_all_of_float16() -> None:
    assert (VALUES_V[0], VALUES_V[-1], len(VALUES_V)) == (0, 1, 15361)
    assert (np.diff(VALUES_V) > 0).all()


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_error_is_that_of_torchmetrics(bins) -> None:
    predicted, confidence, label = draw(0)
    probabilities = np.full((len(predicted), CLASSES), 0.0, np.float64)
    probabilities[:] = ((1 - confidence.astype(np.float64)) / (CLASSES - 1))[:, None]
    probabilities[np.arange(len(predicted)), predicted] = confidence
    from torchmetrics.classification import MulticlassCalibrationError  # which imports Triton

    judge = MulticlassCalibrationError(num_classes=CLASSES, n_bins=bins, ignore_index=255)
    judge.update(torch.from_numpy(probabilities), torch.from_numpy(label.astype(np.int64)))
    found = counted(predicted, confidence, label).calibration(bins)
    assert found.ece == pytest.approx(float(judge.compute()), abs=1e-6)
    assert found.ece > 0.1
    assert sum(part.share for part in found.bins) == pytest.approx(1)


def test_bins_are_closed_on_the_right() -> None:
    """Certain pixels belong to the last bin, an edge to the bin below it, 0 to the first."""
    confidence = np.array([1.0, 0.5, 0.0, 0.75], np.float16)
    found = counted(np.zeros(4, np.uint8), confidence, np.array([0, 1, 1, 0], np.uint8), 1).calibration(2)
    low, high = found.bins
    assert (low.low, low.high, high.high) == (0, 0.5, 1)
    assert (low.share, low.confidence, low.accuracy) == (0.5, 0.25, 0)
    assert (high.share, high.confidence, high.accuracy) == (0.5, 0.875, 1)
    assert found.ece == pytest.approx((0.25 + 0.125) / 2)
    assert found.confidence[0] == pytest.approx(0.5625)
    assert found.precision[0] == 0.5
    assert np.isnan(found.precision[1])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), threshold=st.floats(0.01, 0.99), parts=st.integers(1, 4))
def test_coverage_is_that_of_every_pixel(seed, threshold, parts) -> None:
    predicted, confidence, label = draw(seed, 400)
    found = counted(predicted, confidence, label, parts).coverage(threshold)
    selected = confidence.astype(np.float64) >= threshold
    for c in range(CLASSES):
        mine = selected & (predicted == c)
        assert found.predicted[c] == (predicted == c).sum()
        assert found.selected[c] == mine.sum()
        if (label[mine] != 255).any():
            assert found.precision[c] == pytest.approx((label[mine] == c).sum() / (label[mine] != 255).sum())
        else:
            assert np.isnan(found.precision[c])
    assert found.total_share == pytest.approx(selected.mean())
    labelled = selected & (label != 255)
    if labelled.any():
        assert found.total_precision == pytest.approx((predicted == label)[labelled].mean())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0.01, 0.99), levels=st.sampled_from([3, 50, 15361]))
def test_quantiles_are_those_of_sorted_pixels(seed, share, levels) -> None:
    """At least the share is selected, and with the next larger confidence it would be less; ties go together."""
    predicted, confidence, label = draw(seed, 300)
    confidence = (np.round(confidence.astype(np.float64) * levels) / levels).clip(0, 1).astype(np.float16)
    predicted[predicted == 2] = 3  # class 2 is never predicted
    counts = counted(predicted, confidence, label)
    thresholds = counts.quantile_thresholds(share)
    for c in (0, 1, 3):
        mine = np.sort(confidence[predicted == c].astype(np.float64))[::-1]
        assert thresholds[c] == mine[int(np.ceil(share * len(mine) - 1e-9)) - 1]
        assert counts.coverage(thresholds).shares[c] >= share - 1e-9
    assert thresholds[2] == 1
    assert np.isnan(counts.coverage(thresholds).shares[2])


def test_unlabelled_pixels_count_for_coverage_alone() -> None:
    predicted, confidence, _ = draw(1, 50)
    counts = ConfidenceCounts(CLASSES)
    counts.update(torch.from_numpy(predicted), torch.from_numpy(confidence), None)
    assert sum(counts.coverage(0.5).predicted) == 50
    assert np.isnan(counts.coverage(0.5).total_precision)
    assert counts.calibration().ece == 0


def test_pixels_that_do_not_count_are_in_no_count() -> None:
    predicted, confidence, label = draw(2, 60)
    counted_HW = np.arange(60) % 3 > 0
    some, all_of_them = ConfidenceCounts(CLASSES), ConfidenceCounts(CLASSES)
    some.update(torch.from_numpy(predicted), torch.from_numpy(confidence), label, counted_HW)
    part = [torch.from_numpy(array[counted_HW]) for array in (predicted, confidence)]
    all_of_them.update(*part, label[counted_HW])
    for name in ("predicted_CV", "labelled_CV", "right_CV"):
        assert (getattr(some, name) == getattr(all_of_them, name)).all()


def test_confidence_of_a_class_is_that_of_its_labelled_pixels() -> None:
    """Beside the precision, which is known of no other pixels."""
    confidence = np.array([0.5, 1.0], np.float16)
    counts = ConfidenceCounts(CLASSES)
    counts.update(torch.zeros(2, dtype=torch.uint8), torch.from_numpy(confidence), np.array([0, 255], np.uint8))
    assert (counts.calibration().confidence[0], counts.calibration().precision[0]) == (0.5, 1)


def test_a_share_that_is_reached_exactly_is_enough() -> None:
    confidence = np.array([0.25, 0.5, 0.75, 1.0], np.float16)
    counts = ConfidenceCounts(1)
    counts.update(torch.zeros(4, dtype=torch.uint8), torch.from_numpy(confidence), None)
    assert [counts.quantile_thresholds(share) for share in (0.25, 0.5, 0.75, 1.0)] == [(1.0,), (0.75,), (0.5,), (0.25,)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_one_threshold_keeps_a_share_of_all_pixels(share) -> None:
    predicted, confidence, label = draw(5)
    counts = counted(predicted, confidence, label)
    ranked = np.sort(confidence)[::-1]
    assert counts.threshold_keeping(share) == ranked[int(np.ceil(share * len(ranked))) - 1]
    assert counts.highest == confidence.max()
    assert (ConfidenceCounts(CLASSES).threshold_keeping(share), ConfidenceCounts(CLASSES).highest) == (1.0, 0.0)
