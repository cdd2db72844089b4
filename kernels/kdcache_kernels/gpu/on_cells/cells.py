"""The target's cells on CUDA: their places in both sets of logits, how much they count, and the way back.

Legend: B batch, H W the image, hs ws the student's own size, h w the target's cells.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import ShapeError, describe
from ...on_cells.problem import RelationProblem
from ..common import multiprocessors
from ..geometry import Taps, store_taps

LOG2_E = tl.constexpr(1.4426950408889634)
TABLE = 1024
"""Entries of a table that are written at a time."""
OFFSETS = 2**31
"""Elements that an offset of 32 bits can reach."""
ENTRIES = 1024
"""Blocks of cells or classes that are read at a time."""
BLOCKS = (128, 32)
"""Cells of a program, the more the fewer steps its sums take; the fewer where the GPU would not be full."""


class Samples(NamedTuple):
    """A logit map and the neighbour tables to read it at the centres of the target's cells, as kernels take them.

    Attributes:
        logits: the map, (B, C, rows, columns). Inside a kernel it is a pointer.
        rows, columns: neighbour tables (`geometry.Taps`) of the rows and columns of cells. None if the map's elements
            are exactly the cells.
    """

    logits: Any
    rows: Any
    columns: Any


@triton.jit(
    do_not_specialize=["h", "w", "hs", "ws", "H", "W", "view_height", "view_width"],
    do_not_specialize_on_alignment=["window_ptr", "flip_ptr"],
)
def tables_kernel(
    window_ptr, flip_ptr, pixel_rows, pixel_columns, cell_rows, cell_columns, student_rows, student_columns,
    h, w, hs, ws, H, W, view_height, view_width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the neighbour tables that the relation loss needs. One program writes the tables of one image.

    Shapes and units:
        window_ptr: (B, 4) float64 edges y0, x0, y1, x1 in pixels of the view, or None for the whole view.
        flip_ptr: (B,) uint8, 1 for a mirrored image, or None if none is mirrored.
        view_height, view_width: size of the view in pixels. BLOCK: entries that are written at a time.
    Results: each is a `geometry.Taps`, or None if the caller does not need this table
        pixel_rows, pixel_columns: neighbours of the H label rows and W label columns in the view's h x w cells.
        cell_rows, cell_columns: neighbours of the window's h rows and w columns of cells in the view's h x w cells.
        student_rows, student_columns: neighbours of h rows and w columns of cells in the student's hs x ws logits.
    """
    image = tl.program_id(0)
    flip = image < 0
    if student_rows is not None:  # every program writes the same
        store_taps(student_rows, 0, h, h, hs, image, image, flip, False, False, BLOCK)
        store_taps(student_columns, 0, w, w, ws, image, image, flip, False, False, BLOCK)
    if cell_rows is not None:
        MOVED: tl.constexpr = window_ptr is not None
        y0 = tl.full((), 0.0, tl.float64)
        x0, y1, x1 = y0, y0, y0
        if MOVED:
            y0 = tl.load(window_ptr + 4 * image)
            x0 = tl.load(window_ptr + 4 * image + 1)
            y1 = tl.load(window_ptr + 4 * image + 2)
            x1 = tl.load(window_ptr + 4 * image + 3)
        still = image < 0
        if flip_ptr is not None:
            flip = tl.load(flip_ptr + image) != 0
        store_taps(pixel_rows, image * H, H, view_height, h, y0, y1, still, MOVED, False, BLOCK)
        store_taps(pixel_columns, image * W, W, view_width, w, x0, x1, flip, MOVED, False, BLOCK)
        store_taps(cell_rows, image * h, h, view_height, h, y0, y1, still, MOVED, False, BLOCK)
        store_taps(cell_columns, image * w, w, view_width, w, x0, x1, flip, MOVED, False, BLOCK)


@triton.jit
def cells_of_program(plane, blocks, BLOCK: tl.constexpr):
    """Return this program's image, the indices of its BLOCK cells in the image, and which of these cells exist.

    An image has `plane` cells and `blocks` programs. Cells that do not exist have index 0.
    """
    image = tl.program_id(0) // blocks
    offs_n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return image, tl.where(offs_n < plane, offs_n, 0), offs_n < plane


@triton.jit
def _share(cell_n, cells, pixel_n, pixels):
    """Return the part of a cell that a pixel fills along an axis, and whether it fills any."""
    start_n = tl.maximum(cell_n * pixels, pixel_n * cells)
    end_n = tl.minimum((cell_n + 1) * pixels, (pixel_n + 1) * cells)
    return (end_n - start_n).to(tl.float32) / pixels, end_n > start_n


