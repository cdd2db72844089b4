"""`auxiliary`: torch's cross-entropy on the second head, with the class weights and denominators of the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from target_oracle import LABEL, C
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import Batch, DistillLoss, LabelTargets, mean_counts
from kdcache.distill.outputs import StudentOutputs
from kdcache.distill.terms import LossTerm, loss_term, make_term
from kdcache.errors import RecipeError
from kdcache.heads import CategoricalHead
from kdcache.tasks import AUXILIARY, SEGMENTATION

TARGETS = LabelTargets(C, LABEL, (6, 9))
HEADS = {SEGMENTATION: CategoricalHead(C), AUXILIARY: CategoricalHead(C)}
WEIGHT = torch.linspace(0.5, 2, C)


def criterion(spec: LossTerm | None = None, **options: Any) -> DistillLoss:
    smoothing, weight = options.get("label_smoothing", 0.0), options.get("class_weight")
    term = make_term(
        spec or loss_term("auxiliary"),
        targets=TARGETS,
        student_taps={},
        student_heads=HEADS,
        class_weight=weight,
        label_smoothing=smoothing,
        align_corners=options.get("align_corners", False),
    )
    return DistillLoss(kl_weight=0.0, impl="reference", further=[term], **options)


def batch_of(count: int, *, void: bool = True) -> Batch:
    g = torch.Generator().manual_seed(count)
    label = torch.randint(0, C, (count, *LABEL), generator=g).byte()
    if void:
        label[0] = 255
        label[:, :3] = 255
    return Batch(None, {SEGMENTATION: label})


def outputs_of(count: int, dtype: torch.dtype = torch.float64) -> StudentOutputs:
    g = torch.Generator().manual_seed(7)
    logits, second = (torch.randn(count, C, *grid, generator=g, dtype=dtype) for grid in ((8, 12), (3, 5)))
    return StudentOutputs(logits.requires_grad_(), {SEGMENTATION: logits, AUXILIARY: second.requires_grad_()})


def expected(logits: Tensor, label: Tensor, **options: Any) -> Tensor:
    up = F.interpolate(logits, LABEL, mode="bilinear", align_corners=options.get("align_corners", False))
    return F.cross_entropy(
        up,
        label.long(),
        options["class_weight"].to(up) if "class_weight" in options else None,
        ignore_index=255,
        label_smoothing=options.get("label_smoothing", 0.0),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"class_weight": WEIGHT}, {"label_smoothing": 0.2, "class_weight": WEIGHT}, {"align_corners": True}],
    ids=["plain", "weighted", "smoothed", "corners"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_torch_s_cross_entropy_of_the_second_head(options: dict[str, Any], dtype: torch.dtype) -> None:
    loss, batch, outputs = criterion(**options), batch_of(3), outputs_of(3, dtype)
    if dtype == torch.float64:
        loss = loss.double()
    rel = 1e-9 if dtype == torch.float64 else 1e-5
    losses = loss(outputs, batch)
    second = outputs.heads[AUXILIARY]
    oracle = expected(second, batch.label, **options)
    assert loss.names == ("ce", "kl", "auxiliary")
    assert losses.terms["auxiliary"].item() == pytest.approx(oracle.item(), rel=rel)
    assert losses.loss.item() == pytest.approx((losses.ce + 0.1 * losses.terms["auxiliary"]).item(), rel=rel)
    own = torch.autograd.grad(losses.loss, [outputs.logits, second])
    torch.testing.assert_close(own[1], 0.1 * torch.autograd.grad(oracle, second)[0], rtol=rel, atol=rel * 1e-2)
    torch.testing.assert_close(
        own[0],
        torch.autograd.grad(expected(outputs.logits, batch.label, **options), outputs.logits)[0],
        rtol=rel,
        atol=rel * 1e-2,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_of_a_batch_add_up_to_it(smoothing: float) -> None:
    """Denominators are the labels' alone: images of void, or with few labels, count by their pixels."""
    loss, batch, outputs = (
        criterion(class_weight=WEIGHT, label_smoothing=smoothing).double(),
        batch_of(4),
        outputs_of(4),
    )
    counts = loss.counts(batch, torch.float64)
    assert counts.terms[0].item() == pytest.approx(counts.ce.item())
    shared = mean_counts([loss.counts(batch.rows(2, first), torch.float64) for first in (0, 2)])
    whole, parts = loss(outputs, batch).terms["auxiliary"], []
    for first in (0, 2):
        heads = {name: output[first : first + 2] for name, output in outputs.heads.items()}
        losses = loss(StudentOutputs(heads[SEGMENTATION], heads), batch.rows(2, first), shared)
        parts.append(losses.terms["auxiliary"])
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-12)


def test_without_a_labelled_pixel_it_is_0() -> None:
    outputs = outputs_of(2)
    losses = criterion().double()(outputs, Batch(None, {SEGMENTATION: torch.full((2, *LABEL), 255).byte()}))
    losses.loss.backward()
    assert losses.terms["auxiliary"] == 0
    gradient = outputs.heads[AUXILIARY].grad
    assert gradient is not None
    assert not gradient.any()


def test_a_student_without_the_head_is_refused() -> None:
    for spec in (loss_term("auxiliary"), loss_term("adversarial", head=AUXILIARY)):
        with pytest.raises(RecipeError, match=r"a categorical head auxiliary(?s:.*)--model MODEL\+aux"):
            make_term(spec, targets=TARGETS, student_taps={}, student_heads={SEGMENTATION: CategoricalHead(C)})
    with pytest.raises(RecipeError, match="in training mode"):
        criterion()(StudentOutputs(outputs_of(2).logits), batch_of(2))
    with pytest.raises(RecipeError, match="labels of segmentation"):
        criterion(ce_weight=0.0)(outputs_of(2), Batch(None, {"depth": torch.ones(2, *LABEL)}))
    with pytest.raises(RecipeError, match="one of segmentation, auxiliary"):
        loss_term("adversarial", head="depth")
    with pytest.raises(RecipeError, match="Unknown option 'head' of entropy"):
        loss_term("entropy", head=AUXILIARY)
