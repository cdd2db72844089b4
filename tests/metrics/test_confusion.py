"""Metrics against torchmetrics and against counting by hand."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kdcache.metrics import ConfusionMatrix, Metrics

NAMES = ("a", "b", "c", "d", "e")


def measure(pairs: list[tuple[np.ndarray, np.ndarray]], names: tuple[str, ...] = NAMES) -> Metrics:
    confusion = ConfusionMatrix(names)
    for predicted, label in pairs:
        confusion.update(torch.from_numpy(predicted), torch.from_numpy(label))
    return confusion.metrics()


def random_pairs(seed: int, classes: int = 5, images: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(images):
        label = rng.integers(0, classes, (7, 9), dtype=np.uint8)
        predicted = np.where(rng.random((7, 9)) < 0.6, label, rng.integers(0, classes, (7, 9)))
        label[rng.random((7, 9)) < 0.2] = 255
        pairs.append((predicted, label))
    return pairs


@pytest.mark.parametrize("seed", range(5))
def test_iou_is_that_of_torchmetrics(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.classification import MulticlassJaccardIndex

        pairs = random_pairs(seed)
        oracles = {how: MulticlassJaccardIndex(5, average=how, ignore_index=255) for how in ("macro", "none")}
        for predicted, label in pairs:
            for oracle in oracles.values():
                oracle.update(torch.from_numpy(predicted), torch.from_numpy(label).long())
        expected = {how: oracle.compute() for how, oracle in oracles.items()}
    found = measure(pairs)
    assert found.miou == pytest.approx(float(expected["macro"]), abs=1e-6)
    assert found.iou == pytest.approx(expected["none"].tolist(), abs=1e-6)


@hypothesis_settings(max_examples=80, deadline=None)
@given(data=st.data(), classes=st.integers(2, 6), images=st.integers(1, 3))
def test_metrics_are_those_counted_by_hand(data: st.DataObject, classes: int, images: int) -> None:
    present = data.draw(st.lists(st.integers(0, classes - 1), min_size=1, unique=True))
    pairs = []
    for _ in range(images):
        count = data.draw(st.integers(1, 12))
        label = data.draw(st.lists(st.sampled_from([*present, 255]), min_size=count, max_size=count))
        predicted = data.draw(st.lists(st.sampled_from(present), min_size=count, max_size=count))
        pairs.append((np.array(predicted, np.int64), np.array(label, np.uint8)))
    found = measure(pairs, tuple(map(str, range(classes))))
    predicted, label = (np.concatenate([pair[part] for pair in pairs]) for part in (0, 1))
    predicted, label = predicted[label != 255], label[label != 255]
    ious, accs = [], []
    for c in range(classes):
        hit, union = ((predicted == c) & (label == c)).sum(), ((predicted == c) | (label == c)).sum()
        ious.append(hit / union if union else math.nan)
        accs.append(hit / (label == c).sum() if (label == c).any() else math.nan)
    assert found.iou == pytest.approx(ious, nan_ok=True)
    assert found.acc == pytest.approx(accs, nan_ok=True)
    assert found.label_pixels == tuple(int((label == c).sum()) for c in range(classes))
    means = [np.nanmean(v) if not np.isnan(v).all() else math.nan for v in (ious, accs)]
    assert [found.miou, found.macc] == pytest.approx(means, nan_ok=True)
    assert found.aacc == pytest.approx((predicted == label).mean() if len(label) else math.nan, nan_ok=True)


def test_an_absent_class_is_nan_and_leaves_the_mean() -> None:
    found = measure([(np.array([0, 0, 1]), np.array([0, 1, 1], np.uint8))])
    assert found.iou[:2] == (0.5, 0.5)
    assert all(map(math.isnan, found.iou[2:] + found.acc[2:]))
    assert found.miou == 0.5


def test_a_class_that_is_only_predicted_counts_as_zero_iou() -> None:
    found = measure([(np.array([2, 0]), np.array([0, 0], np.uint8))])
    assert found.iou[2] == 0
    assert math.isnan(found.acc[2])
    assert found.miou == pytest.approx(0.25)


def test_void_is_left_out_whatever_was_predicted() -> None:
    one = measure([(np.array([0, 1, 4]), np.array([0, 1, 255], np.uint8))])
    assert one.miou == one.aacc == 1
    assert one.label_pixels == (1, 1, 0, 0, 0)


def test_the_mean_is_over_the_set_and_not_over_images() -> None:
    small = (np.array([0, 1]), np.array([0, 0], np.uint8))
    large = (np.zeros(98, np.int64), np.zeros(98, np.uint8))
    whole = measure([small, large])
    assert whole.iou[0] == pytest.approx(99 / 100)
    images = [measure([pair]).iou[0] for pair in (small, large)]
    assert np.mean(images) == 0.75


def test_order_and_splitting_do_not_matter() -> None:
    pairs = random_pairs(8, images=4)
    joined = [tuple(np.concatenate([pair[part] for pair in pairs]) for part in (0, 1))]
    assert measure(pairs) == measure(pairs[::-1]) == measure(joined)


def test_nothing_counted_is_nan_everywhere() -> None:
    found = measure([(np.array([1, 2]), np.array([255, 255], np.uint8))])
    assert all(map(math.isnan, (found.miou, found.macc, found.aacc, *found.iou, *found.acc)))


def test_json_has_null_for_nan_and_names_for_classes() -> None:
    found = measure([(np.array([0, 0, 1]), np.array([0, 1, 1], np.uint8))]).to_json()
    text = json.dumps(found, allow_nan=False)
    again = json.loads(text)
    assert again["classes"][0] == {"name": "a", "iou": 0.5, "acc": 1.0, "label_pixels": 1}
    assert again["classes"][4] == {"name": "e", "iou": None, "acc": None, "label_pixels": 0}
    empty = ConfusionMatrix(NAMES).metrics().to_json()
    assert (empty["miou"], empty["macc"], empty["aacc"]) == (None, None, None)


def test_counts_are_exact_beyond_float32() -> None:
    confusion = ConfusionMatrix(("a", "b"))
    confusion.counts += torch.tensor([[2**53, 1], [0, 2**30]])
    confusion.update(torch.tensor([0]), torch.tensor([0]))
    assert int(confusion.counts[0, 0]) == 2**53 + 1


def test_an_id_that_is_no_class_is_not_left_out_in_silence() -> None:
    """Void is 255 alone: other ids beyond the classes are a wrong label, which would make the score look better."""
    confusion = ConfusionMatrix(("a", "b"))
    with pytest.raises(RuntimeError):
        confusion.update(torch.tensor([0, 1]), torch.tensor([0, 2], dtype=torch.uint8))
