"""A loss of samples into which another stream's were pasted, beside a float64 oracle: labels, KL, pseudo labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from target_oracle import LABEL, VIEW, Format, dense_target, inputs, kl_pixels, labelled, top_k, upsampled
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, Counts, Criterion, DistillLoss, Gate, GateSpec, rows_of
from kdcache.distill.masks import TeacherMasks
from kdcache.distill.terms import TermSetup
from kdcache.distill.terms.unlabelled.pseudo import Pseudo
from kdcache.models import Outputs
from kdcache.settings import terms as specs
from kdcache.training.input import Mix, Paste, Pastes

ROWS, FROM = 4, [0, 0, 1, 1]
"""The stream has four rows, and the other's two are pasted into them."""


class Half(Format):
    """A store whose views have half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.view_size = (VIEW[0] // 2, VIEW[1] // 2)


def streams() -> tuple[Batch, Batch]:
    """Targets of two stores, (source, into): top-k and dense; the first two rows of the second have no label."""
    source = labelled(dense_target(3, seed=2).rows(2, 1), inputs(2, 2)[1])
    into = labelled(dense_target(ROWS, seed=1), inputs(1, ROWS)[1])
    into.label[:2] = 255
    pixels = [torch.full((n, *LABEL, 3), value, dtype=torch.uint8) for n, value in ((2, 7), (ROWS, 90))]
    dice = torch.rand(ROWS, Mix("classmix").dice, generator=torch.Generator().manual_seed(3))
    return replace(top_k(source), pixels=pixels[0]), replace(into, pixels=pixels[1], dice=dice)


def own_of(source: Batch, dice: Tensor) -> np.ndarray:
    """Where a row is still its own (4, H, W): all but half of the classes that the other shows, those of least dice."""
    own = np.ones((ROWS, *LABEL), bool)
    for row, other in enumerate(FROM):
        label = source.label[other].numpy()
        shown = sorted(set(label.flatten().tolist()) - {255}, key=lambda c: float(dice[row, 1 + c]))
        own[row] = ~np.isin(label, shown[: (len(shown) + 1) // 2])
    return own


def mixed(source: Batch, into: Batch, forms: tuple[Format, Format] = (Format(), Half())) -> Batch:
    """The second stream after pasting; the source's windows are given in pixels of views of half the size."""
    assert source.window is not None
    small = replace(source, window=source.window / 2) if isinstance(forms[1], Half) else source
    first, second = Pastes([Paste(1, 0, Mix("classmix"), *forms)])((small, into))
    assert first is small
    return second


def pseudo_of(into: Batch, z: Tensor, counted: Tensor) -> tuple[Tensor, float]:
    """DACS: every counted pixel, times the share of the confident ones; and the threshold, far from any confidence."""
    t, _ = upsampled(into, False)
    confidence, label = t.softmax(1).max(1)
    seen = confidence[counted]
    threshold = max(np.linspace(0.9, 0.97, 71), key=lambda x: float((seen - x).abs().min()))
    share = float((seen >= threshold).double().mean())
    return share * F.cross_entropy(z, label, reduction="none")[counted].mean(), float(threshold)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_what_each_pixel_is_taught_by(weight: float) -> None:
    """The source's labels and targets where it was pasted, its own elsewhere; all times the stream's weight."""
    source, into = streams()
    assert into.dice is not None
    own = torch.from_numpy(own_of(source, into.dice))
    logits = inputs(9, ROWS)[0].double().requires_grad_()
    z = F.interpolate(logits, LABEL, mode="bilinear")
    other = source.map(lambda tensor: tensor[FROM])
    label = torch.where(own, into.label, other.label)
    ce = F.cross_entropy(z, label.long(), ignore_index=255)
    kls, insides = zip(kl_pixels(logits, into), kl_pixels(logits, other), strict=True)
    counts = [own & insides[0], ~own & insides[1]]
    kl = sum(kls[n][counts[n]].sum() for n in (0, 1)) / sum(count.sum() for count in counts)
    pseudo, threshold = pseudo_of(into, z, counts[0])

    term = Pseudo(
        specs.Pseudo(threshold=threshold, normalise="share", weight=0.7), TermSetup(Format(), impl="reference")
    )
    target_loss = DistillLoss(Format(), kl_weight=0.4, further=[term], impl="reference")
    criterion = Criterion([DistillLoss(impl="reference"), target_loss], ["source", "into"], [1.0, weight])
    batch = (replace(source, targets=None), mixed(source, into))
    first = inputs(8, 2)[0].double()
    losses = criterion(Outputs({SEGMENTATION: torch.cat([first, logits])}, {}), batch)
    assert losses.terms["into/ce"].item() == pytest.approx(ce.item(), rel=1e-9)
    assert losses.terms["into/kl"].item() == pytest.approx(kl.item(), rel=1e-9)
    assert losses.terms["into/pseudo"].item() == pytest.approx(pseudo.item(), rel=1e-9)
    alone = F.cross_entropy(F.interpolate(first, LABEL, mode="bilinear"), source.label.long(), ignore_index=255)
    mixed_loss = ce + 0.4 * kl + 0.7 * pseudo
    assert losses.loss.item() == pytest.approx(alone.item() + weight * mixed_loss.item(), rel=1e-9)
    (gradient,), (expected,) = (torch.autograd.grad(loss, logits) for loss in (losses.loss, mixed_loss))
    assert expected.abs().max() > 1e-4
    assert torch.allclose(gradient, weight * expected, rtol=1e-9, atol=1e-13)
    parts = criterion.parts(Outputs({SEGMENTATION: torch.cat([first, logits])}, {}), batch)
    assert parts["into/loss"].item() == pytest.approx(weight * mixed_loss.item(), rel=1e-9)


