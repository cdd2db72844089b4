"""Trainings of a model with an auxiliary head: what learns it, what keeps it, and what never sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.metrics import evaluate_model
from kdcache.models import build_model, state_digest
from kdcache.models.run import load_run
from kdcache.teacher import fingerprint, load_teacher
from kdcache.training import Observer, make_config, train
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World
from kdcache.training.input.streams import feed_streams
from kdcache.training.trainer import Trainer

SCENES, OTHERS = "scenes:32x48,train=6,val=3", "scenes:32x48,train=5,val=3,style=game"
TIMES = ("images_per_second", "wait_share")
Read = Callable[..., list[dict[str, Any]]]
ADVERSARIES = ["adversarial,weight=0.1", "adversarial,head=auxiliary,weight=0.02"]


@pytest.fixture
def alone(settings: dict[str, Any]) -> dict[str, Any]:
    """One source of labels, with the class weights that a training has by default."""
    return settings | {"model": "kdcache:tiny+aux", "class_weights": "sqrt", "batch_size": 4, "gradients_every": 2}


@pytest.fixture
def two(alone: dict[str, Any]) -> dict[str, Any]:
    """Labelled images, and others whose predictions are to pass for theirs on two levels."""
    target = {"name": "t", "data": OTHERS, "labels": "none", "method": "none", "term": ADVERSARIES}
    changed = {"verb": "train-student", "data": None, "val": None, "stream": [{"name": "s", "data": SCENES}, target]}
    return alone | changed


def begun(settings: dict[str, Any], run: Path) -> Trainer:
    return make_trainer(make_config(**settings), run, World(), Observer(), resume=False)


def test_it_learns_beside_cross_entropy_and_is_gone_afterwards(
    alone: dict[str, Any], tmp_path: Path, read_metrics: Read, scenes: str
) -> None:
    """The loss is that of the sum; what a run leaves is a run of the model without the head."""
    run = tmp_path / "run"
    train(make_config(**alone), run)
    for row in read_metrics(run, "train"):
        assert row["loss"] == pytest.approx(row["ce"] + 0.1 * row["auxiliary"], rel=1e-5)
    assert all(row["auxiliary"] > 0 for row in read_metrics(run, "gradients"))
    assert json.loads((run / "model.json").read_text())["spec"] == "kdcache:tiny"
    plain = build_model("kdcache:tiny", 7)
    for which in ("best", "last"):
        assert set(load_file(run / f"{which}.safetensors")) == set(plain.state_dict())
    model, description = load_run(run)
    assert (model.spec, description.spec) == ("kdcache:tiny", "kdcache:tiny")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    miou = evaluate_model(model, open_split(scenes, "val"), (32, 48)).miou
    best = max(row["miou"] for row in read_metrics(run, "validation"))
    assert miou == pytest.approx(best, abs=1e-6)
    teacher = load_teacher(str(run), open_split(scenes, "val").classes)
    known = fingerprint(teacher, "fp32", torch.device("cpu"))
    assert known.spec == "kdcache:tiny"
    plain.load_state_dict(load_file(run / "best.safetensors"))
    assert known.weights == state_digest(plain)


def test_its_gradient_is_that_of_a_second_cross_entropy(alone: dict[str, Any], tmp_path: Path) -> None:
    """The first step, by hand: weighted classes and the shared denominator of both heads."""
    trainer = begun(alone | {"weight_decay": 0.0}, tmp_path / "run")
    (batch,) = next(iter(feed_streams(trainer.streams, torch.device("cpu"), first=0, last=1, workers=0)))
    model = trainer.model.train()
    outputs = model(model.normalise(batch.pixels))
    weight = trainer.criterion.losses[0].class_weight
    assert weight is not None
    assert len(weight.unique()) > 1
    ups = [F.interpolate(outputs.heads[name], (32, 48), mode="bilinear") for name in ("segmentation", "auxiliary")]
    ce, second = (F.cross_entropy(up, batch.label.long(), weight, ignore_index=255) for up in ups)
    losses = trainer.criterion(outputs, (batch,))
    assert losses.terms["auxiliary"].item() == pytest.approx(second.item(), rel=1e-5)
    parameters = list(model.parameters())
    own = torch.autograd.grad(losses.loss, parameters, retain_graph=True)
    byhand = torch.autograd.grad(ce + 0.1 * second, parameters)
    for one, other in zip(own, byhand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_student_begins_as_without_it(alone: dict[str, Any], tmp_path: Path) -> None:
    """So that two arms of a sweep differ in nothing but the head."""
    first = begun(alone, tmp_path / "with").model.deployed.state_dict()
    other = begun(alone | {"model": "kdcache:tiny"}, tmp_path / "without").model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.items())
    assert make_config(**alone).optimizer.lr == make_config(**alone | {"model": "kdcache:tiny"}).optimizer.lr == 6e-3


@pytest.mark.parametrize(("weight", "kinds"), [("auxiliary,weight=0.4", 1), ("auxiliary,weight=0", 0)])
def test_its_weight_is_a_term_s(
    weight: str, kinds: int, two: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    streams = [two["stream"][0] | {"term": [weight]}, {"name": "w", "data": SCENES}]
    train(make_config(**two | {"stream": streams} | {"iterations": 1, "val_every": 1}), tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run", "train")
    assert ("s/auxiliary" in row) == bool(kinds)
    assert row["s/loss"] == pytest.approx(row["s/ce"] + 0.4 * row.get("s/auxiliary", 0), rel=1e-5)
    assert row["w/loss"] == pytest.approx(row["w/ce"] + 0.1 * row["w/auxiliary"], rel=1e-5)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_two_levels_killed_end_as_if_nothing_had_happened(
    ema: float | None, two: dict[str, Any], nursery: Any, tmp_path: Path, read_metrics: Read
) -> None:
    settings = two | {"iterations": 12, "val_every": 4, "val": SCENES, "ema": ema}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(make_config(**settings), whole)
    nursery.kill_at_checkpoint(settings, killed)
    train(make_config(**settings), killed, resume=True)
    for name in ("last", "best", *(("last-ema", "best-ema") if ema else ())):
        assert (whole / f"{name}.safetensors").read_bytes() == (killed / f"{name}.safetensors").read_bytes()
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, killed)]
    for part in ("model", "criterion"):
        one, other = (state[part] for state in states)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(name.startswith("aux_classifier.") for name in states[0]["model"])
    discriminators = {
        name.rpartition(".discriminator")[0] for name in states[0]["criterion"] if "discriminator" in name
    }
    assert len(discriminators) == 2, "one of each level"
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run)] for run in (whole, killed)]
    assert rows[0] == rows[1]


def test_each_level_has_a_discriminator_of_its_own(two: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    train(make_config(**two), tmp_path / "run")
    rows, norms = (read_metrics(tmp_path / "run", kind) for kind in ("train", "gradients"))
    for level in ("", "-auxiliary"):
        assert rows[0][f"t/discriminator{level}"] == pytest.approx(0.69, abs=0.03)
        assert rows[-1][f"t/discriminator{level}"] < rows[0][f"t/discriminator{level}"]
        assert norms[0][f"t/adversarial{level}"] > 0
        assert f"t/discriminator{level}" not in norms[0]
    assert rows[0]["t/discriminator"] != rows[0]["t/discriminator-auxiliary"]


def test_a_compiled_step_computes_the_same(
    two: dict[str, Any], tmp_path: Path, read_metrics: Read, backend: Any
) -> None:
    for step in ("eager", "compiled"):
        train(make_config(**two | {"step": step, "lr": 0.002}), tmp_path / step)
    assert backend.programs > 0
    rows = [read_metrics(tmp_path / step, "train") for step in ("eager", "compiled")]
    for one, other in zip(*rows, strict=True):
        for name in (name for name in one if "/" in name):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (one["step"], name)


_WITHOUT_BATCHNORM = """
from torch import nn

