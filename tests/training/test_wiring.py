"""What a setting says is what the training does: one setting changed, beside the same put together by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate

from kdcache.data import Augmentation, RandAugment, class_weights, folds_of, open_split
from kdcache.distill import Batch, DistillLoss, Gate, GateSpec
from kdcache.distill.terms import loss_term, make_term
from kdcache.metrics.depth import DepthErrors
from kdcache.store import Cache, open_cache
from kdcache.training import CacheDataset, LabelledDataset, TrainConfig, api, make_config, train
from kdcache.training import trainer as trainer_module
from kdcache.training.input.loader import Draws
from kdcache.training.input.mix import Mix
from kdcache.training.input.sampler import Interleaved
from kdcache.training.input.subset import Part
from kdcache.training.sources import open_dataset, open_validation
from kdcache.training.trainer import Trainer

Begin = Callable[..., Trainer]
Read = Callable[..., list[dict[str, Any]]]

_ALIGNED = """
from torch import nn

def build(num_classes=7):
    net = nn.Conv2d(3, num_classes, 5, 4, 2)
    net.align_corners = True
    return net
"""


def first_batch(trainer: Trainer) -> Batch:
    actual: Batch = default_collate(
        [trainer.streams[0].draws[draw] for draw in range(trainer.config.optimizer.batch_size)]
    )
    return actual


# --- the loss ----------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights": ({"ce_weight": 0.7, "kl_weight": 0.9}, {"ce_weight": 0.7, "kl_weight": 0.9}),
    "temperature": ({"temperature": 3.0}, {"temperature": 3.0}),
    "void": ({"distill_void": False}, {"distill_void": False}),
    "gate": ({"gate": "confidence:0.9"}, {"gate": Gate(GateSpec("confidence", 0.9))}),
    "labels alone": ({"method": "none"}, {"kl_weight": 0.0}),
    "aligned": ({"model": "aligned"}, {"align_corners": True}),
    "fading": ({"distill_schedule": "fade"}, {"scheduled": True}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_setting_reaches_the_loss(name: str, begin: Begin, cache: Cache, tmp_path: Path) -> None:
    changes, options = LOSSES[name]
    if "model" in changes:
        (tmp_path / "aligned.py").write_text(_ALIGNED)
        changes = changes | {"model": f"{tmp_path}/aligned.py:build"}
    (criterion,) = begin(**changes).criterion.losses
    batch = default_collate([CacheDataset(cache, augment="none")[number] for number in range(4)])
    batch.label[:, :9] = 255
    student = 2 * torch.randn(4, 7, 8, 12, generator=torch.Generator().manual_seed(1))
    expected, usual = DistillLoss(cache, **options), DistillLoss(cache)
    if name == "fading":
        expected.set_distill_weight_scale(0.25)
        criterion.set_distill_weight_scale(0.25)
    given = replace(batch, targets=None) if name == "labels alone" else batch
    losses = [one(student, given) for one in (criterion, expected)]
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert losses[0].loss.item() != pytest.approx(usual(student, batch).loss.item(), rel=1e-4)


def test_a_term_resizes_as_its_student_does(begin: Begin, cache: Cache, tmp_path: Path) -> None:
    """Under a gate, where the fused loss does not do it; a term of weight 0 is not there."""
    (tmp_path / "aligned.py").write_text(_ALIGNED)
    trainer = begin(
        model=f"{tmp_path}/aligned.py:build",
        method="none",
        term=["pseudo,threshold=0.4,weight=0.6", "dist,weight=0"],
        gate="confidence:0.5",
    )
    assert trainer.criterion.names == ("ce", "kl", "pseudo")
    batch = default_collate([CacheDataset(cache, augment="none")[number] for number in range(4)])
    student = 2 * torch.randn(4, 7, 8, 12, generator=torch.Generator().manual_seed(1))
    values = []
    for aligned in (True, False):
        term = make_term(
            loss_term("pseudo", threshold=0.4, weight=0.6), targets=cache, student_taps={}, align_corners=aligned
        )
        gate = Gate(GateSpec("confidence", 0.5))
        expected = DistillLoss(cache, kl_weight=0.0, align_corners=True, gate=gate, further=[term])
        values.append(expected(student, batch).loss.item())
    actual = trainer.criterion(student, (batch,)).loss.item()
    assert actual == pytest.approx(values[0], rel=1e-6)
    assert actual != pytest.approx(values[1], rel=1e-4)


def test_pseudo_labels_are_weighed_as_often_as_their_classes_are_targets(begin: Begin, cache: Cache) -> None:
    trainer = begin(method="none", term=["pseudo,class_weights=median"])
    (loss,) = trainer.criterion.losses
    (term,) = loss.terms
    best = [cache.read(number, ["targets/segmentation/values"]) for number in range(len(cache.ids))]
    counts = np.bincount(np.stack([row["targets/segmentation/values"].argmax(0) for row in best]).ravel(), minlength=7)
    assert torch.equal(term.class_weight, torch.tensor(class_weights(counts, "median"), dtype=torch.float32))
    assert loss.class_weight is None


def test_labels_of_other_proportions_than_the_view_are_learnt_from(begin: Begin) -> None:
    trainer = begin(size="24x24")
    trainer.eager((first_batch(trainer),))


@pytest.mark.parametrize("source", ["store", "store of views", "store without pixels", "folder"])
def test_class_weights_are_those_of_the_labels_that_are_used(
    source: str, begin: Begin, make_cache: Callable[..., Path], source_path: Path, scenes: str
) -> None:
    changes: dict[str, Any] = {
        "store": {},
        "store of views": {"cache": str(make_cache(views=3))},
        "store without pixels": {"cache": str(source_path), "data": scenes},
        "folder": {
            "verb": "train-teacher", "method": "none", "cache": None, "size": "32x48", "data": scenes,
        },
    }[source]  # fmt: skip
    trainer = begin(class_weights="median", limit_labels=2, **changes)
    split = open_split(scenes, "train")
    used = sorted(Part(labels=2).choose(split.ids).labelled)
    assert used not in ([0, 1], list(range(6))), "the test could not tell"
    counts = sum(np.bincount(np.asarray(split.label(number)).ravel(), minlength=256)[:7] for number in used)
    expected = class_weights(counts, "median")
    (loss,) = trainer.criterion.losses
    assert loss.class_weight is not None
    assert loss.class_weight.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


# --- the step ----------------------------------------------------------------------------------------------


def test_mixed_pixels_are_learnt_with_their_labels_and_targets(begin: Begin, cache: Cache) -> None:
    trainer = begin(mix="cutmix", augment="warp")
    batch, model = first_batch(trainer), trainer.model
    model.train()
    (mixed,) = Mix("cutmix")((batch,))
    assert mixed.own is not None
    assert 0 < mixed.own.float().mean() < 1
    logits = model(model.normalise(mixed.pixels)).logits
    actual = trainer.eager.forward((batch,))
    assert torch.equal(actual.loss, DistillLoss(cache)(logits, mixed).loss)
    assert actual.loss != DistillLoss(cache)(logits, replace(mixed, own=None)).loss


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("auto", torch.float32), ("off", torch.float32)])
def test_a_model_runs_in_the_precision_that_was_asked_for(amp: str, dtype: torch.dtype, begin: Begin) -> None:
    trainer, seen = begin(amp=amp), list[torch.dtype]()
    trainer.model.register_forward_hook(lambda model, given, answer: seen.append(answer.logits.dtype))
    trainer.eager((first_batch(trainer),))
    assert seen == [dtype]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_of_all_that_learns_is_clipped_as_one(
    accumulate: int, begin: Begin, make_cache: Callable[..., Path]
) -> None:
    """Also that of a term's projection: SGD moves everything together by the rate times the largest norm."""
    trainer = begin(
        cache=str(make_cache(features=("head",))),
        method="kl+hint", optimizer="sgd", weight_decay=0.0, lr=0.5, clip_grad=0.01,
        accumulate=accumulate, augment="replay",
    )  # fmt: skip
    learning = [list(part.parameters()) for part in (trainer.model, trainer.criterion)]
    before = [[tensor.detach().clone() for tensor in part] for part in learning]
    trainer.model.train()
    trainer.eager((first_batch(trainer),))
    moved = [
        torch.cat([(new.detach() - old).flatten() for new, old in zip(part, was, strict=True)])
        for part, was in zip(learning, before, strict=True)
    ]
    assert all(part.norm() > 1e-4 for part in moved)
    assert torch.cat(moved).norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


