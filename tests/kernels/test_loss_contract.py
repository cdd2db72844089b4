"""Every implementation against the reference in float64, on inputs that hypothesis draws."""

from dataclasses import dataclass

import pytest
import torch
from float32 import error_of_value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdcache_kernels
from kdcache_kernels import LossParts, PackedTarget, pack

DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16]
GRADIENT_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SPAN = 10
"""No two of so few normal numbers lie further apart."""


@dataclass(frozen=True)
class Case:
    """What is drawn: sizes and choices; the numbers follow from the seed."""

    batch: int
    classes: int
    student: tuple[int, int]
    grid: tuple[int, int]
    size: tuple[int, int]
    kept: int
    temperature: float
    window: str
    flip: bool
    dtype: torch.dtype
    layout: str
    labels: str
    scale: float
    ce_weight: float
    kl_weight: float
    class_weight: bool
    label_gate: str
    smoothing: float
    focal: float
    gate: str
    distill_void: bool
    align_corners: tuple[bool, bool]
    differentiated: str
    seed: int


@st.composite
def cases(draw: st.DrawFn, small: bool) -> Case:
    """Of any size, or so small that the interpreter takes seconds; the kernels for strides have cases of their own."""
    cell = st.integers(1, 3 if small else 6)
    pixel = st.integers(1, 7 if small else 20)
    student = (draw(cell), draw(cell))
    stride = draw(st.sampled_from([1, 2, 3, None, None] if small else [1, 2, 4, 8, 3, None]))
    size = tuple(n * stride for n in student) if stride else (draw(pixel), draw(pixel))
    same_grid = draw(st.booleans())
    grid = student if same_grid else (draw(cell), draw(cell))
    classes = draw(st.sampled_from([2, 3, 5] if small else [2, 3, 5, 19, 33]))
    weights = draw(st.sampled_from([(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)]))
    smoothing, focal = draw(st.sampled_from([(0.0, 0.0), (0.0, 0.0), (0.2, 0.0), (0.0, 2.0), (0.0, 0.5)]))
    return Case(
        batch=draw(st.integers(1, 3)),
        classes=classes,
        student=student,
        grid=grid,
        size=size,
        kept=draw(st.sampled_from([1, 2, classes, classes])),
        temperature=draw(st.sampled_from([0.05, 0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 100.0])),
        window=draw(st.sampled_from(["none", "whole", "crop", "aligned", "over_the_edge"])),
        flip=draw(st.booleans()),
        dtype=draw(
            st.sampled_from([torch.float32, torch.float32, torch.float16, *([] if small else [torch.bfloat16])])
        ),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "slice"])),
        labels=draw(st.sampled_from(["some void", "all void", "one image void", "one pixel", "none"])),
        scale=draw(st.sampled_from([0.0, 1.0, 3.0, 10.0, 40.0])),
        ce_weight=weights[0],
        kl_weight=weights[1],
        class_weight=draw(st.booleans()),
        label_gate=draw(st.sampled_from(["none", "none", "bool", "float"])),
        smoothing=smoothing,
        focal=focal,
        gate=draw(st.sampled_from(["none", "uint8", "float"])),
        distill_void=draw(st.booleans()),
        align_corners=(draw(st.booleans()), draw(st.booleans())) if stride is None else (False, False),
        differentiated=draw(st.sampled_from(["loss", "loss", "ce", "kl", "all"])),
        seed=draw(st.integers(0, 2**16)),
    )


def windows(case: Case, generator: torch.Generator) -> Tensor | None:
    """One row per sample; "aligned" moves by whole cells of the target at the student's scale."""
    H, W = case.size
    if case.window == "none":
        return None
    whole = torch.tensor([[0.0, 0.0, H, W]] * case.batch, dtype=torch.float64)
    if case.window == "aligned":
        cell = torch.tensor([H / case.grid[0], W / case.grid[1]] * 2, dtype=torch.float64)
        shift = torch.randint(0, 2, (case.batch, 2), generator=generator).repeat(1, 2) * cell
        # Half a cell less than the view, so that something of it shows.
        return whole + shift.clamp(max=min(H, W) / 2)
    if case.window == "crop":
        low = torch.rand(case.batch, 2, generator=generator, dtype=torch.float64) * 0.4
        return torch.cat([low, low + 0.55], 1) * torch.tensor([H, W] * 2)
    if case.window == "over_the_edge":
        return whole + torch.tensor([-0.4 * H, 0.3 * W, 0.35 * H, 0.5 * W])
    return whole


def labels_of(case: Case) -> Tensor | None:
    if case.labels == "none":
        return None
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.batch, *case.size)
    labels = torch.randint(0, case.classes, shape, generator=generator, dtype=torch.uint8)
    if case.labels == "some void":
        labels[torch.rand(shape, generator=generator) < 0.3] = 255
    elif case.labels == "one image void":
        labels[0] = 255
    elif case.labels in ("all void", "one pixel"):
        first = labels[0, 0, 0].clone()
        labels[:] = 255
        if case.labels == "one pixel":
            labels[0, 0, 0] = first
    return labels


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "slice":
        big = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, 2 * x.shape[3]), torch.nan)
        big[:, 1:, 2:, ::2] = x
        return big[:, 1:, 2:, ::2]
    return x