@triton.jit(
    do_not_specialize=[
        "h", "w", "H", "W", "rows", "columns", "blocks",
        "mask_stride_b", "mask_stride_h", "mask_stride_w", "gate_stride_b", "gate_stride_h", "gate_stride_w",
    ],
)  # fmt: skip
def weights_kernel(
    inside_y_ptr, inside_x_ptr, mask_ptr, mask_stride_b, mask_stride_h, mask_stride_w, gate_ptr, gate_stride_b,
    gate_stride_h, gate_stride_w, counted_ptr, weight_ptr, totals_ptr, h, w, H, W, rows, columns, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute which share of each target cell counts in the relation loss's mean over cells, and the cell's weight.

    A cell is the area of the image that one target logit covers. One program handles BLOCK cells of one image.

    Shapes and units:
        inside_y_ptr, inside_x_ptr: (B, H) and (B, W) uint8, whether label rows and columns lie in the view, or None for
            all.
        mask_ptr: (B, H, W) uint8, 0 for pixels to leave out, or None to count all pixels inside the view.
        gate_ptr: (B, H, W) weights of pixels, or None for ones. The strides of both are in elements.
        h, w, H, W: numbers of cells, and label size in pixels.
        rows, columns: the largest number of label pixels that touch a cell along each axis. blocks: programs per image.
    Results:
        counted_ptr: (B, h, w) float32, the share of the cell's area whose pixels count, 0 to 1.
        weight_ptr: (B, h, w) float32, the same share with each pixel multiplied by its gate.
        totals_ptr: (B * blocks,) float64, the sum of the counted shares per program.
    """
    image, cell_n, exists = cells_of_program(h * w, blocks, BLOCK)
    image64 = image.to(tl.int64)
    i_n, j_n = cell_n // w, cell_n % w
    top_n, left_n = i_n * H // h, j_n * W // w
    counted = tl.zeros((BLOCK,), tl.float32)
    weight = counted
    for dy in range(rows):
        y_n = top_n + dy
        share_y, fills_y = _share(i_n, h, y_n, H)
        fills_y = fills_y & exists
        if inside_y_ptr is not None:
            fills_y = fills_y & (tl.load(inside_y_ptr + image * H + y_n, mask=fills_y, other=0) != 0)
        counted_y = tl.zeros((BLOCK,), tl.float32)
        weight_y = counted_y
        for dx in range(columns):
            x_n = left_n + dx
            share_x, fills = _share(j_n, w, x_n, W)
            fills = fills & fills_y
            if inside_x_ptr is not None:
                fills = fills & (tl.load(inside_x_ptr + image * W + x_n, mask=fills, other=0) != 0)
            if mask_ptr is not None:
                offs = image64 * mask_stride_b + y_n.to(tl.int64) * mask_stride_h + x_n.to(tl.int64) * mask_stride_w
                fills = fills & (tl.load(mask_ptr + offs, mask=fills, other=0) != 0)
            counted_y += tl.where(fills, share_x, 0.0)
            if gate_ptr is not None:
                offs = image64 * gate_stride_b + y_n.to(tl.int64) * gate_stride_h + x_n.to(tl.int64) * gate_stride_w
                gate = tl.load(gate_ptr + offs, mask=fills, other=0).to(tl.float32)
                # Chosen, not multiplied: a gate of a pixel that does not count may be NaN.
                weight_y += tl.where(fills, share_x * gate, 0.0)
        counted += share_y * counted_y
        weight += share_y * weight_y
    if gate_ptr is None:
        weight = counted
    offs = image64 * h * w + cell_n
    tl.store(counted_ptr + offs, counted, mask=exists)
    tl.store(weight_ptr + offs, weight, mask=exists)
    tl.store(totals_ptr + tl.program_id(0), tl.sum(tl.where(exists, counted, 0.0).to(tl.float64), 0))


@triton.jit
def corners(samples, image, batched, cell_n, h, w, stride_h, stride_w, FLAT: tl.constexpr):
    """Return the offsets of the four logits around the centre of each cell, and two bilinear weights.

    Shapes and units:
        samples: `Samples`. Without neighbour tables, all four offsets are the cell's own logit, and both weights are 0.
        image: index of the image. batched: 1 if the neighbour tables differ between images, else 0.
        cell_n: indices of the cells in the image. h, w: rows and columns of cells.
        stride_h, stride_w: strides of the logits in elements. FLAT: whether rows follow each other without a gap.
    Returns: (top left, top right, bottom left, bottom right, weight of the bottom, weight of the right). Offsets are in
        elements, from a class's first logit.
    """
    i_n, j_n = cell_n // w, cell_n % w
    # With an else: the compiler also compiles what stands behind a return.
    if samples.rows is None:
        top_left = cell_n * stride_w if FLAT else i_n * stride_h + j_n * stride_w
        top_right, bottom_left, bottom_right = top_left, top_left, top_left
        down = tl.zeros(cell_n.shape, tl.float32)
        right = down
    else:
        y_n, x_n = batched * image * h + i_n, batched * image * w + j_n
        top_n, left_n = tl.load(samples.rows.index + y_n), tl.load(samples.columns.index + x_n)
        down, right = tl.load(samples.rows.fraction + y_n), tl.load(samples.columns.fraction + x_n)
        top, bottom = top_n * stride_h, (top_n + (down > 0).to(tl.int32)) * stride_h
        left, after = left_n * stride_w, (left_n + (right > 0).to(tl.int32)) * stride_w
        top_left, top_right, bottom_left, bottom_right = top + left, top + after, bottom + left, bottom + after
    return top_left, top_right, bottom_left, bottom_right, down, right


@triton.jit
def logit(ptr, corners, exists, SAMPLED: tl.constexpr):
    """Return one class's float32 logits at a block of cells.

    If SAMPLED, each is interpolated bilinearly from four logits. Otherwise it is the cell's own logit.

    Shapes and units:
        ptr: pointer to the class's logits of the image.
        corners: offsets and weights of each cell, from the function `corners`.
        exists: bool block, whether the cell exists. Cells that do not exist get 0.
    """
    x = tl.load(ptr + corners[0], mask=exists, other=0.0).to(tl.float32)
    if SAMPLED:
        next_x = tl.load(ptr + corners[1], mask=exists, other=0.0).to(tl.float32)
        below = tl.load(ptr + corners[2], mask=exists, other=0.0).to(tl.float32)
        next_below = tl.load(ptr + corners[3], mask=exists, other=0.0).to(tl.float32)
        x += corners[5] * (next_x - x)
        x += corners[4] * (below + corners[5] * (next_below - below) - x)
    return x


@triton.jit
def take(x, limit, scale, top, total, lost):
    """Add one class's logits to a running softmax over the classes, and return its new state (top, total, lost).

    Shapes and units:
        x: float32 logits of a block of cells. A logit that is NaN or exceeds `limit` in magnitude is replaced by 0.
        scale: log2(e) / T.
        top: the largest logit so far. total: the sum of exp2((logit - top) * scale) so far.
        lost: int32, 1 if a logit so far was NaN or too large, else 0.
    """
    usable = tl.abs(x) <= limit
    x = tl.where(usable, x, 0.0)
    e = tl.exp2(-tl.abs(x - top) * scale)
    total = tl.where(x > top, total * e + 1.0, total + e)
    return tl.maximum(top, x), total, tl.where(usable, lost, 1)


@triton.jit
def weigh(counted_ptr, weight_ptr, offs, exists, lost):
    """Return the float32 weights of a block of cells in the relation loss.

    Shapes and units:
        counted_ptr, weight_ptr: (B, h, w) float32 from `weights_kernel`, or None if every cell counts and weighs 1.
        offs: offsets of the cells in these tensors.
        exists: bool, whether the cell exists. Otherwise its weight is 0.
        lost: int32, not 0 if a logit of the cell is unusable. Its weight becomes NaN if the cell counts, else 0.
    """
    weight = tl.where(exists, 1.0, 0.0)
    counts = exists
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=exists, other=0.0)
        counts = tl.load(counted_ptr + offs, mask=exists, other=0.0) > 0
    return tl.where(lost == 0, weight, tl.where(counts, float("nan"), 0.0))


@triton.jit
def _weight_of(taps, cell_n, pixel_n, exists):
    """Return a cell's weight of a pixel of the student's array along an axis."""
    index_n = tl.load(taps.index + cell_n, mask=exists, other=-2)
    fraction_n = tl.load(taps.fraction + cell_n, mask=exists, other=0.0)
    return tl.where(index_n == pixel_n, 1.0 - fraction_n, tl.where(index_n + 1 == pixel_n, fraction_n, 0.0))


@triton.jit(do_not_specialize=["h", "w", "hs", "ws", "rows", "columns", "blocks"])
def gather_kernel(
    cells_ptr, row_taps, column_taps, gradient_ptr, h, w, hs, ws, rows, columns, blocks, BLOCK: tl.constexpr
):
    """Carry a gradient from the target's cells back to the student's logits.

    This is the transpose of the student's bilinear resize. One program handles BLOCK logits of one of the B * C planes.

    Shapes and units:
        cells_ptr: (B, C, h, w) float32, the gradient by the resized logits.
        row_taps, column_taps: neighbour tables (`geometry.Taps`) of the rows and columns of cells in the student's
            logits.
        gradient_ptr: (B, C, hs, ws) float32 result.
        rows, columns: the largest number of cells that read a logit, along each axis. blocks: programs per plane.
    """
    offs_n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = offs_n < hs * ws
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    y_n, x_n = offs_n // ws, offs_n % ws
    # The first cell whose centre lies beyond the pixel before: (i + 1/2) hs / h - 1/2 > y - 1.
    top_n = tl.maximum((2 * y_n - 1) * h // (2 * hs) - 1, 0)
    left_n = tl.maximum((2 * x_n - 1) * w // (2 * ws) - 1, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    cells_ptr += plane * h * w
    for dy in range(rows):
        i_n = top_n + dy
        here = exists & (i_n < h)
        weight_y = _weight_of(row_taps, i_n, y_n, here)
        line = tl.zeros((BLOCK,), tl.float32)
        for dx in range(columns):
            j_n = left_n + dx
            cell = here & (j_n < w)
            weight_x = _weight_of(column_taps, j_n, x_n, cell)
            line += weight_x * tl.load(cells_ptr + i_n * w + j_n, mask=cell, other=0.0)
        total += weight_y * line
    tl.store(gradient_ptr + plane * hs * ws + offs_n, total, mask=exists)


Axes = tuple[Taps, Taps] | tuple[None, None]
"""The neighbour tables of rows and of columns."""


def launch_tables(problem: RelationProblem) -> tuple[Axes, Axes, Axes]:
    """Compute the neighbour tables with which the relation loss interpolates, by a launch of `tables_kernel`.

    Returns: three pairs of a table for rows and a table for columns. The first pair gives the neighbours of label
        pixels in the view's cells. The second gives the neighbours of the window's cells in the view's cells. The third
        gives the neighbours of the window's cells in the student's logits. The first two are (None, None) without
        window and flip. The third is (None, None) if the student has the target's size.
    """
    B, (H, W), (h, w), device = problem.student.shape[0], problem.size, problem.grid, problem.student.device

    def taps(*shape: int) -> Taps:
        kinds = (torch.int32, torch.float32, torch.uint8)
        return Taps(*(torch.empty(shape, dtype=kind, device=device) for kind in kinds))

    moved = problem.is_moved
    pixels: Axes = (taps(B, H), taps(B, W)) if moved else (None, None)
    cells: Axes = (taps(B, h), taps(B, w)) if moved else (None, None)
    student: Axes = (taps(h), taps(w)) if problem.is_resized else (None, None)
    if moved or problem.is_resized:
        window = None if problem.window is None else problem.window.contiguous()
        flip = None if problem.flip is None else problem.flip.contiguous().view(torch.uint8)
        tables_kernel[(B if moved else 1,)](
            window, flip, *pixels, *cells, *student, h, w, *problem.student.shape[2:], H, W, *problem.view_size,
            BLOCK=TABLE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return pixels, cells, student


def launch_weights(
    problem: RelationProblem, pixel_taps: Axes, block: int
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """Compute the share of each target cell's area whose pixels count, and the cell's weight.

    The weight is the same share, but with each pixel multiplied by its gate.

    Args:
        problem: the checked arguments of the relation loss.
        pixel_taps: the first pair that `launch_tables` returns, the neighbour tables of the label pixels.
        block: cells per program.
    Returns: (counted, weight, counts), or (None, None, None) if each cell counts and weighs 1. `counted` is the share.
        It and `weight` are (B, h, w) float32. `counts` is (programs,) float64, the sum of `counted` over each program's
        cells.
    """
    if not problem.is_weighted:
        return None, None, None
    B, (H, W), (h, w), device = problem.student.shape[0], problem.size, problem.grid, problem.student.device
    blocks = triton.cdiv(h * w, block)
    counted, weight = (torch.empty((B, h, w), device=device) for _ in range(2))
    counts = torch.empty(B * blocks, dtype=torch.float64, device=device)
    mask, gate = problem.counted, problem.pixel_weight
    if gate is not None and gate.dtype == torch.bool:
        gate = gate.view(torch.uint8)
    weights_kernel[(B * blocks,)](
        *(None if taps is None else taps.inside for taps in pixel_taps),
        None if mask is None else mask.view(torch.uint8), *((0, 0, 0) if mask is None else mask.stride()),
        gate, *((0, 0, 0) if gate is None else gate.stride()),
        counted, weight, counts, h, w, H, W, triton.cdiv(H, h) + 1, triton.cdiv(W, w) + 1, blocks,
        BLOCK=block, num_warps=1,
    )  # fmt: skip
    return counted, weight, counts


class Laid(NamedTuple):
    """The inputs that the kernels of the relation loss on CUDA share.

    A cell is the area of the image that one target logit covers.

    Attributes:
        samples: the first arguments of the kernels. They are the student's `Samples` and four strides, the teacher's
            `Samples` and four strides, and 1 if the teacher's neighbour tables differ between images, else 0.
        taps: (rows, columns), neighbour tables with which the student's logits are resized to the cells. (None, None)
            if the student has the target's size.
        flat: the constants S_FLAT and T_FLAT: whether the rows of the student's and the teacher's logits follow each
            other in memory without a gap.
        block, blocks: cells per program, and programs per image.
        counted, weight: (B, h, w) counted share and weight of each cell, or None if each is 1. The counted share is the
            share of the cell's area whose pixels count, 0 to 1.
        counts: (B * blocks,) float64, the sum of `counted` over each program's cells. None if `counted` is None.
    """

    samples: tuple[Any, ...]
    taps: Axes
    flat: dict[str, bool]
    block: int
    blocks: int
    counted: Tensor | None
    weight: Tensor | None
    counts: Tensor | None


def lay(problem: RelationProblem) -> Laid:
    """Return the inputs that the relation loss's kernels share: neighbour tables, cell weights and launch sizes."""
    student, teacher, device = problem.student.detach(), problem.teacher, problem.student.device
    B, (h, w) = student.shape[0], problem.grid
    if teacher.dtype == torch.float64:
        teacher = teacher.float()
    pixel_taps, cell_taps, student_taps = launch_tables(problem)
    block = BLOCKS[0] if B * triton.cdiv(h * w, BLOCKS[0]) >= 4 * multiprocessors(device) else BLOCKS[1]
    if device.type == "cpu":  # the interpreter's time grows with the programs, hardly with the lanes
        block = BLOCKS[0]
    samples = (
        Samples(student, *student_taps), *student.stride(),
        Samples(teacher, *cell_taps), *teacher.stride(), int(problem.is_moved),
    )  # fmt: skip
    flat = {name: x.stride(2) == x.shape[3] * x.stride(3) for name, x in (("S_FLAT", student), ("T_FLAT", teacher))}
    weights = launch_weights(problem, pixel_taps, block)
    return Laid(samples, student_taps, flat, block, triton.cdiv(h * w, block), *weights)


def on_own_grid(problem: RelationProblem, laid: Laid, cells: Tensor) -> Tensor:
    """Convert the gradient by the student's logits on the cells into the gradient by the student's own logits.

    Args:
        problem: the arguments of the relation loss.
        laid: from `lay`. It has the bilinear weights of the resize from the student's logits to the cells.
        cells: (B, C, h, w) float32, the gradient by the student's logits after this resize.
    Returns: (B, C, hs, ws). It is `cells` itself if the student's logits have the size (h, w) already.
    """
    if not problem.is_resized:
        return cells
    gradient = torch.empty(problem.student.shape, device=cells.device)
    (B, C, hs, ws), (h, w) = problem.student.shape, problem.grid
    blocks = triton.cdiv(hs * ws, BLOCKS[0])
    # In one dimension of the grid: a second one ends at 65,535 programs.
    gather_kernel[(blocks * B * C,)](
        cells, *laid.taps, gradient, h, w, hs, ws, *(2 * triton.cdiv(n, m) + 3 for n, m in ((h, hs), (w, ws))),
        blocks, BLOCK=BLOCKS[0], num_warps=4,
    )  # fmt: skip
    return gradient


def check_offsets(problem: RelationProblem) -> None:
    """Raise ShapeError if one image of the student's or teacher's logits spans 2^31 elements or more.

    The kernels count elements in 32 bits.
    """
    for name, tensor in (("student_logits_BChw", problem.student), ("teacher_logits_BChw", problem.teacher)):
        reach = sum((n - 1) * abs(stride) for n, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
        if (elements := max(reach, tensor[0].numel())) >= OFFSETS:
            raise ShapeError(
                f"One image of {name} is too large for the CUDA kernels: {elements:,} elements, above 2^31 - 1 "
                f"({describe(tensor)})",
                fix=f"Pass {name}.contiguous(), crop the images, or pass impl='reference'.",
            )
