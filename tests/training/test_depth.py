"""Trainings of a depth head from labels, beside segmentation and in a stream of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdcache.data import Augmentation, open_split, write_scenes
from kdcache.errors import DataError, KDCacheError, RecipeError
from kdcache.metrics import DepthMetrics
from kdcache.models import build_model
from kdcache.store import Records, open_cache
from kdcache.training import CacheDataset, LabelledDataset, Observer, make_config, train
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World
from kdcache.training.input.loader import Draws
from kdcache.training.run.metrics_log import Score

EXACT = "scenes:32x48,train=6,val=3,depth=exact"
HALVES = "scenes:32x48,train=6,val=3,depth=exact,tasks=halves"
SIZE = (32, 48)
BOTH = ("segmentation", "depth")
Read = Callable[..., list[dict[str, Any]]]


class Depths(Observer):
    def __init__(self) -> None:
        self.validations: list[DepthMetrics] = []

    def validated(self, step: int, task: str, score: Score, *, best: bool, ema: bool) -> None:
        if isinstance(score, DepthMetrics):
            self.validations.append(score)


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
    dataset = LabelledDataset(open_split(EXACT, "train"), SIZE, Augmentation(scale=(1.0, 1.0)), tasks=BOTH)
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
    assert row["tasks"]["depth"] == {"loss": pytest.approx(0.5 * expected, rel=1e-4), "weight": 0.5}
    assert row["loss"] == pytest.approx(0.5 * ce + 0.5 * 0.5 * expected, rel=1e-4)


def test_both_tasks_are_validated(both: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    observer = Depths()
    train(make_config(**both), tmp_path / "run", observer=observer)
    rows = read_metrics(tmp_path / "run", "validation")
    assert [row["depth_rmse"] for row in rows] == [metrics.rmse for metrics in observer.validations]
    assert len(rows) == 2
    assert all(row["miou"] >= 0 and row["depth_rmse"] > 0 and row["depth_counted_images"] == 3 for row in rows)


def test_metric_depth_is_drawn_without_zoom(both: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(both, tmp_path / "none")
    assert trainer.config.augmentation.scale == (1.0, 1.0)
    for scale in ("0.5:1.5", "0.5:2", (0.5, 2.0)):  # also where it is what trainings of classes draw
        with pytest.raises(KDCacheError, match=r"(?s)Cannot learn .* with --scale 0\.5:.*--depth-zoom divide"):
            make_config(**both | {"scale": scale})
    assert begun(both | {"scale": "1:1"}, tmp_path / "one").config.augmentation.scale == (1.0, 1.0)
    for how in ("divide", "keep"):
        assert begun(both | {"scale": "0.5:1.5", "depth_zoom": how}, tmp_path / how).config.augmentation.scale == (
            0.5,
            1.5,
        )


def test_a_zoom_divides_the_metres() -> None:
    split = open_split(EXACT, "train")
    zoomed = Augmentation(scale=(2.0, 2.0), jitter=0)
    kept, divided = (
        Draws(LabelledDataset(split, SIZE, zoomed, tasks=BOTH, depth_zoom=how), 3)[0].labels["depth"]  # type: ignore[union-attr]
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
        ({"data": "scenes:32x48,train=6,val=3"}, "of segmentation, and not of depth.*--data scenes:96x128,depth=exact"),
        ({"labels": "segmentation"}, "with --labels segmentation: they read labels of depth.*--labels all"),
        ({"model": "kdcache:tiny"}, "head depth"),
        ({"method": "none", "labels": "depth", "data": "scenes:32x48,train=6,val=3"}, "labels of segmentation"),
        ({"data": f"{EXACT},tasks=depth"}, "Add --ce-weight 0"),
        ({"data": f"{EXACT},tasks=depth", "method": "dice+depth-l1"}, "dice: the data have labels of depth, and not"),
        ({"data": f"{EXACT},tasks=depth", "labels": "segmentation", "method": "none"}, "--labels segmentation"),
        ({"model": "kdcache:hydra,max=0.5"}, r"to 0\.5 m: none in 6 labels \(.*kdcache:hydra,max=200"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str, both: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KDCacheError) as caught:
        begun(both | {"val": None} | changes, tmp_path / "run")
    assert re.search(words, str(caught.value), flags=re.DOTALL)
    assert not (tmp_path / "run").exists()


def test_a_stream_without_the_labels_of_its_terms_is_named(both: dict[str, Any], tmp_path: Path) -> None:
    """Cross-entropy may find none in one of several streams, whose labels are void; a term on labels may not."""
    far = {"name": "far", "data": f"{EXACT},tasks=depth", "method": "depth-l1"}
    streams = [{"name": "near", "data": EXACT, "method": "none"}, far]
    settings = both | {"data": None, "val": None, "batch_size": 4}
    assert begun(settings | {"stream": streams}, tmp_path / "run").config.tasks == ("segmentation", "depth")
    with pytest.raises(RecipeError, match="stream far: Cannot learn dice: the data have labels of depth"):
        begun(settings | {"stream": [streams[0], far | {"method": "dice+depth-l1"}]}, tmp_path / "refused")
    with pytest.raises(RecipeError, match="Add --ce-weight 0"):
        begun(settings | {"stream": [far, {**far, "name": "other"}]}, tmp_path / "refused")


def test_labels_of_depth_without_a_known_pixel_are_refused(both: dict[str, Any], tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "data", EXACT)
    files = sorted((root / "depth" / "train").iterdir())
    for path in files:
        np.save(path, np.full_like(np.load(path), np.nan))
    with pytest.raises(DataError, match="no pixel has a known depth"):
        begun(both | {"data": str(root), "val": None}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def taught(settings: dict[str, Any], depth_paths: dict[str, Path]) -> dict[str, Any]:
    """A student of a store's depth alone, on its stored views."""
    changes = {"verb": "train-student", "model": "kdcache:tiny+depth", "data": None, "val": None}
    terms = {"method": "none", "ce_weight": 0.0, "term": ["depth-l1,reference=teacher,weight=0.5"]}
    return settings | changes | terms | {"cache": str(depth_paths["stored"]), "augment": "replay"}


