"""`adversarial` beside AdaptSegNet's own training step: networks and their optimizers, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from target_oracle import LABEL, C
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.distill import Batch, Criterion, DistillLoss, LabelTargets, Streams, pixels_of
from kdcache.distill.outputs import StudentOutputs
from kdcache.distill.terms import discriminator_parameters, loss_term, make_term, with_companions
from kdcache.distill.terms.unlabelled.predictions import Discriminator
from kdcache.errors import RecipeError
from kdcache.heads import CategoricalHead

TARGETS = LabelTargets(C, LABEL, (6, 9))
BETAS = (0.9, 0.99)


class Student(nn.Module):
    """Logits (B, C, H / 4, W / 4) of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, C, 3, 2, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x: Tensor = self.layers(pixels.permute(0, 3, 1, 2).double() / 255)
        return x


def batches(steps: int) -> list[Streams]:
    g = torch.Generator().manual_seed(5)

    def rows(count: int) -> Batch:
        pixels = torch.randint(0, 256, (count, *LABEL, 3), generator=g, dtype=torch.uint8)
        return Batch(pixels, {"segmentation": torch.randint(0, C, (count, *LABEL), generator=g).byte()})

    return [(rows(3), rows(2)) for _ in range(steps)]


def criterion(**options: Any) -> Criterion:
    term = make_term(loss_term("adversarial", **options), targets=TARGETS, student_taps={})
    losses = [
        DistillLoss(ce_weight=1.0, kl_weight=0.0, impl="reference"),
        DistillLoss(ce_weight=0.0, kl_weight=0.0, impl="reference", further=with_companions([term])),
    ]
    return Criterion(losses, ["source", "target"], [1.0, 1.0]).double()


def published(student: nn.Module, d: nn.Module, steps: list[Streams], weight: float, square: bool) -> list[float]:
    """As in the authors' train_gta2cityscapes_multi.py, for one level; returns the discriminator's losses."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0)
    optimizer_d = torch.optim.Adam(d.parameters(), lr=1e-3, betas=BETAS)
    distance = F.mse_loss if square else F.binary_cross_entropy_with_logits

    def upsampled(batch: Batch) -> Tensor:
        return F.interpolate(student(batch.pixels), LABEL, mode="bilinear")

    losses = []
    for step in steps:
        source, target = step
        optimizer.zero_grad()
        optimizer_d.zero_grad()
        for parameter in d.parameters():
            parameter.requires_grad = False
        pred_source = upsampled(source)
        F.cross_entropy(pred_source, source.label.long()).backward()
        pred_target = upsampled(target)
        out = d(pred_target.softmax(1))
        (weight * distance(out, torch.ones_like(out))).backward()
        for parameter in d.parameters():
            parameter.requires_grad = True
        parts = []
        for pred, label in ((pred_source, 1.0), (pred_target, 0.0)):
            out = d(pred.detach().softmax(1))
            part = distance(out, torch.full_like(out, label)) / 2
            part.backward()
            parts.append(part.item())
        optimizer.step()
        optimizer_d.step()
        losses.append(sum(parts))
    return losses


@pytest.mark.parametrize("loss", ["vanilla", "least-squares"])
def test_it_trains_both_networks_as_the_authors_do(loss: str) -> None:
    torch.manual_seed(0)
    steps, own_loss = batches(4), criterion(loss=loss, weight=0.3)
    torch.manual_seed(1)
    student, twin = Student().double(), Student().double()
    twin.load_state_dict(student.state_dict())
    d = Discriminator(C, LABEL).double()
    (own_d,) = (module for module in own_loss.modules() if isinstance(module, Discriminator))
    d.load_state_dict(own_d.state_dict())
    assert {id(parameter) for parameter in discriminator_parameters(own_loss)} == set(map(id, own_d.parameters()))
    assert len(list(own_loss.parameters())) == len(list(own_d.parameters()))
    expected = published(twin, d, steps, 0.3, loss == "least-squares")
    optimizer = torch.optim.AdamW(
        [{"params": student.parameters()}, {"params": own_d.parameters(), "lr": 1e-3, "betas": BETAS}],
        lr=1e-2,
        weight_decay=0,
    )
    for step, discriminator_loss in zip(steps, expected, strict=True):
        outputs = student(pixels_of(step))
        losses = own_loss(outputs, step)
        adversarial, discriminator = losses.terms["target/adversarial"], losses.terms["target/discriminator"]
        assert discriminator.item() == pytest.approx(discriminator_loss, rel=1e-9)
        assert losses.loss.item() == pytest.approx(
            (losses.terms["source/ce"] + 0.3 * adversarial + discriminator).item(), rel=1e-9
        )
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
    for of, twin_of in ((student, twin), (own_d, d)):
        for (name, value), other in zip(of.state_dict().items(), twin_of.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=name)


def test_parts_are_the_student_s_alone() -> None:
    torch.manual_seed(0)
    own_loss, (step,) = criterion(), batches(1)
    outputs = Student().double()(pixels_of(step))
    assert set(own_loss.parts(outputs, step)) == {"source/loss", "source/ce", "target/loss", "target/adversarial"}
    assert own_loss.names[-2:] == ("target/adversarial", "target/discriminator")
    counted = own_loss(outputs, step, own_loss.counts(step))
    torch.testing.assert_close(counted.loss, own_loss(outputs, step).loss)


def test_defaults_and_sizes() -> None:
    weights = {"vanilla": 0.001, "least-squares": 0.01}
    for loss, weight in weights.items():
        term = make_term(loss_term("adversarial", loss=loss), targets=TARGETS, student_taps={})
        assert term.weight == weight
        assert not term.reads_teacher
    for size, grid in (((64, 96), (2, 3)), ((8, 40), (1, 5)), ((2, 2), (1, 1))):
        assert Discriminator(C, size)(torch.rand(1, C, *size)).shape[2:] == grid
    with pytest.raises(RecipeError, match="vanilla, least-squares"):
        loss_term("adversarial", loss="hinge")
    with pytest.raises(RecipeError, match=r"(?s)against of adversarial: ''.*Give text, not empty"):
        loss_term("adversarial", against="")


class TwoLevels(Student):
    """A second head on the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, C, 1)

    def forward(self, pixels: Tensor) -> Any:
        x = self.layers[:2](pixels.permute(0, 3, 1, 2).double() / 255)
        logits: Tensor = self.layers[2](x)
        return StudentOutputs(logits, {"segmentation": logits, "auxiliary": self.second(x)})