def test_a_source_without_targets_teaches_by_its_labels_alone() -> None:
    source, into = streams()
    assert into.dice is not None
    own = torch.from_numpy(own_of(source, into.dice))
    logits = inputs(9, ROWS)[0].double()
    losses = DistillLoss(Format(), impl="reference")(logits, mixed(replace(source, targets={}), into))
    kl, inside = kl_pixels(logits, into)
    assert losses.kl.item() == pytest.approx(kl[own & inside].mean().item(), rel=1e-9)


def test_equal_parts_paste_and_count_as_the_whole() -> None:
    source, into = streams()
    whole = mixed(source, into, (Format(), Format()))
    parts = [mixed(*rows_of((source, into), 3, 3 * part), (Format(), Format())) for part in (0, 1)]
    for part, batch in enumerate(parts):
        assert batch.pixels is not None
        assert torch.equal(batch.label, whole.label[2 * part : 2 * part + 2])
        assert batch.own is not None
        assert whole.own is not None
        assert torch.equal(batch.own, whole.own[2 * part : 2 * part + 2])
        assert torch.equal(batch.pixels[..., 0] == 90, batch.own)
    criterion = DistillLoss(Format(), impl="reference")
    counts, of_parts = criterion.counts(whole), [criterion.counts(part) for part in parts]
    assert sum(float(part.kl) for part in of_parts) == counts.kl
    assert sum(float(part.ce) for part in of_parts) == counts.ce


def test_a_gate_judges_each_target_at_its_own_pixels() -> None:
    """The gate lets pass what the stream's target, or the pasted one, gets right."""
    source, into = streams()
    into.label[:2] = inputs(5, 2)[1]
    assert into.dice is not None
    own = torch.from_numpy(own_of(source, into.dice))
    logits = inputs(9, ROWS)[0].double()
    batch = mixed(source, into)
    losses = DistillLoss(Format(), gate=Gate(GateSpec("correct")), impl="reference")(logits, batch)
    total, counted = 0.0, 0.0
    for target, mask in ((into, own), (source.map(lambda tensor: tensor[FROM]), ~own)):
        kl, inside = kl_pixels(logits, target)
        best = upsampled(target, False)[0].argmax(1)
        passed = (best == batch.label) | (batch.label == 255)
        total += float(kl[mask & inside & passed].sum())
        counted += float((mask & inside).sum())
    assert losses.kl.item() == pytest.approx(total / counted, rel=1e-3)  # argmax of float16 sums


def test_what_is_shown_is_of_the_image_that_each_pixel_is_of() -> None:
    """Terms on predictions count neither the grey beside the stream's image nor that beside the pasted one."""
    source, into = streams()
    assert into.dice is not None
    own = torch.from_numpy(own_of(source, into.dice))
    upper = torch.tensor([0.0, 0.0, VIEW[0] / 2, VIEW[1]], dtype=torch.float64)
    masks = TeacherMasks(Format(), True, 255)
    for grey in (0, 1):
        pair = [replace(source, inside=upper.repeat(2, 1)), into] if grey == 0 else [source, into]
        if grey == 1:
            pair[1] = replace(into, inside=upper.repeat(ROWS, 1))
        shown = masks.shown(mixed(pair[0], pair[1], (Format(), Format())))
        alone = pair[grey].map(lambda tensor: tensor[FROM]) if grey == 0 else pair[grey]
        within = masks.shown(replace(alone, own=None))
        assert shown is not None
        assert within is not None
        assert torch.equal(shown, torch.where(own, within | (grey == 0), within | (grey == 1)))
        assert not shown.all()