def gate_of(kind: str, weight: Tensor) -> Tensor | None:
    """The gate that lets the pixels of a weight pass: the weight as a number or a count, or a mask."""
    return None if kind == "none" else weight > 1 if kind == "bool" else weight.to(getattr(torch, kind))


def run(case: Case, impl: str, device: torch.device) -> tuple[LossParts, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    z = (torch.randn(case.batch, case.classes, *case.student, generator=generator) * case.scale).to(case.dtype)
    t = torch.randn(case.batch, case.classes, *case.grid, generator=generator) * max(case.scale, 1)
    labels = labels_of(case)
    window = windows(case, generator)
    gate, label_gate = (torch.rand(case.batch, *case.size, generator=generator) * 2 for _ in range(2))
    z = laid_out(z.to(device), case.layout) if impl != "reference" else z.to(device).double()
    target = PackedTarget(*pack(t, case.kept, impl="reference"), case.classes, case.size, case.align_corners[1])
    flip = torch.arange(case.batch, device=device) % 2 == 0 if case.flip else None
    weight = torch.linspace(0, 2, case.classes, device=device) if case.class_weight else None
    z = z.detach().requires_grad_()
    parts = kdcache_kernels.distill_loss(
        z,
        None if labels is None else labels.to(device),
        target.to(device),
        size=case.size,
        ce_weight=case.ce_weight,
        kl_weight=case.kl_weight,
        temperature=case.temperature,
        class_weight=weight,
        ce_pixel_weight_BHW=gate_of(case.label_gate, label_gate.to(device)),
        label_smoothing=case.smoothing,
        focal_gamma=case.focal,
        window_B4=None if window is None else window.to(device),
        flip_B=flip,
        pixel_weight_BHW=gate_of(case.gate, gate.to(device)),
        distill_void=case.distill_void,
        align_corners=case.align_corners[0],
        impl=impl,
    )
    wanted = [(part, factor) for part, factor in zip(parts, upstream_of(case), strict=True) if factor]
    (gradient,) = torch.autograd.grad(sum(factor * part for part, factor in wanted), z)
    return LossParts(*(part.detach() for part in parts)), gradient


def upstream_of(case: Case) -> tuple[float, ...]:
    """What the loss, CE and KL are multiplied by before they are differentiated."""
    if case.differentiated == "all":
        return (0.5, 0.25, 2.0)
    return tuple(float(name == case.differentiated) for name in LossParts._fields)


def share_of_a_logit(case: Case) -> float:
    """The most that a logit has of a mean over the counted pixels."""
    if case.window in ("aligned", "over_the_edge") or case.class_weight:
        return 1.0  # few may be in the view, or weigh something
    labels = labels_of(case)
    pixels = case.size[0] * case.size[1]
    counted = case.batch * pixels if labels is None else int((labels != 255).sum())
    part = max(1.0, pixels / (case.student[0] * case.student[1]))
    return min(1.0, 2.25 * part / max(counted, 1))  # a corner's logit has that of its neighbours beyond the edge


def compare(case: Case, backend) -> None:
    """Loss and gradient within what float32 rounds of them; a repeat to the bit, but for the interpreter."""
    expected, expected_gradient = run(case, "reference", backend.device)
    actual, gradient = run(case, backend.impl, backend.device)
    T, most = case.temperature, 2.0  # the most that a gate lets a pixel weigh
    span = SPAN * max(case.scale, 1)  # the target is scaled so
    of_ce, of_kl = error_of_value(span), error_of_value(span / T)
    allowed_ce = of_ce * (abs(expected.ce.item()) + most)
    allowed_kl = of_kl * (abs(expected.kl.item()) + most * T * T)
    allowed_loss = case.ce_weight * allowed_ce + case.kl_weight * allowed_kl
    for name, a, b, allowed in zip(
        expected._fields, actual, expected, (allowed_loss, allowed_ce, allowed_kl), strict=True
    ):
        assert abs(a.item() - b.item()) <= allowed, (name, a.item(), b.item())
    assert gradient.dtype == case.dtype
    largest = expected_gradient.abs().max().item()
    upstream = upstream_of(case)
    of_ce *= (upstream[0] * case.ce_weight + upstream[1]) * most
    of_kl *= (upstream[0] * case.kl_weight + upstream[2]) * most * T
    allowed = GRADIENT_ERROR[case.dtype] * largest + (of_ce + of_kl) * share_of_a_logit(case)
    error = (gradient.double() - expected_gradient).abs().max().item()
    assert error <= allowed, (error, largest)
    if backend.interpreted:  # each of its kernels is repeated elsewhere
        return
    again, gradient_again = run(case, backend.impl, backend.device)
    assert torch.equal(gradient_again, gradient)
    assert all(torch.equal(a, b) for a, b in zip(again, actual, strict=True))


COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.fused  # the reference is compared with other people's code elsewhere
@pytest.mark.timeout(900)
def test_any_case(backend):
    # The interpreter takes seconds for an example, and so does the compiler for a GPU.
    examples = 10 if backend.interpreted else 25 if backend.device.type == "cuda" else 200

    @settings(max_examples=examples, **COMMON)
    @given(case=cases(small=backend.interpreted))
    def check(case: Case) -> None:
        compare(case, backend)

    check()
