"""DistillLoss against plain float64 PyTorch: interpolate, grid_sample, cross_entropy, kl_div."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from target_oracle import LABEL, VIEW, C, Format, dense_target, inputs, labelled, top_k, upsampled, values_of
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from kdcache.data import Augmentation
from kdcache.distill import Batch, DistillLoss, Target
from kdcache.distill.batch import tensors_of
from kdcache.errors import DataError, ModelError, RecipeError
from kdcache.store import Cache
from kdcache.training import CacheDataset


def oracle(
    student: Tensor,
    label: Tensor,
    target: Batch | None,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 0.3,
    temperature: float = 2.0,
    class_weight: Tensor | None = None,
    distill_void: bool = True,
    align_corners: bool = False,
    teacher_align: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    z = F.interpolate(student.double(), LABEL, mode="bilinear", align_corners=align_corners)
    weight = None if class_weight is None else class_weight.double()
    ce = F.cross_entropy(z, label.long(), weight, ignore_index=255) if ce_weight else torch.zeros(())
    kl = torch.zeros(())
    if target is not None and kl_weight:
        t, counted = upsampled(target, teacher_align)
        if not distill_void:
            counted = counted & (label != 255)
        p, q = ((x / temperature).log_softmax(1) for x in (z, t))
        kl = temperature**2 * F.kl_div(p, q, reduction="none", log_target=True).sum(1)[counted].mean()
    return ce_weight * ce + kl_weight * kl, ce, kl


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 7.5},
    "cold": {"temperature": 1.0},
    "weighted": {"ce_weight": 0.3, "kl_weight": 2.5},
    "classes": {"class_weight": torch.tensor([0.2, 3.0, 1.0, 0.0, 0.5])},
    "no void": {"distill_void": False},
    "ce alone": {"kl_weight": 0.0},
    "kl alone": {"ce_weight": 0.0},
    "aligned student": {"align_corners": True},
    "aligned teacher": {"teacher_align": True},
}


@pytest.mark.parametrize("moved", [False, True], ids=["whole view", "windows"])
@pytest.mark.parametrize("kind", ["dense", "top-k"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_are_those_of_float64(name: str, kind: str, moved: bool) -> None:
    options = dict(OPTIONS[name])
    student, label = inputs()
    target = dense_target(moved=moved)
    target = top_k(target) if kind == "top-k" else target
    reference = student.double().requires_grad_()
    expected = oracle(reference, label, target, **options)
    (wanted,) = torch.autograd.grad(expected[0], reference)
    criterion = DistillLoss(Format(options.pop("teacher_align", False)), **options)
    student.requires_grad_()
    parts = criterion(student, labelled(target, label))
    (gradient,) = torch.autograd.grad(parts.loss, student)
    assert [part.item() for part in (parts.loss, parts.ce, parts.kl)] == pytest.approx(
        [part.item() for part in expected], rel=3e-6, abs=1e-7
    )
    assert (gradient - wanted).norm() <= 3e-6 * wanted.norm()


def test_its_repr_names_its_weights() -> None:
    shown = repr(DistillLoss(ce_weight=0, kl_weight=0.3, temperature=4))
    assert shown.startswith("DistillLoss(\n  ce_weight=0, kl_weight=0.3, temperature=4\n")


def test_a_whole_view_is_an_interpolation() -> None:
    """The independent sampling above agrees with the resize that everyone uses."""
    target = dense_target(moved=False)
    sampled, inside = upsampled(target, False)
    assert inside.all()
    assert (sampled - F.interpolate(values_of(target).double(), LABEL, mode="bilinear")).abs().max() < 1e-12


ALONE = Batch()
"""What a data set without a store gives for targets."""
WITHOUT = Batch(targets=None)
"""A batch without a teacher."""


@pytest.mark.parametrize(
    ("store", "options", "batch"),
    [
        ("store", {"kl_weight": 1.0}, WITHOUT),
        ("store", {"kl_weight": 0.0}, dense_target()),
        ("store", {"kl_weight": 0.0}, ALONE),
        ("none", {}, ALONE),
        ("none", {}, WITHOUT),
    ],
)
def test_without_a_teacher_there_is_cross_entropy_alone(store: str, options: dict[str, Any], batch: Batch) -> None:
    student, label = inputs()
    criterion = DistillLoss(Format() if store == "store" else None, ce_weight=0.5, **options)
    batch = labelled(batch, label)
    parts = criterion(student, batch)
    ce = oracle(student, label, None)[1].item()
    assert [part.item() for part in (parts.loss, parts.ce, parts.kl)] == pytest.approx([0.5 * ce, ce, 0], rel=1e-6)
    assert set(criterion.parts(student, batch)) == {"ce"}


@pytest.mark.parametrize("call", ["__call__", "parts"])
@pytest.mark.parametrize(
    ("store", "batch", "remedy"),
    [("store", ALONE, "targets=True"), ("none", dense_target(), r"DistillLoss\(cache\)")],
    ids=["no target", "no store"],
)
def test_a_teacher_that_weighs_is_never_left_out_in_silence(call: str, store: str, batch: Batch, remedy: str) -> None:
    criterion = DistillLoss(Format() if store == "store" else None, kl_weight=0.3)
    student, label = inputs()
    with pytest.raises(RecipeError, match=remedy) as caught:
        getattr(criterion, call)(student, labelled(batch, label))
    assert "(kl have a weight above 0)" in caught.value.problem
    assert "target" in caught.value.problem


def cropped(batch: Batch, window: tuple[float, ...]) -> Batch:
    return replace(batch, window=torch.tensor([window] * len(batch), dtype=torch.float64))


@pytest.mark.parametrize("zoom", [1.0, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(11, 34), (22, 17), (22, 44), (44, 17)])
def test_labels_that_were_cut_without_the_window_are_refused(rows: int, columns: int, zoom: float) -> None:
    """Of whole views, and of windows that a training draws, which have the view's proportions."""
    student, _ = inputs()
    label = torch.zeros(3, rows, columns, dtype=torch.uint8)
    target = cropped(dense_target(moved=False), (2.0, 3.0, 2.0 + zoom * VIEW[0], 3.0 + zoom * VIEW[1]))
    criterion = DistillLoss(Format(), kl_weight=0.3)
    with pytest.raises(DataError) as caught:
        criterion(student, labelled(target, label))
    assert f"{rows}x{columns}" in caught.value.problem
    assert "22x34" in caught.value.problem
    assert "window=" in caught.value.fix
    stretched = DistillLoss(Format(), kl_weight=0.3, size=(rows, columns))
    assert stretched(student, labelled(target, label)).kl > 0
    with pytest.raises(DataError, match=f"whose labels are {rows}x{columns}"):
        stretched(student, labelled(target, torch.zeros(3, 23, 37, dtype=torch.uint8)))


