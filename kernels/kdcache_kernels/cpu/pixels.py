"""The general CPU kernel: any sizes, windows, flips and logits, with an exponential per class, pixel and tensor.

Gathers are paid once per row of logits: stretched to the columns of a tile, two such rows serve every label row between
them, in loops over contiguous memory. The gradient goes the same way back. The maximum over classes is searched only if
exponentials of the unshifted logits could overflow or vanish. It is about 1.7 times slower than `cells.py`, and divides
the work in the same way.

Legend: B batch, C classes, H label rows, h w a tensor's own rows and columns, n label columns of a tile.
"""

import numpy as np

from .math import OPTIONS, SQUARE, TILE, TWO, exp2, kernel, njit, total
from .terms import any_counts, focal_terms, pixel_terms, smoothing_terms

_f = np.float32


@njit(**OPTIONS)
def _stretch(j, rows_hCw, index, fraction, pair, held):
    """Resample row j to the columns of a tile, unless `pair` holds it. Rows j and j + 1 never share a place."""
    place = j % 2
    if held[place] == j:
        return
    held[place] = j
    for c in range(pair.shape[1]):
        source, row = rows_hCw[j, c], pair[place, c]
        for k in range(index.size):
            a = source[index[k]]
            row[k] = a + fraction[k] * (source[index[k] + np.uint32(1)] - a)


@njit(**OPTIONS)
def _largest(n, above, below, fraction, peak):
    peak[:n] = -np.inf
    for c in range(above.shape[0]):
        for k in range(n):
            a = above[c, k]
            peak[k] = max(peak[k], a + fraction * (below[c, k] - a))


@njit(**OPTIONS)
def _student_exponentials(c, n, above, below, fraction, peak, scale, e, sums):
    for k in range(n):
        a = above[c, k]
        x = exp2(scale * (a + fraction * (below[c, k] - a) - peak[k]))
        e[c, k] = x
        sums[k] += x


@njit(**OPTIONS)
def _squares(c, n, e, sums):
    for k in range(n):
        sums[k] += e[c, k] * e[c, k]


@njit(**OPTIONS)
def _target_exponentials(c, n, student, fraction, peak, target, t_fraction, t_peak, v, sums, cross):
    above, below = student
    t_above, t_below = target
    for k in range(n):
        a, b = above[c, k], t_above[c, k]
        a += fraction * (below[c, k] - a) - peak[k]
        b += t_fraction * (t_below[c, k] - b) - t_peak[k]
        x = exp2(b)
        v[c, k] = x
        sums[k] += x
        cross[k] += x * (b - a)


@njit(**OPTIONS)
def _own_logarithms(n, ids, above, below, fraction, peak, scale, label_log):
    for k in range(n):
        a = above[ids[k], k]
        label_log[k] = scale * (a + fraction * (below[ids[k], k] - a) - peak[k])


@njit(**OPTIONS)
def _gradient(c, n, form, fraction, ids, e, e_1, v, slopes, pull):
    """Add a class's gradient of one label row to the stretched rows above and below."""
    slope_1, slope_T, slope_v, hot = slopes
    this = np.uint32(c)
    if form == SQUARE:
        for k in range(n):
            x = e[c, k]
            g = x * (slope_1[k] * x + slope_T[k]) - v[c, k] * slope_v[k] - (hot[k] if ids[k] == this else _f(0))
            pull[0, c, k] += g - fraction * g
            pull[1, c, k] += fraction * g
    else:
        for k in range(n):
            x = e_1[c, k] * slope_1[k] + e[c, k] * slope_T[k]
            g = x - v[c, k] * slope_v[k] - (hot[k] if ids[k] == this else _f(0))
            pull[0, c, k] += g - fraction * g
            pull[1, c, k] += fraction * g


@njit(**OPTIONS)
def _mix(n, class_weight, above, below, fraction, peak, scale, mix):
    """Sum class weight * logit over the classes, relative to the peak like the exponentials."""
    mix[:n] = 0
    for c in range(class_weight.size):
        for k in range(n):
            a = above[c, k]
            mix[k] += class_weight[c] * (a + fraction * (below[c, k] - a) - peak[k])
    for k in range(n):
        mix[k] *= scale


