"""Trainings with `consistency`: whose pseudo labels they learn, from which weights, by how many forwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from kdcache.data import Augmentation, open_split
from kdcache.errors import RecipeError
from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.training import CacheDataset, LabelledDataset, Observer, make_config, train
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World
from kdcache.training.input.loader import Draws
from kdcache.training.input.streams import feed_streams, stream_seed
from kdcache.training.run.monitor import Watch
from kdcache.training.trainer import Trainer

SCENES, OTHERS = "scenes:32x48,train=6,val=3", "scenes:32x48,train=5,val=3,style=game"
_DECIDED = """
from torch import nn

def build(num_classes=7):
    model = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, num_classes, 1))
    model[2].weight.data.mul_(6)
    return model
"""
TIMES = ("images_per_second", "wait_share", "weak_view_seconds")
Read = Callable[..., list[dict[str, Any]]]


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def streams(term: str = "by=ema,threshold=0.16", **target: Any) -> list[dict[str, Any]]:
    """Labelled images beside others without labels, two rows of four each."""
    unlabelled = {"name": "u", "data": OTHERS, "labels": "none", "method": "none", "term": [f"consistency,{term}"]}
    return [{"name": "l", "data": SCENES}, {**unlabelled, "scale": "1:2", **target}]


@pytest.fixture
def base(settings: dict[str, Any]) -> dict[str, Any]:
    changed = {"verb": "train-student", "data": None, "batch_size": 4, "ema": 0.9, "val": None, "lr": 0.01}
    return settings | changed | {"stream": streams(), "gradients_every": 0}


def begun(settings: dict[str, Any], run: Path, observer: Observer | None = None) -> Trainer:
    return make_trainer(make_config(**settings), run, World(), observer or Observer(), resume=False)


def counted_forwards(trainer: Trainer) -> dict[bool, int]:
    """How often the model ran, in training and in eval mode, until now."""
    counts = {True: 0, False: 0}

    def count(model: torch.nn.Module, *_: Any) -> None:
        counts[model.training] += 1

    trainer.model.register_forward_hook(count)
    return counts


@pytest.mark.parametrize(
    ("term", "more", "eval_forwards"),
    [
        ("by=student", {}, 1),
        ("by=ema", {}, 1),
        ("by=ema", {"accumulate": 2}, 2),
        ("by=student,weight=0", {"labels": "all"}, 0),
        ("by=ema", {"term": ["consistency,by=ema", "consistency,by=student"]}, 2),
    ],
)
def test_every_maker_of_pseudo_labels_is_one_more_forward_of_a_step(
    term: str, more: dict[str, Any], eval_forwards: int, base: dict[str, Any], tmp_path: Path
) -> None:
    notes, own = Notes(), dict(more)
    parts = own.pop("accumulate", 1)
    rows = streams(term)
    rows[1] |= own
    trainer = begun(base | {"stream": rows, "accumulate": parts}, tmp_path / "run", notes)
    counts = counted_forwards(trainer)
    trainer.train(resume=False)
    assert counts == {True: 6 * parts, False: 6 * eval_forwards}
    told = [text for text in notes.texts if "forwards in training" in text]
    assert [text.split()[0] for text in told] == ([str(6 * eval_forwards)] if eval_forwards else [])
    assert trainer.model.training


def test_a_store_s_pseudo_labels_take_no_forward(student: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    settings = student | {"method": "none", "term": ["consistency,by=store,threshold=0.5"], "val": None}
    trainer = begun(settings, tmp_path / "run")
    counts = counted_forwards(trainer)
    trainer.train(resume=False)
    assert counts == {True: 6, False: 0}
    for row in read_metrics(tmp_path / "run", "train"):
        assert 0 < row["confident"] < 1
        assert row["consistency"] > 0
        assert "weak_view_seconds" not in row


@pytest.mark.parametrize("source", ["data", "warp", "replay"])
def test_both_views_have_one_geometry(source: str, cache_path: Path) -> None:
    """The weak view is what is drawn without jitter, pixel by pixel, and the strong one what it is without a weak."""
    augmentations = [Augmentation(jitter=jitter) for jitter in (0.8, 0.8, 0.0)]
    if source == "data":
        datasets: list[Any] = [LabelledDataset(open_split(SCENES, "train"), (32, 48), own) for own in augmentations]
    else:
        cache = open_cache(cache_path)
        datasets = [CacheDataset(cache, augment=source, augmentation=own) for own in augmentations]
    datasets[0].weak = True
    for draw in range(4):
        both, strong, weak = (Draws(dataset, 7)[draw] for dataset in datasets)
        assert both.weak is not None
        assert torch.equal(both.pixels, strong.pixels)
        assert torch.equal(both.weak, weak.pixels)
        assert not torch.equal(both.weak, both.pixels)
        assert torch.equal(both.label, weak.label)
        assert strong.weak is None


@pytest.mark.parametrize("by", ["student", "ema"])
def test_a_step_is_the_definition(by: str, base: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    """The third step, by the weights after two, and by their average; eval mode, as a validation has them."""
    settings = base | {"stream": streams(f"by={by},threshold=0.16,normalise=share"), "keep_every": 2, "iterations": 3}
    settings |= {"schedule": "constant"}
    train(make_config(**settings), tmp_path / "run")
    train(make_config(**settings | {"iterations": 2}), tmp_path / "two")
    last = load_file(tmp_path / "two" / "last.safetensors")
    teacher = build_model("kdcache:tiny", 7)
    teacher.load_state_dict(
        load_file(tmp_path / "two" / ("last-ema.safetensors" if by == "ema" else "last.safetensors"))
    )
    model = build_model("kdcache:tiny", 7)
    model.load_state_dict(last)
    samples = []
    for number, (data, scale) in enumerate(((SCENES, (0.5, 2.0)), (OTHERS, (1.0, 2.0)))):
        dataset = LabelledDataset(
            open_split(data, "train"), (32, 48), Augmentation(scale=scale), labelled_only=number == 0
        )
        dataset.weak = number == 1
        draws = Draws(dataset, stream_seed(0, number))
        samples += [draws[draw] for draw in (4, 5)]
    strong = torch.stack([sample.pixels for sample in samples])
    weak = torch.stack([sample.weak for sample in samples[2:] if sample.weak is not None])
    with torch.no_grad():
        predicted = teacher.eval()(teacher.normalise(weak)).logits
        best, label = F.interpolate(predicted, (32, 48), mode="bilinear").softmax(1).max(1)
        z = F.interpolate(model.train()(model.normalise(strong)).logits, (32, 48), mode="bilinear")[2:]
    share = (best >= 0.16).double().mean().item()
    row = read_metrics(tmp_path / "run", "train")[2]
    assert 0.05 < share < 1
    assert row["u/confident"] == pytest.approx(share, abs=5e-3)
    assert row["u/consistency"] == pytest.approx(row["u/confident"] * F.cross_entropy(z, label).item(), rel=1e-3)
    assert row["u/loss"] == pytest.approx(row["u/consistency"], rel=1e-6)
    assert row["weak_view_seconds"] > 0


@pytest.mark.parametrize("term", ["by=student,threshold=0.16", "by=ema,threshold=0.16", "by=ema,quantile=0.3"])
def test_a_killed_run_ends_as_if_nothing_had_happened(
    term: str, base: dict[str, Any], nursery: Any, model_file: Callable[[str], str], tmp_path: Path, read_metrics: Read
) -> None:
    settings = base | {"model": model_file("dropout"), "iterations": 30, "val_every": 6, "val": SCENES}
    settings |= {"stream": streams(term)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(make_config(**settings), whole)
    nursery.kill_at_checkpoint(settings, killed)
    train(make_config(**settings), killed, resume=True)
    for name in ("last", "best", "last-ema", "best-ema"):
        assert (whole / f"{name}.safetensors").read_bytes() == (killed / f"{name}.safetensors").read_bytes()
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run)] for run in (whole, killed)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("normalise", ["all", "share"])
def test_parts_of_a_batch_learn_what_the_batch_does(
    normalise: str, base: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    (tmp_path / "decided.py").write_text(_DECIDED)
    settings = base | {
        "model": f"{tmp_path}/decided.py:build",
        "stream": streams(f"by=ema,threshold=0.4,normalise={normalise}"),
    }
    for name, parts in (("whole", 1), ("parts", 2)):
        train(make_config(**settings | {"accumulate": parts, "gradients_every": 2}), tmp_path / name)
    assert any(0 < row["u/confident"] < 1 for row in read_metrics(tmp_path / "whole", "train"))
    for kind in ("train", "gradients"):
        rows = [read_metrics(tmp_path / name, kind) for name in ("whole", "parts")]
        for one, two in zip(*rows, strict=True):
            for name in (name for name in one if "/" in name or name == "loss"):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (kind, one["step"], name)


def test_a_compiled_step_reads_pseudo_labels_as_labels(
    base: dict[str, Any], tmp_path: Path, read_metrics: Read, backend: Any
) -> None:
    for step in ("eager", "compiled"):
        train(make_config(**base | {"step": step, "lr": 0.005}), tmp_path / step)
    assert backend.programs > 0
    rows = [read_metrics(tmp_path / step, "train") for step in ("eager", "compiled")]
    for one, two in zip(*rows, strict=True):
        for name in (name for name in one if "/" in name):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


def test_by_a_quantile_the_surest_share_of_each_class_is_learnt_among_what_was_not_pasted(
    base: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    """At least it: equal confidences go together."""
    rows = streams("by=ema,quantile=0.3,normalise=share", paste="classmix")
    rows[1]["paste-from"] = "l"
    notes = Notes()
    train(make_config(**base | {"stream": rows}), tmp_path / "run", observer=notes)
    for row in read_metrics(tmp_path / "run", "train"):
        assert 0.3 - 1e-6 <= row["u/confident"] < 1
        assert row["u/consistency"] > 0
    assert any("the highest probabilities, a share of 0.3 of each class" in text for text in notes.texts)


def test_bf16_mixed_samples_a_schedule_and_a_single_source(
    settings: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    """Pasted pixels bring their pseudo labels; the weight rises, the values stay unweighted."""
    changed = {"verb": "train-student", "method": "none", "term": ["consistency,threshold=0.145"], "val": None}
    changed |= {"mix": "classmix", "amp": "bf16", "distill_schedule": "warmup:6", "jitter": 0, "batch_size": 4}
    train(make_config(**settings | changed | {"gradients_every": 1}), tmp_path / "run")
    rows, norms = (read_metrics(tmp_path / "run", kind) for kind in ("train", "gradients"))
    assert [row["loss"] - row["ce"] for row in rows] == pytest.approx(
        [row["consistency"] * (step + 1) / 6 for step, row in enumerate(rows)], rel=1e-3, abs=1e-5
    )
    assert all(norm["consistency"] > 0 for norm in norms)
    plain = make_config(**settings | changed | {"distill_schedule": "constant", "term": []})
    with pytest.raises(RecipeError, match="--distill-schedule"):
        make_config(given=["distill_schedule"], **plain.settings | {"distill_schedule": "fade"})


def test_pixels_that_another_stream_pasted_have_no_pseudo_label(base: dict[str, Any], tmp_path: Path) -> None:
    rows = streams("by=student,threshold=0.01", paste="classmix")
    rows[1]["paste-from"] = "l"
    trainer = begun(base | {"stream": rows}, tmp_path / "run")
    batch = next(iter(trainer_batches(trainer)))
    labelled = trainer.weak_view(batch)
    mixed = trainer.eager.mixed(labelled)
    before, after = labelled[1], mixed[1]
    assert after.own is not None
    assert 0 < after.own.float().mean() < 1
    assert before.weak is None
    own, was = after.pseudo["student"], before.pseudo["student"]
    assert torch.equal(own.confidence, torch.where(after.own, was.confidence, 0))
    losses = trainer.eager.forward(labelled)
    assert losses.terms["u/confident"] == 1, "of the pixels that nothing was pasted into"


def trainer_batches(trainer: Trainer) -> Any:
    return feed_streams(trainer.streams, torch.device("cpu"), first=0, last=1, workers=0)


def test_a_stream_without_a_confident_pixel_is_noted(base: dict[str, Any], tmp_path: Path) -> None:
    notes = Notes()
    train(make_config(**base | {"stream": streams("by=ema"), "iterations": 2}), tmp_path / "run", observer=notes)
    (text,) = [text for text in notes.texts if "no pixel of the stream u" in text]
    assert "is confident (log lines in a row: 2)" in text
    assert any("moving average (--ema), with one more forward without gradient" in text for text in notes.texts)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["iterations"] == 2


def test_an_unsure_stream_is_noted_once_and_not_where_it_became_sure() -> None:
    watch = Watch([], World(), lambda step: [])
    looks = [(0.0, 0), (0.1, 0), (0.0, 0), (0.0, 0), (0.0, 1), (0.0, 0)]
    for value, count in looks:
        assert len(list(watch.unsure({"loss": 1.0, "u/confident": value}, last=False))) == count
    other = Watch([], World(), lambda step: [])
    assert not list(other.unsure({"confident": 0.1}, last=True))
    assert len(list(other.unsure({"confident": 0.0}, last=True))) == 1


def test_consistency_alone_teaches_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    rows = streams("by=student")[1:] + streams("by=student", name="v")[1:]
    with pytest.raises(RecipeError, match="has labels or a teacher"):
        begun(base | {"stream": rows}, tmp_path / "run")
    with pytest.raises(RecipeError, match="stream u: Cannot use consistency,by=ema without --ema"):
        make_config(**base | {"ema": None})
