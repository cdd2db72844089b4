"""`consistency` beside its definition in float64, for each way to divide and each maker of pseudo labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from target_oracle import LABEL, C, Format, dense_target, inputs, labelled
from terms_oracle import changed, term_batch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, DistillLoss, LabelTargets, mean_counts
from kdcache.distill.batch import PseudoLabels
from kdcache.distill.terms import labellers, loss_term, make_term, pseudo_labels, with_companions
from kdcache.distill.terms.unlabelled.pseudo import Consistency
from kdcache.errors import RecipeError

TARGETS = LabelTargets(C, LABEL, (6, 9))
VOID = torch.full((2, *LABEL), 255, dtype=torch.uint8)


def weak_logits(batch: int = 2) -> Tensor:
    """Logits that float16 keeps as they are."""
    logits = 4 * torch.randn(batch, C, 6, 9, generator=torch.Generator().manual_seed(3))
    return (logits - logits.amax(1, keepdim=True)).half().double()


def between(confidence: Tensor) -> float:
    """A threshold far from every confidence: the middle of the widest gap of those around 0.7."""
    near = confidence[(confidence > 0.5) & (confidence < 0.9)].sort().values
    gap = near.diff()
    assert gap.max() > 1e-3, "float16 rounds by a quarter of that"
    return (near[gap.argmax()] + gap.max() / 2).item()


def consistency(**options: object) -> Consistency:
    term = make_term(loss_term("consistency", **{"weight": 1.0, **options}), targets=TARGETS, student_taps={})  # type: ignore[arg-type]
    assert isinstance(term, Consistency)
    return term


@pytest.mark.parametrize("aligned", [False, True])
def test_pseudo_labels_are_the_upsampled_softmax_s(aligned: bool) -> None:
    logits = weak_logits()
    own = pseudo_labels(logits.float(), LABEL, align_corners=aligned)
    p = F.interpolate(logits, LABEL, mode="bilinear", align_corners=aligned).softmax(1)
    best, label = p.max(1)
    assert (own.confidence.double() - best).abs().max() < 1e-3
    clear = (p.topk(2, 1).values.diff(dim=1).abs() > 1e-4)[:, 0]
    assert torch.equal(own.label.long()[clear], label[clear])
    wild = torch.tensor([0.0, -float("inf"), 7e4, 3.0, 1.0]).view(1, C, 1, 1)
    sure = pseudo_labels(wild, (2, 3))
    assert (sure.label == 2).all()
    assert (sure.confidence == 1).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalise", ["all", "share", "kept"])
def test_it_is_its_definition(normalise: str, masked: bool) -> None:
    student, weak = inputs(batch=2)[0].double().requires_grad_(), weak_logits()
    best, label = F.interpolate(weak, LABEL, mode="bilinear").softmax(1).max(1)
    threshold = between(best)
    shown = torch.ones(2, *LABEL, dtype=torch.bool)
    if masked:
        shown[0, :, :11], shown[1, 5] = False, False
    sure = (best >= threshold) & shown
    ce = F.cross_entropy(F.interpolate(student, LABEL, mode="bilinear"), label, reduction="none")
    share = sure.sum().double() / shown.sum()
    assert 0.1 < share < 0.9
    expected = {
        "all": (ce * sure).sum() / shown.sum(),
        "kept": (ce * sure).sum() / sure.sum(),
        "share": share * (ce * shown).sum() / shown.sum(),
    }[normalise]
    term = consistency(threshold=threshold, normalise=normalise)
    # A gate is of the teacher of a store, and labels do not matter.
    batch = term_batch(student, {}, VOID, None, {}, torch.zeros(2, *LABEL), LABEL, shown=shown if masked else None)
    batch = changed(batch, pseudo={"student": pseudo_labels(weak, LABEL)})
    value = term(batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    gradient, wanted = (torch.autograd.grad(loss, student)[0] for loss in (value, expected))
    assert (gradient - wanted).norm() <= 1e-12 * wanted.norm()
    confident = with_companions([term])[1]
    assert confident(batch).item() == pytest.approx(share.item(), rel=1e-12)


def surest(pseudo: PseudoLabels, shown: Tensor, share: float) -> Tensor:
    """Class by class, the ceil(share * n) most confident of its n counted pixels, and whatever is as confident."""
    kept = torch.zeros(shown.shape, dtype=torch.bool)
    for name in range(C):
        own = shown & (pseudo.label == name)
        ranked = sorted(pseudo.confidence[own].tolist(), reverse=True)
        if ranked:
            kept |= own & (pseudo.confidence >= ranked[math.ceil(share * len(ranked)) - 1])
    return kept


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalise", ["all", "share", "kept"])
def test_by_a_quantile_the_surest_of_each_class_are_confident(normalise: str, masked: bool) -> None:
    student, pseudo = inputs(batch=2)[0].double().requires_grad_(), pseudo_labels(weak_logits(), LABEL)
    shown = torch.ones(2, *LABEL, dtype=torch.bool)
    if masked:
        shown[0, :, :11], shown[1, 5] = False, False
    sure = surest(pseudo, shown, 0.4)
    ce = F.cross_entropy(F.interpolate(student, LABEL, mode="bilinear"), pseudo.label.long(), reduction="none")
    share = sure.sum().double() / shown.sum()
    expected = {
        "all": (ce * sure).sum() / shown.sum(),
        "kept": (ce * sure).sum() / sure.sum(),
        "share": share * (ce * shown).sum() / shown.sum(),
    }[normalise]
    term = consistency(by="ema", quantile=0.4, normalise=normalise)
    batch = term_batch(
        student, {}, VOID, None, {}, None, LABEL, shown=shown if masked else None, pseudo={"ema": pseudo}
    )
    value = term(batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    gradient, wanted = (torch.autograd.grad(loss, student)[0] for loss in (value, expected))
    assert (gradient - wanted).norm() <= 1e-12 * wanted.norm()
    confident = with_companions([term])[1]
    assert confident(batch).item() == pytest.approx(share.item(), rel=1e-12)


def test_a_quantile_keeps_a_class_of_which_nothing_is_sure() -> None:
    """Class 1 is on a quarter of the pixels, at 0.4 where the others are at 0.9."""
    label = torch.zeros(2, *LABEL, dtype=torch.uint8)
    label[:, : LABEL[0] // 4] = 1
    pseudo = PseudoLabels(label, torch.where(label == 1, 0.4, 0.9).half())
    student = inputs(batch=2)[0].double().requires_grad_()
    batch = term_batch(student, {}, VOID, None, {}, None, LABEL, pseudo={"student": pseudo})
    pulls = []
    for options in ({"threshold": 0.7}, {"quantile": 0.5}):
        (gradient,) = torch.autograd.grad(consistency(**options)(batch), student)
        pulls.append(bool((gradient[:, 1] < 0).any()))
    assert pulls == [False, True], "a logit is raised only where its class is a pseudo label"


def test_by_the_store_it_is_pseudo_with_defaults_of_its_own() -> None:
    student, label = inputs()
    batch = labelled(dense_target(), label)
    losses = []
    for spec in (loss_term("consistency", by="store"), loss_term("pseudo", threshold=0.968, normalise="all")):
        term = make_term(spec, targets=with_manifest(), student_taps={})
        assert term.reads_teacher
        assert term.reads_target
        losses.append(DistillLoss(Format(), kl_weight=0.0, further=[term], impl="reference")(student, batch).loss)
    assert torch.equal(*losses)


def with_manifest() -> LabelTargets:
    """What makes a term of a store without its manifest: labels in its place, of the store's view."""
    return LabelTargets(C, Format().view_size, (6, 9))


