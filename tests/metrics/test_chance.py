"""Models that have learnt nothing are told from poor ones, by their scores alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.metrics import ConfusionMatrix, Metrics, at_chance

NAMES = ("Sky", "Road", "Car", "Pole")
PRIORS = np.array([0.25, 0.6, 0.14, 0.01])
PIXELS = 20_000


def score(label: np.ndarray, predicted: np.ndarray, names: tuple[str, ...] = NAMES) -> Metrics:
    confusion = ConfusionMatrix(names)
    confusion.update(torch.from_numpy(predicted), torch.from_numpy(label))
    return confusion.metrics()


@pytest.fixture(scope="module")
def label() -> np.ndarray:
    return np.random.default_rng(0).choice(len(NAMES), PIXELS, p=PRIORS)


def wrong(label: np.ndarray, share: float) -> np.ndarray:
    """The labels with that share of the pixels drawn anew, each class as often as before."""
    rng = np.random.default_rng(1)
    return np.where(rng.random(len(label)) < share, rng.permutation(label), label)


@pytest.mark.parametrize("alone", range(len(NAMES)))
def test_one_class_everywhere_is_named(label: np.ndarray, alone: int) -> None:
    found = at_chance(score(label, np.full_like(label, alone)))
    assert found is not None
    assert f"predicts {NAMES[alone]} alone" in found


def test_a_few_stray_pixels_do_not_hide_a_single_class(label: np.ndarray) -> None:
    predicted = np.full_like(label, 1)
    predicted[:5] = label[:5]
    assert "predicts Road alone" in str(at_chance(score(label, predicted)))


@pytest.mark.parametrize(
    "predicted",
    [
        lambda label: np.random.default_rng(2).permutation(label),
        lambda label: np.random.default_rng(2).integers(0, len(NAMES), label.shape),
        lambda label: np.random.default_rng(2).choice([1, 3], label.shape),
    ],
    ids=["as often as the labels", "all alike", "two classes"],
)
def test_classes_at_random_places_are_at_chance(label: np.ndarray, predicted: object) -> None:
    assert "at chance" in str(at_chance(score(label, predicted(label))))


def test_classes_that_are_swapped_are_at_chance(label: np.ndarray) -> None:
    found = at_chance(score(label, (label + 1) % len(NAMES)))
    assert found == "is at chance: mIoU 0.00 %, and Road everywhere would have 15.00 %".replace(
        "15.00", f"{100 * (label == 1).mean() / 4:.2f}"
    )


def test_worse_than_the_largest_class_everywhere_is_at_chance() -> None:
    """However well the predictions go with the labels."""
    label = np.repeat([0, 1], [9_900, 100])
    predicted = label.copy()
    predicted[:3_000] = 1
    found = score(label, predicted, ("Street", "Pothole"))
    assert found.miou < 0.99 / 2
    assert "Street everywhere would have 49.50 %" in str(at_chance(found))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.85])
def test_poor_models_are_not_reproached(label: np.ndarray, share: float) -> None:
    assert at_chance(score(label, wrong(label, share))) is None


def test_a_rare_class_that_is_found_is_no_collapse() -> None:
    label = np.repeat([0, 1], [99_990, 10])
    assert at_chance(score(label, label, ("Street", "Pothole"))) is None


def test_one_of_many_classes_learnt_well_is_not_chance() -> None:
    """Of 150 classes a student soon knows the largest two: its mIoU is tiny, and it has learnt something."""
    label = np.random.default_rng(3).integers(0, 150, PIXELS)
    label[:8_000] = 0
    predicted = np.where(label == 0, 0, 1)
    assert at_chance(score(label, predicted, tuple(map(str, range(150))))) is None


@pytest.mark.parametrize("label", [np.zeros(50, int), np.full(50, 255)], ids=["one class", "void"])
def test_where_nothing_can_be_told_nothing_is_said(label: np.ndarray) -> None:
    assert at_chance(score(label, np.zeros(50, int))) is None


def test_a_single_class_without_labels_is_at_chance(label: np.ndarray) -> None:
    found = at_chance(score(label, np.full_like(label, 4), (*NAMES, "Train")))
    assert "is at chance: mIoU 0.00 %" in str(found)
