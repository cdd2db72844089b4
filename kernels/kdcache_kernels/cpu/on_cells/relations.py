"""The loss of relations on the CPU: two passes over the target's cells, with only their probabilities in between.

The first pass resamples the logits of a row of cells class by class into scratch that stays in the L2 cache, turns them
into probabilities, and takes what both correlations need: sums over the classes of each cell, and over the cells of the
row the mean of each class and products centred on it. Rows are then combined in float64. All summands are positive, so
nothing cancels however even a class is. The second pass reads the probabilities and overwrites them with the gradient.

Results are bitwise equal for any number of threads: a task is a row of cells, writes only its own memory, and every sum
has one order.

Legend: B batch, Bt B or 1 (the same for all images), C classes, H W the image, hs ws the student's own size, h w the
target's cells, n cells of a tile.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...on_cells.problem import EPS, MOMENTS, RelationProblem, largest_logit
from ..geometry import Array
from ..math import LN2, OPTIONS, SUMS, exp2, kernel, njit
from ..threads import run
from .cells import TILE, Laid, lay, on_own_grid, place_for, read_tile, weigh

_f = np.float32
_EPS = _f(EPS)


@njit(**OPTIONS)
def _exponentials(c, line, scale, usable, largest, n, total):
    for j in range(n):
        e = exp2(scale * (line[c, j] - largest[j]) if usable[j] != 0 else _f(0))
        line[c, j] = e
        total[j] += e


@njit(**OPTIONS)
def _probabilities(c, s, t, inverse_s, inverse_t, even, n, st, ss, tt):
    """Turn the exponentials of a class into probabilities, and add their products, centred on the classes' mean."""
    for j in range(n):
        p, q = s[c, j] * inverse_s[j], t[c, j] * inverse_t[j]
        s[c, j], t[c, j] = p, q
        a, b = p - even, q - even
        st[j] += a * b
        ss[j] += a * a
        tt[j] += b * b


@njit(**OPTIONS)
def _correlate(cell_weight, st, ss, tt, weight, slope, pull, n):
    """Write what the gradient needs of n cells, and to `st` their weighted 1 - r."""
    for j in range(n):
        both = _f(1) / np.sqrt((ss[j] + _EPS) * (tt[j] + _EPS))
        weight[j], slope[j], pull[j] = cell_weight[j], both, st[j] / (ss[j] + _EPS)
        st[j] = cell_weight[j] * (_f(1) - st[j] * both)


@njit(**OPTIONS)
def _keep(c, line, row, start, n):
    part = row[start : start + n]
    for j in range(n):
        part[j] = line[c, j]


@njit(**SUMS)
def _sum(x, n):
    result = _f(0)
    for j in range(n):
        result += x[j]
    return result


@njit(**SUMS)
def _weighted_sums(c, s, t, weight, n):
    sum_s, sum_t = _f(0), _f(0)
    for j in range(n):
        sum_s += weight[j] * s[c, j]
        sum_t += weight[j] * t[c, j]
    return sum_s, sum_t


@njit(**SUMS)
def _centred_sums(c, s, t, mean_s, mean_t, weight, n):
    """Return weighted sums of products of centred values, and of the values: the rounding error of the means."""
    st, ss, tt, rest_s, rest_t = _f(0), _f(0), _f(0), _f(0), _f(0)
    for j in range(n):
        a, b = s[c, j] - mean_s, t[c, j] - mean_t
        wa, wb = weight[j] * a, weight[j] * b
        rest_s += wa
        rest_t += wb
        st += wa * b
        ss += wa * a
        tt += wb * b
    return st, ss, tt, rest_s, rest_t


