"""The fast Triton kernel for strides 2, 4 and 8: one lane owns one bilinear cell, S x S pixels between four corners.

A loop over the classes runs twice, for the sums of the softmaxes and for the gradient. Each turn reads a class's four
corners, of the student and of the target, and does all pixels of the cell from them (`surface`). Sums and factors of
the pixels stay in registers. Nothing of size C is held, and no class is padded. Normalised logits make a maximum per
pixel unnecessary while their range stays below 80 nats, which the route guarantees. Compiled for sm_90 at T = 2, S = 4
and 21 classes, a class of a pixel costs 28 instructions (`benchmarks/results/sass-sm90.md`).

The image is cut into strips of `rows` rows of cells. A strip's w + 1 columns of cells are w + 1 neighbouring lanes,
each of which walks down its strip; the strips of an image follow each other, so that a program's NC lanes are full
whatever w is:

    lane of a program       0 | 1   2   3   4   5   6   7       its lane 0 is the halo: a cell of the program before
    column j of cells       1 | 2   3  -1   0   1   2   3       (w = 4; the strip ends after j = 3)
    column of logits        - | 2   3   -   0   1   2   3       j takes from its own cell and from the lane before

A logit's gradient takes from four cells. Left and right: a lane keeps what its cell gives the left corner and gets what
the lane before gives its right one, by a shuffle; lane 0 only gives. Above and below: what a row of cells gives to the
row of logits below waits in `edges` for the next row of cells. Where two strips meet, the halves of both are in `edges`
and the launch of the totals adds them (`loss`). So every logit is one sum in one order, without atomic addition, and
its bits depend on neither `rows` nor NC.

Legend: B batch, C classes, h w student's size, ht wt target's size, S stride, NC lanes of a program, ROWS pixel rows
done in a turn (S = 8 does 2 of its 8, so that the values per pixel fit the registers), GROUPS = S / ROWS turns for a
row of cells. Row i of cells, -1 to h - 1, lies between rows i and i + 1 of logits, clamped; so do columns. `s_first`,
`s_step` and `t_first`, `t_step`: where pixels lie between the corners of their cell, see `interpolation`.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..problem import LossProblem
from .bilinear_cell.gradient import write_gradient
from .bilinear_cell.pixels import any_lost, pixel_factors, read_labels
from .bilinear_cell.surface import (
    contract,
    interpolation,
    label_moments,
    load_corners,
    make_surface,
    softmax_denominators,
)
from .common import (
    LN2,
    WRONG,
    Buffers,
    Needs,
    cdiv,
    dependent,
    gpu,
    integer_power,
    launch_options,
    load_label_factors,
    multiprocessors,
    pixels_of,
    power_of_2,
    register_limit,
    strides_of,
    take_turn,
)
from .geometry import target_tables
from .prepared import Prepared

REGISTERS = register_limit(168)
"""Per lane: nothing is spilt, and the next class's logits are loaded early; with 128, a turn waits for its loads.

KDCACHE_CELLS_REGISTERS in the environment is another limit, for measurements.
"""
RESIDENT = max(1, min(4, 512 // REGISTERS))
"""Warps that share a scheduler, of which a multiprocessor has four."""
ROW_TIME = (0.0, 1.0, 1.25, 1.8, 2.4)
"""A scheduler's time for a row of cells of 0 to 4 warps, in that of one; simulated (sass-sm90.md), not measured."""
STRIP_TIME = 0.2
"""What a warp's start and its strip's edges take, in rows of a lone warp."""


@triton.jit
def _or(a, b):
    """Combine for `tl.reduce`."""
    return a | b


