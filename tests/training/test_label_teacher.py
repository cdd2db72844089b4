"""`--teacher labels`: the same batches without targets, the store's cells, a data set without a store, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate

from kdcache.distill import Batch, DistillLoss, LabelTargets
from kdcache.distill.terms import loss_term, make_term
from kdcache.errors import DataError, RecipeError
from kdcache.store import open_cache
from kdcache.training import Observer, make_config, read_config, train
from kdcache.training.trainer import Trainer

Begin = Callable[..., Trainer]
Read = Callable[..., list[dict[str, Any]]]
CONTROL = {"method": "kl+dist", "teacher": "labels"}


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def first_batch(trainer: Trainer) -> Batch:
    actual: Batch = default_collate([trainer.streams[0].draws[draw] for draw in range(4)])
    return actual


@pytest.fixture(scope="module")
def views(make_cache: Callable[..., Path]) -> Path:
    return make_cache(views=3)


@pytest.mark.parametrize("augment", ["replay", "warp"])
def test_the_control_sees_what_the_student_of_the_teacher_sees(
    augment: str, views: Path, begin: Begin, tmp_path: Path
) -> None:
    """Pixels, labels and order; the loss is that of the labels on the store's cells, and reads no target."""
    taught, control = (
        begin(cache=str(views), augment=augment, **changes) for changes in ({"method": "kl+dist"}, CONTROL)
    )
    with_targets, without = first_batch(taught), first_batch(control)
    assert torch.equal(with_targets.pixels, without.pixels)  # type: ignore[arg-type]
    assert torch.equal(with_targets.label, without.label)
    assert with_targets.targets
    assert not without.targets
    cells = LabelTargets(7, (32, 48), open_cache(views).specs["targets/segmentation/values"].shape[-2:])  # type: ignore[arg-type]
    expected = DistillLoss(cells, further=[make_term(loss_term("dist"), targets=cells, student_taps={})])
    logits = torch.randn(4, 7, 16, 24, generator=torch.Generator().manual_seed(0))
    losses = (*control.criterion.losses, expected)
    values = [loss(logits, batch).loss for loss in losses for batch in (with_targets, without)]
    assert all(torch.equal(value, values[0]) for value in values)
    assert values[0] != taught.criterion(logits, (with_targets,)).loss


@pytest.mark.parametrize("source", ["store", "data set"])
def test_a_control_is_trained_and_says_so(
    source: str, views: Path, student: dict[str, Any], scenes: str, tmp_path: Path, read_metrics: Read
) -> None:
    where = {"cache": str(views)} if source == "store" else {"cache": None, "data": scenes, "size": "32x48"}
    notes = Notes()
    train(make_config(**(student | CONTROL | where)), tmp_path / "run", observer=notes)
    assert "--teacher labels: a control without a teacher, labels on 8x12 cells" in notes.texts
    assert read_config(tmp_path / "run").loss.teacher == "labels"
    lines = read_metrics(tmp_path / "run", "train")
    assert all(line[name] > 0 for line in lines for name in ("kl", "dist"))
    (first, *_) = read_metrics(tmp_path / "run", "gradients")
    assert set(first) == {"kind", "step", "ce", "kl", "dist"}
    with pytest.raises(RecipeError, match=r"--teacher store \(was labels\)|Cannot learn kl, dist without --cache"):
        train(make_config(**(student | where | {"method": "kl+dist"})), tmp_path / "run", resume=True)


@pytest.mark.parametrize("change", ["mix", "accumulate", "fade"])
def test_what_goes_with_it(change: str, student: dict[str, Any], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"mix": {"mix": "cutmix"}, "accumulate": {"accumulate": 2}, "fade": {}}[change]
    changes |= {"distill_schedule": "fade"} if change == "fade" else {"method": "kl"}
    settings = student | CONTROL | {"batch_size": 4, "iterations": 2, "val": None} | changes
    for name, kl_weight in (("weak", 0.3), ("strong", 3.0)):
        train(make_config(**settings, kl_weight=kl_weight), tmp_path / name)
    weak, strong = (load_file(tmp_path / name / "last.safetensors") for name in ("weak", "strong"))
    assert not all(torch.equal(weak[name], strong[name]) for name in weak)


@pytest.mark.parametrize("terms", ["dice+lovasz", "none"])
@pytest.mark.parametrize("source", ["store", "data set"])
def test_terms_on_labels_need_no_teacher(
    terms: str, source: str, student: dict[str, Any], scenes: str, tmp_path: Path, read_metrics: Read
) -> None:
    where = {} if source == "store" else {"cache": None, "data": scenes, "size": "32x48", "verb": "train-teacher"}
    given = {"method": "none", "term": ["dice,weight=0.5", "lovasz"]} if terms == "none" else {"method": terms}
    more = {"mix": "classmix", "batch_size": 4, "accumulate": 2, "label_smoothing": 0.1, "iterations": 2}
    config = make_config(**(student | where | given | more))
    assert not config.teaches
    train(config, tmp_path / "run")
    line = read_metrics(tmp_path / "run", "train")[-1]
    weight = 0.5 if terms == "none" else 1.0
    assert line["loss"] == pytest.approx(line["ce"] + weight * line["dice"] + line["lovasz"], rel=1e-5)


def test_smoothing_reaches_the_loss_and_none_changes_nothing(student: dict[str, Any], tmp_path: Path) -> None:
    plain = student | {"method": "none", "iterations": 2, "val": None}
    for name, changes in (("plain", {}), ("zero", {"label_smoothing": 0.0}), ("smooth", {"label_smoothing": 0.1})):
        train(make_config(**(plain | changes)), tmp_path / name)
    one, two, three = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "zero", "smooth"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "received"),
    [
        ({"method": "none"}, "with --method none: it reads no logits of a teacher"),
        ({"method": "dice"}, "with --method dice: it reads no logits of a teacher"),
        ({"method": "kl+hint"}, "Cannot compute hint with --teacher labels"),
        ({"term": ["cwd,teacher_tap=stage4"]}, "Cannot compute cwd with --teacher labels"),
    ],
)
def test_what_needs_a_teacher_is_refused(changes: dict[str, Any], received: str, student: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_config(**(student | CONTROL | changes))
    assert received in str(caught.value)


@pytest.mark.parametrize("name", ["gate", "class_trust", "class_balance", "distill_void"])
def test_masks_of_a_teacher_have_no_effect_on_labels(name: str, student: dict[str, Any]) -> None:
    value = {"gate": "correct", "class_trust": "trust.toml", "class_balance": "sqrt", "distill_void": False}[name]
    typed = f"--{name.replace('_', '-')} {value}" if value else "--no-distill-void"
    with pytest.raises(RecipeError, match=f"{typed} would have no effect"):
        make_config(given=[name], **(student | CONTROL | {name: value}))


def test_a_store_without_labels_is_refused(
    make_cache: Callable[..., Path], student: dict[str, Any], tmp_path: Path
) -> None:
    store = make_cache("scenes:32x48,train=6,val=3,unlabelled=4", "unlabelled")
    with pytest.raises(DataError, match="none of 4 samples has a label") as caught:
        train(make_config(**(student | CONTROL | {"cache": str(store)})), tmp_path / "run")
    assert caught.value.fix.startswith("Leave --teacher labels out")
    assert not (tmp_path / "run").exists()
