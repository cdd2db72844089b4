"""Bilinear samples and softmax sums of groups of label pixels, as the generic loss kernel needs them.

A group is the pixels of one label column per lane in up to ROWS label rows that lie between the same two rows of
student pixels and, of the target's, between three: a class then costs 10 loads for 4 pixels, where each pixel by
itself would cost 8. Tables of taps say where a pixel lies (`geometry`), so any ratio and window will do.

Legend: u, v the student's and the target's base-2 logits / T at a label pixel. Blocks: c classes, q rows of a group,
n lanes. Tuples: taps are a table, `geometry.Taps`; columns are the pixels left and right of a label column and its
fraction; blend the weights by which a group's rows mix, see `student_group` and `target_group`.
"""

import triton
import triton.language as tl

from .common import LN2, label_terms, load_pixel, power

ROWS = tl.constexpr(4)
LOWEST_LOGIT = tl.constexpr(-2.5e38)
"""Below any logit, and the difference to any is finite."""
SMALL = tl.constexpr(2.0**-12)
"""Keeps a sum over classes of such differences finite."""
LOWEST_SUM = tl.constexpr(2.0**-60)
VALUES = tl.constexpr(8)
"""Numbers kept per pixel: label, factors of 2^(T u), 2^u and 2^v, maxima of u and v, pulls at its label and at all."""


@triton.jit
def cell_of(index, fraction):
    """The cell that a pixel lies in: -1 before the first centre, where both taps are pixel 0."""
    return tl.where((index == 0) & (fraction == 0), -1, index)


@triton.jit
def first_pixel(taps, cell_n, size, steps):
    """The first of `size` < 2^steps pixels that lies in the cell or beyond, by bisection of the monotone table."""
    low_n = cell_n * 0
    high_n = low_n + size
    for _ in range(steps):
        middle_n = (low_n + high_n) // 2
        at_n = tl.minimum(middle_n, size - 1)
        reached_n = cell_of(tl.load(taps.index + at_n), tl.load(taps.fraction + at_n)) >= cell_n
        open_n = low_n < high_n
        low_n = tl.where(open_n & (reached_n == 0), middle_n + 1, low_n)
        high_n = tl.where(open_n & reached_n, middle_n, high_n)
    return low_n


@triton.jit
def load_logits(ptrs):
    """Prepared logits; of packed ones, which are read as they are, 0 in place of one that is not finite."""
    x = tl.load(ptrs)
    if x.dtype == tl.float16:
        x = x.to(tl.float32)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    return x


@triton.jit
def along_row(row_n, columns, offset_c):
    """Logits on a low-resolution row, at one label column per lane; columns: left and right pixel, fraction."""
    left_cn = load_logits((row_n + columns[0])[None, :] + offset_c[:, None])
    right_cn = load_logits((row_n + columns[1])[None, :] + offset_c[:, None])
    return left_cn + columns[2][None, :] * (right_cn - left_cn)


@triton.jit
def student_logits(top_cn, bottom_cn, blend):
    return top_cn[:, None, :] + blend[0][None, :, :] * (bottom_cn - top_cn)[:, None, :]


@triton.jit
def target_logits(rows, columns, blend, offset_c):
    """The target's logits from three rows; a row of weight 0 leaves no trace, however large its logits."""
    v_cqn = blend[1][None, :, :] * along_row(rows[0], columns, offset_c)[:, None, :]
    v_cqn += blend[2][None, :, :] * along_row(rows[1], columns, offset_c)[:, None, :]
    return v_cqn + blend[3][None, :, :] * along_row(rows[2], columns, offset_c)[:, None, :]


