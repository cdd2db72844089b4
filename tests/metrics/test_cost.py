"""Counts against convolutions counted by hand and by torch's profiler, times against torch's own timer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import benchmark

from kdcache.metrics.cost import count_flops, measure_cost, measure_latency
from kdcache.models import SegmentationModel, build_model


def macs_by_hand(model: SegmentationModel, size: tuple[int, int]) -> int:
    """Kernel area, channels in per group, and channels out, for every output cell of every convolution or product."""
    counted = []

    def convolution(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        height, width = module.kernel_size
        counted.append(height * width * module.in_channels // module.groups * output.numel())

    def product(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counted.append(module.in_features * output.numel())

    kinds = ((nn.Conv2d, convolution), (nn.Linear, product))
    handles = [m.register_forward_hook(hook) for m in model.modules() for kind, hook in kinds if isinstance(m, kind)]
    with torch.no_grad():
        model(torch.zeros(1, 3, *size))
    for handle in handles:
        handle.remove()
    return sum(counted)


@pytest.mark.parametrize("size", [(32, 48), (97, 61)])
@pytest.mark.parametrize("spec", ["kdcache:tiny", "kdcache:base", "torchvision:lraspp_mobilenet_v3_large"])
def test_flops_are_two_per_multiply_add(spec: str, size: tuple[int, int]) -> None:
    model = build_model(spec, 7).eval()
    found = measure_cost(model, size, repeats=0)
    assert found.macs == macs_by_hand(model, size)
    assert found.flops == 2 * found.macs
    assert found.parameters == sum(p.numel() for p in build_model(spec, 7).parameters())
    assert found.latency is None
    assert found.to_json()["macs"] == found.macs


@pytest.mark.parametrize("spec", ["kdcache:tiny", "kdcache:base", "torchvision:lraspp_mobilenet_v3_large"])
def test_torchs_profiler_agrees(spec: str) -> None:
    """It has formulas of its own, from the shapes that the operators got."""
    model = build_model(spec, 7).eval()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as judge:
        model(torch.zeros(1, 3, 64, 96))
    counted = {event.key: event.flops for event in judge.key_averages() if event.flops}
    products = ("aten::conv2d", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    assert counted["aten::conv2d"] > 0
    assert count_flops(model, (64, 96)) == sum(counted.get(name, 0) for name in products)


def test_attention_is_counted() -> None:
    """Queries by keys, and weights by values: 2 * 2 * length^2 * width, beside the projection of a token."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(3, 16)

        def forward(self, x_B3HW: Tensor) -> Tensor:
            tokens_BLc = self.project(x_B3HW.flatten(2).mT)
            heads_B4L4 = tokens_BLc.unflatten(2, (4, 4)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(heads_B4L4, heads_B4L4, heads_B4L4)

    length = 6 * 5
    assert count_flops(Attention(), (6, 5)) == 2 * length * 3 * 16 + 2 * 2 * length**2 * 16  # type: ignore[arg-type]


def test_latency_is_that_of_torchs_timer() -> None:
    model, size = build_model("kdcache:tiny", 7).eval(), (96, 128)
    x_13HW = torch.rand(1, 3, *size).contiguous(memory_format=torch.channels_last)
    timer = benchmark.Timer(
        "model.upsample(model(x).logits, size)", globals={"model": model, "x": x_13HW, "size": size}
    )
    with torch.inference_mode():
        judged_ms = 1e3 * timer.blocked_autorange(min_run_time=0.3).median
    found = measure_latency(model, size, repeats=40)
    assert judged_ms / 3 < found.median_ms < 3 * judged_ms  # other work on the machine
    assert found.fps == pytest.approx(1000 / found.mean_ms)
    assert (found.repeats, found.warm_up, found.threads) == (40, 10, torch.get_num_threads())
    assert found.device


def test_a_slow_model_is_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.metrics.cost.MOST_SECONDS", 0.0)
    found = measure_latency(build_model("kdcache:tiny", 7).eval(), (32, 48), repeats=50)
    assert (found.repeats, found.warm_up) == (5, 1)


@pytest.mark.parametrize(("classes", "heads"), [(0, 1), (7, 2)])
def test_every_head_is_timed_up_to_its_map(classes: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, resized = build_model("kdcache:hydra", classes).eval(), []
    monkeypatch.setattr(model, "upsample", lambda head, size: resized.append(head.shape[1]))
    measure_latency(model, (32, 48), repeats=1)
    assert resized == ([7, 1] if heads == 2 else [1]) * (len(resized) // heads)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_nothing_is_learnt(training: bool) -> None:
    model = build_model("kdcache:tiny", 7).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_cost(model, (32, 48), repeats=2)
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
