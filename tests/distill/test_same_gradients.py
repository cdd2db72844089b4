"""The promise: a student learns from the store what it would learn beside the living teacher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from kdcache.data import Window, open_split, render
from kdcache.distill import DistillLoss
from kdcache.models import SegmentationModel, build_model
from kdcache.store import Cache
from kdcache.train import CacheDataset, Sample

DATA, SIZE = "scenes:64x96,train=8,val=1", (64, 96)
Teach = Callable[[Tensor], Tensor]


def stored_batch(cache: Cache) -> Sample:
    dataset = CacheDataset(cache, augment="none")
    return default_collate([dataset[index] for index in range(8)])


def rendered_batch() -> Tensor:
    """The same pixels, rendered anew from the data set."""
    split = open_split(DATA, "train")
    images = [split.image(index) for index in range(8)]
    pixels = [render(image, None, Window.full(*image.shape[:2]), flip=False, size=SIZE)[0] for image in images]
    return torch.stack([torch.from_numpy(p) for p in pixels])


def live_kl(student: SegmentationModel, teacher: SegmentationModel, pixels: Tensor, temperature: float) -> Tensor:
    """Hinton's loss as everyone writes it, at the label's size."""
    with torch.no_grad():
        t = teacher.upsample(teacher(teacher.normalise(pixels)).logits, SIZE)
    z = student.upsample(student(student.normalise(pixels)).logits, SIZE)
    p, q = ((x / temperature).log_softmax(1) for x in (z, t))
    kl = F.kl_div(p, q, reduction="none", log_target=True).sum(1).mean()
    return temperature**2 * kl


@pytest.fixture(params=["initial", "trained"])
def student(request: pytest.FixtureRequest, dense: Cache) -> tuple[SegmentationModel, float]:
    """(a student, how far its gradients may be from the live ones)."""
    torch.manual_seed(2)
    model = build_model("kdcache:tiny", 7)
    if request.param == "initial":
        return model, 2e-3
    batch, criterion = stored_batch(dense), DistillLoss(dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        criterion(model(model.normalise(batch.pixels)).logits, batch.label, batch.target).loss.backward()
        optimizer.step()
    return model, 5e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_gradients_from_the_store_are_those_beside_a_live_teacher(
    student: tuple[SegmentationModel, float], teacher: SegmentationModel, dense: Cache, temperature: float
) -> None:
    model, bound = student
    parameters = dict(model.named_parameters())
    live = live_kl(model, teacher, rendered_batch(), temperature)
    expected = torch.autograd.grad(live, list(parameters.values()))
    batch = stored_batch(dense)
    criterion = DistillLoss(dense, ce_weight=0.0, temperature=temperature)
    parts = criterion(model(model.normalise(batch.pixels)).logits, batch.label, batch.target)
    found = torch.autograd.grad(parts.loss, list(parameters.values()))
    assert parts.kl.item() == pytest.approx(live.item(), rel=bound)
    total = torch.cat([g.flatten() for g in expected]).norm()
    assert total > 1e-3
    for name, one, other in zip(parameters, found, expected, strict=True):
        assert (one - other).norm() <= bound * (other.norm() + 1e-3 * total), name


def test_a_top_k_store_points_the_same_way(
    teacher: SegmentationModel, dense: Cache, make_cache: Callable[..., Cache]
) -> None:
    torch.manual_seed(2)
    model = build_model("kdcache:tiny", 7)
    gradients = []
    for cache in (dense, make_cache(top_k=5)):
        batch = stored_batch(cache)
        logits = model(model.normalise(batch.pixels)).logits
        loss = DistillLoss(cache, ce_weight=0.0, temperature=1.0)(logits, batch.label, batch.target).loss
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.99