def test_labels_cut_with_their_window_learn_what_the_whole_view_says_there() -> None:
    student, _ = inputs()
    label = torch.zeros(3, *VIEW, dtype=torch.uint8)
    target = dense_target(moved=False)
    z = F.interpolate(student, VIEW, mode="bilinear")
    criterion = DistillLoss(Format(), kl_weight=1.0, ce_weight=0.0)
    upper, lower = (
        criterion(
            z[:, :, part], labelled(cropped(target, (*edges[:1], 0.0, *edges[1:], 34.0)), label[:, part])
        ).kl.item()
        for part, edges in ((slice(0, 8), (0.0, 8.0)), (slice(8, 22), (8.0, 22.0)))
    )
    whole = criterion(z, labelled(target, label)).kl.item()
    assert (8 * upper + 14 * lower) / 22 == pytest.approx(whole, rel=1e-5)


def test_labels_of_another_scale_show_the_same_view() -> None:
    student, _ = inputs()
    criterion = DistillLoss(Format(), kl_weight=0.3)
    for rows, columns in ((11, 17), (44, 68), (33, 51), (5, 8), (22, 35), (100, 154)):
        label = torch.zeros(3, rows, columns, dtype=torch.uint8)
        assert criterion(student, labelled(dense_target(moved=False), label)).kl > 0


def test_a_batch_of_other_samples_is_refused() -> None:
    student, label = inputs()
    with pytest.raises(DataError, match="target of 2"):
        DistillLoss(Format())(student, labelled(dense_target(2, moved=False), label))
    with pytest.raises(DataError, match="labels of 1"):
        DistillLoss(kl_weight=0.0)(student, labelled(Batch(), label[:1]))
    with pytest.raises(DataError, match="void"):
        DistillLoss(Format())(student, dense_target())


def test_counts_refuse_the_batches_that_the_loss_refuses() -> None:
    _, label = inputs()
    with pytest.raises(DataError, match="void"):
        DistillLoss(Format()).counts(dense_target())
    with pytest.raises(DataError, match="labels of 3, target of 2"):
        DistillLoss(Format()).counts(labelled(dense_target(2, moved=False), label))
    with pytest.raises(RecipeError, match="targets=True"):
        DistillLoss(Format()).counts(labelled(ALONE, label))
    with pytest.raises(RecipeError, match=r"DistillLoss\(cache\)"):
        DistillLoss(kl_weight=0.3).counts(labelled(dense_target(), label))


@pytest.mark.parametrize("name", OPTIONS)
def test_terms_sum_to_the_loss_with_their_gradients(name: str) -> None:
    options = dict(OPTIONS[name])
    criterion = DistillLoss(Format(options.pop("teacher_align", False)), **options)
    student, label = inputs(3)
    target = dense_target()
    student.requires_grad_()
    batch = labelled(target, label)
    terms = criterion.parts(student, batch)
    assert list(terms) == [t for t in ("ce", "kl") if options.get(f"{t}_weight", 1.0) > 0]
    loss = criterion(student, batch).loss
    assert sum(term.item() for term in terms.values()) == pytest.approx(loss.item(), rel=1e-6)
    whole = torch.autograd.grad(loss, student)[0]
    parts = sum(torch.autograd.grad(term, student)[0] for term in terms.values())
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-9)