@kernel
def relate(
    first, last, student, s_above, s_below, s_down, s_left, s_next, s_right, s_moved,
    teacher, t_above, t_below, t_down, t_left, t_next, t_right, t_moved,
    counted, weight, scale, limit, keep, p_student, p_teacher, weights, slope, pull, inter, blocks,
):  # fmt: skip
    """Run the forward pass of the relation loss on a range of rows of the target's cells.

    The rows are `first` to `last` - 1. Row i of image b has the number b * h + i. In each cell, p and q are the
    student's and the teacher's probabilities of a class, and r is their correlation over the C classes. The derivative
    of r by p is slope * ((q - 1/C) - pull * (p - 1/C)). Arrays without a dtype are float32.

    Shapes and units:
        student, teacher: (B, C, hs, ws) and (B, C, h, w) logits. The teacher's h x w logits are the cells.
        s_above, s_below, s_down, t_above, t_below, t_down: (Bt, h) uint32 rows of each map above and below a row of
            cells, and the weight of the row below. Bt is B, or 1 if all images share them.
        s_left, s_next, t_left, t_next: (Bt, w) uint32 columns to the left and to the right of a cell.
        s_right, t_right: (Bt, w) weights of the columns to the right.
        s_moved, t_moved: whether to interpolate the map with these numbers. Otherwise its elements are the cells.
        counted, weight: (B, h, w) counted share and weight of each cell, or (0, h, w) if all are 1.
        scale: log2(e) / T.
        limit: the largest magnitude of a usable logit. A cell with another logit is lost.
        keep: whether to write p_student and p_teacher.
        p_student, p_teacher: (B, C, h, w) results, p and q.
        weights: (B, h, w) result: `weight`, but NaN for a lost cell that counts and 0 for a lost cell that does not.
        slope, pull: (B, h, w) results, the factors of the derivative above.
        inter: (B, h) float64 result, the sum of weights * (1 - r) over a row.
        blocks: (B, h, tiles, 6, C) result, the moments of each tile (a part of a row of cells), see
            `RelationProblem.moments`.
    """
    _, h, tiles, _, C = blocks.shape
    w = weights.shape[2]
    weighted = weight.shape[0] > 0
    s, t = np.empty((C, TILE), _f), np.empty((C, TILE), _f)
    top_s, top_t, sum_s, sum_t = np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f)
    st, ss, tt, cell_weight = np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f)
    usable, even = np.empty(TILE, np.uint8), _f(1) / _f(C)
    for task in range(first, last):
        b, i = task // h, task % h
        loss = 0.0
        for tile in range(tiles):
            start = tile * TILE
            n = min(TILE, w - start)
            here = slice(start, start + n)
            top_s[:], top_t[:], usable[:] = -np.inf, -np.inf, 1
            read_tile(b, i, start, n, student, s_above, s_below, s_down, s_left, s_next, s_right, s_moved, limit,
                      s, top_s, usable)  # fmt: skip
            read_tile(b, i, start, n, teacher, t_above, t_below, t_down, t_left, t_next, t_right, t_moved, limit,
                      t, top_t, usable)  # fmt: skip
            weigh(weighted, counted, weight, b, i, start, usable, cell_weight, n)
            sum_s[:], sum_t[:], st[:], ss[:], tt[:] = 0, 0, 0, 0, 0
            for c in range(C):
                _exponentials(c, s, scale, usable, top_s, n, sum_s)
                _exponentials(c, t, scale, usable, top_t, n, sum_t)
            for j in range(n):
                sum_s[j], sum_t[j] = _f(1) / sum_s[j], _f(1) / sum_t[j]
            for c in range(C):
                _probabilities(c, s, t, sum_s, sum_t, even, n, st, ss, tt)
            _correlate(cell_weight, st, ss, tt, weights[b, i][here], slope[b, i][here], pull[b, i][here], n)
            loss += _sum(st, n)
            moments = blocks[b, i, tile]
            total = _sum(cell_weight, n)
            inverse = _f(0) if total == 0 else _f(1) / total
            for c in range(C):
                a, d = _weighted_sums(c, s, t, cell_weight, n)
                k, m = a * inverse, d * inverse
                st_c, ss_c, tt_c, rest_s, rest_t = _centred_sums(c, s, t, k, m, cell_weight, n)
                # A class that is alike everywhere has exactly its value as its mean: its factors reach 1 / EPS.
                moments[0, c], moments[1, c], moments[2, c] = total, k + rest_s * inverse, m + rest_t * inverse
                moments[3, c], moments[4, c], moments[5, c] = st_c, ss_c, tt_c
            if keep:
                for c in range(C):
                    _keep(c, s, p_student[b, c, i], start, n)
                    _keep(c, t, p_teacher[b, c, i], start, n)
        inter[b, i] = loss