IMPLS = ("auto", "reference")
SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "schedules": {"ce_weight": 0.5, "kl_weight": 0.7, "temperature": 2.5},
    "smoothed labels": {"label_smoothing": 0.2},
    "focal": {"focal_gamma": 2.0},
}


def neighbouring(own: Tensor) -> tuple[Tensor, Batch]:
    """Logits and a batch whose rows have pixels of their neighbours, through windows of their own."""
    student, label = inputs(7, ROWS)
    return student, labelled(dense_target(ROWS, seed=3), label, own)


def random_mask(seed: int = 4) -> Tensor:
    return torch.rand(ROWS, *LABEL, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_labels_teach_once_and_both_targets_by_one_count(impl: str, settings: dict[str, float]) -> None:
    """Against float64: the labels of all pixels, each target at its own, and the mean over the pixels of both."""
    own = random_mask()
    student, batch = neighbouring(own)
    options = {"ce_weight": 1.0, "kl_weight": 0.3, "temperature": 2.0} | settings
    exact = student.double().requires_grad_()
    other = batch.map(lambda tensor: tensor[[1, 0, 3, 2]])
    pairs = [kl_pixels(exact, one, options["temperature"]) for one in (batch, other)]
    counts = [mask & inside for mask, (_, inside) in zip((own, ~own), pairs, strict=True)]
    kl = sum(kl[count].sum() for (kl, _), count in zip(pairs, counts, strict=True)) / sum(x.sum() for x in counts)
    z = F.interpolate(exact, LABEL, mode="bilinear")
    ce = F.cross_entropy(
        z, batch.label.long(), ignore_index=255, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    ce = ce * (1 - (-ce).exp()) ** options["focal_gamma"] if "focal_gamma" in options else ce
    ce = ce.sum() / (batch.label != 255).sum()
    wanted = torch.autograd.grad(options["ce_weight"] * ce + options["kl_weight"] * kl, exact)[0]
    leaf = student.requires_grad_()
    losses = DistillLoss(Format(), impl=impl, **options)(leaf, batch)
    assert losses.ce.item() == pytest.approx(ce.item(), rel=2e-6)
    assert losses.kl.item() == pytest.approx(kl.item(), rel=2e-6)
    expected = options["ce_weight"] * ce + options["kl_weight"] * kl
    assert losses.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    gradient = torch.autograd.grad(losses.loss, leaf)[0]
    assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_of_a_batch_share_the_count_of_both_targets(impl: str) -> None:
    student, whole = neighbouring(random_mask())
    criterion = DistillLoss(Format(), kl_weight=0.7, impl=impl)
    parts = [whole.rows(2, first) for first in (0, 2)]
    counts = [criterion.counts(part) for part in parts]
    mean = Counts(*(torch.stack(same).mean() for same in zip(*((n.ce, n.kl) for n in counts), strict=True)))
    losses = [criterion(student[2 * n : 2 * n + 2], part, mean).loss.item() for n, part in enumerate(parts)]
    assert sum(losses) / 2 == pytest.approx(criterion(student, whole).loss.item(), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_nothing_and_everything_pasted(impl: str, everywhere: bool) -> None:
    """The loss is that of one target alone: of the row, or of its neighbour."""
    student, batch = neighbouring(torch.full((ROWS, *LABEL), not everywhere))
    criterion = DistillLoss(Format(), ce_weight=0.0, kl_weight=1.0, impl=impl)
    alone = batch.map(lambda tensor: tensor[[1, 0, 3, 2]]) if everywhere else batch
    alone = replace(alone, labels=batch.labels, own=None)
    assert criterion(student, batch).kl.item() == pytest.approx(criterion(student, alone).kl.item(), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row", [0, 1])
def test_a_logit_that_is_not_finite_spoils_the_kl(impl: str, row: int) -> None:
    """Of either target, if it lies in its view: the loss is NaN, and so is its gradient at every logit."""
    own = torch.zeros(ROWS, *LABEL, dtype=torch.bool)
    own[0] = True
    student, batch = neighbouring(own)
    assert batch.target is not None
    batch.target.values[row, 2, 3, 3] = torch.nan
    leaf = student.requires_grad_()
    losses = DistillLoss(Format(), kl_weight=0.5, impl=impl)(leaf, batch)
    assert losses.kl.isnan()
    assert losses.ce.isfinite()
    assert torch.autograd.grad(losses.loss, leaf)[0].isnan().all()
