"""A student of depth alone: no logits, no labels of segmentation."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from kdcache.distill import Batch, DistillLoss, LabelTargets
from kdcache.distill.terms import loss_term, make_term
from kdcache.errors import RecipeError
from kdcache.heads import RegressionHead

HEADS = {"depth": RegressionHead()}


class Depth(NamedTuple):
    heads: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor]

    @property
    def logits(self) -> torch.Tensor:
        raise AssertionError("a student of depth alone has none")


def criterion(**weights: Any) -> DistillLoss:
    targets = LabelTargets(3, (8, 12), (4, 6))
    term = make_term(loss_term("depth-l1", weight=0.5), targets=targets, student_taps={}, student_heads=HEADS)
    return DistillLoss(targets, further=[term], **({"ce_weight": 0.0, "kl_weight": 0.0} | weights))


def batch_of(raw: torch.Tensor) -> tuple[Depth, Batch]:
    label = torch.rand(2, 8, 12) * 40 + 1
    label[0, :4] = torch.nan
    return Depth({"depth": raw}, {}), Batch(labels={"depth": label})


def test_its_loss_is_that_of_its_terms() -> None:
    raw = torch.randn(2, 1, 4, 6, requires_grad=True)
    outputs, batch = batch_of(raw)
    loss = criterion()
    assert loss.tasks == ("depth",)
    losses = loss(outputs, batch)
    label = batch.labels["depth"]
    depth = torch.nn.functional.softplus(torch.nn.functional.interpolate(raw, (8, 12), mode="bilinear"))[:, 0]
    expected = (depth.clamp(1e-3, 80) - label).abs()[label.isfinite()].mean()
    torch.testing.assert_close(losses.loss, 0.5 * expected)
    assert (losses.ce, losses.kl) == (0, 0)
    losses.loss.backward()
    assert raw.grad is not None
    assert raw.grad.abs().sum() > 0
    torch.testing.assert_close(loss(outputs, batch, loss.counts(batch)).loss, losses.loss)
    assert list(loss.parts(outputs, batch)) == ["depth-l1"]


def test_what_reads_logits_is_refused() -> None:
    outputs, batch = batch_of(torch.randn(2, 1, 4, 6))
    with pytest.raises(RecipeError, match="ce need logits"):
        criterion(ce_weight=1.0)(outputs, batch)