@kernel
def _add_up(blocks, moments):
    """Combine the moments (N, 6, C) of blocks of cells, (6, C) float64."""
    N, _, C = blocks.shape
    for c in range(C):
        weight, s, t = 0.0, 0.0, 0.0
        for n in range(N):
            weight += blocks[n, 0, c]
            s += np.float64(blocks[n, 0, c]) * blocks[n, 1, c]
            t += np.float64(blocks[n, 0, c]) * blocks[n, 2, c]
        s, t = (0.0, 0.0) if weight == 0 else (s / weight, t / weight)
        st, ss, tt = 0.0, 0.0, 0.0
        for n in range(N):
            block_weight, a, d = np.float64(blocks[n, 0, c]), blocks[n, 1, c] - s, blocks[n, 2, c] - t
            st += blocks[n, 3, c] + block_weight * a * d
            ss += blocks[n, 4, c] + block_weight * a * a
            tt += blocks[n, 5, c] + block_weight * d * d
        moments[0, c], moments[1, c], moments[2, c] = weight, s, t
        moments[3, c], moments[4, c], moments[5, c] = st, ss, tt


@kernel
def learn(first, last, gradient, p_teacher, weights, slope, pull, factor, means, by_teacher, by_student):
    """Compute the gradient of the relation loss by the student's logits, on a range of rows of the target's cells.

    The rows are `first` to `last` - 1. Row i of image b has the number b * h + i. In each cell, p and q are the
    student's and the teacher's probabilities of a class.

    Shapes and units:
        gradient: (B, C, h, w) float32. It holds p on entry, and afterwards the gradient by the student's logits after
            their resize to the cells.
        p_teacher: (B, C, h, w), q.
        weights: (B, h, w) weights of the cells, from `relate`.
        slope, pull: (B, h, w), from `relate`. In a cell, the correlation over the classes has the derivative slope *
            ((q - 1/C) - pull * (p - 1/C)) by p.
        factor: beta * T / count. beta is the weight of the correlation over the classes, T the temperature, and count
            the number of counted cells.
        means: (2, C), the means of p and of q over the cells.
        by_teacher, by_student: (C,) factors. gamma * T / C times the correlation of a class over the cells has, by p,
            the derivative m * (by_teacher * (q - mean of q) - by_student * (p - mean of p)). m is the cell's entry of
            `weights`, and gamma the weight of this correlation in the loss.
    """
    _, C, h, w = gradient.shape
    g, dot, steep, negative = np.empty((C, TILE), _f), np.empty(TILE, _f), np.empty(TILE, _f), np.empty(TILE, _f)
    even = _f(1) / _f(C)
    for task in range(first, last):
        b, i = task // h, task % h
        for start in range(0, w, TILE):
            here = slice(start, min(start + TILE, w))
            n = here.stop - here.start
            weight, lean = weights[b, i][here], pull[b, i][here]
            dot[:] = 0
            for j in range(n):
                negative[j] = -weight[j]
                steep[j] = factor * slope[b, i][here][j] * negative[j]
            for c in range(C):
                s, t, line = gradient[b, c, i][here], p_teacher[b, c, i][here], g[c]
                mean_s, mean_t, k_t, k_s = means[0, c], means[1, c], by_teacher[c], by_student[c]
                for j in range(n):
                    p, q = s[j], t[j]
                    x = steep[j] * ((q - even) - lean[j] * (p - even))
                    x += negative[j] * (k_t * (q - mean_t) - k_s * (p - mean_s))
                    line[j] = x
                    dot[j] += p * x
            for c in range(C):
                s, line = gradient[b, c, i][here], g[c]
                for j in range(n):
                    s[j] *= line[j] - dot[j]