# --- rates and scores --------------------------------------------------------------------------------------


def test_the_logged_rate_is_the_one_that_was_learnt_with(
    student: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    train(make_config(**student | {"val": None, "lr": 0.02, "warmup": 2}), tmp_path)
    rates = [row["lr"] for row in read_metrics(tmp_path, "train")]
    assert rates == pytest.approx([0.01, 0.02, *(0.02 * (1 - step / 6) ** 0.9 for step in range(2, 6))])


@pytest.mark.parametrize("ema", [None, 0.5])
def test_scores_choose_the_best_weights_and_halve_the_rate(
    ema: float | None, student: dict[str, Any], tmp_path: Path, read_metrics: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal scores the first is the best; the sixth validation after it halves the rate.

    The rate follows the weights: a moving average that gets better and better changes nothing.
    """
    scores, states = [0.3, 0.4, 0.4, 0.2, *[0.1] * 5], list[dict[str, torch.Tensor]]()
    averages = [] if ema is None else [step / 10 for step in range(1, 10)]
    turns = itertools.count()

    def validate(model: torch.nn.Module) -> Any:
        if averages and next(turns) % 2:  # after the weights, their average
            return SimpleNamespace(miou=averages[len(states) - 1], to_json=dict)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return SimpleNamespace(miou=scores[len(states) - 1], to_json=dict)

    monkeypatch.setattr(api, "make_validator", lambda *_: validate)
    monkeypatch.setattr("kdcache.training.trainer.outcome", lambda _: None)
    settings = student | {"schedule": "plateau", "lr": 0.01, "iterations": 9, "val_every": 1, "ema": ema}
    result = train(make_config(**settings), tmp_path)
    assert (result["best_miou"], result["best_step"]) == (0.4, 2)
    for which, step in (("best", 2), ("last", 9)):
        weights = load_file(tmp_path / f"{which}.safetensors")
        assert all(torch.equal(tensor, states[step - 1][name]) for name, tensor in weights.items()), which
    assert [row["lr"] for row in read_metrics(tmp_path, "train")] == pytest.approx([0.01] * 8 + [0.005])
    assert result.get("ema_best_miou") == (None if ema is None else 0.9)


def test_the_rate_follows_the_depth_of_the_weights(
    student: dict[str, Any], tmp_path: Path, read_metrics: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without classes to judge: the sixth validation without a smaller rmse halves the rate."""
    rmses = iter(rmse for step in range(9) for rmse in (2.0 + (step != 1), 9 - step))  # of the weights, the average

    def accumulated(*_: Any, **__: Any) -> dict[str, DepthErrors]:
        measured = DepthErrors()
        measured.update(torch.full((2, 2), 20.0), torch.full((2, 2), 20.0 - next(rmses)))
        return {"depth": measured}

    monkeypatch.setattr(api, "accumulate", accumulated)
    data = "scenes:32x48,train=6,val=3,depth=exact,tasks=depth"
    settings = student | {"cache": None, "data": data, "val": data, "size": "32x48", "model": "kdcache:tiny+depth"}
    settings |= {"method": "depth-silog", "ce_weight": 0, "ema": 0.5, "schedule": "plateau", "lr": 0.01}
    result = train(make_config(**settings | {"iterations": 9, "val_every": 1}), tmp_path)
    assert (result["best_depth_rmse"], result["best_step"]) == (pytest.approx(2), 2)
    assert (result["ema_best_depth_rmse"], result["ema_best_step"]) == (pytest.approx(1), 9)
    assert [row["lr"] for row in read_metrics(tmp_path, "train")] == pytest.approx([0.01] * 8 + [0.005])


def test_the_share_of_waiting_and_the_pace_follow_the_clock(
    student: dict[str, Any], tmp_path: Path, read_metrics: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch takes 3 s to come and 1 s to learn from. To prepare the step takes 5 s, which are no training."""
    seconds = [0.0]

    def later(taken: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*values: Any) -> Any:
            seconds[0] += taken
            return call(*values)

        return wait

    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(trainer_module, "next_batch", later(3, trainer_module.next_batch))
    monkeypatch.setattr(trainer_module, "make_step", later(5, lambda kind, eager, batch, note: later(1, eager)))
    short = {"iterations": 4, "batch_size": 2, "log_every": 1, "gradients_every": 0, "val": None}
    result = train(make_config(**student | short), tmp_path)
    lines = read_metrics(tmp_path, "train")
    assert [line["wait_share"] for line in lines] == pytest.approx([0.75] * 4)
    assert [line["images_per_second"] for line in lines] == pytest.approx([0.5] * 4)
    assert (result["wait_share"], result["images_per_second"]) == (0.75, 0.5)
    assert (result["seconds"], result["prepared_seconds"]) == (16, 5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_step_ends_every_interval(
    accumulate: int, student: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    uneven = {"iterations": 5, "val_every": 2, "log_every": 3, "gradients_every": 4, "accumulate": accumulate}
    result = train(make_config(**student | uneven), tmp_path)
    steps = {kind: [row["step"] for row in read_metrics(tmp_path, kind)] for kind in ("train", "validation")}
    assert steps == {"train": [3, 5], "validation": [2, 4, 5]}
    assert [row["step"] for row in read_metrics(tmp_path, "gradients")] == [1, 5]
    progress = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]
    assert (progress["step"], result["iterations"]) == (5, 5)
    assert (
        progress["best_score"]
        == result["best_miou"]
        == max(row["miou"] for row in read_metrics(tmp_path, "validation"))
    )


def test_validations_change_nothing(student: dict[str, Any], tmp_path: Path, model_file: Callable[[str], str]) -> None:
    """Neither weights and BatchNorms, which train on in training mode, nor what dropout draws."""
    settings = student | {"model": model_file("dropout")}
    for name, changes in (("often", {"val_every": 1}), ("never", {"val": None})):
        train(make_config(**settings | changes), tmp_path / name)
    one, two = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("often", "never"))
    assert one == two


# --- the samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["store", "folder"])
def test_augmentation_is_what_was_asked_for(
    source: str, student: dict[str, Any], settings: dict[str, Any], cache: Cache
) -> None:
    def drawn(**changes: Any) -> Augmentation:
        chosen = make_config(**((student if source == "store" else settings) | changes))
        return open_dataset(chosen, cache if source == "store" else None).augmentation

    assert drawn(augment="warp") == Augmentation()
    for changes in ({"scale": (0.8, 1.5)}, {"flip": False}, {"jitter": 0.1}):
        assert drawn(augment="warp", **changes) == Augmentation(**changes)
    assert drawn(augment="warp", jitter="randaugment:3,12") == Augmentation(jitter=RandAugment(3, 12))
    assert drawn(augment="none") == Augmentation.off()


def test_a_folder_and_a_store_of_it_are_drawn_alike(scenes: str, cache: Cache) -> None:
    """Windows, flips and colours; images are wider than high."""
    chosen = Augmentation(scale=(0.5, 2.0), jitter=0.5)
    folder = LabelledDataset(open_split(scenes, "train"), (32, 48), chosen)
    stored = CacheDataset(cache, augment="warp", augmentation=chosen)
    for seed in range(8):
        one, two = (dataset.draw(seed % 6, 0, np.random.default_rng(seed)) for dataset in (folder, stored))
        assert torch.equal(one.pixels, two.pixels)
        assert torch.equal(one.label, two.label)


def test_a_draw_is_that_of_its_own_generator(cache: Cache) -> None:
    """Seed, draw and the word that keeps these apart from orders: what runs were begun with."""
    dataset = CacheDataset(cache)
    draws = Draws(dataset, 7)
    for draw in (0, 4, 11):
        expected = dataset.draw(*draws.visit(draw), np.random.default_rng((7, draw, 1)))
        assert torch.equal(draws[draw].pixels, expected.pixels)  # type: ignore[union-attr]
        assert torch.equal(draws[draw].window, expected.window)  # type: ignore[union-attr]


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_a_training_visits_what_its_seed_order_and_share_say(
    shuffle: str, begin: Begin, make_cache: Callable[..., Path]
) -> None:
    path = make_cache(shard_records=2)
    trainer = begin(cache=str(path), seed=4, shuffle=shuffle, limit_labels=3, labelled_share=0.25)
    labelled = np.isin(np.arange(6), sorted(Part(labels=3).choose(open_cache(path).ids).labelled))
    asked = (4, 2 if shuffle == "window" else None)
    orders = {
        key: [Interleaved(labelled, 0.25, *key).visit(draw) for draw in range(24)]
        for key in ((4, 2), (4, None), (0, 2))
    }
    assert [trainer.streams[0].draws.visit(draw) for draw in range(24)] == orders[asked]
    assert all(order != orders[asked] for key, order in orders.items() if key != asked)


def test_a_fold_is_left_out_and_judged_on(
    config: Callable[..., TrainConfig], scenes: str, cache_path: Path, student: dict[str, Any]
) -> None:
    split = open_split(scenes, "train")
    of = folds_of(split.ids, 3)
    judging = open_validation(config(val=scenes, val_split="train", val_fold="1/3"))
    assert judging is not None
    assert list(judging.ids) == [name for name, fold in zip(split.ids, of, strict=True) if fold == 1]
    whole = open_validation(config(val=scenes, val_split="val"))
    assert whole is not None
    assert list(whole.ids) == list(open_split(scenes, "val").ids)
    for chosen in (config(limit_samples=2, limit_labels=1), make_config(**student | {"limit_samples": 2})):
        dataset = open_dataset(chosen, None if chosen.data.cache is None else open_cache(cache_path))
        part = Part(samples=2).choose(split.ids)
        expected = part.samples if chosen.data.cache else Part(samples=2, labels=1).choose(split.ids).labelled
        assert [dataset.sample_id(index) for index in range(len(dataset))] == [split.ids[n] for n in sorted(expected)]