@triton.jit(
    do_not_specialize=[
        "h", "w", "ht", "wt", "target_batch", "first_partial", "blocks", "strips", "rows",
        "label_stride_b", "label_stride_h", "label_stride_w",
        "label_gate_stride_b", "label_gate_stride_h", "label_gate_stride_w",
        "gate_stride_b", "gate_stride_h", "gate_stride_w",
    ]
)  # fmt: skip
def cells_kernel(
    student_ptr, student_lost_ptr, target_ptr, target_lost_ptr,
    tables_ptr, route_ptr, factors_ptr, mix_ptr, gradient_ptr, edges_ptr, partials_ptr, first_partial, pixels, h, w,
    ht, wt, target_batch, blocks, strips, rows, target_scale,
    label_stride_b, label_stride_h, label_stride_w, label_gate_stride_b, label_gate_stride_h, label_gate_stride_w,
    gate_stride_b, gate_stride_h, gate_stride_w, temperature,
    S: tl.constexpr, NC: tl.constexpr, POWER: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Compute the fused CE + KL loss and its gradient at label strides 2, 4 and 8, with one bilinear cell per lane.

    A bilinear cell is the S x S label pixels between four neighbouring logits. One program handles NC - 1 neighbouring
    columns of cells in `rows` rows of cells (a strip), from top to bottom. Images with route 0 are skipped, see
    `Prepared.route`.

    Shapes and units:
        student_ptr, target_ptr: (B, C, h, w) and (B, C, ht, wt) logits, as in `Prepared`.
        student_lost_ptr, target_lost_ptr: (B, h, w) and (B, ht, wt) uint8, 1 where a logit is unusable.
        route_ptr, factors_ptr, mix_ptr, target_scale, target_batch: fields of `Prepared`. tables_ptr:
            `Prepared.tables`, or None without a window.
        pixels: `Pixels`, labels and pixel weights. label_stride_b to gate_stride_w: their strides in elements.
        blocks: programs per image. strips: strips per image. temperature: T.
        S: label pixels per logit. NC: lanes per program. POWER: T if it is 1 to 4, else 0.
        DEPENDENT: whether the kernel may start before the previous one ends.
    Results:
        gradient_ptr: (B, C, h, w), except the rows of logits where strips meet. None computes no gradient.
        edges_ptr: (B, strips, planes, C, w) float32, what a strip adds to these rows. Plane 0 is for the row above the
            strip, and plane 1 for the row below. If S is 8, there are 4 planes instead of 2. Plane 1 is then for the
            row below if `rows` is odd, else plane 2 is. The other planes have intermediate sums.
        partials_ptr: `Buffers.partials`. Row first_partial + program gets the program's sums of CE and KL in nats.
    """
    take_turn(DEPENDENT)
    ROWS: tl.constexpr = 2 if S == 8 else S
    GROUPS: tl.constexpr = S // ROWS
    PLANES: tl.constexpr = 2 if GROUPS == 1 else 4
    pid = tl.program_id(0)
    partials_ptr += 2 * (first_partial + pid)
    image = pid // blocks
    route_ptr += 4 * image
    if tl.load(route_ptr) == 0:
        tl.store(partials_ptr, 0.0)
        tl.store(partials_ptr + 1, 0.0)
        return
    lane = tl.arange(0, NC)
    cell = pid % blocks * (NC - 1) + lane - 1
    alive = (cell >= 0) & (cell < strips * (w + 1))
    cell = tl.minimum(tl.maximum(cell, 0), strips * (w + 1) - 1)
    strip = cell // (w + 1)
    j = cell % (w + 1) - 1
    left_lane = tl.maximum(lane - 1, 0)
    owned = alive & (lane > 0)

    base = image.to(tl.int64) * pixels.num_classes
    student_ptr += base * (h * w)
    student_lost_ptr += image.to(tl.int64) * (h * w)
    s_column, s_first, s_step = interpolation(j, w, lane < 0, S)
    t_first = s_first
    t_step = s_step
    if pixels.USE_KL:
        target_ptr += base * (ht * wt)
        target_lost_ptr += image.to(tl.int64) * (ht * wt)
        row_shift = tl.load(route_ptr + 1)
        column_shift = tl.load(route_ptr + 2)
        flip = tl.load(route_ptr + 3) != 0
        t_low = tl.where(flip, w - 2 - j, j) + column_shift
        t_column, t_first, t_step = interpolation(t_low, wt, flip, S)
        if target_scale is not None:
            t_step *= target_scale
    label_ptr = pixels.labels
    if label_ptr is not None:
        label_ptr += image.to(tl.int64) * label_stride_b
    label_gate_ptr = pixels.label_gate
    if label_gate_ptr is not None:
        label_gate_ptr += image.to(tl.int64) * label_gate_stride_b
    if mix_ptr is not None:
        mix_ptr += image.to(tl.int64) * (h * w)
    gate_ptr = pixels.gate
    if gate_ptr is not None:
        gate_ptr += image.to(tl.int64) * gate_stride_b
    row_inside_ptr = tables_ptr
    column_inside_ptr = tables_ptr
    if tables_ptr is not None:
        target_rows, target_columns = target_tables(tables_ptr, h * S, w * S, target_batch)
        row_inside_ptr = target_rows.inside + image * (h * S)
        column_inside_ptr = target_columns.inside + image * (w * S)
    if gradient_ptr is not None:
        gradient_ptr += base * (h * w)
        edges_ptr += base * strips * PLANES * w
    plane = pixels.num_classes * w
    k_ce = tl.load(factors_ptr)
    k_kl = tl.load(factors_ptr + 1)
    label_factors = load_label_factors(pixels, factors_ptr)
    zero = tl.zeros((NC,), tl.float32)
    ce_sum = tl.zeros((NC,), tl.float64)
    kl_sum = tl.zeros((NC,), tl.float64)

    for turn in range(rows * GROUPS):
        # As blocks, because the interpreter makes no mask of a block's mask and a scalar's.
        step = turn // GROUPS + lane * 0
        g = turn % GROUPS + lane * 0
        i = strip * rows - 1 + step
        active = alive & (i < h)
        i = tl.minimum(i, h - 1)
        y_first = (g * ROWS + 0.5) / S
        y = i * S + (S // 2 + g * ROWS)
        x = j * S + S // 2
        s_top = tl.maximum(i, 0) * w
        s_bottom = tl.minimum(i + 1, h - 1) * w
        student = (student_ptr + s_top + s_column, student_ptr + s_bottom + s_column, h * w, s_first, s_step, None)
        target = student
        if pixels.USE_KL:
            t_top = tl.minimum(tl.maximum(row_shift + i, 0), ht - 1) * wt
            t_bottom = tl.minimum(tl.maximum(row_shift + i + 1, 0), ht - 1) * wt
            t_upper = target_ptr + t_top + t_column
            t_lower = target_ptr + t_bottom + t_column
            target = (t_upper, t_lower, ht * wt, t_first, t_step, target_scale)
        labels = (zero,)
        label_gate_ptrs = label_gate_ptr
        gate_ptrs = gate_ptr
        row_inside_ptrs = row_inside_ptr
        column_inside_ptrs = column_inside_ptr
        if label_ptr is not None and (pixels.USE_CE or not pixels.DISTILL_VOID):
            label_ptrs = label_ptr + y.to(tl.int64) * label_stride_h + x * label_stride_w
            labels, bits, lowest, highest = read_labels(
                label_ptrs, label_stride_h, label_stride_w, pixels, active, i, j, g, h, w, S, ROWS
            )
        if label_gate_ptr is not None:
            label_gate_ptrs = label_gate_ptr + y.to(tl.int64) * label_gate_stride_h + x * label_gate_stride_w
        if gate_ptr is not None:
            gate_ptrs = gate_ptr + y.to(tl.int64) * gate_stride_h + x * gate_stride_w
        if row_inside_ptr is not None:
            row_inside_ptrs = row_inside_ptr + y
            column_inside_ptrs = column_inside_ptr + x
        ce, kl, teacher = softmax_denominators(student, target, y_first, pixels, temperature, zero, S, ROWS, POWER)
        ce, kl, teacher, ce_cell, kl_cell, kl_any = pixel_factors(
            ce, kl, teacher, labels, label_gate_ptrs, label_gate_stride_h, label_gate_stride_w, pixels, gate_ptrs,
            gate_stride_h, gate_stride_w, row_inside_ptrs, column_inside_ptrs, k_ce, k_kl, label_factors, active, i, j,
            g, h, w, zero, S, ROWS,
        )  # fmt: skip
        even = (zero, zero, zero, zero)
        even_label = zero
        if pixels.SMOOTH:
            even = label_moments(labels, label_gate_ptrs, label_gate_stride_h, label_gate_stride_w, 0, True, S, ROWS)
            mix = (mix_ptr + s_top + s_column, mix_ptr + s_bottom + s_column, h * w, s_first, s_step, None)
            even_label = label_factors[1] * contract(make_surface(load_corners(mix, 0), mix, y_first, S), even, S, ROWS)

        present = 0
        if pixels.USE_CE:
            present = tl.reduce(bits, 0, _or)
        # The share of the upper row of logits at the last pixel row of this turn, and its decrease per pixel row.
        inner = (i >= 0) & (i < h - 1)
        upper_last = tl.where(inner, (S - (g + 1) * ROWS + 0.5) / S, tl.where(i < 0, 0.0, 1.0))
        upper_step = tl.where(inner, 1.0 / S, 0.0)
        writes = owned & active & (j >= 0)
        gradient_ptrs = gradient_ptr
        edge_ptrs = edges_ptr
        if gradient_ptr is not None:
            gradient_ptrs = gradient_ptr + i * w + j
            edge_ptrs = edges_ptr + strip.to(tl.int64) * (PLANES * plane) + j
        kl_cell, ce_label = write_gradient(
            student, target, y_first, labels, label_gate_ptrs, label_gate_stride_h, label_gate_stride_w, present, even,
            ce, kl, teacher, kl_cell, left_lane, upper_last, upper_step, step, g, writes, gradient_ptrs, edge_ptrs,
            k_ce, k_kl, label_factors, pixels, w, temperature, S, ROWS, POWER,
        )  # fmt: skip

        if pixels.USE_CE or pixels.USE_KL:
            student_spoilt = any_lost(student_lost_ptr, s_top, s_bottom, j, w)
        if pixels.USE_CE:
            if pixels.SMOOTH:
                ce_label += even_label
            ce_cell = LN2 * (ce_cell - temperature * ce_label)
            spoilt = (lowest == WRONG) | ((highest >= 0) & student_spoilt)
            ce_cell = tl.where(spoilt, float("nan"), ce_cell)
            ce_sum += tl.where(owned & active, ce_cell, 0.0)
        if pixels.USE_KL:
            spoilt = student_spoilt | any_lost(target_lost_ptr, t_top, t_bottom, t_low, wt)
            kl_cell = tl.where(kl_any & spoilt, float("nan"), LN2 * kl_cell)
            kl_sum += tl.where(owned & active, kl_cell, 0.0)
        # Edges are read by the lane that wrote them, but not in every layout by the same thread.
        tl.debug_barrier()
    tl.store(partials_ptr, tl.sum(ce_sum, 0))
    tl.store(partials_ptr + 1, tl.sum(kl_sum, 0))


class Tiling(NamedTuple):
    """How `cells_kernel` divides an image among its programs. The tiling does not change any bit of the gradient.

    Attributes:
        rows: rows of bilinear cells per strip. An image has h + 1 rows of cells, one more than rows of logits.
        lanes: lanes per program, a power of two. One lane repeats a cell of the previous program.
    """

    rows: int
    lanes: int


def choose_tiling(problem: LossProblem) -> Tiling:
    """Return the `Tiling` of a problem, with the number of rows per strip, 1 to 16, that is predicted to be fastest.

    The prediction is the time of the busiest scheduler of the GPU. On the CPU (Triton's interpreter), return a tiling
    into few, large programs.
    """
    B, _, h, w = problem.student.shape
    # One warp: the lane shift is then a shuffle. Of 32 lanes, 31 own a cell.
    lanes = gpu(problem.student.device).warp_size
    if problem.student.device.type == "cpu":
        # The interpreter's time grows with the turns and programs, hardly with the lanes.
        return Tiling(2, min(512, max(lanes, power_of_2((h // 2 + 1) * (w + 1) + 1))))
    schedulers = 4 * multiprocessors(problem.student.device)

    def time(rows: int) -> float:
        warps = cdiv(B * cdiv(cdiv(h + 1, rows) * (w + 1), lanes - 1), schedulers)
        rounds, rest = divmod(warps, RESIDENT)
        return rows * (rounds * ROW_TIME[RESIDENT] + ROW_TIME[rest]) + warps * STRIP_TIME

    return Tiling(min(range(min(16, h + 1), 0, -1), key=time), lanes)


class Seams(NamedTuple):
    """How an image is cut into strips of bilinear cells, to add up the gradient at the seams, where two strips meet.

    Attributes:
        strips: strips per image.
        rows: rows of cells per strip.
        groups: into how many groups of pixel rows `cells_kernel` divides a cell: 4 at stride 8, else 1. The layout of
            the kernel's result `edges_ptr`, the gradient at the seams, depends on this number.
    """

    strips: int
    rows: int
    groups: int


def _cut(problem: LossProblem, tiling: Tiling) -> tuple[int, int]:
    """Return strips of an image, and programs of all its strips."""
    h, w = problem.student.shape[2:]
    strips = cdiv(h + 1, tiling.rows)
    return strips, cdiv(strips * (w + 1), tiling.lanes - 1)


def _groups(stride: int) -> int:
    return 4 if stride == 8 else 1


def needs(problem: LossProblem, stride: int, tiling: Tiling) -> Needs:
    """Return the number of programs and the scratch memory that `launch` needs for the same problem, stride and tiling.

    The scratch has 8 bytes per image, class, strip and column of logits, or 16 bytes at stride 8.
    """
    B, C, _, w = problem.student.shape
    strips, blocks = _cut(problem, tiling)
    return Needs(B * blocks, B * strips * (2 if _groups(stride) == 1 else 4) * C * w)


def seams(problem: LossProblem, stride: int, tiling: Tiling) -> Seams:
    """Return how `launch` cuts each image into strips, each of several rows of bilinear cells.

    The kernel writes the gradient of each strip separately. Where two strips meet, `loss.add_up` adds their two parts
    of the gradient.

    Args:
        problem: the checked arguments of the loss.
        stride: label pixels per logit.
        tiling: the sizes from `choose_tiling`.
    """
    return Seams(_cut(problem, tiling)[0], tiling.rows, _groups(stride))


def launch(
    problem: LossProblem,
    prepared: Prepared,
    gradient: Tensor | None,
    buffers: Buffers,
    tiling: Tiling,
    *,
    stride: int,
) -> None:
    """Launch `cells_kernel`, which computes the loss of the images with route 1 (see `Prepared.route`).

    It writes sums of CE and KL to `buffers.partials`, and the gradient where strips meet to `buffers.scratch`.
    `loss.add_up` adds them up.

    Shapes and units:
        problem, prepared: the checked arguments, and the result of `prepare` for them.
        gradient: (B, C, h, w) contiguous result, written for images with route 1, except at seams: the rows of logits
            where two strips meet. None computes no gradient.
        buffers: memory of the size that `needs` returns. Its scratch gets what each strip adds at seams.
        tiling: from `choose_tiling`.
        stride: label pixels per logit along an axis, 2, 4 or 8.
    """
    (B, _, h, w), device = problem.student.shape, problem.student.device
    strips, blocks = _cut(problem, tiling)
    cells_kernel[(B * blocks,)](
        prepared.student, prepared.student_lost, prepared.target, prepared.target_lost,
        None if problem.window is None else prepared.tables, prepared.route, prepared.factors, prepared.mix, gradient,
        buffers.scratch, buffers.partials, buffers.first,
        pixels_of(problem)._replace(label_strides=None, gate_strides=None, label_gate_strides=None),
        h, w, *prepared.target.shape[2:], prepared.target_batch, blocks, strips, tiling.rows,
        prepared.target_scale, *strides_of(problem), problem.temperature,
        S=stride, NC=tiling.lanes, POWER=integer_power(problem.temperature),
        num_stages=1, enable_fp_fusion=False, **dependent(device), **launch_options(tiling.lanes, REGISTERS, device),
    )  # fmt: skip
