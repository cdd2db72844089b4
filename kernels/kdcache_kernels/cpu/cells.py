"""The fast CPU kernel: spans of four pixels between two nodes, whose exponentials are powers of the nodes'.

Along a row, bilinear logits are straight lines between the cell centres. With nodes every four pixels, at all centres
and wherever else needed, the pixel at 1/8, 3/8, 5/8 or 7/8 between nodes a and b has the exponential

    2**(a * 7/8 + b * 1/8) = root(a)**7 * root(b)**1    with root(x) = 2**(x / 8)

so a node costs one exponential and four products, a pixel one product: a quarter of the exponentials, and no gather of
logits, for neighbouring nodes lie side by side. The price: nothing is subtracted per pixel, so logits may span 80 nats
at most (the caller checks), and all kinks must fall on nodes (strides 4, 8, 12, ...; flips; windows by whole cells).

A task is a cell row: the label rows between two rows of low-resolution logits. It writes its share of the gradient of
both, each to its own array, so that no other task writes there and no sum depends on who did what.

Legend: B batch, C classes, H label rows, h logit rows, n nodes of a tile, P = 4 phases; scratch rows are TILE long,
phases one after the other. The last span of a tile is no pixel's.
"""

import numpy as np

from .math import ONE, OPTIONS, SQUARE, TILE, TWO, exp2, kernel, log2, njit, total
from .terms import any_counts, focal_terms, pixel_terms, smoothing_terms

_f = np.float32
_EIGHTH, _1, _3, _5, _7 = _f(1 / 8), _f(1 / 8), _f(3 / 8), _f(5 / 8), _f(7 / 8)


@njit(**OPTIONS)
def _odd_powers(x):
    x2 = x * x
    x3 = x2 * x
    x5 = x3 * x2
    return x, x3, x5, x5 * x2


@njit(**OPTIONS)
def _span(left, right):
    """Return the exponentials of the four pixels between the roots of two nodes."""
    l1, l3, l5, l7 = _odd_powers(left)
    r1, r3, r5, r7 = _odd_powers(right)
    return l7 * r1, l5 * r3, l3 * r5, l1 * r7


@njit(**OPTIONS)
def _student_nodes(c, n, above, below, fraction, scale, value, root):
    for k in range(n):
        a = above[c, k]
        a += fraction * (below[c, k] - a)
        value[k] = a
        root[k] = exp2(scale * a)


@njit(**OPTIONS)
def _target_nodes(c, n, above, below, fraction, student, lead, root):
    """Write the roots of the target's nodes, and to `lead` the target's nodes minus the student's."""
    for k in range(n):
        a = above[c, k]
        a += fraction * (below[c, k] - a)
        lead[k] = a - student[k]
        root[k] = exp2(_EIGHTH * a)


@njit(**OPTIONS)
def _pixels(c, k, root, e, sums):
    """Write the exponentials of class c at the four pixels of span k, and add them to the sums."""
    e0, e1, e2, e3 = _span(root[k], root[k + 1])
    e[c, k], e[c, TILE + k], e[c, 2 * TILE + k], e[c, 3 * TILE + k] = e0, e1, e2, e3
    sums[k] += e0
    sums[TILE + k] += e1
    sums[2 * TILE + k] += e2
    sums[3 * TILE + k] += e3
    return e0, e1, e2, e3


@njit(**OPTIONS)
def _student_pixels(c, n, root, e, sums):
    for k in range(n):
        _pixels(c, k, root, e, sums)


@njit(**OPTIONS)
def _student_pixels_and_squares(c, n, root, e, sums, square_sums):
    for k in range(n):
        e0, e1, e2, e3 = _pixels(c, k, root, e, sums)
        square_sums[k] += e0 * e0
        square_sums[TILE + k] += e1 * e1
        square_sums[2 * TILE + k] += e2 * e2
        square_sums[3 * TILE + k] += e3 * e3


@njit(**OPTIONS)
def _target_pixels(c, n, root, lead, v, sums, cross):
    for k in range(n):
        v0, v1, v2, v3 = _pixels(c, k, root, v, sums)
        a = lead[k]
        d = lead[k + 1] - a
        cross[k] += v0 * (a + _1 * d)
        cross[TILE + k] += v1 * (a + _3 * d)
        cross[2 * TILE + k] += v2 * (a + _5 * d)
        cross[3 * TILE + k] += v3 * (a + _7 * d)


@njit(**OPTIONS)
def _own_logarithms(n, ids_Pn, e, power, label_log):
    """Look up the exponential of each pixel's label. Its logarithm is `power` times the one at T = 1."""
    for p in range(4):
        for k in range(n):
            label_log[p * TILE + k] = e[ids_Pn[p, k], p * TILE + k]
        for k in range(n):
            label_log[p * TILE + k] = power * log2(label_log[p * TILE + k])


