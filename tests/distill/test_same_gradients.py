"""The promise: a student learns from the store what it would learn beside the living teacher."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from kdcache.data import OUTSIDE_RGB, Augmentation, Window, open_split, render
from kdcache.distill import Batch, DistillLoss
from kdcache.models import SegmentationModel, build_model
from kdcache.store import Cache
from kdcache.training import CacheDataset

DATA, SIZE = "scenes:64x96,train=8,val=1", (64, 96)
Teach = Callable[[Tensor], Tensor]


def stored_batch(cache: Cache) -> Batch:
    dataset = CacheDataset(cache, augment="none")
    return default_collate([dataset[index] for index in range(8)])


def rendered_batch() -> Tensor:
    """The same pixels, rendered anew from the data set."""
    split = open_split(DATA, "train")
    images = [split.image(index) for index in range(8)]
    pixels = [render(image, None, Window.full(*image.shape[:2]), flip=False, size=SIZE)[0] for image in images]
    return torch.stack([torch.from_numpy(p) for p in pixels])


def live_kl(
    student: SegmentationModel,
    teacher: SegmentationModel,
    pixels: Tensor,
    temperature: float,
    counted: Tensor | None = None,
) -> Tensor:
    """Hinton's loss as everyone writes it, at the label's size, over the pixels that count."""
    size = (pixels.shape[1], pixels.shape[2])
    with torch.no_grad():
        t = teacher.upsample(teacher(teacher.normalise(pixels)).logits, size)
    z = student.upsample(student(student.normalise(pixels)).logits, size)
    p, q = ((x / temperature).log_softmax(1) for x in (z, t))
    kl = F.kl_div(p, q, reduction="none", log_target=True).sum(1)
    return temperature**2 * (kl if counted is None else kl[counted]).mean()


def gradients(model: SegmentationModel, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Layer by layer; a layer that hardly gets any gradient is measured by all of it."""
    total = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert total > 1e-3
    for name, other in expected.items():
        assert (actual[name] - other).norm() <= bound * (other.norm() + 1e-3 * total), name


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
        criterion(model(model.normalise(batch.pixels)).logits, batch).loss.backward()
        optimizer.step()
    return model, 5e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_gradients_from_the_store_are_those_beside_a_live_teacher(
    student: tuple[SegmentationModel, float], teacher: SegmentationModel, dense: Cache, temperature: float
) -> None:
    model, bound = student
    live = live_kl(model, teacher, rendered_batch(), temperature)
    expected = gradients(model, live)
    batch = stored_batch(dense)
    criterion = DistillLoss(dense, ce_weight=0.0, kl_weight=1.0, temperature=temperature)
    losses = criterion(model(model.normalise(batch.pixels)).logits, batch)
    assert losses.kl.item() == pytest.approx(live.item(), rel=bound)
    assert_close(gradients(model, losses.loss), expected, bound)


VIEWS = {
    "whole and drawn": {"views": 4},
    "crops": {"views": 3, "crop": (48, 64), "view_scale": (1.0, 2.0)},
    "crops with grey": {"views": 3, "crop": SIZE, "view_scale": (0.5, 1.0)},
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_replayed_with_the_teacher_s_own_gradient(
    name: str, student: tuple[SegmentationModel, float], teacher: SegmentationModel, make_cache: Callable[..., Cache]
) -> None:
    """Each view as the store says that it lies in its source, rendered anew, beside what replay makes of it."""
    model, bound = student
    cache, split = make_cache(**VIEWS[name]), open_split(DATA, "train")
    dataset = CacheDataset(cache, augment="replay", augmentation=Augmentation.off())
    windows, flips = cache.column("window"), cache.column("flip")
    shown: set[int] = set()
    for epoch in range(cache.manifest.view.views_per_sample):
        records = [dataset.record(index, epoch) for index in range(8)]
        shown |= set(records)
        pixels = torch.stack([
            torch.from_numpy(render(
                split.image(index), None, Window(*windows[record]), flip=bool(flips[record]), size=cache.view_size
            )[0])
            for index, record in enumerate(records)
        ])  # fmt: skip
        counted = ~(pixels == torch.tensor(OUTSIDE_RGB, dtype=torch.uint8)).all(-1)
        batch = default_collate([dataset.draw(index, epoch, np.random.default_rng(0)) for index in range(8)])
        assert torch.equal(batch.pixels, pixels)
        expected = gradients(model, live_kl(model, teacher, pixels, 2.0, counted))
        losses = DistillLoss(cache, ce_weight=0.0, kl_weight=1.0)(model(model.normalise(pixels)).logits, batch)
        assert_close(gradients(model, losses.loss), expected, bound)
    assert shown == set(range(len(cache)))


def test_what_warp_loses_beside_a_live_teacher(
    student: tuple[SegmentationModel, float], teacher: SegmentationModel, dense: Cache
) -> None:
    """A moved target is not what the teacher would say of the moved pixels, and near it: zoomed, it is coarser."""
    model, _ = student
    cosines = {}
    for name, augmentation in {
        "whole": Augmentation.off(),
        "flipped": Augmentation(scale=(1.0, 1.0), flip=True, jitter=0.0),
        "zoomed": Augmentation(scale=(1.0, 2.0), flip=False, jitter=0.0),
    }.items():
        dataset = CacheDataset(dense, augment="warp", augmentation=augmentation)
        batch = default_collate([dataset.draw(index, 0, np.random.default_rng(index)) for index in range(8)])
        live = gradients(model, live_kl(model, teacher, batch.pixels, 2.0))
        losses = DistillLoss(dense, ce_weight=0.0, kl_weight=1.0)(model(model.normalise(batch.pixels)).logits, batch)
        warped = gradients(model, losses.loss)
        pair = [torch.cat([g.flatten() for g in actual.values()]) for actual in (live, warped)]
        cosines[name] = F.cosine_similarity(*pair, dim=0).item()
    assert cosines["whole"] > 0.9999
    assert cosines["whole"] > cosines["flipped"] > cosines["zoomed"] > 0.2, cosines


def test_a_top_k_store_points_the_same_way(
    teacher: SegmentationModel, dense: Cache, make_cache: Callable[..., Cache]
) -> None:
    torch.manual_seed(2)
    model = build_model("kdcache:tiny", 7)
    actual = []
    for cache in (dense, make_cache(top_k=5)):
        batch = stored_batch(cache)
        logits = model(model.normalise(batch.pixels)).logits
        loss = DistillLoss(cache, ce_weight=0.0, kl_weight=1.0, temperature=1.0)(logits, batch).loss
        actual.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert F.cosine_similarity(*actual, dim=0) > 0.99