def build(num_classes=7):
    return nn.Sequential(nn.Conv2d(3, 12, 5, 4, 2), nn.ReLU(), nn.Conv2d(12, num_classes, 1))
"""


def test_parts_of_a_batch_learn_what_the_batch_does(
    two: dict[str, Any], tmp_path: Path, read_metrics: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm sees a part at a time, so it is left out here, in the head as well."""
    monkeypatch.setattr(torch.nn, "BatchNorm2d", lambda channels: torch.nn.Identity())
    (tmp_path / "own.py").write_text(_WITHOUT_BATCHNORM)
    settings = two | {"model": f"{tmp_path}/own.py:build+aux,tap=1", "lr": 0.01}
    for name, parts in (("whole", 1), ("parts", 2)):
        train(make_config(**settings | {"accumulate": parts}), tmp_path / name)
    for kind in ("train", "gradients"):
        rows = [read_metrics(tmp_path / name, kind) for name in ("whole", "parts")]
        for one, other in zip(*rows, strict=True):
            for name in (name for name in one if "/" in name or name == "loss"):
                assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (kind, one["step"], name)


def test_a_stream_without_labels_of_classes_counts_nothing(
    two: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    """The auxiliary head counts no pixel there, as cross-entropy; pasted pixels bring the source's labels to both."""
    depth = {"name": "d", "data": "scenes:32x48,train=6,val=3,depth=exact,tasks=halves", "method": "depth-silog"}
    streams = [two["stream"][0], depth | {"labels": "depth"}]
    train(make_config(**two | {"model": "kdcache:hydra+aux", "stream": streams}), tmp_path / "depth")
    assert {row["d/auxiliary"] for row in read_metrics(tmp_path / "depth", "train")} == {0}
    pasted = two["stream"][1] | {"paste": "classmix", "paste-from": "s", "term": []}
    train(make_config(**two | {"stream": [two["stream"][0], pasted]}), tmp_path / "pasted")
    assert all(row["t/auxiliary"] > 0 for row in read_metrics(tmp_path / "pasted", "train"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ce_weight": 0.0, "term": ["dice"]}, "Use --model kdcache:tiny, or add --term auxiliary"),
        ({"term": ["auxiliary,weight=0"]}, "auxiliary,weight=0, throughout"),
        ({"model": "kdcache:tiny", "term": ["auxiliary"]}, r"--model MODEL\+aux"),
        ({"term": ["adversarial,head=auxiliary"]}, "beside no other"),
    ],
)
def test_a_head_that_nothing_teaches_and_terms_without_it_are_refused(
    changes: dict[str, Any], words: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        begun(alone | changes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_term_alone_teaches_the_head(alone: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    train(make_config(**alone | {"ce_weight": 0.0, "term": ["dice", "auxiliary,weight=1"]}), tmp_path / "run")
    for row in read_metrics(tmp_path / "run", "train"):
        assert row["loss"] == pytest.approx(row["dice"] + row["auxiliary"], rel=1e-5)