def _gradient_of(form):
    """Make the function that adds a class's gradient of one label row to the nodes of the cell row.

    `pull` (C, 4 * TILE): each span's gradient at its left and right node of the row above and of the row below.
    """

    @njit(**OPTIONS)
    def pixel(c, i, id, e, e_1, v, slopes):
        slope_1, slope_T, slope_v, hot = slopes
        if form == ONE:
            g = e[c, i] * (slope_1[i] + slope_T[i]) - v[c, i] * slope_v[i]
        elif form == SQUARE:
            g = e[c, i] * (slope_1[i] * e[c, i] + slope_T[i]) - v[c, i] * slope_v[i]
        else:
            g = e_1[c, i] * slope_1[i] + e[c, i] * slope_T[i] - v[c, i] * slope_v[i]
        return g - (hot[i] if id == np.uint32(c) else _f(0))

    @njit(**OPTIONS)
    def gradient(c, n, fraction, ids_Pn, e, e_1, v, slopes, pull):
        for k in range(n):
            g0 = pixel(c, k, ids_Pn[0, k], e, e_1, v, slopes)
            g1 = pixel(c, TILE + k, ids_Pn[1, k], e, e_1, v, slopes)
            g2 = pixel(c, 2 * TILE + k, ids_Pn[2, k], e, e_1, v, slopes)
            g3 = pixel(c, 3 * TILE + k, ids_Pn[3, k], e, e_1, v, slopes)
            right, all_four = _1 * g0 + _3 * g1 + _5 * g2 + _7 * g3, g0 + g1 + g2 + g3
            left = all_four - right
            pull[c, k] += left - fraction * left
            pull[c, TILE + k] += right - fraction * right
            pull[c, 2 * TILE + k] += fraction * left
            pull[c, 3 * TILE + k] += fraction * right

    return gradient


_gradient_one, _gradient_square, _gradient_two = map(_gradient_of, (ONE, SQUARE, TWO))


@njit(**OPTIONS)
def _mix_nodes(n, class_weight, above, below, fraction, scale, mixed):
    """Sum class weight * logit over the classes, on the nodes."""
    mixed[:] = 0
    for c in range(class_weight.size):
        for k in range(n):
            a = above[c, k]
            a += fraction * (below[c, k] - a)
            mixed[k] += class_weight[c] * (scale * a)


@njit(**OPTIONS)
def _mix_pixels(n, mixed, mix):
    for k in range(n):
        a = mixed[k]
        d = mixed[k + 1] - a
        mix[k], mix[TILE + k] = a + _1 * d, a + _3 * d
        mix[2 * TILE + k], mix[3 * TILE + k] = a + _5 * d, a + _7 * d


@njit(**OPTIONS)
def _even_gradient(n, fraction, even, pull):
    """Add to `pull` (4 * TILE,) what smoothed labels take from every class of weight 1, as `_gradient_of` does."""
    for k in range(n):
        g0, g1, g2, g3 = even[k], even[TILE + k], even[2 * TILE + k], even[3 * TILE + k]
        right, all_four = _1 * g0 + _3 * g1 + _5 * g2 + _7 * g3, g0 + g1 + g2 + g3
        left = all_four - right
        pull[k] += left - fraction * left
        pull[TILE + k] += right - fraction * right
        pull[2 * TILE + k] += fraction * left
        pull[3 * TILE + k] += fraction * right


@njit(**OPTIONS)
def _write_nodes(c, n, pull, upper, lower):
    upper[c, 0], lower[c, 0] = pull[c, 0], pull[c, 2 * TILE]
    for k in range(n - 1):
        upper[c, k + 1] = pull[c, k + 1] + pull[c, TILE + k]
        lower[c, k + 1] = pull[c, 2 * TILE + k + 1] + pull[c, 3 * TILE + k]