@pytest.mark.parametrize("normalise", ["all", "share", "kept"])
def test_parts_of_a_batch_add_up_and_the_share_is_no_part_of_the_loss(normalise: str) -> None:
    """Of one part all pixels are sure, of the other none."""
    student = inputs(batch=4)[0].double().requires_grad_()
    pseudo = pseudo_labels(weak_logits(4), LABEL)
    sure = PseudoLabels(pseudo.label, torch.full_like(pseudo.confidence, 0.99))
    sure.confidence[2:] = 0.5
    batch = Batch(labels={SEGMENTATION: VOID.repeat(2, 1, 1)}, targets=None, pseudo={"ema": sure})
    terms = with_companions([consistency(by="ema", normalise=normalise, weight=0.3)])
    criterion = DistillLoss(ce_weight=0.0, kl_weight=0.0, further=terms, impl="reference")
    assert criterion.names == ("ce", "kl", "consistency", "confident")
    whole = criterion(student, batch)
    assert whole.terms["confident"].item() == 0.5
    assert whole.loss.item() == pytest.approx(0.3 * whole.terms["consistency"].item(), rel=1e-12)
    assert list(criterion.parts(student, batch)) == ["consistency"]
    (expected,) = torch.autograd.grad(whole.loss, student)
    parts = [batch.rows(2), batch.rows(2, 2)]
    counts = mean_counts([criterion.counts(part, torch.float64) for part in parts])
    losses = [criterion(student[2 * at : 2 * at + 2], part, counts) for at, part in enumerate(parts)]
    assert torch.stack([part.terms["confident"] for part in losses]).mean().item() == 0.5
    (actual,) = torch.autograd.grad(torch.stack([part.loss for part in losses]).mean(), student)
    assert (actual - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("normalise", ["all", "share", "kept"])
def test_without_a_confident_pixel_there_is_no_gradient(normalise: str) -> None:
    student = inputs(batch=2)[0].requires_grad_()
    unsure = pseudo_labels(torch.zeros(2, C, 6, 9), LABEL)
    batch = term_batch(student, {}, VOID, None, {}, None, LABEL, pseudo={"student": unsure})
    loss = consistency(normalise=normalise)(batch)
    (gradient,) = torch.autograd.grad(loss, student)
    assert (loss.item(), gradient.abs().sum().item()) == (0, 0)


def test_defaults_schedule_and_what_is_missing() -> None:
    term = consistency()
    assert (term.threshold, term.normalise, term.by, term.reads_teacher) == (0.968, "all", "student", False)
    assert "come from the student, with" in term.describe()
    assert term.describe().endswith("have a probability of at least 0.968")
    assert consistency(quantile=0.5).describe().endswith("a share of 0.5 of each class")
    criterion = DistillLoss(ce_weight=0.0, kl_weight=0.0, further=[term, consistency(by="ema")], scheduled=True)
    assert labellers(criterion) == ("student", "ema")
    assert labellers(DistillLoss(further=[consistency(weight=0.0)])) == ()
    student = inputs(batch=2)[0]
    batch = Batch(labels={SEGMENTATION: VOID}, targets=None)
    with pytest.raises(RecipeError, match="lacks the pseudo labels of its weak view by student, ema"):
        criterion(student, batch)
    own = pseudo_labels(weak_logits(), LABEL)
    batch = replace(batch, pseudo={"student": own, "ema": own})
    whole = criterion(student, batch).loss
    criterion.set_distill_weight_scale(0.25)
    assert criterion(student, batch).loss.item() == pytest.approx(0.25 * whole.item(), rel=1e-6)
