"""Evaluation of classes and depth in one pass, against the same thing written out; what cannot be judged is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from kdcache.data import ClassList, Numbered, Split, open_split
from kdcache.errors import DataError
from kdcache.metrics import (
    DepthMetrics,
    DepthRange,
    Inference,
    TaskMetrics,
    evaluate_model,
    evaluate_tasks,
    metrics_markdown,
)
from kdcache.metrics.tables import depth_figure
from kdcache.models import SegmentationModel, build_model
from kdcache.settings.shared import DepthSettings

SCENES = "scenes:40x56,train=4,val=5,depth=exact"
SIZE = (24, 40)


def only_depth(of: Split, change: Callable[[np.ndarray], np.ndarray] = lambda depth: depth) -> Split:
    """Return a split with depth only, of another split: its first image has no label, its second no valid pixel."""

    def depth(number: int) -> np.ndarray:
        metres = of.label(number, "depth")
        assert metres is not None
        return np.full_like(metres, np.nan) if number == 1 else change(metres)

    samples = tuple(
        replace(sample, labels={"depth": Numbered(depth, number)} if number else {})
        for number, sample in enumerate(of.samples)
    )
    return Split(of.data, of.split, ClassList(()), samples)


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    torch.manual_seed(3)
    model = build_model("kdcache:tiny+depth,max=60", 7)
    assert isinstance(model.depth_head, torch.nn.Sequential)
    with torch.no_grad():
        model.depth_head[-1].weight.mul_(100)
    return model.eval()


@pytest.fixture(scope="module")
def split() -> Split:
    return open_split(SCENES, "val")


def direct_rmse(model: SegmentationModel, split: Split) -> list[float]:
    """Pillow's resize, one image at a time, the raw output resized, softplus and clip in float64."""
    roots = []
    for index in range(len(split)):
        label = split.label(index, "depth")
        if label is None:
            continue
        valid = (label > 1e-3) & (label < 60)
        small = Image.fromarray(split.image(index)).resize(SIZE[::-1], Image.Resampling.BILINEAR)
        with torch.inference_mode():
            raw = model(model.normalise(torch.from_numpy(np.array(small))[None])).heads["depth"]
            full = F.interpolate(raw, label.shape, mode="bilinear", align_corners=model.align_corners)[0, 0].double()
        metres = np.clip(np.log1p(np.exp(full.numpy())), 1e-3, 60)
        if valid.any():
            roots.append(math.sqrt(np.mean((metres[valid] - label[valid].astype(np.float64)) ** 2)))
    return roots


@pytest.mark.parametrize("batch_size", [1, 3])
def test_both_tasks_score_as_each_written_out(model: SegmentationModel, split: Split, batch_size: int) -> None:
    both = evaluate_tasks(model, split, Inference(SIZE, batch_size=batch_size))
    assert both.segmentation == evaluate_model(model, split, SIZE, batch_size=batch_size)
    assert both.depth is not None
    assert both.depth.images is not None
    expected = direct_rmse(model, split)
    assert both.depth.images.values[:, 0].tolist() == pytest.approx(expected, rel=1e-4)
    assert both.depth.rmse == pytest.approx(np.mean(expected), rel=1e-4)
    assert both.depth.images.ids == split.ids
    assert list(both.to_json()["tasks"]) == ["segmentation", "depth"]


def test_depth_alone_is_judged_where_it_is_known(model: SegmentationModel, split: Split) -> None:
    only = only_depth(split)
    scored = evaluate_tasks(model, only, Inference(SIZE))
    assert scored.segmentation is None
    assert scored.depth is not None
    assert scored.depth.images is not None
    assert scored.depth.images.ids == split.ids[2:]
    assert scored.depth.rmse == pytest.approx(np.mean(direct_rmse(model, only)), rel=1e-4)
    assert "mIoU" not in metrics_markdown("x", scored)


def test_labels_at_the_size_that_the_model_sees(model: SegmentationModel, split: Split) -> None:
    scored = evaluate_tasks(model, split, Inference(SIZE, at_size=True)).depth
    assert scored is not None
    assert 0 < scored.pixels <= 5 * math.prod(SIZE)


def test_one_task_alone_is_as_before(split: Split) -> None:
    plain = build_model("kdcache:tiny", 7)
    metrics = evaluate_model(plain, split, SIZE)
    assert evaluate_tasks(plain, split, Inference(SIZE)) == TaskMetrics(metrics)
    assert TaskMetrics(metrics).to_json() == metrics.to_json()


def test_what_cannot_be_judged_is_refused(model: SegmentationModel, split: Split) -> None:
    with pytest.raises(DataError, match=r"predicts segmentation, and .* has labels of depth"):
        evaluate_tasks(build_model("kdcache:tiny", 7), only_depth(split), Inference(SIZE))
    with pytest.raises(DataError, match="Cannot use --min-depth"):
        evaluate_tasks(build_model("kdcache:tiny", 7), split, Inference(SIZE), depth=DepthSettings(max_depth=10))
    for change in (lambda depth: depth * np.nan, lambda depth: depth + 100):
        with pytest.raises(DataError, match="has depth from"):
            evaluate_tasks(model, only_depth(split, change), Inference(SIZE))


def test_a_range_ends_at_the_models_own_maximum(model: SegmentationModel) -> None:
    head = model.regressions["depth"]
    assert DepthRange.of(head) == DepthRange(max_depth=60)
    assert (
        str(DepthRange.of(head, DepthSettings(min_depth=1, max_depth=10, depth_crop="garg"))) == "1 to 10 m, garg crop"
    )
    assert DepthRange.of(None).max_depth == 80


def test_figures_of_depth() -> None:
    cases = {("rmse", 4.0): "4.000", ("rmse", 1234.6): "1235", ("delta1", 0.5): "50.00", ("silog", math.nan): "-"}
    for (name, value), text in cases.items():
        assert depth_figure(name, value) == text
    metrics = DepthMetrics(*[0.25] * 8, counted_images=3, pixels=7)
    assert "| rmse m | 0.2500 |" in metrics_markdown("run", TaskMetrics(depth=metrics))