def test_gradients_reach_the_student_alone() -> None:
    student, label = inputs()
    target = dense_target()
    values_of(target).requires_grad_()
    student.requires_grad_()
    DistillLoss(Format())(student, labelled(target, label)).loss.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert values_of(target).grad is None


def test_unlabelled_batches_teach_too() -> None:
    student, label = inputs()
    target = dense_target()
    void = torch.full_like(label, 255)
    batch = labelled(target, void)
    teaching, silent = (DistillLoss(Format(), distill_void=flag)(student, batch) for flag in (True, False))
    assert teaching.ce.item() == 0
    assert teaching.kl.item() == pytest.approx(oracle(student, void, target, ce_weight=0)[2].item(), rel=1e-5)
    assert silent.loss.item() == 0


@pytest.mark.parametrize("distill_void", [True, False])
@pytest.mark.parametrize("pasted", [False, True])
def test_another_number_may_mean_void(distill_void: bool, pasted: bool) -> None:
    student, label = inputs(batch=4)
    target, weight = dense_target(4), torch.tensor([0.2, 3.0, 1.0, 0.7, 0.5])
    own = torch.rand(4, *LABEL, generator=torch.Generator().manual_seed(2)) < 0.6 if pasted else None
    losses = []
    for void in (255, 7):
        criterion = DistillLoss(Format(), distill_void=distill_void, ignore_index=void, class_weight=weight)
        batch = labelled(target, label.masked_fill(label == 255, void), own)
        counts = criterion.counts(batch)
        losses.append((criterion(student, batch).loss, criterion(student, batch, counts).loss, counts.ce, counts.kl))
    assert all(torch.equal(one, two) for one, two in zip(*losses, strict=True))
    assert losses[0][0] != DistillLoss(Format(), distill_void=not distill_void)(student, labelled(target, label)).loss


def test_class_weights_follow_the_module_and_stay_out_of_its_state() -> None:
    criterion = DistillLoss(Format(), class_weight=torch.ones(C))
    assert not criterion.state_dict()
    assert criterion.double().class_weight.dtype == torch.float64


def test_batches_move_between_devices_whole() -> None:
    batch = top_k(dense_target())
    moved = batch.to("meta")
    assert all(tensor.device.type == "meta" for tensor in tensors_of(moved))
    assert [tensor.shape for tensor in tensors_of(moved)] == [tensor.shape for tensor in tensors_of(batch)]
    assert len(tensors_of(batch)) == 5  # values, indices, tail, window, flip
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(batch.to("cpu")), tensors_of(batch), strict=True))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("augment", ["warp", "replay", "none"])
def test_a_collated_batch_of_a_store_is_what_the_loss_takes(
    kind: str, augment: str, request: pytest.FixtureRequest
) -> None:
    cache: Cache = request.getfixturevalue(kind)
    torch.manual_seed(0)
    dataset = CacheDataset(cache, augment=augment, augmentation=Augmentation(scale=(0.5, 2.0)))
    batch = default_collate([dataset[index] for index in range(3)])
    assert isinstance(batch.target, Target)
    student = torch.randn(3, 7, 16, 24, requires_grad=True)
    parts = DistillLoss(cache, temperature=3.0)(student, batch)
    parts.loss.backward()
    assert all(part.isfinite() for part in (parts.loss, parts.ce, parts.kl))
    assert parts.kl > 0
    assert student.grad is not None
    assert student.grad.isfinite().all()
    plain = default_collate([CacheDataset(cache, targets=False)[index] for index in range(3)])
    assert DistillLoss(cache)(student, replace(plain, targets=None)).kl.item() == 0
    with pytest.raises(RecipeError, match="targets=True"):
        DistillLoss(cache)(student, plain)


def test_a_student_of_another_class_list_is_refused(dense: Cache) -> None:
    batch = default_collate([CacheDataset(dense, augment="none")[0]])
    with pytest.raises((ValueError, ModelError), match=r"7|8"):
        DistillLoss(dense, ce_weight=0.0, kl_weight=1.0)(torch.randn(1, 8, 16, 24), batch)


@pytest.mark.parametrize("name", ["ce_weight", "kl_weight", "temperature"])
@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf"), "1"])
def test_a_number_that_is_no_weight_is_refused_where_the_loss_is_made(name: str, number: object) -> None:
    with pytest.raises(RecipeError) as caught:
        DistillLoss(Format(), **{name: number})
    assert caught.value.problem == f"Invalid value of {name}: {number!r}"
    assert name in caught.value.fix


def test_a_temperature_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="above 0"):
        DistillLoss(Format(), temperature=0)
