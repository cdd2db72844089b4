"""benchmarks/yolo_step.py and lightly_client.py, whose packages have their own environments: here they are pretended.

The tests of clients/ run the packages themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.bench.timing import Spread
from kdcache.store import open_cache


def pretend(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Put modules in place of packages that are not installed."""
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)


class Network(nn.Module):
    """A network of Ultralytics: its loss is a vector and parts of it."""

    def __init__(self, config: str, nc: int, verbose: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, nc, 1)
        self.seen: list[Any] = []
        self.norms: list[float] = []

    def loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, None]:
        self.seen.append(batch)
        logits = 1e4 * self.layer(batch["img"])
        return nn.functional.cross_entropy(logits, batch["semantic_mask"].long(), ignore_index=255)[None], None


class Average:
    """A moving average that counts its updates."""

    def __init__(self, network: nn.Module) -> None:
        self.network, network.average = network, self
        self.updates = 0

    def update(self, network: nn.Module) -> None:
        self.updates += 1


@pytest.fixture
def yolo(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pretend(
        monkeypatch,
        {
            **{name: {} for name in ("ultralytics", "ultralytics.nn", "ultralytics.utils")},
            "ultralytics.cfg": {"get_cfg": lambda: "settings"},
            "ultralytics.nn.tasks": {"SemanticSegmentationModel": Network},
            "ultralytics.utils.torch_utils": {"ModelEMA": Average},
        },
    )
    return script("yolo_step")


def test_the_plain_step_is_ultralytics_with_clipping_and_average(yolo, store, options, monkeypatch) -> None:
    networks: list[Network] = []
    clipped: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters: Any, max_norm: float) -> Any:
        kept = list(parameters)
        clip(kept, max_norm)
        clipped.append(max_norm)
        assert torch.stack([p.grad.norm() for p in kept]).norm() <= max_norm * 1.001

    monkeypatch.setattr(
        yolo, "SemanticSegmentationModel", lambda *a, **o: networks.append(Network(*a, **o)) or networks[0]
    )
    monkeypatch.setattr(yolo.torch.nn.utils, "clip_grad_norm_", watched)
    given = options(batch_size=4, size=(32, 48), workers=0, device="cpu")
    learner = yolo.plain(open_cache(store), given)
    (network,) = networks
    warm = len(network.seen)
    before = network.layer.weight.clone()
    learner(3)
    assert (warm >= 2, len(network.seen) - warm) == (True, 3)
    assert network.average.updates == len(network.seen)
    assert set(clipped) == {10.0}
    assert not torch.equal(network.layer.weight, before)
    assert network.layer.weight.grad is None
    for batch in network.seen:
        assert batch["img"].shape == (4, 3, 32, 48)
        assert 0 <= batch["img"].min() <= batch["img"].max() <= 1
        assert batch["img"].max() > 0.1
        assert batch["semantic_mask"].shape == (4, 32, 48)
    assert learner.size == (4, 32, 48, 3) == yolo.learner(open_cache(store), "none", _kinds(given)).size


def _kinds(given: Any) -> Any:
    return SimpleNamespace(**vars(given), student="kdcache:tiny", teacher="kdcache:tiny")


def test_ratios_are_of_the_cpu_s_medians(yolo, pace) -> None:
    one = {"plain": 100.0, "none": 80.0, "kl": 90.0, "live": 180.0}
    paces = {kind: pace(1.0, 2, 3, cpu=(1.0, ms, 999.0)) for kind, ms in one.items()}
    found = yolo.result(paces)
    assert (found["kl_over_plain"], found["kl_over_none"], found["live_over_kl"]) == (0.9, 1.125, 2)
    assert found["ms_per_step"]["kl"]["p50"] == 2
    assert found["cpu_ms_per_step"]["kl"] == vars(Spread.of([1.0, 90.0, 999.0]))


@pytest.fixture
def lightly(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    class Method(nn.Module):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.settings = settings
            self.student, self.teacher = settings["embedding_model"], settings["method_args"]["teacher"]

        def training_step_impl(self, batch: Any, number: int) -> Any:
            (x,) = batch["views"]
            target = self.teacher.forward_features(x)["features"].mean((2, 3))
            return SimpleNamespace(loss=(self.student(x).mean((2, 3)) * target).sum())

    top, v3 = "lightly_train", "lightly_train._methods.distillationv3"
    pretend(
        monkeypatch,
        {
            **{name: {} for name in (top, f"{top}._methods", v3, f"{top}._models")},
            f"{v3}.distillationv3": {
                "DistillationV3": Method,
                "DistillationV3AdamWArgs": dict,
                "DistillationV3Args": dict,
            },
            f"{top}._models.embedding_model": {"EmbeddingModel": lambda student: student},
            f"{top}._models.model_wrapper": {"ForwardFeaturesOutput": dict, "ForwardPoolOutput": dict},
            f"{top}._models.package_helpers": {"get_wrapped_model": lambda name, **_: nn.Conv2d(3, 2, 1)},
        },
    )
    return script("lightly_client")


def test_an_error_is_the_worst_of_the_batches_relative_to_the_exact_one(lightly) -> None:
    exact = [(torch.tensor([3.0, 4.0]), 2.0), (torch.tensor([0.0, 10.0]), 4.0)]
    found = [(torch.tensor([3.0, 4.5]), 2.0), (torch.tensor([0.0, 8.0]), 3.0)]
    assert lightly.error(found, exact) == {"gradient": 0.2, "loss": 0.25}
    assert lightly.error(exact, exact) == {"gradient": 0, "loss": 0}


def test_inputs_are_normalised_pixels_and_nothing_is_mixed(lightly) -> None:
    pixels = torch.full((2, 4, 6, 3), 255, dtype=torch.uint8)
    x = lightly.normalised(SimpleNamespace(pixels=pixels))
    assert x.shape == (2, 3, 4, 6)
    assert x[0, :, 0, 0].tolist() == pytest.approx(
        [(1 - m) / s for m, s in zip(lightly.MEAN, lightly.STD, strict=True)]
    )
    assert lightly.Unmixed._mixup_data(x) is x


def test_gradients_are_of_one_student_batch_by_batch(lightly) -> None:
    batches = [SimpleNamespace(pixels=torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)) for _ in range(2)]

    def features(scale: float) -> Any:
        return lambda x: (scale * torch.ones(len(x), 2, 2, 3), torch.ones(len(x), 2))

    exact, same, twice = (list(lightly.gradients(batches, 2, features(scale))) for scale in (1.0, 1.0, 2.0))
    assert len(exact) == 2
    assert lightly.error(same, exact) == {"gradient": 0, "loss": 0}, "the same weights each time"
    assert lightly.error(twice, exact)["gradient"] == pytest.approx(1)
    assert not torch.equal(exact[0][0], exact[1][0])