@kernel
def cells(
    first, last, student, target, ids, weight, gate, spread, starts, fractions, target_rows, target_fractions,
    form, temperature, factors, class_weight, gamma, use_kl, need_gradient, upper, lower, losses,
):  # fmt: skip
    """Compute the fused CE + KL loss and its gradient at label strides 4, 8, 12 and so on, for a range of cell rows.

    A cell row is the label rows between logit rows i and i + 1. The cell rows are `first` to `last` - 1, and row i of
    image b has the number b * h + i. Nodes are positions on a logit row, four label pixels apart. A tile is a part of a
    row with n nodes. There are P = 4 phases: phase p holds pixel p between every two nodes.

    Shapes and units:
        student, target: (B, h, tiles, C, n) float32, at the nodes: (logit - maximum over the classes) * log2(e) / T.
        ids, weight, gate: (B, H, tiles, P, n) class ids and pixel weights in CE and in KL, from `prepare.count_pixels`.
        spread: (B, H, tiles, P, n), each class's share of a smoothed label, or empty without label smoothing.
        starts: (h + 1,) first label row of each cell row.
        fractions: (H,) bilinear weight of the lower logit row in each label row.
        target_rows, target_fractions: (Bt, H), for each label row the target's logit row above it, and the weight of
            the logit row below it. Bt is B, or 1 if all images share them.
        form: how to get the student's exponentials at T = 1. ONE: take those at T. SQUARE: square those at T (T = 2).
            TWO: compute them separately.
        temperature: T.
        factors: (ce_weight / CE's denominator, kl_weight * T / KL's denominator).
        class_weight: (C,) float32, read only with label smoothing.
        gamma: exponent of the focal loss, or 0.
        use_kl, need_gradient: whether to compute KL and the gradient.
        upper, lower: (B, h, tiles, C, n) results, the gradient at the nodes of logit row i and of row i + 1.
        losses: (B, h, 2) results, sums of weighted CE and KL in bits.
    """
    _, h, tiles, C, n = student.shape
    ht = target.shape[1]
    size = 4 * TILE
    smooth, total_weight = spread.size > 0, class_weight.sum()
    mixed, mix, even, even_pull = np.zeros(TILE + 1, _f), np.zeros(size, _f), np.zeros(size, _f), np.zeros(size, _f)
    e, v, pull = np.empty((C, size), _f), np.zeros((C, size), _f), np.empty((C, size), _f)
    e_1 = np.empty((C, size), _f) if form == TWO else e
    # A node beyond the last is read for the last span, which is no pixel's.
    value, root, lead = np.zeros(TILE + 1, _f), np.ones(TILE + 1, _f), np.zeros(TILE + 1, _f)
    sum_T, sum_v, cross = np.ones(size, _f), np.ones(size, _f), np.zeros(size, _f)
    sum_1 = sum_T if form == ONE else np.ones(size, _f)
    label_log, hot, loss = np.empty(size, _f), np.empty(size, _f), np.empty(2 * size)
    slope_1, slope_T, slope_v = np.empty(size, _f), np.empty(size, _f), np.empty(size, _f)
    for task in range(first, last):
        b, i = task // h, task % h
        bt = b if target_rows.shape[0] > 1 else 0
        losses[b, i, :] = 0
        for tile in range(tiles):
            above, below = student[b, i, tile], student[b, min(i + 1, h - 1), tile]
            pull[:], even_pull[:] = 0, 0
            loss[:] = 0
            for y in range(starts[i], starts[i + 1]):
                row_weight, row_gate = weight[b, y, tile], gate[b, y, tile]
                taught = use_kl and any_counts(row_gate)
                if not (taught or any_counts(row_weight) or (smooth and any_counts(spread[b, y, tile]))):
                    continue
                fraction = fractions[y]
                j = target_rows[bt, y]
                t_above, t_below = target[b, j, tile], target[b, min(j + 1, ht - 1), tile]
                t_fraction = target_fractions[bt, y]
                sum_T[:], sum_1[:] = 0, 0
                if taught:
                    sum_v[:], cross[:] = 0, 0
                for c in range(C):
                    if form == TWO:
                        _student_nodes(c, n, above, below, fraction, temperature * _EIGHTH, value, root)
                        _student_pixels(c, n, root, e_1, sum_1)
                    _student_nodes(c, n, above, below, fraction, _EIGHTH, value, root)
                    if form == SQUARE:
                        _student_pixels_and_squares(c, n, root, e, sum_T, sum_1)
                    else:
                        _student_pixels(c, n, root, e, sum_T)
                    if taught:
                        _target_nodes(c, n, t_above, t_below, t_fraction, value, lead, root)
                        _target_pixels(c, n, root, lead, v, sum_v, cross)
                pixel_ids = ids[b, y, tile]
                _own_logarithms(n, pixel_ids, e_1, _f(2) if form == SQUARE else _f(1), label_log)
                pixel_terms(
                    n, sum_1, sum_T, sum_v, cross, label_log, row_weight, row_gate,
                    factors[0], factors[1], slope_1, slope_T, slope_v, hot, loss,
                )  # fmt: skip
                if smooth:
                    _mix_nodes(n, class_weight, above, below, fraction, temperature, mixed)
                    _mix_pixels(n, mixed, mix)
                    smoothing_terms(
                        n, sum_1, mix, total_weight, spread[b, y, tile], factors[0], slope_1, even, loss
                    )  # fmt: skip
                    _even_gradient(n, fraction, even, even_pull)
                if gamma > 0:
                    focal_terms(n, sum_1, label_log, row_weight, gamma, slope_1, hot, loss)
                if not need_gradient:
                    continue
                slopes = (slope_1, slope_T, slope_v, hot)
                for c in range(C):
                    if form == ONE:
                        _gradient_one(c, n, fraction, pixel_ids, e, e_1, v, slopes, pull)
                    elif form == SQUARE:
                        _gradient_square(c, n, fraction, pixel_ids, e, e_1, v, slopes, pull)
                    else:
                        _gradient_two(c, n, fraction, pixel_ids, e, e_1, v, slopes, pull)
            for p in range(4):
                losses[b, i, 0] += total(loss, p * TILE, n)
                losses[b, i, 1] += total(loss, (4 + p) * TILE, n)
            if need_gradient:
                for c in range(C):
                    if smooth:
                        for k in range(size):
                            pull[c, k] -= class_weight[c] * even_pull[k]
                    _write_nodes(c, n, pull, upper[b, i, tile], lower[b, i, tile])