@triton.jit
def softmax_sums(
    student_rows, student_columns, target_rows, target_columns, blend, sizes, temperature, pixels,
    POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over classes: 2^(T u), 2^u, 2^v and 2^v (v - u). BLOCK divides the number of classes."""
    s1 = tl.zeros(blend[0].shape, tl.float32)
    su = s1
    sv = s1
    cross = s1
    for start in range(0, sizes[0], BLOCK):
        c = start + tl.arange(0, BLOCK)
        top = along_row(student_rows[0], student_columns, c * sizes[1])
        bottom = along_row(student_rows[1], student_columns, c * sizes[1])
        u = student_logits(top, bottom, blend)
        if pixels.USE_KL:
            v = target_logits(target_rows, target_columns, blend, c * sizes[2])
            eu = tl.exp2(u)
            ev = tl.exp2(v)
            su += tl.sum(eu, 0)
            sv += tl.sum(ev, 0)
            cross += tl.sum(ev * (v - u), 0)
            if pixels.USE_CE and POWER > 1:
                s1 += tl.sum(power(eu, POWER), 0)
        if pixels.USE_CE and POWER == 0:
            s1 += tl.sum(tl.exp2(temperature * u), 0)
    if pixels.USE_CE and POWER == 1:
        s1 = su
    return s1, su, sv, cross


@triton.jit
def softmax_sums_below_peaks(
    student_rows, student_columns, target_rows, target_columns, blend, sizes, temperature, pixels
):
    """Compute the sums of `softmax_sums` for logits of any range, relative to the largest u and v.

    Returns: the four sums, the last in units of 2^12, and the largest u and v.
    """
    s1 = tl.zeros(blend[0].shape, tl.float32)
    su = s1
    sv = s1
    cross = s1
    peak_u = s1 + LOWEST_LOGIT / tl.maximum(temperature, 1.0)
    peak_v = s1 + LOWEST_LOGIT
    for start in range(sizes[0]):
        c = start + tl.arange(0, 1)
        top = along_row(student_rows[0], student_columns, c * sizes[1])
        bottom = along_row(student_rows[1], student_columns, c * sizes[1])
        u = tl.sum(student_logits(top, bottom, blend), 0)
        higher = tl.maximum(peak_u, u)
        step_u = peak_u - higher
        peak_u = higher
        u -= higher
        if pixels.USE_CE:
            s1 = s1 * tl.exp2(temperature * step_u) + tl.exp2(temperature * u)
        if pixels.USE_KL:
            v = tl.sum(target_logits(target_rows, target_columns, blend, c * sizes[2]), 0)
            higher = tl.maximum(peak_v, v)
            step_v = peak_v - higher
            peak_v = higher
            v -= higher
            ev = tl.exp2(v)
            sv *= tl.exp2(step_v)
            cross = cross * tl.exp2(step_v) + sv * SMALL * (step_v - step_u) + ev * SMALL * (v - u)
            sv += ev
            su = su * tl.exp2(step_u) + tl.exp2(u)
    return s1, su, sv, cross, peak_u, peak_v


@triton.jit
def student_group(y_n, cell_n, taps, H):
    """The next ROWS label rows from y on, which of them lie in the cell (they come first), and their fractions."""
    rows_qn = y_n[None, :] + tl.arange(0, ROWS)[:, None]
    exists_qn = rows_qn < H
    rows_qn = tl.minimum(rows_qn, H - 1)
    fraction_qn = tl.load(taps.fraction + rows_qn)
    own_cell_qn = cell_of(tl.load(taps.index + rows_qn), fraction_qn)
    return rows_qn, exists_qn & (own_cell_qn == cell_n[None, :]), tl.where(own_cell_qn < 0, 1.0, fraction_qn)


@triton.jit
def target_group(at_qn, first_n, taps, scale):
    """Where label rows lie between three target rows from `first_n` on.

    Returns: whether they lie there (the first always does), whether between the last two rows, the fraction, and the
    weights of the three rows, times `scale` (None for 1).
    """
    index_qn = tl.load(taps.index + at_qn)
    fraction_qn = tl.load(taps.fraction + at_qn)
    reached_qn = (index_qn >= first_n[None, :]) & (index_qn <= first_n[None, :] + 1)
    below_qn = index_qn > first_n[None, :]
    upper_qn = 1.0 - fraction_qn
    weights = (
        tl.where(below_qn, 0.0, upper_qn),
        tl.where(below_qn, upper_qn, fraction_qn),
        tl.where(below_qn, fraction_qn, 0.0),
    )
    if scale is not None:
        weights = (weights[0] * scale, weights[1] * scale, weights[2] * scale)
    return reached_qn, below_qn, fraction_qn, weights


@triton.jit
def load_columns(at_n, taps, width):
    left_n = tl.load(taps.index + at_n)
    return left_n, tl.minimum(left_n + 1, width - 1), tl.load(taps.fraction + at_n)


@triton.jit
def lost_on_row(lost_n, columns):
    """Whether a lost pixel enters with weight > 0."""
    left_n = tl.load(lost_n + columns[0]).to(tl.int32)
    return left_n | tl.load(lost_n + columns[1], mask=columns[2] > 0, other=0).to(tl.int32)


@triton.jit
def label_logit(rows, columns, fraction_qn, offset_qn):
    """u of the label's class."""
    left_n, right_n, fraction_n = columns
    top_qn = tl.load((rows[0] + left_n)[None, :] + offset_qn)
    top_qn += fraction_n[None, :] * (tl.load((rows[0] + right_n)[None, :] + offset_qn) - top_qn)
    bottom_qn = tl.load((rows[1] + left_n)[None, :] + offset_qn)
    bottom_qn += fraction_n[None, :] * (tl.load((rows[1] + right_n)[None, :] + offset_qn) - bottom_qn)
    return top_qn + fraction_qn * (bottom_qn - top_qn)


@triton.jit
def visit(
    r, student_rows, student_lost_rows, target_rows, target_lost_rows, mix_rows, blend, target_places, left_n, right_n,
    first_n, target_at_n, live_qn, in_view_qn, label_row_ptrs, label_gate_row_ptrs, gate_row_ptrs, label_stride_w,
    label_gate_stride_w, gate_stride_w, value_ptrs, taps, target_taps, pixels, k_ce, k_kl, label_factors,
    sizes, W, wt, temperature, HAS_GRADIENT: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms of the pixels in column r of each lane's cell, and the factors of their gradient.

    Returns: CE and KL of each lane in nats, weighted; 1 when the gradient needs the maxima, else 0.
    """
    x_n = tl.minimum(first_n + r, W - 1)
    columns = (left_n, right_n, tl.load(taps.fraction + x_n))
    target_columns = columns
    if pixels.USE_KL:
        target_columns = load_columns(target_at_n + x_n, target_taps, wt)
        in_view_qn = in_view_qn & (tl.load(target_taps.inside + target_at_n + x_n) != 0)[None, :]
    s1, su, sv, cross = softmax_sums(
        student_rows, columns, target_rows, target_columns, blend, sizes, temperature, pixels, POWER, BLOCK
    )
    lowest = s1
    if pixels.USE_KL:
        lowest = tl.where(tl.abs(cross) < float("inf"), tl.minimum(su, sv), 0.0)
        if pixels.USE_CE:
            lowest = tl.minimum(lowest, s1)
    peak_u = tl.zeros(live_qn.shape, tl.float32)
    peak_v = peak_u
    unit = peak_u + 1.0
    has_peaks = 0
    low = lowest < LOWEST_SUM
    if tl.max(tl.max(low.to(tl.int32), 0), 0) > 0:
        # A pixel keeps its first sums where they serve: its bits must not depend on who shares the program.
        s1_low, su_low, sv_low, cross_low, peak_u, peak_v = softmax_sums_below_peaks(
            student_rows, columns, target_rows, target_columns, blend, sizes, temperature, pixels
        )
        s1 = tl.where(low, s1_low, s1)
        su = tl.where(low, su_low, su)
        sv = tl.where(low, sv_low, sv)
        cross = tl.where(low, cross_low, cross)
        peak_u = tl.where(low, peak_u, 0.0)
        peak_v = tl.where(low, peak_v, 0.0)
        unit = tl.where(low, 1.0 / SMALL, unit)
        has_peaks = 1
    label_ptrs = label_row_ptrs
    if pixels.labels is not None:
        label_ptrs += (x_n * label_stride_w)[None, :]
    gate_ptrs = gate_row_ptrs
    if pixels.gate is not None:
        gate_ptrs += (x_n * gate_stride_w)[None, :]
    label_gate_ptrs = label_gate_row_ptrs
    if pixels.label_gate is not None:
        label_gate_ptrs += (x_n * label_gate_stride_w)[None, :]
    label, ce_weight, label_gate, kl_weight, ce_counted, kl_counted = load_pixel(
        pixels, label_ptrs, label_gate_ptrs, gate_ptrs, live_qn, in_view_qn
    )
    below_lost = tl.where(blend[0] > 0, lost_on_row(student_lost_rows[1], columns)[None, :], 0)
    lost = (lost_on_row(student_lost_rows[0], columns)[None, :] | below_lost) != 0
    ce_n = tl.zeros(x_n.shape, tl.float32)
    kl_n = ce_n
    value_ptrs += r * (ROWS * VALUES * x_n.shape[0])
    if pixels.USE_CE:
        ce_weight = ce_weight.to(tl.float32)
        u_label = label_logit(student_rows, columns, blend[0], label * sizes[1])
        mix = u_label
        if pixels.SMOOTH:
            # The sum of the class weights times the maximum goes off every class's logit.
            mix = label_logit(mix_rows, columns, blend[0], label * 0) - label_factors[2] / label_factors[1] * peak_u
        ce, whole, pull, even = label_terms(
            pixels, label_factors, ce_weight, label_gate, tl.log2(s1), temperature * (u_label - peak_u),
            temperature * mix,
        )  # fmt: skip
        ce_n = LN2 * tl.sum(tl.where(ce_counted & lost, float("nan"), ce), 0)
        if HAS_GRADIENT:
            tl.store(value_ptrs, tl.where(ce_counted, label.to(tl.float32), -1.0))
            tl.store(value_ptrs + x_n.shape[0], k_ce * whole / s1)
            if pixels.WEIGHED:
                tl.store(value_ptrs + 6 * x_n.shape[0], pull)
            if pixels.SMOOTH:
                tl.store(value_ptrs + 7 * x_n.shape[0], even)
    if pixels.USE_KL:
        t_fraction, below = target_places
        lost0 = lost_on_row(target_lost_rows[0], target_columns)[None, :]
        lost1 = lost_on_row(target_lost_rows[1], target_columns)[None, :]
        lost2 = lost_on_row(target_lost_rows[2], target_columns)[None, :]
        below_lost = tl.where(t_fraction > 0, tl.where(below, lost2, lost1), 0)
        lost = lost | ((tl.where(below, lost1, lost0) | below_lost) != 0)
        kl = (cross / sv * unit + tl.log2(su / sv)) * kl_weight
        kl_n = LN2 * tl.sum(tl.where(kl_counted & lost, float("nan"), kl), 0)
        if HAS_GRADIENT:
            tl.store(value_ptrs + 2 * x_n.shape[0], k_kl * kl_weight / su)
            tl.store(value_ptrs + 3 * x_n.shape[0], k_kl * kl_weight / sv)
    if HAS_GRADIENT:
        tl.store(value_ptrs + 4 * x_n.shape[0], peak_u)
        tl.store(value_ptrs + 5 * x_n.shape[0], peak_v)
    return ce_n, kl_n, has_peaks
