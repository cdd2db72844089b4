"""The focal loss of a training beside its formula."""

from __future__ import annotations

import pytest
import torch
from target_oracle import LABEL, Format, dense_target, inputs, labelled
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, DistillLoss

CLASS_WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.0, 0.5])


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_it_is_the_formula(gamma: float, impl: str) -> None:
    """Lin et al. 2017, equation 5, with class weights for alpha, over their sum."""
    student, label = inputs()
    exact = student.double().requires_grad_()
    log_p = F.interpolate(exact, LABEL, mode="bilinear").log_softmax(1)
    own, weight = -F.nll_loss(log_p, label.long(), ignore_index=255, reduction="none"), CLASS_WEIGHT.double()
    alpha = torch.where(label == 255, 0, weight[label.long().clamp(max=len(weight) - 1)])
    expected = -(alpha * (1 - own.exp()) ** gamma * own).sum() / alpha.sum()
    (wanted,) = torch.autograd.grad(expected, exact)
    leaf = student.clone().requires_grad_()
    criterion = DistillLoss(class_weight=CLASS_WEIGHT, focal_gamma=gamma, impl=impl)
    actual = criterion(leaf, Batch(labels={SEGMENTATION: label}))
    (gradient,) = torch.autograd.grad(actual.loss, leaf)
    assert actual.ce.item() == pytest.approx(expected.item(), rel=3e-6)
    assert (gradient - wanted).norm() <= 3e-6 * wanted.norm()


def test_kl_beside_it_stays_what_it_was() -> None:
    student, label = inputs()
    batch = labelled(dense_target(), label)
    plain, focal = (DistillLoss(Format(), focal_gamma=gamma)(student, batch) for gamma in (0.0, 2.0))
    assert focal.kl.item() == pytest.approx(plain.kl.item(), rel=1e-6)
    assert focal.ce < plain.ce
