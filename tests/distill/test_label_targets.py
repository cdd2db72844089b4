"""Labels in the teacher's place: shares of cells counted pixel by pixel, and the formulas of terms on them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from terms_oracle import GRID, MAXIMUM, SIZE, VIEW, Array, B, C, oracle, term_batch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, DistillLoss, LabelTargets, Target, mean_counts
from kdcache.distill.label_targets import LOG_FLOOR
from kdcache.distill.terms import LossTerm, Term, loss_term, make_term
from kdcache.errors import RecipeError

LABELS = LabelTargets(C, SIZE, GRID)
SPECS = [
    loss_term("dist"),
    loss_term("dist", temperature=2.0, beta=0.5, gamma=3.0),
    loss_term("dkd", temperature=1.0),
    loss_term("cwd"),
    loss_term("pseudo", threshold=0.6),
]


def label_maps() -> Tensor:
    """Speckled labels with void; whole cells of one class, of void, and an image that is void throughout."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, C, (B, *SIZE), generator=generator, dtype=torch.uint8)
    labels[torch.rand(B, *SIZE, generator=generator) < 0.2] = 255
    labels[0, :12, :20] = 2
    labels[1, 8:, 10:25] = 255
    labels[3] = 255
    return labels


def shares(label_HW: Array) -> tuple[Array, Array]:
    """(C, h, w) areas of classes over the labelled area of each cell, and that area (h, w); any where it is 0."""
    areas = np.zeros((C, *GRID))
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            for i in range(GRID[0]):
                for j in range(GRID[1]):
                    overlap = 1.0
                    for at, cell, cells, pixels in ((row, i, GRID[0], SIZE[0]), (column, j, GRID[1], SIZE[1])):
                        low, high = cell * pixels / cells, (cell + 1) * pixels / cells
                        overlap *= max(0.0, min(at + 1, high) - max(at, low)) * cells / pixels
                    if label_HW[row, column] != 255:
                        areas[label_HW[row, column], i, j] += overlap
    total = areas.sum(0)
    nothing = np.linspace(0.1, 0.3, C)[:, None, None]
    return np.where(total > 0, areas / np.where(total > 0, total, 1), nothing), total


def batch_of() -> Batch:
    """What a store gives: random targets, windows and flips, none of which labels in their place may read."""
    generator = torch.Generator().manual_seed(4)
    window = torch.tensor([3.0, 5.0, 14.0, 22.0], dtype=torch.float64).repeat(B, 1)
    values = torch.randn(B, C, *GRID, generator=generator).half()
    inside = torch.tensor([0.0, 0.0, 9.0, 20.0], dtype=torch.float64).repeat(B, 1)
    return Batch(
        labels={SEGMENTATION: label_maps()},
        targets={SEGMENTATION: Target(values)},
        window=window,
        flip=torch.arange(B) % 2 == 0,
        inside=inside,
    )