class _Walked(NamedTuple):
    """The result of the first pass, with arrays as in `relate`.

    Attributes:
        laid: both sets of logits under the cells.
        inter: weighted sum of 1 - r over the cells.
        moments: (6, C) float64 of this batch's cells.
    """

    laid: Laid
    p_student: Tensor
    p_teacher: Tensor
    weights: Array
    slope: Array
    pull: Array
    inter: float
    moments: Array


def relation_loss(problem: RelationProblem) -> tuple[Tensor, Tensor]:
    """Compute the relation loss and its gradient on the CPU, from checked arguments.

    Returns: the loss, 0-dimensional float32, and its float32 gradient by the student's (B, C, hs, ws) logits. The
        gradient is an empty tensor if `problem.need_gradient` is False.
    Memory: float32 copies of logits in other dtypes, and both (B, C, h, w) maps of probabilities. The gradient
        overwrites the student's probabilities.
    """
    if problem.student.shape[0] == 0:
        return torch.zeros(()), torch.zeros(problem.student.shape if problem.need_gradient else 0)
    walked = _walk(problem, keep=problem.need_gradient)
    moments = walked.moments if problem.moments is None else problem.moments.numpy()
    count = walked.laid.cells_counted if problem.count is None else float(problem.count)
    per_count, weight = (1 / count if count else 0.0), moments[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        per_weight = np.where(weight == 0, 0, 1 / weight)
    st, ss, tt = moments[3:] * per_weight
    slope = 1 / np.sqrt((ss + EPS) * (tt + EPS))
    intra = ((1 - st * slope) * (weight != 0)).mean()
    T, C = problem.temperature, problem.student.shape[1]
    loss = T * T * (problem.beta * walked.inter * per_count + problem.gamma * intra)
    if not problem.need_gradient:
        return torch.tensor(loss, dtype=torch.float32), torch.empty(0)
    by_teacher = problem.gamma * T / C * per_weight * slope
    factors = (x.astype(_f) for x in (moments[1:3], by_teacher, by_teacher * st / (ss + EPS)))
    (B, _, h, _), cells = walked.p_student.shape, walked.p_student
    run(
        learn, B * h, cells.numpy(), walked.p_teacher.numpy(), walked.weights, walked.slope, walked.pull,
        _f(problem.beta * T * per_count), *factors,
    )  # fmt: skip
    return torch.tensor(loss, dtype=torch.float32), on_own_grid(problem, walked.laid, cells)


def relation_moments(problem: RelationProblem) -> Tensor:
    """Compute `kdcache_kernels.relation_moments` on the CPU from checked arguments.

    Returns: (6, C) float64. For each class: the sum of the cells' weights, the student's and the teacher's weighted
        mean probability, and three sums over the cells. They are of weight * a * b, weight * a * a and weight * b * b.
        a and b are the deviations of the student's and the teacher's probability from these means.
    """
    if problem.student.shape[0] == 0:
        return torch.zeros((MOMENTS, problem.student.shape[1]), dtype=torch.float64)
    return torch.from_numpy(_walk(problem, keep=False).moments)


def _walk(problem: RelationProblem, keep: bool) -> _Walked:
    (B, C), (h, w) = problem.student.shape[:2], problem.grid
    laid = lay(problem)
    p_student = place_for(problem.student, laid.logits_s, laid.student, (B, C, h, w) if keep else None)
    p_teacher = place_for(problem.teacher, laid.logits_t, laid.teacher, (B, C, h, w) if keep else None)
    weights, slope, pull = (np.empty((B, h, w), _f) for _ in range(3))
    inter, blocks = np.empty((B, h)), np.empty((B, h, -(-w // TILE), MOMENTS, C), _f)
    run(
        relate, B * h, *laid.arguments, _f(1 / (LN2 * problem.temperature)), _f(largest_logit(problem.temperature)),
        keep, p_student.numpy(), p_teacher.numpy(), weights, slope, pull, inter, blocks,
    )  # fmt: skip
    moments = np.empty((MOMENTS, C))
    _add_up(blocks.reshape(-1, MOMENTS, C), moments)
    return _Walked(laid, p_student, p_teacher, weights, slope, pull, float(inter.sum()), moments)
