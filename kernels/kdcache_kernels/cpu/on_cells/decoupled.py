"""The decoupled loss on the CPU: one walk over the target's cells.

A row of cells is resampled into scratch that stays in the L2 cache; its loss and its gradient, which need nothing of
other cells but their number, follow from it. Exponentials and logarithms are in base 2. Bitwise the same for any number
of threads: a task is a row of cells.

Legend: B batch, C classes, h w the target's cells, n cells of a tile.
"""

import numpy as np
import torch
from torch import Tensor

from ...on_cells.problem import DecoupledProblem, largest_logit
from ...target_cells import labels_at_centres
from ..math import LN2, OPTIONS, UNFUSED, exp2, kernel, log2, njit
from ..threads import run
from .cells import TILE, lay, on_own_grid, place_for, read_tile, weigh

_f = np.float32


@njit(**OPTIONS)
def _find_target(c, line, largest, n, num_classes, target):
    for j in range(n):
        if target[j] == num_classes and line[c, j] == largest[j]:
            target[j] = c


@njit(**OPTIONS)
def _set_apart(c, line, target, usable, n, own, largest):
    """Take the target's logit apart; find the largest of the others. A logit of a lost cell becomes 0."""
    for j in range(n):
        x = line[c, j] if usable[j] != 0 else _f(0)
        line[c, j] = x
        own[j] = x if target[j] == c else own[j]
        largest[j] = max(largest[j], _f(-3e38) if target[j] == c else x)


@njit(**OPTIONS)
def _exponentials(c, s, t, target, scale, top_s, top_t, n, sum_s, sum_t, difference):
    """Turn the other classes' logits into exponentials; add these, and the teacher's times what lies between both."""
    for j in range(n):
        a, b = s[c, j] - top_s[j], t[c, j] - top_t[j]
        other = target[j] != c
        e_s = exp2(scale * a) if other else _f(0)
        e_t = exp2(scale * b) if other else _f(0)
        s[c, j], t[c, j] = e_s, e_t
        sum_s[j] += e_s
        sum_t[j] += e_t
        difference[j] += e_t * (b - a) if other else _f(0)


@njit(**UNFUSED)
def _compare(scale, own_s, own_t, top_s, top_t, sum_s, sum_t, weight, alpha, beta, n, difference, pull):
    """Turn the sums into their inverses, `difference` into the loss; write the gradient at the target's logit."""
    for j in range(n):
        log_s, log_t = log2(max(sum_s[j], _f(1))), log2(max(sum_t[j], _f(1)))
        # Of a class alone the others have no largest logit.
        alone = sum_t[j] == 0
        a = _f(0) if alone else scale * (own_t[j] - top_t[j]) - log_t
        b = _f(0) if alone else scale * (own_s[j] - top_s[j]) - log_s
        sum_s[j], sum_t[j] = _f(0) if alone else _f(1) / sum_s[j], _f(0) if alone else _f(1) / sum_t[j]
        e_a, e_b = exp2(-abs(a)), exp2(-abs(b))
        more_a, more_b = _f(1) / (_f(1) + e_a), _f(1) / (_f(1) + e_b)
        less_a, less_b = e_a * more_a, e_b * more_b
        p, rest_p = (more_a, less_a) if a > 0 else (less_a, more_a)
        q, rest_q = (more_b, less_b) if b > 0 else (less_b, more_b)
        # What is largest is taken out of both logarithms, so that no difference of large numbers is left.
        tckd = p * (min(a, _f(0)) - min(b, _f(0))) + rest_p * (max(b, _f(0)) - max(a, _f(0)))
        tckd += log2(_f(1) + e_b) - log2(_f(1) + e_a)
        nckd = scale * difference[j] * sum_t[j] - (log_t - log_s)
        difference[j] = weight[j] * (alpha * tckd + beta * nckd)
        pull[j] = alpha * weight[j] * (rest_p - rest_q if a > 0 else q - p)


@njit(**UNFUSED)
def _write(c, s, t, target, inverse_s, inverse_t, weight, beta, pull, factor, n, row):
    for j in range(n):
        q, p = s[c, j] * inverse_s[j], t[c, j] * inverse_t[j]
        x = beta * weight[j] * (q - p) - pull[j] * q
        row[j] = factor * (pull[j] if target[j] == c else x)


