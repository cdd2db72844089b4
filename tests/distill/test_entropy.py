"""`entropy` beside its definition, pixel by pixel, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from target_oracle import LABEL, C, Format, dense_target, inputs
from terms_oracle import term_batch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, DistillLoss, LabelTargets, mean_counts
from kdcache.distill.terms import Term, loss_term, make_term

TARGETS = LabelTargets(C, LABEL, (6, 9))


def entropy() -> Term:
    return make_term(loss_term("entropy", weight=1), targets=TARGETS, student_taps={})


def oracle(student: Tensor, shown: np.ndarray | None = None) -> float:
    logits = F.interpolate(student.double(), LABEL, mode="bilinear").numpy()
    values = []
    for b, y, x in np.ndindex(len(logits), *LABEL):
        if shown is None or shown[b, y, x]:
            p = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
            p /= p.sum()
            values.append(-sum(one * math.log(one) for one in p if one > 0) / math.log(C))
    return float(np.mean(values))


def test_it_is_its_definition() -> None:
    student, label = inputs(batch=2)
    shown = torch.rand(2, *LABEL, generator=torch.Generator().manual_seed(1)) > 0.4
    leaf = student.double().requires_grad_()
    for mask in (None, shown):
        batch = term_batch(leaf, {}, label, None, {}, None, LABEL, shown=mask)
        expected = oracle(student, None if mask is None else mask.numpy())
        assert 0 < expected < 1
        assert entropy()(batch).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: entropy()(term_batch(x, {}, label, None, {}, None, LABEL, shown=shown)), (leaf,), fast_mode=True
    )


@pytest.mark.parametrize("logit", [0.0, 60000.0, -60000.0])
def test_the_ends_of_its_range(logit: float) -> None:
    """Equal logits are 1, one class alone is 0; halves that are nearly infinite have gradients that are numbers."""
    student = torch.zeros(1, C, 6, 9, dtype=torch.float16)
    student[:, 0] = logit
    student.requires_grad_()
    loss = entropy()(term_batch(student, {}, None, None, {}, None, LABEL))
    expected = {0.0: 1.0, 60000.0: 0.0, -60000.0: math.log(C - 1) / math.log(C)}[logit]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_what_shows_no_image_counts_nothing() -> None:
    student = inputs(batch=1)[0].double().requires_grad_()
    loss = entropy()(
        term_batch(student, {}, None, None, {}, None, LABEL, shown=torch.zeros(1, *LABEL, dtype=torch.bool))
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert (loss.item(), gradient.abs().sum().item()) == (0, 0)


def test_void_counts_and_parts_of_a_batch_add_up() -> None:
    """Parts of which one lies largely beyond its image learn what the batch does; labels do not matter."""
    student, label = inputs(batch=4)
    student = student.double().requires_grad_()
    label[0] = 255
    inside = torch.tensor([[0, 0, 1e6, 1e6]] * 3 + [[0, 0, 3.0, 4.0]], dtype=torch.float64)
    target = dense_target(4, moved=False)
    batch = Batch(labels={SEGMENTATION: label}, targets=target.targets, inside=inside)
    criterion = DistillLoss(Format(), ce_weight=0.5, kl_weight=0.0, further=[entropy()], impl="reference")
    whole = criterion(student, batch)
    shown = batch.shown(Format(), LABEL)
    assert shown is not None
    assert not shown[3].all()
    assert whole.terms["entropy"].item() == pytest.approx(oracle(student.detach(), shown.numpy()), rel=1e-12)
    (expected,) = torch.autograd.grad(whole.loss, student)
    parts = [batch.rows(2), batch.rows(2, 2)]
    counts = mean_counts([criterion.counts(part, torch.float64) for part in parts])
    losses = [criterion(student[2 * at : 2 * at + 2], part, counts) for at, part in enumerate(parts)]
    (actual,) = torch.autograd.grad(torch.stack([part.loss for part in losses]).mean(), student)
    assert (actual - expected).norm() <= 1e-12 * expected.norm()
