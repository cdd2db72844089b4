"""Positions of every pixel in the two grids of logits, the kernel of each image, and the factors of the pixels.

One program per table writes neighbours in float64, in the order of operations of `window.py` and without fused
multiplications, so that they are bit for bit those of the reference; others turn counts into factors and route images.
Everything depends on values on the device (windows, ranges of logits), so the host never learns the route: both loss
kernels are launched and each returns at once from the images of the other.

Legend: B batch, H W label size, h w student's size, ht wt target's size, S stride.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import sum_pairs, take_turn

MOST_NATS = tl.constexpr(80.0)
"""Range of a pixel's logits, over min(T, 1), up to which exp2 of normalised logits stays a normal float32."""
ALIGNED = tl.constexpr(1e-9)
"""Cells by which a window may miss the grid and still count as aligned with it."""


class Taps(NamedTuple):
    """A neighbour table for one axis: the two neighbouring logits of each pixel, with their bilinear weights.

    It is not a tap of a model's layer. The tensors have shape (B, N) for N rows or columns of pixels, or (1, N) or (N,)
    if all images share the table. In kernels they are pointers. In an image with logits x along the axis, pixel n has
    the value (1 - fraction[n]) * x[index[n]] + fraction[n] * x[index[n] + 1].

    Attributes:
        index: int32, the lower neighbour. The upper neighbour is index + 1, or index itself where fraction is 0.
        fraction: float32, weight of the upper neighbour, 0 to 1. A NaN window gives NaN, with index 0.
        inside: uint8, 1 if the pixel's centre lies in the target's view along this axis. Not used for the student.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple's method, which nobody calls
    fraction: Tensor
    inside: Tensor

    @classmethod
    def empty(cls, device: torch.device, *shape: int) -> "Taps":
        """Return `Taps` whose three tensors have the given shape, are on `device` and are not initialised."""
        kinds = (torch.int32, torch.float32, torch.uint8)
        return cls(*(torch.empty(shape, dtype=kind, device=device) for kind in kinds))


@triton.jit
def _table(tables_ptr, first, size):
    """Return the `Taps` of `size` pixels: three planes of 32 bits, from element `first` on."""
    fraction = (tables_ptr + (first + size)).to(tl.pointer_type(tl.float32))
    return Taps(tables_ptr + first, fraction, tables_ptr + (first + 2 * size))


@triton.jit
def student_tables(tables_ptr, H, W):
    """Return the neighbours of the H label rows and of the W label columns in the student's logits, a `Taps` each.

    `tables_ptr` points to `Prepared.tables`.
    """
    return _table(tables_ptr, 0, H), _table(tables_ptr, 3 * H, W)


@triton.jit
def target_tables(tables_ptr, H, W, target_batch):
    """Return two neighbour tables, a `Taps` each: of the label rows and of the label columns, in the target's logits.

    The tables of `target_batch` images follow each other, with H or W entries per image. `target_batch` is 1 if all
    images share one table. `tables_ptr` points to `Prepared.tables`.
    """
    first = 3 * (H + W)
    return _table(tables_ptr, first, target_batch * H), _table(
        tables_ptr, first + 3 * target_batch * H, target_batch * W
    )


def tables_size(H: int, W: int, target_batch: int) -> int:
    """Return the number of int32 elements of all neighbour tables of H label rows and W label columns.

    `target_batch` is the number of images with their own neighbour tables of the target: 1 if they share them, 0
    without KL.
    """
    return 3 * (H + W) * (1 + target_batch)


@triton.jit
def _double(x):
    """Return a scalar in float64. A method would fail, because Triton makes a constant of an argument of 1."""
    return x * tl.full((), 1.0, tl.float64)


@triton.jit
def load_window(window_ptr, image, view_height, view_width):
    """Return the edges (y0, x0, y1, x1) of an image's window, float64 in pixels of the view.

    If the window shows no part of the view, y0 and x0 are NaN, which makes the loss NaN.

    Shapes and units:
        window_ptr: (B, 4) float64, or None for the whole view.
        image: index of the image. view_height, view_width: size of the view in pixels.
    """
    if window_ptr is not None:
        window_ptr += image * 4
        y0 = tl.load(window_ptr)
        x0 = tl.load(window_ptr + 1)
        y1 = tl.load(window_ptr + 2)
        x1 = tl.load(window_ptr + 3)
        misses = (y0 >= view_height) | (x0 >= view_width) | (y1 <= 0) | (x1 <= 0)
        y0 = tl.where(misses, float("nan"), y0)
        x0 = tl.where(misses, float("nan"), x0)
    else:
        y0 = _double(0)
        x0 = y0
        y1 = _double(view_height)
        x1 = _double(view_width)
    return y0, x0, y1, x1


@triton.jit
def view_positions(offs_n, size, view, start, end, HAS_WINDOW: tl.constexpr):
    """Return where the centres of label pixels lie in the view along one axis, float64 in pixels of the view.

    Shapes and units:
        offs_n: indices of the label pixels. size: number of label pixels along the axis.
        view: pixels of the view along the axis.
        start, end: edges of the window in pixels of the view, read only with HAS_WINDOW. Without HAS_WINDOW, the axis
            shows the whole view.
    """
    centre = offs_n.to(tl.float64) + 0.5
    return start + centre * (end - start) / _double(size) if HAS_WINDOW else centre * _double(view) / _double(size)


@triton.jit
def is_inside(position, view):
    """Return whether positions along an axis lie between 0 and `view` pixels, both edges included.

    NaN counts as inside, which makes the loss NaN.
    """
    return ((position < 0) | (position > _double(view))) == 0


@triton.jit
def store_taps(
    taps, first, size, view, cells, view_start, view_end, flip,
    HAS_WINDOW: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the neighbours of `size` label pixels along one axis to a neighbour table, beginning with entry `first`.

    Shapes and units:
        taps: the table, a `Taps` of pointers.
        view: pixels of the view along the axis. cells: logits that cover the view along the axis.
        view_start, view_end: edges of the window in pixels of the view, read only with HAS_WINDOW.
        flip: whether to mirror the axis.
        ALIGN: whether the resize aligns corners. BLOCK: entries that are written at a time.
    """
    for start in range(0, size, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        exists = offs_n < size
        pixel = tl.where(flip, size - 1 - offs_n, offs_n)
        position = view_positions(pixel, size, view, view_start, view_end, HAS_WINDOW)
        if not ALIGN:
            source = position * _double(cells) / _double(view) - 0.5
        elif view == 1:
            source = position * 0.0
        else:
            source = (position - 0.5) * _double(cells - 1) / _double(view - 1)
        # Written so that NaN stays NaN.
        last = _double(cells - 1)
        source = tl.where(source < 0, 0.0, source)
        source = tl.where(source > last, last, source)
        lower = tl.floor(tl.where(source == source, source, 0.0))
        # The reference's hat function at the upper cell, so that its weight is 0 exactly when theirs is.
        fraction = 1.0 - tl.abs(source - (lower + 1.0))
        fraction = tl.where(fraction < 0, 0.0, fraction)
        tl.store(taps.index + first + offs_n, lower.to(tl.int32), mask=exists)
        tl.store(taps.fraction + first + offs_n, fraction.to(tl.float32), mask=exists)
        inside = is_inside(position, view).to(taps.inside.dtype.element_ty)
        tl.store(taps.inside + first + offs_n, inside, mask=exists)


@triton.jit
def _shift(size, cells, view, start, end):
    """Return the offset in cells of a window's first cell, and whether it meets the target's grid exactly."""
    offset = start * _double(cells) / _double(view)
    extent = (end - start) * _double(cells) / _double(view)
    nearest = tl.floor(offset + 0.5)
    aligned = (tl.abs(offset - nearest) <= ALIGNED) & (tl.abs(extent - _double(size)) <= ALIGNED)
    aligned = aligned & (tl.abs(offset) < 2**24)
    return tl.where(aligned, nearest, 0.0).to(tl.int32), aligned


@triton.jit
def _store_factors(
    counts_ptr, num_counts, pixel_count, factors_ptr, ce_weight_ptr, kl_weight_ptr, ce_denominator_ptr,
    kl_denominator_ptr, temperature, class_weight_ptr, num_classes, smoothing, gamma,
    USE_CE: tl.constexpr, USE_KL: tl.constexpr, COUNTS_CE: tl.constexpr, COUNTS_KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total_weight = _double(num_classes)
    if class_weight_ptr is not None:
        weights = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, num_classes, BLOCK):
            offs_c = start + tl.arange(0, BLOCK)
            weights += tl.load(class_weight_ptr + offs_c, mask=offs_c < num_classes, other=0.0).to(tl.float64)
        total_weight = tl.sum(weights, 0)
    part = _double(smoothing) / _double(num_classes)
    tl.store(factors_ptr + 4, (1.0 - _double(smoothing)).to(tl.float32))
    tl.store(factors_ptr + 5, part.to(tl.float32))
    tl.store(factors_ptr + 6, (part * total_weight).to(tl.float32))
    tl.store(factors_ptr + 7, _double(gamma).to(tl.float32))
    ce_count = _double(0)
    kl_count = _double(pixel_count)
    if COUNTS_CE or COUNTS_KL:
        ce_count, counted = sum_pairs(counts_ptr, num_counts, BLOCK)
        if COUNTS_KL:
            kl_count = counted
    if ce_denominator_ptr is not None:
        ce_count = tl.load(ce_denominator_ptr).to(tl.float64)
    if kl_denominator_ptr is not None:
        kl_count = tl.load(kl_denominator_ptr).to(tl.float64)
    ce_inverse = tl.where(ce_count == 0, 0.0, 1.0 / tl.where(ce_count == 0, 1.0, ce_count))
    kl_inverse = tl.where(kl_count == 0, 0.0, 1.0 / tl.where(kl_count == 0, 1.0, kl_count))
    if not USE_CE:
        ce_inverse *= 0.0
    if not USE_KL:
        kl_inverse *= 0.0
    T = _double(temperature)
    tl.store(factors_ptr, (tl.load(ce_weight_ptr).to(tl.float64) * ce_inverse).to(tl.float32))
    tl.store(factors_ptr + 1, (tl.load(kl_weight_ptr).to(tl.float64) * T * kl_inverse).to(tl.float32))
    tl.store(factors_ptr + 2, ce_inverse.to(tl.float32))
    tl.store(factors_ptr + 3, (T * T * kl_inverse).to(tl.float32))


@triton.jit
def _store_route(
    image, window_ptr, flip_ptr, ranges_ptr, route_ptr, h, w, ht, wt, view_height, view_width, num_ranges,
    USE_KL: tl.constexpr, FAST: tl.constexpr, GUARD_RANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fast = image >= 0
    if USE_KL:
        y0, x0, y1, x1 = load_window(window_ptr, image, view_height, view_width)
        flip = image < 0
        if flip_ptr is not None:
            flip = tl.load(flip_ptr + image) != 0
        row, row_aligned = _shift(h, ht, view_height, y0, y1)
        column, column_aligned = _shift(w, wt, view_width, x0, x1)
        fast = fast & row_aligned & column_aligned
        tl.store(route_ptr + 4 * image + 1, row)
        tl.store(route_ptr + 4 * image + 2, column)
        tl.store(route_ptr + 4 * image + 3, flip.to(tl.int32))
    if FAST:
        if GUARD_RANGE:
            widest = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, num_ranges, BLOCK):
                offs_n = start + tl.arange(0, BLOCK)
                ranges_n = tl.load(ranges_ptr + image * num_ranges + offs_n, mask=offs_n < num_ranges, other=0.0)
                widest = tl.maximum(widest, ranges_n)
            fast = fast & (tl.max(widest, 0) <= MOST_NATS)
        tl.store(route_ptr + 4 * image, fast.to(tl.int32))
    else:
        tl.store(route_ptr + 4 * image, 0)


@triton.jit(
    do_not_specialize=[
        "B", "h", "w", "ht", "wt", "H", "W", "view_height", "view_width", "num_ranges", "num_counts", "pixel_count",
        "num_classes", "target_batch",
    ],
    do_not_specialize_on_alignment=[
        "window_ptr", "flip_ptr", "class_weight_ptr", "ce_weight_ptr", "kl_weight_ptr", "ce_denominator_ptr",
        "kl_denominator_ptr",
    ],
)  # fmt: skip
def geometry_kernel(
    window_ptr, flip_ptr, ranges_ptr, counts_ptr, ce_weight_ptr, kl_weight_ptr, ce_denominator_ptr,
    kl_denominator_ptr, tables_ptr, route_ptr, factors_ptr, target_batch,
    B, h, w, ht, wt, H, W, view_height, view_width, num_ranges, num_counts, pixel_count, temperature,
    class_weight_ptr, num_classes, smoothing, gamma,
    USE_CE: tl.constexpr, USE_KL: tl.constexpr, STUDENT_ALIGN: tl.constexpr, TARGET_ALIGN: tl.constexpr,
    FAST: tl.constexpr, GUARD_RANGE: tl.constexpr, COUNTS_CE: tl.constexpr, COUNTS_KL: tl.constexpr,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Write what the CE + KL loss kernels read: factors, neighbour tables, and which kernel computes each image.

    Program 0 writes the factors of the loss and the gradient. Programs 1 to B write the route of one image each, which
    says which kernel computes it. Each further program writes one table for the label rows or columns: their two
    neighbouring logits, bilinear weights, and whether they lie in the view.

    Shapes and units:
        window_ptr: (B, 4) float64 edges y0, x0, y1, x1 in pixels of the view, or None for the whole view.
        flip_ptr: (B,) uint8, 1 for a mirrored image, or None.
        ranges_ptr: (B, num_ranges) float32. Of a block of positions, the largest difference between the maximum and the
            minimum over the classes, divided by min(T, 1).
        counts_ptr: (num_counts, 2) float64, the partial denominators of CE and KL that `prepare_kernel` counted.
        ce_weight_ptr, kl_weight_ptr: one float each, the weights of the terms.
        ce_denominator_ptr, kl_denominator_ptr: one float each, or None to use the counts.
        class_weight_ptr: (num_classes,) floats, or None for ones.
        H, W, h, w, ht, wt, view_height, view_width: sizes of labels, student's logits, target's logits and view.
        temperature, smoothing, gamma: T, the share of label smoothing, and the exponent of the focal loss, 0 without.
        target_batch: how many images have their own tables of the target: B with windows or flips, 1 if all share them,
            0 without a target.
        pixel_count: B * H * W, KL's denominator without COUNTS_KL.
        USE_CE, USE_KL: which terms to compute. COUNTS_CE, COUNTS_KL: which denominators come from counts_ptr.
        STUDENT_ALIGN, TARGET_ALIGN: whether each resize aligns corners. BLOCK: entries that are read or written at a
            time.
        FAST: whether an image may take the fast kernel, which needs each student logit to meet one target logit
            exactly.
        GUARD_RANGE: whether the fast kernel also needs a range of at most 80.
        DEPENDENT: whether the kernel may start before the previous one ends.
    Results:
        factors_ptr, route_ptr, tables_ptr: `factors`, `route` and `tables` of `Prepared`.
    """
    take_turn(DEPENDENT)
    program = tl.program_id(0)
    if program == 0:
        _store_factors(
            counts_ptr, num_counts, pixel_count, factors_ptr, ce_weight_ptr, kl_weight_ptr, ce_denominator_ptr,
            kl_denominator_ptr, temperature, class_weight_ptr, num_classes, smoothing, gamma, USE_CE, USE_KL, COUNTS_CE,
            COUNTS_KL, BLOCK,
        )  # fmt: skip
    elif program <= B:
        _store_route(
            program - 1, window_ptr, flip_ptr, ranges_ptr, route_ptr, h, w, ht, wt, view_height, view_width, num_ranges,
            USE_KL, FAST, GUARD_RANGE, BLOCK,
        )  # fmt: skip
    elif program <= B + 2:
        of_rows = program == B + 1
        size = tl.where(of_rows, H, W)
        taps = _table(tables_ptr, tl.where(of_rows, 0, 3 * H), size)
        store_taps(
            taps, 0, size, size, tl.where(of_rows, h, w), _double(0), _double(size), program < 0, True, STUDENT_ALIGN,
            BLOCK,
        )  # fmt: skip
    elif USE_KL:
        image = (program - B - 3) // 2
        of_rows = (program - B - 3) % 2 == 0
        y0, x0, y1, x1 = load_window(window_ptr, image, view_height, view_width)
        flip = program < 0
        if flip_ptr is not None:
            flip = (tl.load(flip_ptr + image) != 0) & (of_rows == 0)
        size = tl.where(of_rows, H, W)
        first = 3 * (H + W) + tl.where(of_rows, 0, 3 * target_batch * H)
        store_taps(
            _table(tables_ptr, first, target_batch * size), image * size, size,
            tl.where(of_rows, view_height, view_width), tl.where(of_rows, ht, wt), tl.where(of_rows, y0, x0),
            tl.where(of_rows, y1, x1), flip, True, TARGET_ALIGN, BLOCK,
        )  # fmt: skip
