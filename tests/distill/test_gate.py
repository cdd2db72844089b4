"""Gates and pasted pixels: what the KL counts, against float64."""

from __future__ import annotations

import pytest
import torch
from target_oracle import LABEL, C, Format, dense_target, inputs, kl_pixels, labelled, top_k, upsampled
from torch import Tensor

from kdcache.distill import DistillLoss, Gate, GateSpec, parse_gate
from kdcache.distill.batch import neighbours
from kdcache.errors import RecipeError

TABLE = torch.tensor([0.0, 0.25, 1.0, 2.0, 0.5])
GATES = {
    "correct": Gate(GateSpec("correct")),
    "confidence": Gate(GateSpec("confidence", 0.8)),
    "classes": Gate(class_weight=TABLE),
    "all": Gate(GateSpec("correct"), TABLE),
}


def weights(name: str, target, label: Tensor) -> Tensor:
    """What a gate says, from the teacher's probabilities in float64."""
    confidence, argmax = upsampled(target, False)[0].softmax(1).max(1)
    weight = torch.ones(argmax.shape, dtype=torch.float64)
    if name in ("correct", "all"):
        weight *= (argmax == label) | (label == 255)
    if name == "confidence":
        weight *= confidence.half() >= 0.8  # as the kernels give it
    return weight * TABLE.double()[argmax] if name in ("classes", "all") else weight


@pytest.mark.parametrize("kind", ["dense", "top-k"])
@pytest.mark.parametrize("name", GATES)
def test_a_gate_weighs_pixels_and_does_not_shrink_the_denominator(name: str, kind: str) -> None:
    student, label = inputs()
    target = dense_target() if kind == "dense" else top_k(dense_target())
    reference = student.double().requires_grad_()
    kl, inside = kl_pixels(reference, target)
    expected = (kl * weights(name, target, label) * inside).sum() / inside.sum()
    (wanted,) = torch.autograd.grad(expected, reference)
    student.requires_grad_()
    losses = DistillLoss(Format(), ce_weight=0, kl_weight=1.0, gate=GATES[name])(student, labelled(target, label))
    (gradient,) = torch.autograd.grad(losses.loss, student)
    assert losses.kl.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


def test_an_open_gate_costs_nothing() -> None:
    student, label = inputs()
    batch = labelled(dense_target(), label)
    assert Gate()(batch, Format()) is None
    plain, gated = DistillLoss(Format()), DistillLoss(Format(), gate=Gate(class_weight=torch.ones(C)))
    torch.testing.assert_close(plain(student, batch)[:3], gated(student, batch)[:3])


@pytest.mark.parametrize("void", [True, False])
@pytest.mark.parametrize("gate", ["none", *GATES])
def test_pasted_pixels_learn_from_the_neighbour_s_target(gate: str, void: bool) -> None:
    student, label = inputs(batch=4)
    target = dense_target(4)
    own = torch.rand(4, *LABEL, generator=torch.Generator().manual_seed(2)) < 0.6
    other = target.map(lambda part: part[[1, 0, 3, 2]])
    reference = student.double().requires_grad_()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one, counted in ((target, own), (other, ~own)):
        kl, inside = kl_pixels(reference, one)
        counted = counted & inside & (torch.ones_like(counted) if void else label != 255)
        weight = torch.ones_like(kl) if gate == "none" else weights(gate, one, label)
        total, count = total + (kl * weight * counted).sum(), count + int(counted.sum())
    (wanted,) = torch.autograd.grad(total / count, reference)
    student.requires_grad_()
    criterion = DistillLoss(Format(), ce_weight=0.0, kl_weight=1.0, gate=GATES.get(gate), distill_void=void)
    batch = labelled(target, label, own)
    losses = criterion(student, batch)
    (gradient,) = torch.autograd.grad(losses.loss, student)
    assert losses.kl.item() == pytest.approx((total / count).item(), rel=1e-5)
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
    assert set(criterion.parts(student, batch)) == {"kl"}


def test_neighbours_change_places() -> None:
    assert neighbours(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert neighbours(torch.arange(8).reshape(4, 2)).tolist() == [[2, 3], [0, 1], [6, 7], [4, 5]]


@pytest.mark.parametrize("text", ["", "wrong", "confidence", "confidence:1", "confidence:0", "confidence:x", "none:1"])
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"confidence:0\.7"):
        parse_gate(text)


def test_gates_by_name() -> None:
    assert parse_gate("none") == GateSpec()
    assert parse_gate("correct").kind == "correct"
    assert parse_gate("confidence:0.7") == GateSpec("confidence", 0.7)