def test_the_first_step_compares_the_store_s_metres(taught: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    train(make_config(**taught | {"iterations": 1, "seed": 2}), tmp_path / "run")
    torch.manual_seed(2)
    model = build_model("kdcache:tiny+depth", 7)
    cache = open_cache(taught["cache"])
    draws = Draws(CacheDataset(cache, augment="replay", targets=("depth",)), 2)
    samples = [draws[draw] for draw in range(2)]
    records = [draws.dataset.record(*draws.visit(draw)) for draw in range(2)]
    outputs = model.train()(model.normalise(torch.stack([sample.pixels for sample in samples])))
    raw = F.interpolate(outputs.heads["depth"].double(), SIZE, mode="bilinear")[:, 0]
    depth = F.softplus(raw).clamp(1e-3, 80)
    stored = np.stack([Records(cache).target(record, "depth")["values"] for record in records])
    logarithm = torch.from_numpy(stored).double().clamp_min(1e-3).log()
    reference = F.interpolate(logarithm, SIZE, mode="bilinear")[:, 0].exp()
    expected = (depth - reference).abs().mean().item()
    (row,) = read_metrics(tmp_path / "run", "train")
    assert row["depth-l1"] == pytest.approx(expected, rel=1e-4)
    assert row["loss"] == pytest.approx(0.5 * expected, rel=1e-4)
    assert row["ce"] == row["kl"] == 0


@pytest.mark.parametrize("store", ["stored", "source"])
def test_labels_and_targets_of_depth_teach_from_a_store(
    taught: dict[str, Any], depth_paths: dict[str, Path], store: str, tmp_path: Path, read_metrics: Read
) -> None:
    """Logits and pasting stand beside them; the labels are the store's own, or those of its data set."""
    changes: dict[str, Any] = {"cache": str(depth_paths[store]), "method": "kl", "ce_weight": 1.0, "mix": "cutmix"}
    changes |= {"term": ["depth-silog,reference=teacher", "depth-l1"], "augment": "warp", "depth_zoom": "divide"}
    changes |= {"data": HALVES} if store == "source" else {}
    train(make_config(**taught | changes), tmp_path / "run")
    rows = read_metrics(tmp_path / "run", "train")
    assert len(rows) == 6
    assert all(row["kl"] > 0 and row["depth-silog"] > 0 for row in rows)
    assert any(row["depth-l1"] > 0 for row in rows)
    assert any(row["ce"] > 0 for row in rows)


def test_a_store_of_depth_alone_is_a_source(
    taught: dict[str, Any], make_cache: Callable[..., Path], depth_teacher: torch.nn.Module, tmp_path: Path
) -> None:
    store = make_cache(HALVES, model=depth_teacher, heads=("depth",))
    result = train(make_config(**taught | {"cache": str(store), "augment": "auto"}), tmp_path / "run")
    assert result["iterations"] == 6
    with pytest.raises(KDCacheError, match="has no segmentation head"):
        begun(taught | {"cache": str(store), "method": "pseudo"}, tmp_path / "refused")


def test_a_training_reads_the_heads_that_it_learns_from(taught: dict[str, Any], tmp_path: Path) -> None:
    def heads(**changes: Any) -> tuple[str, ...]:
        return begun(taught | changes, tmp_path / "run").streams[0].draws.dataset.heads

    assert heads() == ("depth",)
    assert heads(method="kl") == ("segmentation", "depth")
    assert heads(term=["pseudo,quantile=0.5", "depth-l1,reference=teacher,weight=0"]) == ("segmentation",)
    assert heads(term=[], ce_weight=1.0) == ()


@pytest.mark.parametrize(
    ("store", "changes", "words"),
    [
        ("zoomed", {"depth_zoom": "keep"}, "--depth-zoom keep for .*: it was built with --depth-zoom divide"),
        ("zoomed", {"term": ["depth-l1"], "depth_zoom": "keep"}, "built with --depth-zoom divide"),
        (
            "stored",
            {"augment": "warp", "scale": "0.7:2"},
            "Cannot learn depth-l1 with --scale 0.7:2: a zoomed image looks nearer",
        ),
        ("plain", {}, "targets of a regression head depth"),
        ("plain", {"term": ["depth-l1"]}, "a cache that was built from one"),
        ("stored", {"model": "kdcache:tiny"}, "depth"),
        ("stored", {"method": "at"}, "at needs features of the teacher"),
    ],
)
def test_depth_that_a_store_cannot_teach_is_refused(
    taught: dict[str, Any],
    depth_paths: dict[str, Path],
    cache_path: Path,
    store: str,
    changes: dict[str, Any],
    words: str,
    tmp_path: Path,
) -> None:
    path = cache_path if store == "plain" else depth_paths[store]
    with pytest.raises(KDCacheError, match=words):
        begun(taught | {"cache": str(path)} | changes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_replayed_zooms_follow_their_store(
    taught: dict[str, Any], depth_paths: dict[str, Path], make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    zoomed = taught | {"cache": str(depth_paths["zoomed"]), "term": ["depth-l1,reference=teacher", "depth-l1"]}
    for how in ("none", "divide"):
        assert begun(zoomed | {"depth_zoom": how}, tmp_path / how).streams[0].draws.dataset.depth_zoom == "divide"
    relative = zoomed | {"depth_zoom": "keep", "term": ["depth-ssi"]}
    assert begun(relative, tmp_path / "ssi").streams[0].draws.dataset.depth_zoom == "keep"
    # A store that was built when its data had no depth says nothing of zooms.
    silent = make_cache("scenes:32x48,train=6,val=3", views=2, view_scale=(1.5, 2.0), pixels="source")
    labels = taught | {"cache": str(silent), "data": EXACT, "term": ["depth-l1"]}
    with pytest.raises(
        KDCacheError, match=r"(?s)Missing --depth-zoom: .* zoomed 1\.5 to 2 times.*Add --depth-zoom divide"
    ):
        begun(labels, tmp_path / "silent")
    dataset = begun(labels | {"depth_zoom": "divide"}, tmp_path / "silent").streams[0].draws.dataset
    assert dataset.depth_zoom == "divide"
