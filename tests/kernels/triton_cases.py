"""What the tests of the Triton kernels share: problems, exact results, and how close one must come."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kdcache_kernels import LossProblem, PackedTarget, distill_loss_reference, pack

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


def assert_close(actual: Result, problem: LossProblem, gradient_error: float = 2e-6) -> None:
    """Terms to 1e-6 of themselves, the gradient to `gradient_error` of its largest element.

    Where probabilities nearly cancel, what is left is their rounding, which is one of 1 over the number of pixels.
    """
    expected, T = exact(problem), problem.temperature
    assert actual.ce == pytest.approx(expected.ce, rel=1e-6, abs=1e-7)
    assert actual.kl == pytest.approx(expected.kl, rel=1e-6, abs=1e-7 * max(T, 1) ** 2)
    assert actual.gradient.dtype == problem.gradient_dtype
    largest = expected.gradient.abs().max().item()
    error = (actual.gradient.double() - expected.gradient).abs().max().item()
    height, width = problem.size
    rounding = 2**-23 / (len(problem.student) * height * width)
    # With one class the gradient is 0.
    assert error <= (gradient_error * largest + rounding if problem.student.shape[1] > 1 else gradient_error)


def same_bits(a: Result, b: Result) -> bool:
    return a[:2] == b[:2] and torch.equal(a.gradient, b.gradient)


def windows(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE)