@njit(**OPTIONS)
def _shrink(n, pull_Cn, index, fraction, rows_Cw):
    """Apply the transpose of `_stretch`: add every column's gradient to the two cells around it."""
    for c in range(rows_Cw.shape[0]):
        row, pulls = rows_Cw[c], pull_Cn[c]
        for k in range(n):
            g = pulls[k]
            right = fraction[k] * g
            row[index[k]] += g - right
            row[index[k] + np.uint32(1)] += right


@kernel
def pixels(
    first, last, student, target, ids, weight, gate, spread, taps, starts, fractions, target_rows, target_fractions,
    form, temperature, factors, class_weight, gamma, wide, use_kl, need_gradient, upper, lower, losses,
):  # fmt: skip
    """Compute the fused CE + KL loss and its gradient for any sizes and windows, for a range of cell rows.

    A cell row is the label rows between logit rows i and i + 1. The cell rows are `first` to `last` - 1, and row i of
    image b has the number b * h + i. A label row is cut into tiles of n pixels.

    Shapes and units:
        student, target: (B, h, 1, C, w + 1) float32, (logit - maximum over the classes) * log2(e) / T. The last
            column is repeated. h and w are the rows and columns of the student's or the target's own logits.
        ids, weight, gate: (B, H, tiles, 1, n) class ids and pixel weights in CE and in KL, from `prepare.count_pixels`.
        spread: (B, H, tiles, 1, n), each class's share of a smoothed label, or empty without label smoothing.
        taps: neighbour tables of the label columns: (index, fraction) of the student, (tiles, n) each, then of the
            target, (Bt, tiles, n) each. index is the logit to the left of a label column, and fraction the weight of
            the logit to its right. Bt is B, or 1 if all images share them.
        starts: (h + 1,) first label row of each cell row. fractions: (H,) weight of the lower logit row in a label row.
        target_rows, target_fractions: (Bt, H) the target's logit row above a label row, and the weight of the next one.
        form: how to get the student's exponentials at T = 1. ONE takes those at T, SQUARE squares those at T = 2, and
            TWO computes them separately.
        temperature: T. factors: (ce_weight / CE's denominator, kl_weight * T / KL's denominator).
        class_weight: (C,) float32, read only with label smoothing. gamma: exponent of the focal loss, or 0.
        use_kl, need_gradient: whether to compute KL and the gradient.
        wide: whether to subtract each label pixel's own maximum over the classes. Logits of a wide range need it,
            because all exponentials of a pixel would otherwise become 0.
        upper, lower: results in the shape of `student`, the gradient at logit row i and at row i + 1.
        losses: (B, h, 2) results, sums of weighted CE and KL in bits. The caller sets them to 0 first.
    """
    _, h, _, C, _ = student.shape
    ht = target.shape[1]
    _, _, tiles, _, n = ids.shape
    index, fraction_x, t_index, t_fraction_x = taps
    smooth, total_weight = spread.size > 0, class_weight.sum()
    mix, even, even_pull = np.zeros(n, _f), np.zeros(n, _f), np.zeros((2, n), _f)
    pair, t_pair = np.empty((2, C, n), _f), np.empty((2, C, n), _f)
    held, t_held = np.empty(2, np.int64), np.empty(2, np.int64)
    e, v, pull = np.empty((C, n), _f), np.zeros((C, n), _f), np.empty((2, C, n), _f)
    e_1 = np.empty((C, n), _f) if form == TWO else e
    peak, t_peak = np.zeros(n, _f), np.zeros(n, _f)
    sum_T, sum_v, cross = np.ones(n, _f), np.ones(n, _f), np.zeros(n, _f)
    sum_1 = sum_T if form not in (SQUARE, TWO) else np.ones(n, _f)
    label_log, hot, loss = np.empty(n, _f), np.empty(n, _f), np.empty(8 * TILE)
    slope_1, slope_T, slope_v = np.empty(n, _f), np.empty(n, _f), np.empty(n, _f)
    scale_1 = _f(2) if form == SQUARE else (temperature if form == TWO else _f(1))
    for tile in range(tiles):
        for task in range(first, last):
            b, i = task // h, task % h
            bt = b if target_rows.shape[0] > 1 else 0
            if task == first or i == 0:
                held[:], t_held[:] = -1, -1
            if starts[i] == starts[i + 1]:
                continue
            next_i = min(i + 1, h - 1)
            for row in (i, next_i):
                _stretch(row, student[b, :, 0], index[tile], fraction_x[tile], pair, held)
            above, below = pair[i % 2], pair[next_i % 2]
            pull[:], even_pull[:], loss[:] = 0, 0, 0
            for y in range(starts[i], starts[i + 1]):
                row_weight, row_gate = weight[b, y, tile], gate[b, y, tile]
                taught = use_kl and any_counts(row_gate)
                if not (taught or any_counts(row_weight) or (smooth and any_counts(spread[b, y, tile]))):
                    continue
                fraction, t_fraction = fractions[y], target_fractions[bt, y]
                pixel_ids = ids[b, y, tile, 0]
                sum_T[:], sum_1[:] = 0, 0
                if wide:
                    _largest(n, above, below, fraction, peak)
                for c in range(C):
                    _student_exponentials(c, n, above, below, fraction, peak, _f(1), e, sum_T)
                    if form == SQUARE:
                        _squares(c, n, e, sum_1)
                    if form == TWO:
                        _student_exponentials(c, n, above, below, fraction, peak, temperature, e_1, sum_1)
                _own_logarithms(n, pixel_ids, above, below, fraction, peak, scale_1, label_log)
                if taught:
                    j = target_rows[bt, y]
                    next_j = min(j + 1, ht - 1)
                    for row in (j, next_j):
                        _stretch(row, target[b, :, 0], t_index[bt, tile], t_fraction_x[bt, tile], t_pair, t_held)
                    t_above, t_below = t_pair[j % 2], t_pair[next_j % 2]
                    if wide:
                        _largest(n, t_above, t_below, t_fraction, t_peak)
                    sum_v[:], cross[:] = 0, 0
                    for c in range(C):
                        _target_exponentials(
                            c, n, (above, below), fraction, peak, (t_above, t_below), t_fraction, t_peak,
                            v, sum_v, cross,
                        )  # fmt: skip
                pixel_terms(
                    n, sum_1, sum_T, sum_v, cross, label_log, row_weight, row_gate,
                    factors[0], factors[1], slope_1, slope_T, slope_v, hot, loss,
                )  # fmt: skip
                if smooth:
                    _mix(n, class_weight, above, below, fraction, peak, temperature, mix)
                    smoothing_terms(
                        n, sum_1, mix, total_weight, spread[b, y, tile], factors[0], slope_1, even, loss
                    )  # fmt: skip
                    for k in range(n):
                        even_pull[0, k] += even[k] - fraction * even[k]
                        even_pull[1, k] += fraction * even[k]
                if gamma > 0:
                    focal_terms(n, sum_1, label_log, row_weight, gamma, slope_1, hot, loss)
                if need_gradient:
                    slopes = (slope_1, slope_T, slope_v, hot)
                    for c in range(C):
                        _gradient(c, n, form, fraction, pixel_ids, e, e_1, v, slopes, pull)
            losses[b, i, 0] += total(loss, 0, n)
            losses[b, i, 1] += total(loss, 4 * TILE, n)
            if need_gradient:
                if smooth:
                    for c in range(C):
                        for k in range(n):
                            pull[0, c, k] -= class_weight[c] * even_pull[0, k]
                            pull[1, c, k] -= class_weight[c] * even_pull[1, k]
                _shrink(n, pull[0], index[tile], fraction_x[tile], upper[b, i, 0])
                _shrink(n, pull[1], index[tile], fraction_x[tile], lower[b, i, 0])