def student(dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(B, C, 7, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def loss_of(*specs: LossTerm, ce_weight: float = 0.0, kl_weight: float = 0.0) -> DistillLoss:
    """A loss on the reference implementation, which takes float64 logits."""
    further = [make_term(spec, targets=LABELS, student_taps={}) for spec in specs]
    return DistillLoss(LABELS, ce_weight=ce_weight, kl_weight=kl_weight, further=further, impl="reference")


def expected_of(term: Term, logits: Tensor, labels: Tensor) -> float:
    """The term's oracle with the areas as its target; cells of void alone have any target."""
    teacher = np.stack([shares(label)[0] for label in labels.numpy()])
    values = torch.from_numpy(np.log(np.maximum(teacher, math.exp(LOG_FLOOR))))
    stored = {MAXIMUM: torch.zeros(len(labels), *GRID)}
    window = torch.tensor([0.0, 0.0, *VIEW], dtype=torch.float64).repeat(len(labels), 1)
    flip = torch.zeros(len(labels), dtype=torch.bool)
    return oracle(
        term,
        term_batch(logits, {}, labels, Target(values), stored, None, SIZE, labels != 255, window, flip),
    )


def test_shares_are_areas_of_labelled_pixels() -> None:
    actual = LABELS.shares(label_maps(), torch.float64).numpy()
    for one, label in zip(actual, label_maps().numpy(), strict=True):
        expected, area = shares(label)
        assert np.allclose(one, np.where(area > 0, expected, 0), atol=1e-12, rtol=0)
    single = LABELS.shares(label_maps()).numpy()
    assert single.dtype == np.float32
    assert np.abs(single - actual).max() < 1e-6
    assert actual.max() == pytest.approx(1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.table()))
def test_a_term_compares_with_the_labels_alone(spec: LossTerm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terms_oracle.B", 3)  # a void image counts nowhere: the oracle goes without it
    logits, batch, criterion = student(), batch_of(), loss_of(spec)
    expected = expected_of(criterion.further[0], logits[:3], label_maps()[:3])  # type: ignore[arg-type]
    actual = criterion(logits, batch)
    assert expected > 1e-3
    assert actual.loss.item() == pytest.approx(actual.terms[spec.kind].item() * criterion.further[0].weight)  # type: ignore[operator]
    tolerance = {"dist": 2e-6, "pseudo": 1e-4, "cwd": 1e-9, "dkd": 1e-8}[spec.kind]
    assert actual.terms[spec.kind].item() == pytest.approx(expected, rel=tolerance)
    single = criterion(logits.float(), replace(batch, targets={}, window=None, flip=None, inside=None))
    assert single.loss.dtype == torch.float32
    assert single.terms[spec.kind].item() == pytest.approx(expected, rel=max(tolerance, 5e-5))


def test_kl_is_that_of_the_shares_at_every_labelled_pixel() -> None:
    labels, logits = label_maps(), student()
    areas = [shares(label) for label in labels.numpy()]
    of_cells = np.stack([np.where(area > 0, share, 1 / C) for share, area in areas])  # void favours no class
    values = torch.from_numpy(of_cells).log().clamp_min(LOG_FLOOR)
    at_label = [F.interpolate(x, SIZE, mode="bilinear") / 2.0 for x in (values.half().double(), logits)]
    t, z = (x.log_softmax(1) for x in at_label)
    kl_BHW = F.kl_div(z, t, reduction="none", log_target=True).sum(1)
    expected = 4 * kl_BHW[labels != 255].mean()
    criterion = loss_of(kl_weight=0.7)
    actual = criterion(logits.requires_grad_(), batch_of())
    assert actual.kl.item() == pytest.approx(expected.item(), rel=1e-9)
    actual.loss.backward()
    assert logits.grad is not None
    assert (logits.grad[3] == 0).all()
    assert logits.grad[:3].abs().sum() > 0


def test_parts_of_a_batch_add_up() -> None:
    """Processes and accumulated parts, of which one has an image of void alone, learn what the batch does."""
    logits, batch = student().requires_grad_(), batch_of()
    criterion = loss_of(*map(loss_term, ("dkd", "cwd", "pseudo")), ce_weight=1.0, kl_weight=0.5)
    whole = criterion(logits, batch)
    (expected,) = torch.autograd.grad(whole.loss, logits)
    parts = [batch.rows(2), batch.rows(2, 2)]
    counts = mean_counts([criterion.counts(part, torch.float64) for part in parts])
    losses = [criterion(logits[2 * at : 2 * at + 2], part, counts).loss for at, part in enumerate(parts)]
    (actual,) = torch.autograd.grad(torch.stack(losses).mean(), logits)
    assert torch.stack(losses).mean().item() == pytest.approx(whole.loss.item(), rel=1e-12)
    assert (actual - expected).norm() <= 1e-12 * expected.norm()


def test_pasted_pixels_bring_their_own_labels() -> None:
    batch = batch_of()
    own = torch.rand(B, *SIZE, generator=torch.Generator().manual_seed(6)) < 0.5
    criterion = loss_of(loss_term("dkd"), kl_weight=1.0)
    assert criterion(student(), replace(batch, own=own)) == criterion(student(), batch)


def test_a_temperature_does_not_smooth_labels() -> None:
    """At 4, classes that a cell does not show keep less than 1 % together, of 19."""
    labels = torch.full((1, 8, 8), 3, dtype=torch.uint8)
    nineteen = LabelTargets(19, (8, 8), (2, 2))
    batch = nineteen.replace_targets(Batch(labels={SEGMENTATION: labels}))
    assert batch.target is not None
    assert (batch.target.values / 4).softmax(1)[:, 3].min() > 0.99
    packed = batch.target.packed(nineteen)
    assert packed.values.dtype == torch.float16
    assert torch.equal(packed.values.float(), batch.target.values)


def test_features_have_no_labels_in_their_place() -> None:
    for spec in (
        loss_term("hint"),
        loss_term("at"),
        loss_term("sp"),
        loss_term("cosine"),
        loss_term("cwd", teacher_tap="a"),
    ):
        with pytest.raises(RecipeError, match="labels have no features") as raised:
            make_term(spec, targets=LABELS, student_taps={"head": 4})
        assert raised.value.problem.startswith(f"Cannot compute {spec.kind} with --teacher labels")
