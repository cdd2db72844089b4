"""`dice` and `lovasz` beside their definitions, by sets and image by image, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from target_oracle import LABEL, C, Format, dense_target, inputs
from terms_oracle import term_batch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, DistillLoss, Gate, GateSpec, LabelTargets, mean_counts
from kdcache.distill.terms import Term, TermBatch, loss_term, make_term

TARGETS = LabelTargets(C, LABEL, (6, 9))


def term_of(kind: str) -> Term:
    return make_term(loss_term(kind), targets=TARGETS, student_taps={})


def batch_of(logits: Tensor, label: Tensor) -> TermBatch:
    return term_batch(logits, {}, label, None, {}, None, LABEL)


def images() -> tuple[Tensor, Tensor]:
    """Four images: two speckled, one that shows two classes, one of void alone."""
    student, label = inputs(batch=4)
    label[2] = torch.where(label[2] < 3, 1, label[2])
    label[2][label[2] > 3] = 4
    label[3] = 255
    return student.double(), label


def dice_of_class(p: np.ndarray, shown: np.ndarray) -> float:
    return 1 - 2 * float(p[shown].sum()) / float(p.sum() + shown.sum())


def lovasz_of_class(p: np.ndarray, shown: np.ndarray) -> float:
    """Equation 8 of the paper: errors from the largest on, each times what its pixel adds to the Jaccard loss."""
    error = np.where(shown, 1 - p, p)
    truth, wrong, total = set(np.flatnonzero(shown)), set[int](), 0.0

    def jaccard_loss() -> float:
        return len(wrong) / len(truth | wrong)

    for pixel in np.argsort(-error, kind="stable"):
        before = jaccard_loss()
        wrong.add(int(pixel))
        total += error[pixel] * (jaccard_loss() - before)
    return total


OF_CLASS = {"dice": dice_of_class, "lovasz": lovasz_of_class}


def oracle(kind: str, student: Tensor, label: Tensor) -> float:
    probability = F.interpolate(student, LABEL, mode="bilinear").softmax(1).numpy()
    of_images = []
    for p, y in zip(probability, label.numpy(), strict=True):
        valid = y != 255
        classes = [OF_CLASS[kind](p[c][valid], y[valid] == c) for c in range(C) if (y == c).any()]
        if classes:
            of_images.append(np.mean(classes))
    return float(np.mean(of_images))


@pytest.mark.parametrize("kind", OF_CLASS)
def test_a_term_is_its_definition(kind: str) -> None:
    student, label = images()
    expected = oracle(kind, student, label)
    assert expected > 0.1
    assert term_of(kind)(batch_of(student, label)).item() == pytest.approx(expected, rel=1e-12)
    single = term_of(kind)(batch_of(student.half(), label))
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-3)
    leaf = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: term_of(kind)(batch_of(x, label)), (leaf,), fast_mode=True)
    (gradient,) = torch.autograd.grad(term_of(kind)(batch_of(leaf, label)), leaf)
    assert (gradient[3] == 0).all()


@pytest.mark.parametrize("kind", OF_CLASS)
def test_a_right_prediction_costs_nothing_and_void_teaches_nothing(kind: str) -> None:
    label = images()[1][:1]
    sure = 200.0 * F.one_hot(torch.where(label == 255, 0, label).long(), C).movedim(3, 1).double()
    assert term_of(kind)(batch_of(sure, label)).item() == pytest.approx(0, abs=1e-12)
    student = images()[0].requires_grad_()
    loss = term_of(kind)(batch_of(student, torch.full_like(images()[1], 255)))
    (gradient,) = torch.autograd.grad(loss, student)
    assert (loss.item(), gradient.abs().sum().item()) == (0, 0)


@pytest.mark.parametrize("taught", [False, True], ids=["labels", "teacher"])
def test_parts_of_a_batch_add_up(taught: bool) -> None:
    """Two parts, of which one has fewer labelled images, learn what the batch does; no gate of a teacher touches it."""
    student, label = images()
    student.requires_grad_()
    target = dense_target(4, moved=False)
    batch = Batch(labels={SEGMENTATION: label}, targets=target.targets if taught else None)
    criterion = DistillLoss(
        Format() if taught else None,
        kl_weight=0.3 if taught else 0.0,
        gate=Gate(GateSpec("confidence", 0.99)),
        further=[term_of("dice"), term_of("lovasz")],
        impl="reference",
    )
    whole = criterion(student, batch)
    (expected,) = torch.autograd.grad(whole.loss, student)
    parts = [batch.rows(2), batch.rows(2, 2)]
    counts = mean_counts([criterion.counts(part, torch.float64) for part in parts])
    losses = [criterion(student[2 * at : 2 * at + 2], part, counts) for at, part in enumerate(parts)]
    (actual,) = torch.autograd.grad(torch.stack([part.loss for part in losses]).mean(), student)
    assert (actual - expected).norm() <= 1e-12 * expected.norm()
    for kind in OF_CLASS:
        assert whole.terms[kind].item() == pytest.approx(oracle(kind, student.detach(), label), rel=1e-12)
    assert set(criterion.parts(student, batch)) == {"ce", "dice", "lovasz"} | ({"kl"} if taught else set())


def test_a_schedule_of_the_teacher_leaves_labels_alone() -> None:
    student, label = images()
    batch = Batch(labels={SEGMENTATION: label}, targets=dense_target(4, moved=False).targets)
    criterion = DistillLoss(Format(), kl_weight=0.3, further=[term_of("dice")], scheduled=True, impl="reference")
    criterion.set_distill_weight_scale(0.0)
    faded = criterion(student, batch)
    assert faded.loss.item() == pytest.approx((faded.ce + faded.terms["dice"]).item())
