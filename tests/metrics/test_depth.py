"""Depth metrics beside an implementation in plain Python, pixel by pixel, and beside torchmetrics."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchmetrics.functional as tm
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import DataError
from kdcache.metrics import DEPTH_METRICS, DepthErrors, DepthMetrics, DepthRange

LOW, HIGH = 1e-3, 80.0


def of_image(
    predicted: np.ndarray, label: np.ndarray, low: float = LOW, high: float = HIGH, crop: tuple[int, ...] | None = None
) -> list[float] | None:
    """The definitions as they are written, over Python floats."""
    pairs = []
    top, bottom, left, right = crop or (0, label.shape[0], 0, label.shape[1])
    for y in range(top, bottom):
        for x in range(left, right):
            p, d = float(predicted[y, x]), float(label[y, x])
            if low < d < high:
                pairs.append((min(max(p, low), high), d))
    if not pairs:
        return None
    n = len(pairs)
    logs = [math.log(p / d) for p, d in pairs]
    mean_log = math.fsum(logs) / n
    return [
        math.sqrt(math.fsum((p - d) ** 2 for p, d in pairs) / n),
        math.sqrt(math.fsum(g * g for g in logs) / n),
        math.fsum(abs(p - d) / d for p, d in pairs) / n,
        math.fsum((p - d) ** 2 / d for p, d in pairs) / n,
        100 * math.sqrt(math.fsum((g - mean_log) ** 2 for g in logs) / n),
        *(sum(p / d < 1.25**i and d / p < 1.25**i for p, d in pairs) / n for i in (1, 2, 3)),
    ]


def values(metrics: DepthMetrics) -> list[float]:
    return [getattr(metrics, name) for name in DEPTH_METRICS]


def maps(seed: int, size: tuple[int, int] = (9, 13), valid: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Labels of 0.5 to 100 m, some not valid; predictions about right, some far out."""
    rng = np.random.default_rng(seed)
    label = np.exp(rng.uniform(math.log(0.5), math.log(100), size)).astype(np.float32)
    predicted = (label * np.exp(rng.normal(0, 0.4, size))).astype(np.float32)
    predicted[rng.random(size) < 0.05] = 1e6
    predicted[rng.random(size) < 0.05] = 0
    label[rng.random(size) > valid] = np.nan
    return predicted, label


def add(errors: DepthErrors, pair: tuple[np.ndarray, np.ndarray], name: str = "") -> None:
    errors.update(torch.from_numpy(pair[0]), torch.from_numpy(pair[1]), name)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4), st.floats(0, 1), st.integers(1, 6), st.integers(1, 7))
def test_metrics_are_their_definitions(seeds: list[int], valid: float, height: int, width: int) -> None:
    pairs = [maps(seed, (height, width), valid) for seed in seeds]
    errors = DepthErrors()
    for pair in pairs:
        add(errors, pair)
    rows = [row for pair in pairs if (row := of_image(*pair)) is not None]
    measured = errors.metrics()
    assert measured.counted_images == len(rows)
    assert measured.pixels == sum(int((pair[1] < HIGH).sum()) for pair in pairs)
    if not rows:
        assert all(map(math.isnan, values(measured)))
        assert json.loads(json.dumps(measured.to_json()))["rmse"] is None
        return
    assert values(measured) == pytest.approx(np.mean(rows, 0).tolist(), rel=1e-9, abs=1e-9)


def test_one_image_is_as_torchmetrics_measures_it() -> None:
    predicted, label = maps(3)
    keep = label < HIGH
    p, d = torch.from_numpy(np.clip(predicted[keep].astype(float), LOW, HIGH)), torch.from_numpy(label[keep]).double()
    errors = DepthErrors()
    add(errors, (predicted, label))
    measured = errors.metrics()
    assert measured.rmse == pytest.approx(tm.mean_squared_error(p, d, squared=False).item(), rel=1e-12)
    assert measured.abs_rel == pytest.approx(tm.mean_absolute_percentage_error(p, d).item(), rel=1e-12)
    assert measured.rmse_log == pytest.approx(tm.mean_squared_error(p.log(), d.log(), squared=False).item(), rel=1e-12)


def test_images_weigh_alike_however_many_pixels_they_have() -> None:
    """The KITTI convention: a mean of roots of images, not the root of a mean over pixels."""
    errors = DepthErrors()
    label = np.full((4, 4), 10.0)
    add(errors, (label + 1, label))
    sparse = np.full((4, 4), np.nan)
    sparse[2, 1] = 10.0
    add(errors, (label + 4, sparse))
    assert errors.metrics().rmse == 2.5
    assert errors.metrics().pixels == 17


@pytest.mark.parametrize("size", [(375, 1242), (352, 1216), (7, 11)])
def test_the_garg_crop_is_that_of_the_published_code(size: tuple[int, int]) -> None:
    height, width = size
    rows, columns = (Fraction("0.40810811"), Fraction("0.99189189")), (Fraction("0.03594771"), Fraction("0.96405229"))
    (top, bottom), (left, right) = [int(share * height) for share in rows], [int(share * width) for share in columns]
    if size == (375, 1242):
        assert (top, bottom, left, right) == (153, 371, 44, 1197)
    valid = DepthRange(crop="garg").valid(np.full(size, 5.0))
    assert valid.sum() == (bottom - top) * (right - left)
    assert valid[top:bottom, left:right].all()


def test_the_crop_and_the_range_choose_pixels() -> None:
    predicted, label = maps(8, (20, 30), 1.0)
    errors = DepthErrors(DepthRange(2.0, 50.0, "garg"))
    add(errors, (predicted, label))
    expected = of_image(predicted, label, 2.0, 50.0, (8, 19, 1, 28))
    assert values(errors.metrics()) == pytest.approx(expected, rel=1e-9)


def test_any_sharing_out_gives_the_same_bits() -> None:
    pairs = [maps(seed) for seed in range(7)]
    whole, parts = DepthErrors(), [DepthErrors() for _ in range(3)]
    for number, pair in enumerate(pairs):
        add(whole, pair, f"image{number}")
        add(parts[number % 3], pair, f"image{number}")
    assert DepthErrors.merged(parts).metrics() == whole.metrics()
    assert DepthErrors.merged(parts[::-1]).metrics() == whole.metrics()
    images = whole.metrics().images
    assert images is not None
    assert images.ids == tuple(f"image{number}" for number in range(7))
    assert images.values[2].tolist() == pytest.approx(of_image(*pairs[2]), rel=1e-9)


def test_a_prediction_that_is_no_number_shows() -> None:
    errors = DepthErrors()
    predicted = np.full((2, 2), 5.0)
    predicted[0, 0] = np.nan
    add(errors, (predicted, np.full((2, 2), 5.0)))
    assert all(map(math.isnan, values(errors.metrics())))


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="Cannot compare"):
        DepthErrors().update(torch.ones(2, 3), torch.ones(4, 6))
    for bounds in ({"min_depth": 0.0}, {"max_depth": math.inf}, {"max_depth": math.nan}, {"min_depth": 90.0}):
        with pytest.raises(DataError, match="Invalid range of depth"):
            DepthRange(**bounds)
    with pytest.raises(DataError, match="different ranges"):
        DepthErrors.merged([DepthErrors(), DepthErrors(DepthRange(max_depth=10.0))])
