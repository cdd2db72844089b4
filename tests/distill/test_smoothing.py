"""Label smoothing beside `torch.nn.functional.cross_entropy`."""

from __future__ import annotations

import pytest
import torch
from target_oracle import LABEL, Format, dense_target, inputs, labelled
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, DistillLoss, mean_counts

CLASS_WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.0, 0.5])


@pytest.mark.parametrize("smoothing", [0.1, 0.6])
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["alike", "weighted"])
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
def test_it_is_pytorchs(smoothing: float, class_weight: Tensor | None, align_corners: bool) -> None:
    student, label = inputs()
    reference = student.double().requires_grad_()
    expected = F.cross_entropy(
        F.interpolate(reference, LABEL, mode="bilinear", align_corners=align_corners),
        label.long(),
        None if class_weight is None else class_weight.double(),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    (wanted,) = torch.autograd.grad(2 * expected, reference)
    options = {"class_weight": class_weight, "label_smoothing": smoothing, "align_corners": align_corners}
    criterion = DistillLoss(ce_weight=2, impl="reference", **options)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 3e-6)):
        leaf = student.to(dtype).requires_grad_()
        actual = criterion(leaf, Batch(labels={SEGMENTATION: label}))
        (gradient,) = torch.autograd.grad(actual.loss, leaf)
        assert actual.ce.item() == pytest.approx(expected.item(), rel=tolerance)
        assert actual.loss.item() == pytest.approx(2 * expected.item(), rel=tolerance)
        assert (gradient - wanted).norm() <= tolerance * wanted.norm()
        assert not actual.ce.requires_grad


def test_kl_beside_it_stays_what_it_was() -> None:
    student, label = inputs()
    batch = labelled(dense_target(), label)
    plain, smooth = (DistillLoss(Format(), label_smoothing=share)(student, batch) for share in (0.0, 0.1))
    assert torch.equal(plain.kl, smooth.kl)
    assert smooth.loss.item() == pytest.approx((smooth.ce + 0.3 * smooth.kl).item(), rel=1e-6)
    parts = DistillLoss(Format(), label_smoothing=0.1).parts(student.requires_grad_(), batch)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {"ce": smooth.ce.item(), "kl": 0.3 * smooth.kl.item()}, rel=1e-6
    )


def test_no_smoothing_is_the_fused_operation_to_the_bit() -> None:
    student, label = inputs()
    batch = labelled(dense_target(), label)
    losses, gradients = [], []
    for criterion in (DistillLoss(Format()), DistillLoss(Format(), label_smoothing=0.0)):
        leaf = student.clone().requires_grad_()
        losses.append(criterion(leaf, batch).loss)
        gradients.append(torch.autograd.grad(losses[-1], leaf)[0])
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


def test_parts_of_a_batch_add_up() -> None:
    """With class weights, where the parts' weights are not equal, and one image is void alone."""
    student, label = inputs(batch=4)
    label[3] = 255
    student = student.double().requires_grad_()
    batch = Batch(labels={SEGMENTATION: label})
    criterion = DistillLoss(class_weight=CLASS_WEIGHT, label_smoothing=0.2, impl="reference")
    (expected,) = torch.autograd.grad(criterion(student, batch).loss, student)
    parts = [batch.rows(2), batch.rows(2, 2)]
    counts = mean_counts([criterion.counts(part) for part in parts])
    losses = [criterion(student[2 * at : 2 * at + 2], part, counts).loss for at, part in enumerate(parts)]
    (actual,) = torch.autograd.grad(torch.stack(losses).mean(), student)
    assert (actual - expected).norm() <= 1e-6 * expected.norm()
    void = Batch(labels={SEGMENTATION: torch.full_like(label, 255)})
    assert criterion(student, void).loss.item() == 0