def test_two_levels_are_trained_as_the_authors_do() -> None:
    """train_gta2cityscapes_multi.py: lambda_seg 0.1, lambda_adv_target1 0.2 of lambda_adv_target2."""
    torch.manual_seed(0)
    heads = {"segmentation": CategoricalHead(C), "auxiliary": CategoricalHead(C)}
    options: dict[str, Any] = {"targets": TARGETS, "student_taps": {}, "student_heads": heads}
    second = make_term(loss_term("adversarial", head="auxiliary"), **options)
    assert (second.weight, second.kind) == (0.0002, "adversarial-auxiliary")
    least_squares = make_term(loss_term("adversarial", head="auxiliary", loss="least-squares"), **options)
    assert least_squares.weight == pytest.approx(0.002)
    weights = {"segmentation": 0.3, "auxiliary": 0.06}
    terms = [make_term(loss_term("adversarial", head=head, weight=own), **options) for head, own in weights.items()]
    assert [term.head for term in with_companions(terms)] == [None, None, "auxiliary", "auxiliary"]
    own_loss = Criterion(
        [
            DistillLoss(kl_weight=0.0, impl="reference", further=[make_term(loss_term("auxiliary"), **options)]),
            DistillLoss(ce_weight=0.0, kl_weight=0.0, impl="reference", further=with_companions(terms)),
        ],
        ["source", "target"],
        [1.0, 1.0],
    ).double()
    assert own_loss.names[-4:] == (
        *("target/adversarial", "target/discriminator"),
        *("target/adversarial-auxiliary", "target/discriminator-auxiliary"),
    )
    student, twin = TwoLevels().double(), TwoLevels().double()
    twin.load_state_dict(student.state_dict())
    own_ds = [module for module in own_loss.modules() if isinstance(module, Discriminator)]
    ds = [Discriminator(C, LABEL).double() for _ in own_ds]
    for d, own_d in zip(ds, own_ds, strict=True):
        d.load_state_dict(own_d.state_dict())
    optimizer = torch.optim.AdamW(
        [{"params": student.parameters()}, {"params": discriminator_parameters(own_loss), "lr": 1e-3, "betas": BETAS}],
        lr=1e-2,
        weight_decay=0,
    )
    optimizer_twin = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0)
    optimizers_d = [torch.optim.Adam(d.parameters(), lr=1e-3, betas=BETAS) for d in ds]

    def levels(batch: Batch) -> list[Tensor]:
        outputs = twin(batch.pixels)
        return [F.interpolate(logits, LABEL, mode="bilinear") for logits in outputs.heads.values()]

    for step in batches(3):
        optimizer.zero_grad()
        own_loss(student(pixels_of(step)), step).loss.backward()
        optimizer.step()

        source, target = step
        for one in (optimizer_twin, *optimizers_d):
            one.zero_grad()
        at_source, at_target = levels(source), levels(target)
        label = source.label.long()
        (F.cross_entropy(at_source[0], label) + 0.1 * F.cross_entropy(at_source[1], label)).backward()
        passes = [d(pred.softmax(1)) for d, pred in zip(ds, at_target, strict=True)]
        deceits = [F.binary_cross_entropy_with_logits(out, torch.ones_like(out)) for out in passes]
        torch.stack([own * deceit for own, deceit in zip(weights.values(), deceits, strict=True)]).sum().backward()
        for one in optimizers_d:
            one.zero_grad()
        for number, d in enumerate(ds):
            for pred, truth in ((at_source[number], 1.0), (at_target[number], 0.0)):
                out = d(pred.detach().softmax(1))
                (F.binary_cross_entropy_with_logits(out, torch.full_like(out, truth)) / 2).backward()
        for one in (optimizer_twin, *optimizers_d):
            one.step()
    for of, twin_of in ((student, twin), *zip(own_ds, ds, strict=True)):
        for (name, value), other in zip(of.state_dict().items(), twin_of.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=name)
