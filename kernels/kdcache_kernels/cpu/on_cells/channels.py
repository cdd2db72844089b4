"""The loss of channels on the CPU: a class of an image after the other.

Both maps of a class are resampled into scratch; three walks over it find the largest logits, the sums and the gradient.
Exponentials are in base 2, sums of rows are put together in float64. Bitwise the same for any number of threads: a task
is a class of an image.

Legend: B batch, C classes, h w the target's cells.
"""

import numpy as np
import torch
from torch import Tensor

from ...on_cells.problem import ChannelProblem, largest_logit
from ..math import LN2, OPTIONS, SUMS, UNFUSED, exp2, kernel, njit
from ..threads import run
from .cells import lay, on_own_grid, place_for, read_row, sample_row, weigh

_f = np.float32
_MOST = _f(3e38)


@njit(**OPTIONS)
def _read(b, c, i, n, logits, above, below, down, left, following, right, moved, limit, rows, largest, usable):
    """Read row i of the cells of a class."""
    bt = b if above.shape[0] > 1 else 0
    if moved:
        upper, lower = logits[b, c, above[bt, i]], logits[b, c, below[bt, i]]
        sample_row(i, upper, lower, down[bt, i], left[bt], following[bt], right[bt], limit, n, rows, largest, usable)
    else:
        read_row(i, logits[b, c, i], 0, limit, n, rows, largest, usable)


@njit(**OPTIONS)
def _prepare(i, s, t, own, usable, top_s, top_t, n):
    """Leave out cells that do not weigh or are lost; NaN remains the weight of what spoils the class."""
    weights = own[i]
    for j in range(n):
        w = weights[j]
        weights[j] = max(w, _f(0)) if abs(w) <= _MOST else _f(np.nan)
        s[i, j], t[i, j] = s[i, j] if usable[j] != 0 else _f(0), t[i, j] if usable[j] != 0 else _f(0)
        top_s[j] = top_s[j] if weights[j] == 0 else max(top_s[j], s[i, j])
        top_t[j] = top_t[j] if weights[j] == 0 else max(top_t[j], t[i, j])


@njit(**SUMS)
def _add(i, s, t, own, top_s, top_t, scale, n):
    """Turn logits into weighted exponentials; sum these, and the teacher's times what lies between both."""
    sum_s, sum_t, difference, weights = _f(0), _f(0), _f(0), own[i]
    for j in range(n):
        # What does not weigh may be larger than the largest that does.
        a, b = min(s[i, j] - top_s, _f(0)), min(t[i, j] - top_t, _f(0))
        e_s, e_t = weights[j] * exp2(scale * a), weights[j] * exp2(scale * b)
        s[i, j], t[i, j] = e_s, e_t
        sum_s += e_s
        sum_t += e_t
        difference += e_t * (b - a)
    return sum_s, sum_t, difference


@njit(**UNFUSED)
def _subtract(s, t, by_s, by_t, n, row):
    for j in range(n):
        row[j] = by_s * s[j] - by_t * t[j]


@kernel
def _compare(
    first, last, student, s_above, s_below, s_down, s_left, s_next, s_right, s_moved,
    teacher, t_above, t_below, t_down, t_left, t_next, t_right, t_moved,
    counted, weight, scale, limit, factor, keep, gradient, losses,
):  # fmt: skip
    """Do the classes `first` to `last`, numbered image by image.

    Args:
        student ... weight: see `Laid`.
        scale: 1 / T in base 2. limit: of usable logits. factor: of the gradient of a class.
        keep: whether the gradient is written. gradient: (B, C, h, w) result. losses: (B, C) float64 result, in bits.
    """
    C, h, w = losses.shape[1], teacher.shape[2], teacher.shape[3]
    weighted = weight.shape[0] > 0
    s, t, own = np.empty((h, w), _f), np.empty((h, w), _f), np.empty((h, w), _f)
    tops_s, tops_t, unused, usable = np.empty(w, _f), np.empty(w, _f), np.empty(w, _f), np.empty(w, np.uint8)
    for task in range(first, last):
        b, c = task // C, task % C
        tops_s[:], tops_t[:], unused[:] = -_MOST, -_MOST, 0
        for i in range(h):
            usable[:] = 1
            _read(b, c, i, w, student, s_above, s_below, s_down, s_left, s_next, s_right, s_moved, limit,
                  s, unused, usable)  # fmt: skip
            _read(b, c, i, w, teacher, t_above, t_below, t_down, t_left, t_next, t_right, t_moved, limit,
                  t, unused, usable)  # fmt: skip
            weigh(weighted, counted, weight, b, i, 0, usable, own[i], w)
            _prepare(i, s, t, own, usable, tops_s, tops_t, w)
        top_s, top_t = tops_s.max(), tops_t.max()
        sum_s, sum_t, difference = 0.0, 0.0, 0.0
        for i in range(h):
            row_s, row_t, row_difference = _add(i, s, t, own, top_s, top_t, scale, w)
            sum_s += row_s
            sum_t += row_t
            difference += row_difference
        # Where nothing weighs, nothing is compared.
        losses[b, c] = 0.0 if sum_s == 0 else scale * difference / sum_t - np.log2(sum_t / sum_s)
        by_s, by_t = _f(0 if sum_s == 0 else factor / sum_s), _f(0 if sum_t == 0 else factor / sum_t)
        if keep:
            for i in range(h):
                _subtract(s[i], t[i], by_s, by_t, w, gradient[b, c, i])


def channel_loss(problem: ChannelProblem) -> tuple[Tensor, Tensor]:
    """Compute what `kdcache_kernels.channel_loss` documents, and its gradient, both float32."""
    (B, C), T = problem.student.shape[:2], problem.temperature
    if B == 0:
        return torch.zeros(()), torch.zeros(problem.student.shape if problem.need_gradient else 0)
    laid = lay(problem)
    images = float((laid.counted > 0).any((1, 2)).sum()) if len(laid.counted) else float(B)
    count = images if problem.count is None else float(problem.count)
    factor = T / (C * count) if count else 0.0
    shape = (B, C, *problem.grid) if problem.need_gradient else None
    cells = place_for(problem.student, laid.logits_s, laid.student, shape)
    losses = np.empty((B, C))
    run(
        _compare, B * C, *laid.arguments, _f(1 / (LN2 * T)), _f(largest_logit(T)), factor,
        problem.need_gradient, cells.numpy(), losses,
    )  # fmt: skip
    loss = torch.tensor(LN2 * T * factor * losses.sum(), dtype=torch.float32)
    return loss, on_own_grid(problem, laid, cells) if problem.need_gradient else torch.empty(0)
