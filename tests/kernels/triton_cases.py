"""What the tests of the Triton kernels share: problems, exact results, and how close one must come."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from float32 import error_of_value
from torch import Tensor

from kdcache_kernels import LossProblem, PackedTarget, distill_loss_reference, pack
from kdcache_kernels.reference import ce_weight_sum, kl_pixels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOID = 255
INTERPRETED = DEVICE.type == "cpu"


def slow(*values: object) -> object:
    """A set of parameters that the interpreter takes long for."""
    return pytest.param(*values, marks=pytest.mark.slow if INTERPRETED else ())


class Result(NamedTuple):
    """Terms and gradient; the gradient is None when it was not asked for."""

    ce: float
    kl: float
    gradient: Tensor | None


def make_problem(
    stride: int,
    grid: tuple[int, int] = (2, 3),
    *,
    B: int = 1,
    C: int = 3,
    target_grid: tuple[int, int] | None = None,
    kept: int | None = None,
    scale: float = 3.0,
    seed: int = 0,
    terms: str = "both",
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> LossProblem:
    """Random logits and labels, a fifth of them void; `target_grid` is one of cells of the same size."""
    generator = torch.Generator().manual_seed(seed)
    size = (grid[0] * stride, grid[1] * stride)
    cells = target_grid or grid
    student = (torch.randn(B, C, *grid, generator=generator) * scale).to(dtype)
    teacher = torch.randn(B, C, *cells, generator=generator) * scale
    dtype_of_labels = torch.uint8 if C <= VOID else torch.int16
    labels = torch.randint(0, C, (B, *size), generator=generator, dtype=dtype_of_labels)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = VOID
    view = (cells[0] * stride, cells[1] * stride)
    target = PackedTarget(*pack(teacher, kept or C, impl="reference"), C, view).to(DEVICE)
    problem = LossProblem(
        student=student.to(DEVICE),
        labels=labels.to(DEVICE),
        target=None if terms == "ce" else target,
        size=size,
        use_ce=terms != "kl",
        ce_weight=torch.tensor(0.7, device=DEVICE),
        kl_weight=torch.tensor(0.3, device=DEVICE),
        ce_denominator=None,
        kl_denominator=None,
        temperature=2.0,
        class_weight=None,
        ignore_index=VOID,
        window=None,
        flip=None,
        pixel_weight=None,
        distill_void=True,
        align_corners=False,
        need_gradient=True,
    )
    return dataclasses.replace(problem, **changes)


def exact(problem: LossProblem) -> Result:
    student = problem.student.double().requires_grad_()
    parts = distill_loss_reference(dataclasses.replace(problem, student=student))
    (gradient,) = torch.autograd.grad(parts.loss, student)
    return Result(parts.ce.item(), parts.kl.item(), gradient)


def assert_close(actual: Result, problem: LossProblem, gradient_error: float = 2e-6, term_error: float = 0.0) -> None:
    """Terms within what float32 rounds of them, the gradient also within `gradient_error` of its largest element.

    Args:
        term_error: what the rounding of large logits adds to both terms, relative.
    """
    expected, allowed = exact(problem), _allowed(problem)
    assert abs(actual.ce - expected.ce) <= (allowed.of_ce + term_error) * (expected.ce + allowed.ce_weight)
    kl_unit = expected.kl + allowed.kl_weight * problem.temperature**2
    assert abs(actual.kl - expected.kl) <= (allowed.of_kl + term_error) * kl_unit
    assert actual.gradient.dtype == problem.gradient_dtype
    largest = expected.gradient.abs().max().item()
    error = (actual.gradient.double() - expected.gradient).abs().max().item()
    # With one class the gradient is 0.
    assert error <= (gradient_error * largest if problem.student.shape[1] > 1 else gradient_error) + allowed.gradient


class _Allowed(NamedTuple):
    """Errors of a value of 1 in CE and in KL / T^2, the most that a pixel weighs there, the error of a gradient."""

    of_ce: float
    of_kl: float
    ce_weight: float
    kl_weight: float
    gradient: float


def _allowed(problem: LossProblem) -> _Allowed:
    """What float32 may round: a term is a mean over its pixels, and a logit has a part in those around it."""
    C, h, w = problem.student.shape[1:]
    H, W = problem.size
    weight_C = problem.class_weight
    # At the corners of an image, a logit has the part of two and a quarter; without a resize, of one pixel.
    part = 1 if (h, w) == (H, W) else 2.25 * H * W / (h * w)
    span = 0.0
    if (h, w) != (H, W):
        logits = [problem.student.float()] + ([problem.target.densify(torch.float32)] if problem.use_kl else [])
        span = max((x.amax(1) - x.amin(1)).max().item() for x in logits)
    of_ce, of_kl = error_of_value(span), error_of_value(span / problem.temperature)
    ce_weight = kl_weight = gradient = 0.0
    if problem.use_ce:
        ce_weight = _largest(problem.ce_pixel_weight)
        total = ce_weight_sum(problem.labels.long(), weight_C, problem.ignore_index, C).item()
        share = part * (1.0 if weight_C is None else weight_C.max().item()) / max(total, 1e-9)
        gradient += problem.ce_weight.item() * of_ce * ce_weight * min(1.0, share)
    if problem.use_kl:
        kl_weight = _largest(problem.pixel_weight)
        geometry = (problem.size, problem.ignore_index, problem.window, problem.flip, problem.distill_void)
        total = kl_pixels(problem.target, problem.labels, *geometry)[0].sum().item()
        share = min(1.0, part / max(total, 1))
        gradient += problem.kl_weight.item() * problem.temperature * of_kl * kl_weight * share
    return _Allowed(of_ce, of_kl, ce_weight, kl_weight, gradient)


def _largest(weight: Tensor | None) -> float:
    """Return the largest weight of a pixel. NaN stands where nothing counts."""
    return 1.0 if weight is None else weight.nan_to_num(nan=0.0).max().item()


def same_bits(a: Result, b: Result) -> bool:
    return a[:2] == b[:2] and torch.equal(a.gradient, b.gradient)


def windows(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE)
