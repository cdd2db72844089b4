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

from .common import power

ROWS = tl.constexpr(4)
LOWEST_LOGIT = tl.constexpr(-2.5e38)
"""Below any logit, and the difference to any is finite."""
SMALL = tl.constexpr(2.0**-12)
"""Keeps a sum over classes of such differences finite."""


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
def along_row(row_n, columns, offset_c):
    """Logits on a low-resolution row, at one label column per lane; columns: left and right pixel, fraction."""
    left_cn = tl.load((row_n + columns[0])[None, :] + offset_c[:, None])
    right_cn = tl.load((row_n + columns[1])[None, :] + offset_c[:, None])
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
def target_group(at_qn, first_n, taps):
    """Where label rows lie between three target rows from `first_n` on.

    Returns: whether they lie there (the first always does), whether between the last two rows, the fraction, and the
    weights of the three rows.
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
