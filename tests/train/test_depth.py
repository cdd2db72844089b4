"""Trainings of a depth head from labels, beside segmentation and in a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdcache.data import Augmentation, open_split
from kdcache.errors import KDCacheError
from kdcache.metrics import DepthMetrics
from kdcache.models import build_model
from kdcache.train import LabelledDataset, Observer, make_config, train
from kdcache.train.api import make_trainer
from kdcache.train.distributed import World
from kdcache.train.input.loader import Draws

EXACT = "scenes:32x48,train=6,val=3,depth=exact"
SIZE = (32, 48)
Read = Callable[..., list[dict[str, Any]]]


class Depths(Observer):
    def __init__(self) -> None:
        self.validations: list[DepthMetrics] = []

    def validated_depth(self, step: int, metrics: DepthMetrics) -> None:
        self.validations.append(metrics)


@pytest.fixture
def both(settings: dict[str, Any]) -> dict[str, Any]:
    """Segmentation and depth of the same images."""
    changes = {"verb": "train-student", "model": "kdcache:tiny+depth", "data": EXACT, "val": EXACT}
    return settings | changes | {"method": "depth-l1"}


def begun(settings: dict[str, Any], run: Path) -> Any:
    return make_trainer(make_config(**settings), run, World(), Observer(), resume=False)


def test_the_first_step_compares_metres(both: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    weighed = {"method": "none", "term": ["depth-l1,weight=0.5"]}
    train(make_config(**both | weighed | {"iterations": 1, "val": None, "seed": 2}), tmp_path / "run")
    torch.manual_seed(2)
    model = build_model("kdcache:tiny+depth", 7)
    dataset = LabelledDataset(open_split(EXACT, "train"), SIZE, Augmentation(scale=(1.0, 1.0)), depth="none")
    draws = Draws(dataset, 2)
    samples = [draws[draw] for draw in range(2)]
    outputs = model.train()(model.normalise(torch.stack([sample.pixels for sample in samples])))
    raw = F.interpolate(outputs.heads["depth"], SIZE, mode="bilinear")[:, 0]
    depth = F.softplus(raw).clamp(1e-3, 80)
    label = torch.stack([sample.labels["depth"] for sample in samples])
    valid = label.isfinite() & (label <= 80)
    assert valid.any()
    z = F.interpolate(outputs.logits, SIZE, mode="bilinear")
    ce = F.cross_entropy(z, torch.stack([sample.label for sample in samples]).long(), ignore_index=255).item()
    (row,) = read_metrics(tmp_path / "run", "train")
    expected = (depth - label)[valid].abs().mean().item()
    assert row["depth-l1"] == pytest.approx(expected, rel=1e-4)
    assert row["ce"] == pytest.approx(ce, rel=1e-5)
    assert row["loss"] == pytest.approx(ce + 0.5 * expected, rel=1e-4)


def test_both_tasks_are_validated(both: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    observer = Depths()
    train(make_config(**both), tmp_path / "run", observer=observer)
    rows = read_metrics(tmp_path / "run", "validation")
    assert [row["depth_rmse"] for row in rows] == [metrics.rmse for metrics in observer.validations]
    assert len(rows) == 2
    assert all(row["miou"] >= 0 and row["depth_rmse"] > 0 and row["depth_counted_images"] == 3 for row in rows)


def test_metric_depth_is_drawn_without_zoom(both: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(both, tmp_path / "none")
    assert trainer.config.scale == (1.0, 1.0)
    with pytest.raises(KDCacheError, match="drawn without zoom"):
        make_config(**both | {"scale": "0.5:1.5"})
    for how in ("divide", "keep"):
        assert begun(both | {"scale": "0.5:1.5", "depth_zoom": how}, tmp_path / how).config.scale == (0.5, 1.5)


def test_a_zoom_divides_the_metres() -> None:
    split = open_split(EXACT, "train")
    zoomed = Augmentation(scale=(2.0, 2.0), jitter=0)
    kept, divided = (
        Draws(LabelledDataset(split, SIZE, zoomed, depth=how), 3)[0].labels["depth"]  # type: ignore[union-attr]
        for how in ("keep", "divide")
    )
    torch.testing.assert_close(divided * 2, kept, equal_nan=True)
    whole = split.label(Draws(LabelledDataset(split, SIZE), 3).visit(0)[0], "depth")
    assert whole is not None
    assert np.isin(kept.numpy()[np.isfinite(kept.numpy())], whole).all()


def test_a_stream_of_depth_beside_one_of_segmentation(both: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    streams = [
        {"name": "classes", "data": "scenes:32x48,train=6,val=3", "weight": 0.5},
        {"name": "metres", "data": EXACT, "method": "depth-silog", "ce-weight": 0, "weight": 0.5},
    ]
    settings = both | {"data": None, "method": "none", "stream": streams, "batch_size": 4, "gradients_every": 3}
    trainer = begun(settings, tmp_path / "begun")
    assert [stream.draws.dataset.augmentation.scale for stream in trainer.streams] == [(0.5, 2.0), (1.0, 1.0)]
    for parts in (1, 2):
        train(make_config(**settings | {"accumulate": parts, "val": None}), tmp_path / str(parts))
    rows = [read_metrics(tmp_path / str(parts), "train")[0] for parts in (1, 2)]
    assert rows[0]["metres/depth-silog"] > 0
    assert rows[0]["classes/ce"] > 0
    for name in ("classes/ce", "metres/depth-silog"):  # BatchNorm sees a part alone
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.3)
    (norms, *_) = read_metrics(tmp_path / "1", "gradients")
    assert {"classes/loss", "metres/loss", "metres/depth-silog"} <= norms.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "scenes:32x48,train=6,val=3"}, "take a data set with labels of depth"),
        ({"labels": "segmentation"}, "reads labels of depth"),
        ({"model": "kdcache:tiny"}, "head depth"),
        ({"mix": "cutmix"}, "--mix pastes"),
        ({"method": "none", "labels": "depth", "data": "scenes:32x48,train=6,val=3"}, "labels of segmentation"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str, both: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KDCacheError, match=words):
        begun(both | {"val": None} | changes, tmp_path / "run")
    assert not (tmp_path / "run").exists()