@kernel
def _decouple(
    first, last, student, s_above, s_below, s_down, s_left, s_next, s_right, s_moved,
    teacher, t_above, t_below, t_down, t_left, t_next, t_right, t_moved,
    counted, weight, targets, scale, limit, alpha, beta, factor, keep, gradient, losses,
):  # fmt: skip
    """Do the rows of cells `first` to `last`, numbered image by image.

    Args:
        student ... weight: see `Laid`.
        targets: (B, h, w) int32, C where it is the teacher's best class; or with B = 0 everywhere.
        scale: 1 / T in base 2. limit: of usable logits. factor: of the gradient of a cell.
        keep: whether the gradient is written. gradient: (B, C, h, w) result. losses: (B, h) float64 result.
    """
    C, h, w = teacher.shape[1], losses.shape[1], teacher.shape[3]
    weighted, labelled = weight.shape[0] > 0, targets.shape[0] > 0
    s, t = np.empty((C, TILE), _f), np.empty((C, TILE), _f)
    top_s, top_t, own_s, own_t = np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f)
    sum_s, sum_t, loss, pull = np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f)
    own, usable, target = np.empty(TILE, _f), np.empty(TILE, np.uint8), np.empty(TILE, np.int32)
    for task in range(first, last):
        b, i = task // h, task % h
        total = 0.0
        for start in range(0, w, TILE):
            n = min(TILE, w - start)
            top_s[:], top_t[:], usable[:] = -np.inf, -np.inf, 1
            read_tile(b, i, start, n, student, s_above, s_below, s_down, s_left, s_next, s_right, s_moved, limit,
                      s, top_s, usable)  # fmt: skip
            read_tile(b, i, start, n, teacher, t_above, t_below, t_down, t_left, t_next, t_right, t_moved, limit,
                      t, top_t, usable)  # fmt: skip
            weigh(weighted, counted, weight, b, i, start, usable, own, n)
            target[:] = C
            if labelled:
                target[:n] = targets[b, i, start : start + n]
            for c in range(C):
                _find_target(c, t, top_t, n, C, target)
            top_s[:], top_t[:], sum_s[:], sum_t[:], loss[:] = -3e38, -3e38, 0, 0, 0
            for c in range(C):
                _set_apart(c, s, target, usable, n, own_s, top_s)
                _set_apart(c, t, target, usable, n, own_t, top_t)
            for c in range(C):
                _exponentials(c, s, t, target, scale, top_s, top_t, n, sum_s, sum_t, loss)
            _compare(scale, own_s, own_t, top_s, top_t, sum_s, sum_t, own, alpha, beta, n, loss, pull)
            for j in range(n):
                total += loss[j]
            if keep:
                for c in range(C):
                    row = gradient[b, c, i][start : start + n]
                    _write(c, s, t, target, sum_s, sum_t, own, beta, pull, factor, n, row)
        losses[b, i] = total


def decoupled_loss(problem: DecoupledProblem) -> tuple[Tensor, Tensor]:
    """Compute what `kdcache_kernels.decoupled_loss` documents, and its gradient, both float32."""
    (B, C), (h, w), T = problem.student.shape[:2], problem.grid, problem.temperature
    if B == 0:
        return torch.zeros(()), torch.zeros(problem.student.shape if problem.need_gradient else 0)
    laid = lay(problem)
    targets = np.empty((0, h, w), np.int32)
    if problem.labels is not None:
        labels_Bhw = labels_at_centres(problem.labels, problem.grid).long()
        is_class = (labels_Bhw >= 0) & (labels_Bhw < C)
        targets = torch.where(is_class, labels_Bhw, C).int().numpy()
    count = laid.cells_counted if problem.count is None else float(problem.count)
    per_count = 1 / count if count else 0.0
    cells = place_for(problem.student, laid.logits_s, laid.student, (B, C, h, w) if problem.need_gradient else None)
    losses = np.empty((B, h))
    run(
        _decouple, B * h, *laid.arguments, targets, _f(1 / (LN2 * T)), _f(largest_logit(T)),
        _f(problem.alpha), _f(problem.beta), _f(T * per_count), problem.need_gradient, cells.numpy(), losses,
    )  # fmt: skip
    loss = torch.tensor(LN2 * T * T * per_count * losses.sum(), dtype=torch.float32)
    return loss, on_own_grid(problem, laid, cells) if problem.need_gradient else torch.empty(0)
