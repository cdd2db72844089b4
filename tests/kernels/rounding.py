"""How far float32 may leave the loss of relations and its gradient from exact arithmetic.

A probability is known to some roundings of itself, more of them the smaller it is: it is the exponential of a rounded
number.

A correlation is as well known as what it correlates is beside what is subtracted of it: a probability is known to some
roundings of itself, and centring keeps these while it takes away what all classes, or all cells, have in common. So the
error is one rounding times |p| / |p - mean|. It is largest where predictions are even. Of two classes the correlation
is 1 or -1 and its gradient is 0, so that of the half over classes these roundings are all that is computed.

Legend: B batch, C classes, hs ws the student's own size, h w the target's cells.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kdcache_kernels.on_cells.problem import EPS, RelationProblem
from kdcache_kernels.on_cells.reference import Seen, logits_on_cells
from kdcache_kernels.target_cells import resize

ROUNDOFF = 2.0**-24
STEPS = 8
"""Roundings on the way of a logit to a probability; a sum over classes adds an eighth of their number."""
SAMPLED = 2
"""Roundings of a logit that lies between others, each one of the largest logit over T."""
SMALLEST = 2.0**-126
"""What is smaller may be 0."""


def rounding(problem: RelationProblem) -> tuple[Tensor, Tensor]:
    """Bounds of the errors of a loss, 0-dimensional, and of its gradient, (B, C, hs, ws), float64; to first order.

    The rounding of a result to a narrower dtype is not in them.
    """
    student = problem.student.detach().double()
    seen = logits_on_cells(replace(problem, student=student))
    loss, cells_BChw = _of_relations(problem, seen)
    leaf = torch.zeros_like(student).requires_grad_()
    (gradient,) = torch.autograd.grad(resize(leaf, problem.grid), leaf, cells_BChw)
    return loss, gradient


def _rho(problem: RelationProblem, terms: int) -> float:
    """Roundings of a probability whose sum has so many terms."""
    return ROUNDOFF * (STEPS + terms / 8 + _sampling(problem))


def _of_relations(problem: RelationProblem, seen: Seen) -> tuple[Tensor, Tensor]:
    (p, q), weight_B1hw = seen.predictions, seen.cells.weight[:, None]
    rho = _rho(problem, p.shape[1])
    inter, by_class = _correlation(p, q, torch.full_like(p, 1 / p.shape[1]), EPS / p.shape[1], 1, rho)
    share = _over(weight_B1hw, weight_B1hw.sum())
    intra, by_cell = _correlation(p, q, share.expand_as(p), EPS, (0, 2, 3), rho)
    per_cell_B1hw, T = _per_cell(problem, seen)[:, None], problem.temperature
    loss = T * T * (problem.beta * (per_cell_B1hw * inter).sum() + problem.gamma * intra.mean())
    pull = T * (problem.beta * per_cell_B1hw * by_class + problem.gamma / p.shape[1] * by_cell)
    # A small probability is the exponential of a large number, whose rounding counts, or 0.
    own_BChw = p * (1 - p.clamp_min(SMALLEST).log() / 4) + SMALLEST / rho
    return loss, own_BChw * (pull + (p * pull).sum(1, keepdim=True))


def _per_cell(problem: RelationProblem, seen: Seen) -> Tensor:
    """(B, h, w): the part that a cell has in a mean over cells."""
    return _over(seen.cells.weight, seen.cells.counted.sum() if problem.count is None else problem.count.double())


def _correlation(
    p: Tensor, q: Tensor, share: Tensor, eps: float, dims: int | tuple[int, ...], rho: float
) -> tuple[Tensor, Tensor]:
    """Errors of the correlation of p and q, weighed by shares of 1, and of its derivative by p."""

    def mean(x: Tensor) -> Tensor:
        return (share * x).sum(dims, keepdim=True)

    a, b = p - mean(p), q - mean(q)
    A, B = ((mean(x.square()) + eps).sqrt() for x in (a, b))
    rest_a, rest_b = (rho * mean(x.square()).sqrt() for x in (p, q))
    error = rest_a / A + rest_b / B + rho
    # What float32 has as the norm may be smaller, but not below this.
    least = (A - rest_a).clamp_min(eps**0.5)
    by_value = error * (1 + a.abs() / A + b.abs() / B) + rho * ((p + mean(p)) / A + (q + mean(q)) / B)
    return error.clamp_max(2), share / least * by_value


def _over(x: Tensor, total: Tensor) -> Tensor:
    """x / total, and 0 where that is 0."""
    return x * total.reciprocal().masked_fill(total == 0, 0)


def _sampling(problem: RelationProblem) -> float:
    """Roundings of a logit that lies between others, in the units of ROUNDOFF."""

    def largest(x: Tensor) -> float:
        return x.detach().abs().max().item() if x.numel() else 0.0

    student = largest(problem.student) if problem.is_resized else 0.0
    teacher = largest(problem.teacher) if problem.is_moved else 0.0
    return SAMPLED * max(student, teacher) / problem.temperature
