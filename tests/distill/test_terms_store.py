"""A term from a store beside the same term from its teacher, alive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from kdcache.distill import DistillLoss
from kdcache.distill.terms import loss_term, make_term
from kdcache.models import SegmentationModel
from kdcache.store import Cache
from kdcache.training import CacheDataset

MAXIMUM = "targets/segmentation/max"
COUNT = 4


@pytest.fixture(scope="module")
def raw(make_cache: Callable[..., Cache]) -> Cache:
    return make_cache(raw_logits=True)


def channels(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 / C times the sum over channels of KL over positions, mean over images; the student on the teacher's grid."""
    grid = (teacher.shape[2], teacher.shape[3])
    s = F.interpolate(student, grid, mode="bilinear").flatten(2) / temperature
    t = teacher.flatten(2) / temperature
    kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return temperature**2 * kl.mean()


def test_channels_of_a_store_are_those_of_its_teacher(raw: Cache, teacher: SegmentationModel) -> None:
    """`cwd` of values + max as a build wrote and a dataset brings them, against logits of the same pixels."""
    term = make_term(loss_term("cwd"), targets=raw, student_taps={})
    assert term.arrays() == (MAXIMUM,)
    dataset = CacheDataset(raw, augment="none", extras=term.arrays())
    batch = default_collate([dataset[number] for number in range(COUNT)])
    with torch.inference_mode():
        live = teacher(teacher.normalise(batch.pixels)).logits.double().clone()
    generator = torch.Generator().manual_seed(2)
    student = 3 * torch.randn(COUNT, raw.num_classes, 8, 12, generator=generator, dtype=torch.float64)
    student = student.requires_grad_()
    expected = channels(student, live, term.spec.temperature)
    (wanted,) = torch.autograd.grad(expected, student)

    criterion = DistillLoss(raw, ce_weight=0.0, kl_weight=0.0, further=[term], impl="reference")
    actual = criterion(student, batch)
    (gradient,) = torch.autograd.grad(actual.loss, student)
    assert actual.terms["cwd"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert (gradient - term.weight * wanted).norm() <= 1e-3 * term.weight * wanted.norm()
    without = replace(batch, arrays={MAXIMUM: torch.zeros_like(batch.arrays[MAXIMUM])})
    assert criterion(student, without).terms["cwd"].item() != pytest.approx(expected.item(), rel=0.02)
