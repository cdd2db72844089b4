"""The fused loss on the CPU: two resizes, two softmaxes and the gradient, without tensors of label size times classes.

Rows of low-resolution logits are resampled class by class into scratch that stays in the L2 cache, and the gradient is
also collected there. The eight tensors of label size times classes that eager PyTorch writes to memory never exist.
Two kernels share the work: `cells.py` for the usual strides, `pixels.py` for everything else.

Results are bitwise equal for any number of threads: a task writes only its own memory, and every sum has one order.

On two threads, T = 2, forward and backward, it is 6 to 26 times as fast as eager PyTorch and 8 to 22 times as fast as
torch.compile (`benchmarks/results/kernels-cpu.json`, a table in `docs/kernels.md`).

Legend: B batch, C classes, H W label size, h w the student's own size, Bt B or 1.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..problem import LossProblem, LossResult
from .cells import cells
from .geometry import Array, Geometry, Plan, Taps, plans
from .math import LN2, ONE, SQUARE, TWO
from .pixels import pixels
from .prepare import count_pixels, from_nodes, to_nodes
from .threads import run
from .topk import densify

WIDEST = 80.0
"""Nats that logits may span at T = 1 and at T, for exponentials of float32 to neither overflow nor vanish."""

PER_LOGIT, PER_LABEL, PER_CLASS = 2.0, 4.0, 1.2
"""Nanoseconds of a thread, roughly: for a low-resolution logit, a label pixel, a class of a label pixel."""

_LARGEST = float(np.finfo(np.float32).max)

_NO_LABELS, _NO_WEIGHTS = np.empty((0, 0, 0), np.uint8), np.empty((0, 0, 0), np.float32)


class _Nodes(NamedTuple):
    """Logits as the kernels read them, see `to_nodes`, which low-resolution pixels are lost, and the widest span."""

    values: Array
    lost: Array
    loses: bool
    span: float


class _Pixels(NamedTuple):
    """Label pixels in the form that the kernels read, see `count_pixels`, and the denominators of the terms."""

    ids: Array
    weight: Array
    gate: Array
    spread: Array
    ce_denominator: float
    kl_denominator: float


def distill_loss(problem: LossProblem) -> LossResult:
    """Compute the fused CE + KL loss, its terms and its gradient on the CPU, from checked arguments.

    Raises: ValueRangeError for class ids out of range, in labels or in top-k targets.
    Memory: float32 copies of the student's and the target's logits, three times the student's gradient, 12 bytes per
        label pixel, and 400 KiB per thread.
    """
    student_BChw = _floats(problem.student)
    if student_BChw.shape[0] == 0 or not (problem.use_ce or problem.use_kl):
        return _result(problem, 0.0, 0.0, torch.zeros_like(student_BChw))
    plan, student, target = _lay_out(problem, student_BChw)
    counted = _count(problem, plan)
    gradient_BChw, ce, kl = _compute(problem, plan, student, target, counted)
    if student.loses or (target is not None and target.loses):
        ce_lost, kl_lost = _lost_terms(problem, plan, student, target)
        ce, kl = (math.nan if ce_lost else ce), (math.nan if kl_lost else kl)
    return _result(problem, ce, kl, gradient_BChw)


def _result(problem: LossProblem, ce: float, kl: float, gradient_BChw: Tensor) -> LossResult:
    loss = float(problem.ce_weight) * ce + float(problem.kl_weight) * kl
    gradient = gradient_BChw if problem.need_gradient else torch.empty(0)
    if gradient.dtype != problem.gradient_dtype:
        gradient = gradient.to(problem.gradient_dtype)
    loss_, ce_, kl_ = (torch.scalar_tensor(x, dtype=torch.float32) for x in (loss, ce, kl))
    return LossResult(loss_, ce_, kl_, gradient)


def _temperature(problem: LossProblem) -> float:
    """Return the temperature of the problem, or 1 for CE only."""
    return problem.temperature if problem.use_kl else 1.0


def _lay_out(problem: LossProblem, student_BChw: Tensor) -> tuple[Plan, _Nodes, _Nodes | None]:
    """Choose the fastest plan that the geometry and the values allow, and lay out student and target by it."""
    T, packed = _temperature(problem), problem.target
    limit = _LARGEST / 8
    target_BChw = None
    if packed is not None and packed.indices is None:
        target_BChw = _floats(packed.values)
    elif packed is not None:
        target_BChw = densify(packed.values, packed.indices, packed.tail, packed.num_classes)
    for plan in plans(_geometry(problem), problem.window, problem.flip):
        student = _to_nodes(
            student_BChw, T, limit * min(1.0, problem.temperature), plan.student_nodes, plan.student_runs
        )
        target = None
        if target_BChw is not None:
            target = _to_nodes(target_BChw, T, min(limit * T, _LARGEST), plan.target_nodes, plan.target_runs)
        if plan.columns is not None or _span(problem, student, target) <= WIDEST:
            return plan, student, target
    raise AssertionError("the last plan takes everything")


def _span(problem: LossProblem, student: _Nodes, target: _Nodes | None) -> float:
    """Return the widest span of the logits at T = 1 and at T, in nats."""
    span = student.span if target is None else max(student.span, target.span)
    return max(span, 0.0) * max(1.0, 1 / _temperature(problem))


def _geometry(problem: LossProblem) -> Geometry:
    """Return the sizes of a problem."""
    target, (C, h, w) = problem.target, problem.student.shape[1:]
    sizes = (C, problem.size, (h, w), problem.align_corners)
    if target is None:
        return Geometry(*sizes, (h, w), problem.size, problem.align_corners)
    return Geometry(*sizes, (target.values.shape[2], target.values.shape[3]), target.view_size, target.align_corners)


def _to_nodes(logits_BChw: Tensor, temperature: float, limit: float, taps: Taps, runs: Array) -> _Nodes:
    B, C, h, w = logits_BChw.shape
    tiles, n = taps.low.shape[1:]
    values = np.empty((B, h, tiles, C, n), np.float32)
    lost = np.empty((B, h, w), np.bool_)
    ranges = np.empty((B, h), np.float32)
    scale = np.float32(1 / (LN2 * temperature))
    arguments = (logits_BChw.numpy(), scale, np.float32(limit), *taps, runs, values, lost, ranges)
    run(to_nodes, B * h, *arguments, nanoseconds=PER_LOGIT * logits_BChw.numel())
    spans = ranges.ravel().tolist()  # a reduction of NumPy takes longer than a small problem's
    least = min(spans)
    return _Nodes(values, lost, least < 0, max(max(spans), -1 - least))


def _floats(x: Tensor) -> Tensor:
    """Return the values of a tensor in float32 and contiguous, without a copy if they are."""
    return x.detach().contiguous().float()


def _class_weight(problem: LossProblem) -> Array:
    """Return (C,) float32."""
    weight = problem.class_weight
    return _ones(problem.student.shape[1]) if weight is None else _floats(weight).numpy()


@lru_cache(maxsize=32)
def _ones(n: int) -> Array:
    return np.ones(n, np.float32)


def _count(problem: LossProblem, plan: Plan) -> _Pixels:
    B, C = problem.student.shape[:2]
    H, _ = problem.size
    labels = _NO_LABELS if problem.labels is None else problem.labels.contiguous().numpy()
    weights = (problem.ce_pixel_weight, problem.pixel_weight)
    label_weight, pixel_weight = (_NO_WEIGHTS if x is None else _floats(x).numpy() for x in weights)
    shape = (B, H, plan.tiles, plan.phases, plan.n)
    ids, weight, gate = np.empty(shape, np.uint32), np.empty(shape, np.float32), np.empty(shape, np.float32)
    spread = np.empty(shape if problem.label_smoothing > 0 else (0,) * 5, np.float32)
    counts_BH3 = np.empty((B, H, 3))
    run(
        count_pixels, B * H, labels, problem.ignore_index, _class_weight(problem), label_weight,
        problem.label_smoothing, pixel_weight,
        plan.inside_y, plan.inside_x, problem.use_ce, problem.use_kl, not problem.distill_void,
        plan.pitch, plan.offset, ids, weight, gate, spread, counts_BH3, nanoseconds=PER_LABEL * ids.size,
    )  # fmt: skip
    weight_sum, counted, wrong = np.add.reduce(counts_BH3.reshape(-1, 3)).tolist()
    if wrong and problem.labels is not None:
        checks.check_class_ids(problem.labels, C, problem.ignore_index)

    if problem.ce_denominator is not None:
        weight_sum = float(problem.ce_denominator)
    if problem.kl_denominator is not None:
        counted = float(problem.kl_denominator)
    return _Pixels(ids, weight, gate, spread, weight_sum, counted)


def _compute(
    problem: LossProblem, plan: Plan, student: _Nodes, target: _Nodes | None, counted: _Pixels
) -> tuple[Tensor, float, float]:
    """Return the gradient, CE and KL."""
    B, C, h, w = problem.student.shape
    T = _temperature(problem)
    both = problem.use_ce and problem.use_kl
    form = TWO if both and T not in (1, 2) else (SQUARE if both and T == 2 else ONE)
    per_ce, per_kl = (1 / x if x else 0.0 for x in (counted.ce_denominator, counted.kl_denominator))
    factors = (float(problem.ce_weight) * per_ce, float(problem.kl_weight) * T * per_kl)
    shape = student.values.shape if problem.need_gradient else (0,) * 5
    upper, lower = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    losses_Bh2 = np.zeros((B, h, 2))
    # Without a target the kernels get something of the same kind that they do not read.
    target_values = student.values if target is None else target.values
    rows = (
        *(plan.starts, plan.student_rows.fraction),
        *(plan.first_target_rows, plan.target_rows.fraction),
    )
    common = (
        *(form, np.float32(T), np.array(factors, np.float32)),
        *(_class_weight(problem), np.float32(problem.focal_gamma)),
    )
    results = (problem.use_kl, problem.need_gradient, upper, lower, losses_Bh2)
    labels = (counted.ids, counted.weight, counted.gate, counted.spread)
    cost = PER_CLASS * C * counted.ids.size
    if plan.columns is None:
        run(cells, B * h, student.values, target_values, *labels, *rows, *common, *results, nanoseconds=cost)
    else:
        wide = not _span(problem, student, target) <= WIDEST
        arguments = (student.values, target_values, *labels, plan.columns, *rows, *common, wide, *results)
        run(pixels, B * h, *arguments, nanoseconds=cost)
    ce, kl = (LN2 * bits for bits in np.add.reduce(losses_Bh2.reshape(-1, 2)).tolist())
    gradient_BChw = np.empty((B, C, h, w) if problem.need_gradient else 0, np.float32)
    if problem.need_gradient:
        index, fraction = plan.student_nodes
        halves = (upper, lower, index[0], fraction[0], gradient_BChw)
        run(from_nodes, B * h, *halves, nanoseconds=PER_LOGIT * upper.size)
    return torch.from_numpy(gradient_BChw), ce * per_ce, kl * T * T * per_kl


def _lost_terms(problem: LossProblem, plan: Plan, student: _Nodes, target: _Nodes | None) -> tuple[bool, bool]:
    """Return whether a counted pixel of CE and of KL is lost. Rare, hence in plain NumPy."""
    labelled_BHW: Any = True
    if problem.labels is not None:
        labelled_BHW = (problem.labels.long() != problem.ignore_index).numpy()
    lost_BHW = plan.student_columns.reaches(plan.student_rows.reaches(student.lost, 1), 2)
    ce_lost = problem.use_ce and bool((lost_BHW & labelled_BHW).any())
    taught_BHW = True if problem.distill_void else labelled_BHW
    if target is None:
        return ce_lost, False
    for b in range(len(lost_BHW)):
        bt = b if len(plan.inside_y) > 1 else 0
        rows, columns = (Taps(*(x[bt] for x in taps)) for taps in (plan.target_rows, plan.target_columns))
        lost_BHW[b] |= columns.reaches(rows.reaches(target.lost[b], 0), 1)
    counted_BHW = plan.inside_y[:, :, None] & plan.inside_x[:, None, :] & taught_BHW
    return ce_lost, bool((lost_BHW & counted_BHW).any())
