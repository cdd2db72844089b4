"""The operators as torch.library, autograd and torch.compile see them."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kdcache_kernels import (
    LossParts,
    LossProblem,
    PackedTarget,
    ShapeError,
    ValueRangeError,
    densify,
    library,
    pack,
)
from kdcache_kernels import target_argmax_confidence as argmax_confidence

C, GRID, SIZE = 5, (3, 4), (12, 16)

pytestmark = pytest.mark.fused  # the reference is no operator


def make(device, k=C, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(2, C, *GRID, generator=generator) * 2).to(device, dtype).requires_grad_()
    t = torch.randn(2, C, *GRID, generator=generator).to(device) * 2
    y = torch.randint(0, C, (2, *SIZE), generator=generator, dtype=torch.uint8).to(device)
    y[0, 2:4] = 255
    return z, y, PackedTarget(*pack(t, k, impl="reference"), C, SIZE)


def problem(device, k, everything):
    """A problem with every optional tensor, or with none but the labels and the target."""
    z, y, target = make(device, k)

    def scalar(value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=device)

    optional = {}
    if everything:
        optional = {
            "window": torch.tensor([[0.0, 0, 12, 16], [1, 2, 9.5, 14]], dtype=torch.float64, device=device),
            "flip": torch.tensor([True, False], device=device),
            "pixel_weight": torch.rand(2, *SIZE, device=device),
            "class_weight": torch.rand(C, device=device),
            "ce_pixel_weight": torch.rand(2, *SIZE, device=device),
            "ce_denominator": scalar(300.0),
            "kl_denominator": scalar(350.0),
        }
    absent = ("class_weight", "ce_pixel_weight", "window", "flip", "pixel_weight", "ce_denominator", "kl_denominator")
    return LossProblem(
        student=z,
        labels=y,
        target=target,
        size=SIZE,
        use_ce=True,
        ce_weight=scalar(1.0),
        kl_weight=scalar(0.5),
        temperature=2.0,
        label_smoothing=0.1 if everything else 0.0,
        ignore_index=255,
        distill_void=True,
        align_corners=False,
        need_gradient=True,
        **{**dict.fromkeys(absent), **optional},
    )


# opcheck itself looks at the .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.interpreted(k=[C])
@pytest.mark.parametrize(("k", "everything"), [(C, False), (2, True)])
def test_opcheck_of_the_loss(backend, k, everything):
    arguments = library.loss_arguments(problem(backend.device, k, everything))
    torch.library.opcheck(library.distill_loss, (backend.impl, *arguments))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_opcheck_without_a_target(backend):
    arguments = library.loss_arguments(dataclasses.replace(problem(backend.device, C, False), target=None))
    torch.library.opcheck(library.distill_loss, (backend.impl, *arguments))


def test_a_problem_comes_back_from_its_arguments(backend):
    whole = problem(backend.device, 2, True)
    for one in (whole, dataclasses.replace(whole, target=None)):
        arguments = library.loss_arguments(one)
        again = library.loss_arguments(library.loss_problem(arguments))
        assert len(arguments) == len(again) == len(library.LOSS_ARGUMENTS)
        pairs = zip(arguments, again, strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_opcheck_of_the_others(backend):
    _, _, target = make(backend.device, k=2)
    parts = (target.values, target.indices, target.tail)
    logits = torch.randn(2, C, *GRID, device=backend.device)
    for k in (2, C):
        torch.library.opcheck(library.pack, (logits, k, backend.impl))
    torch.library.opcheck(library.densify, (*parts, C, backend.impl))
    for one in (target, PackedTarget(logits.half(), None, None, C, SIZE)):
        arguments = (backend.impl, *library.target_arguments(one), None, None, SIZE)
        torch.library.opcheck(library.argmax_confidence, arguments)
    gradient = torch.randn(2, 3, device=backend.device)
    factor = torch.ones((), device=backend.device)
    torch.library.opcheck(library.scale_gradient, (gradient, factor, factor, torch.float16))


@pytest.mark.parametrize("k", [2, C])
def test_a_compiled_step_in_one_graph(distill_loss, backend, k):
    head = torch.nn.Conv2d(3, C, 1).to(backend.device)
    pixels = torch.randn(2, 3, *GRID, device=backend.device)
    _, y, target = make(backend.device, k)

    def step(pixels: Tensor, y: Tensor, values: Tensor, indices: Tensor | None, tail: Tensor | None) -> Tensor:
        packed = PackedTarget(values, indices, tail, C, SIZE)
        return distill_loss(head(pixels), y, packed, kl_weight=1.0, temperature=2.0).loss

    arguments = (pixels, y, target.values, target.indices, target.tail)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*arguments)
        results.append((loss, *torch.autograd.grad(loss, list(head.parameters()))))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)


def test_bad_values_are_seen_in_a_compiled_program(distill_loss, backend):
    if backend.device.type != "cpu":
        pytest.skip("values on a device are not looked at")
    z, y, _ = make(backend.device)
    compiled = torch.compile(lambda z, y: distill_loss(z, y).loss, fullgraph=True, backend="aot_eager")
    assert compiled(z, y).isfinite()
    y[0, 0, 0] = C
    with pytest.raises(ValueRangeError, match=r"(?s)Invalid labels_BHW: .*ids below 5"):
        compiled(z, y)


def test_second_derivatives_are_refused(distill_loss, backend):
    z, y, target = make(backend.device)
    (gradient,) = torch.autograd.grad(distill_loss(z, y, target, kl_weight=1.0).loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="Cannot differentiate distill_loss twice"):
        gradient.square().sum().backward()


def test_no_gradient_is_computed_where_none_is_wanted(distill_loss, backend, monkeypatch):
    seen = []
    original = library.module_of

    class Spy:
        def __init__(self, family: str, operation: str) -> None:
            self.real = original(family, operation)

        def distill_loss(self, problem):
            result = self.real.distill_loss(problem)
            seen.append((problem.need_gradient, result.gradient.numel()))
            return result

    monkeypatch.setattr(library, "module_of", Spy)
    z, y, target = make(backend.device)
    with torch.no_grad():
        parts = distill_loss(z, y, target, kl_weight=1.0)
    detached = distill_loss(z.detach(), y, target, kl_weight=1.0)
    with_gradient = distill_loss(z, y, target, kl_weight=1.0)
    assert seen == [(False, 0), (False, 0), (True, z.numel())]
    assert not parts.loss.requires_grad
    assert not detached.loss.requires_grad
    assert torch.equal(parts.loss, with_gradient.loss.detach())


@pytest.mark.interpreted(temperature=[2.5], weights=[(1.0, 1.0)])
@pytest.mark.parametrize("temperature", [2.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 0.7), (0.4, 0.0)])
def test_gradient_against_finite_differences(distill_loss, backend, weights, temperature):
    """Central differences along random directions, for a grad_output other than 1."""
    z, y, target = make(backend.device, k=3)
    options = {"ce_weight": weights[0], "kl_weight": weights[1], "temperature": temperature}

    def loss(x: Tensor) -> Tensor:
        return -3.5 * distill_loss(x, y, target, **options).loss

    (gradient,) = torch.autograd.grad(loss(z), z)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        direction = torch.randn(z.shape, generator=generator).to(z.device)
        ahead, behind = (loss(z.detach() + sign * 5e-2 * direction).double() for sign in (1, -1))
        slope = ((ahead - behind) / 1e-1).item()
        assert (gradient.double() * direction).sum().item() == pytest.approx(slope, rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_loss_scale_of_a_grad_scaler(distill_loss, backend, dtype):
    z, y, target = make(backend.device, dtype=dtype)
    plain = torch.autograd.grad(distill_loss(z, y, target, kl_weight=1.0).loss, z)[0]
    scaled = torch.autograd.grad(distill_loss(z, y, target, kl_weight=1.0).loss * 65536.0, z)[0]
    assert scaled.dtype == dtype
    error = (scaled.double() / 65536 - plain.double()).abs().max() / plain.double().abs().max()
    assert error.item() <= (1e-3 if dtype == torch.float16 else 1e-7)


def test_a_weight_on_the_device_is_a_weight(distill_loss, backend):
    z, y, target = make(backend.device)
    expected = distill_loss(z, y, target, ce_weight=0.25, kl_weight=1.5)
    two_weights = [torch.tensor(value, device=backend.device) for value in (0.25, 1.5)]
    parts = distill_loss(z, y, target, ce_weight=two_weights[0], kl_weight=two_weights[1])
    torch.testing.assert_close(parts.loss, expected.loss)
    with pytest.raises(ShapeError, match="kl_weight"):
        distill_loss(z, y, target, kl_weight=torch.ones(1, device=backend.device))


def test_debug_mode_says_where(distill_loss, backend, monkeypatch):
    z, y, target = make(backend.device)
    z.data[1, 2, 0, 3] = torch.nan
    assert distill_loss(z, y, target, kl_weight=1.0).loss.isnan()
    monkeypatch.setenv("KDCACHE_DEBUG", "1")
    with pytest.raises(ValueRangeError, match=r"student_logits_BChw\[1, 2, 0, 3\] is nan \(1 of them\)"):
        distill_loss(z, y, target, kl_weight=1.0)
    z.data[1, 2, 0, 3] = 0
    target.values[0, 1, 2, 1] = torch.inf
    with pytest.raises(ValueRangeError, match=r"target.values\[0, 1, 2, 1\] is inf"):
        distill_loss(z, y, target, kl_weight=1.0)
    y[1, 5, 6] = 77
    with pytest.raises(ValueRangeError, match=r"ids \[77\] in 1 pixels, the first at \(b, y, x\) = \(1, 5, 6\)"):
        distill_loss(z, y)


def test_the_public_functions_take_the_operators(backend):
    """Same results by name as by the reference; the contract itself is tested elsewhere."""
    logits = torch.randn(2, C, *GRID, generator=torch.Generator().manual_seed(1)).to(backend.device)
    for k in (2, C):
        expected, actual = (pack(logits, k, impl=impl) for impl in ("reference", backend.impl))
        assert [x is None for x in actual] == [x is None for x in expected]
        torch.testing.assert_close(actual[0], expected[0])
        target = PackedTarget(*expected, C, SIZE)
        dense = [densify(*expected, C, impl=impl) for impl in ("reference", backend.impl)]
        torch.testing.assert_close(dense[1], dense[0])
        ids, confidence = zip(
            *(argmax_confidence(target, SIZE, impl=i) for i in ("reference", backend.impl)), strict=True
        )
        assert torch.equal(ids[0], ids[1])
        torch.testing.assert_close(confidence[0], confidence[1], atol=1e-3, rtol=0)


def test_loss_parts_are_a_named_tuple(distill_loss, backend):
    z, y, _ = make(backend.device)
    assert isinstance(distill_loss(z, y), LossParts)
