"""The last resize of foreign networks is taken off: bit for bit, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdcache
from kdcache.data import from_dataset
from kdcache.models import WrappedModel
from kdcache.models.foreign.peel import whole_answers
from kdcache.teacher import load_teacher


class Net(nn.Module):
    """Logits of stride 8, and what follows."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 5, 3, 2, 1))
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.body(x), x)


def resized(y: Tensor, x: Tensor, **options: Any) -> Tensor:
    return F.interpolate(y, size=x.shape[-2:], mode="bilinear", **options)


PEELED = {
    "to the image": (lambda y, x: resized(y, x), False),
    "corners aligned": (lambda y, x: resized(y, x, align_corners=True), True),
    "by a factor": (lambda y, x: F.interpolate(y, scale_factor=4, mode="bilinear"), False),
    "by a module": (lambda y, x: nn.UpsamplingBilinear2d(scale_factor=8)(y), True),
    "under out, before an auxiliary one": (lambda y, x: {"out": resized(y, x), "aux": resized(y[:, :2], x)}, False),
}
WHOLE = {
    "without a resize": lambda y, x: y,
    "changed after it": lambda y, x: resized(y, x) + 1,
    "changed in place after it": lambda y, x: resized(y, x).mul_(2),
    "its input changed in place": lambda y, x: (resized(y, x), y.mul_(2))[0],
    "nearest": lambda y, x: F.interpolate(y, size=x.shape[-2:], mode="nearest"),
    "antialiased": lambda y, x: resized(y, x, antialias=True),
    "by a factor that is rounded": lambda y, x: F.interpolate(y, scale_factor=3.3, mode="bilinear"),
    "smaller": lambda y, x: F.interpolate(y, scale_factor=0.5, mode="bilinear"),
}


@pytest.mark.parametrize(("end", "corners"), PEELED.values(), ids=PEELED)
def test_a_last_resize_is_taken_off(end: Any, corners: bool) -> None:
    network = Net(end)
    model = WrappedModel("own:net", network, 5).eval()
    assert (model.stride, model.align_corners, model.peeled) == (8, corners, ("segmentation",))
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        logits = model(x).logits
        answer = network(x)
        with whole_answers():
            assert torch.equal(model(x).logits, answer["out"] if isinstance(answer, dict) else answer)
    answer = answer["out"] if isinstance(answer, dict) else answer
    assert logits.shape == (2, 5, 8, 12)
    assert torch.equal(model.upsample(logits, (answer.shape[-2], answer.shape[-1])), answer)


@pytest.mark.parametrize("end", WHOLE.values(), ids=WHOLE)
def test_any_other_answer_is_left_alone(end: Any) -> None:
    network = Net(end)
    model = WrappedModel("own:net", network, 5).eval()
    x = torch.randn(1, 3, 64, 96)
    assert model.peeled == ()
    with torch.inference_mode():
        answer = network(x)
        assert torch.equal(model(x).logits, answer[0] if isinstance(answer, tuple) else answer)


def test_gradients_reach_every_weight_through_the_native_map() -> None:
    model = WrappedModel("own:net", Net(PEELED["to the image"][0]), 5).train()
    model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_compiled_networks_answer_as_they_are() -> None:
    network = Net(PEELED["to the image"][0])
    model = WrappedModel("own:net", network, 5).eval()
    x = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x).heads["segmentation"], network(x))


class Images(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        rng = np.random.default_rng(index)
        return rng.integers(0, 255, (64, 96, 3), dtype=np.uint8), rng.integers(0, 5, (64, 96), dtype=np.uint8)


def test_a_cache_of_whole_logits_stays_usable(tmp_path: Path) -> None:
    """Caches from before resizes were taken off keep their fingerprint, are built to the end and taken over."""
    split = from_dataset(Images(), classes=list("abcde"))
    module = Net(PEELED["to the image"][0])
    settings = {"size": (64, 96), "views": 1, "progress": False}
    with whole_answers():
        old = kdcache.build_cache(split, module, tmp_path / "old.zarr", **settings).manifest
    native = kdcache.build_cache(split, module, tmp_path / "native.zarr", **settings).manifest
    assert (old.segmentation.size, native.segmentation.size) == ((64, 96), (8, 12))
    assert old.teacher == native.teacher
    again = kdcache.build_cache(split, module, tmp_path / "old.zarr", **settings)
    assert again.manifest.segmentation.size == (64, 96)
    taken = kdcache.build_cache(split, module, tmp_path / "new.zarr", reuse=tmp_path / "old.zarr", progress=False)
    assert (taken.records, taken.reused) == (0, 3)
    assert load_teacher(module, split).notes == ()
