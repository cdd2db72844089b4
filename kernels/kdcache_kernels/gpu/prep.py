"""The input of the Triton loss kernels: both sets of logits in one form, and the geometry.

One launch reads the student's and the target's logits at their own small sizes, whatever their dtype, strides and k,
and writes float32, contiguous, normalised and scaled for exp2: every later kernel then has one variant. It also finds
lost pixels and the range of the logits, and counts the pixels that the terms divide by. A second launch
(`geometry`) writes tables of neighbours and decides which kernel takes which image.

The price is 4 bytes per logit, 22 MB for each set at 16 x 21 x 128^2. A dense target that whole views meet cell by cell
does not pay it: its float16 values, minus their maximum as they are, are read in place. That costs the kernel for
cells a conversion per corner and one multiplication per class; the student's raw logits would cost a subtraction per
corner next to it, and registers for the maxima, in the loops that bound it.

Legend: B batch, C classes, k kept classes, h w student's size, ht wt target's size, H W label size.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import LossProblem
from .common import cdiv, dependent, label_pixels, load_pixel, power_of_2, take_turn
from .geometry import geometry_kernel, is_inside, load_window, tables_size, view_positions
from .prepared import Prepared
from .topk import tail_fill

LARGEST = torch.finfo(torch.float32).max
PIXELS = 128
"""Low-resolution pixels of a program."""
COUNT_ROWS, COUNT_COLUMNS = 8, 128
"""Labels of a program that counts: this many rows, and columns at a time."""
TABLE = 512
"""Entries of a table that are written at a time."""


@triton.jit
def _span_of_classes(pixel_ptrs, stride_c, exists, num_classes, limit, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest and the smallest logit of every pixel, and whether one of its classes is lost (int32)."""
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    smallest = tl.full((BLOCK,), float("inf"), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    if BLOCK_C == 1:
        for _ in tl.range(0, num_classes, loop_unroll_factor=4):
            x = tl.load(pixel_ptrs, mask=exists, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, x)
            smallest = tl.minimum(smallest, x)
            wrong = tl.where(tl.abs(x) <= limit, wrong, 1)
            pixel_ptrs += stride_c
    else:
        for start in range(0, num_classes, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = (offs_c < num_classes)[:, None] & exists[None, :]
            x = tl.load(pixel_ptrs[None, :] + offs_c[:, None] * stride_c, mask=mask, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.where(mask, x, float("-inf")), 0))
            smallest = tl.minimum(smallest, tl.min(tl.where(mask, x, float("inf")), 0))
            wrong = tl.maximum(wrong, tl.max(tl.where(tl.abs(x) <= limit, 0, 1), 0))
    return largest, smallest, wrong


@triton.jit
def _normalise(
    x_ptr, strides, out_ptr, lost_ptr, range_ptr, mix_ptr, class_weight_ptr, block, num_classes, plane, w, limit, scale,
    stretch,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise a block of pixels of one image of dense logits. FLAT: its rows follow each other without a gap.

    Without `out_ptr` they are only inspected. Their range then includes 0, and is infinite if one is lost, because the
    fast kernel cannot leave it out.
    """
    _, stride_c, stride_h, stride_w = strides
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    exists = offs_n < plane
    pixel_ptrs = x_ptr + (offs_n * stride_w if FLAT else offs_n // w * stride_h + offs_n % w * stride_w)
    largest, smallest, wrong = _span_of_classes(pixel_ptrs, stride_c, exists, num_classes, limit, BLOCK_C, BLOCK)
    usable = exists & (wrong == 0)
    largest = tl.where(usable, largest, 0.0)
    smallest = tl.where(usable, smallest, 0.0)
    tl.store(lost_ptr + offs_n, wrong.to(tl.uint8), mask=exists)
    if out_ptr is None:
        span = tl.maximum(largest, 0.0) - tl.minimum(smallest, 0.0)
        tl.store(range_ptr, tl.max(tl.where(wrong == 0, span * stretch, float("inf")), 0))
    else:
        tl.store(range_ptr, tl.max((largest - smallest) * stretch, 0))
        mix = tl.zeros((BLOCK,), tl.float32)
        if BLOCK_C == 1:
            out_ptrs = out_ptr + offs_n
            for c in tl.range(0, num_classes, loop_unroll_factor=4):
                x = tl.load(pixel_ptrs, mask=exists, other=0.0).to(tl.float32)
                value = (tl.where(usable, x, 0.0) - largest) * scale
                tl.store(out_ptrs, value, mask=exists)
                if mix_ptr is not None:
                    if class_weight_ptr is not None:
                        value = value * tl.load(class_weight_ptr + c).to(tl.float32)
                    mix += value
                pixel_ptrs += stride_c
                out_ptrs += plane
        else:
            for start in range(0, num_classes, BLOCK_C):
                offs_c = start + tl.arange(0, BLOCK_C)
                mask = (offs_c < num_classes)[:, None] & exists[None, :]
                x = tl.load(pixel_ptrs[None, :] + offs_c[:, None] * stride_c, mask=mask, other=0.0).to(tl.float32)
                value = (tl.where(usable[None, :], x, 0.0) - largest[None, :]) * scale
                tl.store(out_ptr + offs_c[:, None] * plane + offs_n[None, :], value, mask=mask)
                if mix_ptr is not None:
                    if class_weight_ptr is not None:
                        weight = tl.load(class_weight_ptr + offs_c, mask=offs_c < num_classes, other=0.0).to(tl.float32)
                        value = value * weight[:, None]
                    mix += tl.sum(tl.where(mask, value, 0.0), 0)
        if mix_ptr is not None:
            tl.store(mix_ptr + offs_n, mix, mask=exists)


@triton.jit
def _densify(
    values_ptr, indices_ptr, tail_ptr, out_ptr, lost_ptr, range_ptr, block, k, num_classes, num_pixels, limit, scale,
    stretch,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise a packed target like `_normalise`: the tail's fill for every class, then the kept ones over it."""
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    exists = offs_n < num_pixels
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    smallest = tl.full((BLOCK,), float("inf"), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for rank in range(k):
        x = tl.load(values_ptr + rank * num_pixels + offs_n, mask=exists, other=0.0).to(tl.float32)
        ids = tl.load(indices_ptr + rank * num_pixels + offs_n, mask=exists, other=0).to(tl.int32)
        largest = tl.maximum(largest, x)
        smallest = tl.minimum(smallest, x)
        wrong = wrong | tl.where(tl.abs(x) <= limit, 0, 1) | tl.where(ids < num_classes, 0, 1)
    largest = tl.where(wrong == 0, largest, 0.0)
    mass = tl.zeros((BLOCK,), tl.float32)
    for rank in range(k):
        x = tl.load(values_ptr + rank * num_pixels + offs_n, mask=exists, other=0.0).to(tl.float32)
        mass += tl.exp(tl.where(wrong == 0, x - largest, 0.0))
    tail = tl.load(tail_ptr + offs_n, mask=exists, other=0.0).to(tl.float32)
    fill = tail_fill(largest, mass, tail, num_classes, k).to(tl.float32)
    wrong = wrong | tl.where(tl.abs(fill) <= limit, 0, 1)  # NaN too
    usable = exists & (wrong == 0)
    fill = tl.where(usable, fill, 0.0)
    largest = tl.where(usable, tl.maximum(largest, fill), 0.0)
    smallest = tl.where(usable, tl.minimum(smallest, fill), 0.0)
    tl.store(lost_ptr + offs_n, wrong.to(tl.uint8), mask=exists)
    tl.store(range_ptr, tl.max((largest - smallest) * stretch, 0))
    fill = (fill - largest) * scale
    for start in range(0, num_classes, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = (offs_c < num_classes)[:, None] & exists[None, :]
        ptrs = out_ptr + offs_c[:, None] * num_pixels + offs_n[None, :]
        tl.store(ptrs, tl.broadcast_to(fill[None, :], (BLOCK_C, BLOCK)), mask=mask)
    # Another thread may have filled what this one overwrites.
    tl.debug_barrier()
    for rank in range(k):
        x = tl.load(values_ptr + rank * num_pixels + offs_n, mask=exists, other=0.0).to(tl.float32)
        ids = tl.load(indices_ptr + rank * num_pixels + offs_n, mask=exists, other=0).to(tl.int32)
        tl.store(out_ptr + ids * num_pixels + offs_n, (x - largest) * scale, mask=usable)


@triton.jit
def count_block(
    pixels, window_ptr, flip_ptr, counts_ptr, image, block, H, W, view_height, view_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count the denominators of CE and KL in ROWS label rows of an image, and write them to `counts_ptr`.

    Shapes and units:
        pixels: `Pixels`, the labels and pixel weights.
        window_ptr: (B, 4) float64 edges in pixels of the view, or None for the whole view. flip_ptr: (B,) uint8, 1 if
            the image is mirrored, or None.
        counts_ptr: (2,) float64 result, the sum of the class weights of labelled pixels, and the number of pixels that
            KL counts.
        image, block: the image's index, and the number of the block of ROWS rows in the image.
        H, W: label size. view_height, view_width: size of the view in pixels. COLUMNS: label columns read at a time.
    """
    offs_y = block * ROWS + tl.arange(0, ROWS)
    y0, x0, y1, x1 = load_window(window_ptr, image, view_height, view_width)
    flip = image < 0
    if flip_ptr is not None:
        flip = tl.load(flip_ptr + image) != 0
    label_ptr = pixels.labels
    if label_ptr is not None:
        stride_b, stride_h, stride_w = pixels.label_strides
        label_ptr += image.to(tl.int64) * stride_b
    ce = tl.zeros((ROWS, COLUMNS), tl.float64)
    kl = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, W, COLUMNS):
        offs_x = start + tl.arange(0, COLUMNS)
        exists = (offs_y < H)[:, None] & (offs_x < W)[None, :]
        in_view = exists
        if window_ptr is not None:
            y = view_positions(offs_y, H, view_height, y0, y1, True)
            x = view_positions(tl.where(flip, W - 1 - offs_x, offs_x), W, view_width, x0, x1, True)
            in_view = is_inside(y, view_height)[:, None] & is_inside(x, view_width)[None, :]
        ptrs = label_ptr
        if label_ptr is not None:
            ptrs += offs_y.to(tl.int64)[:, None] * stride_h + offs_x.to(tl.int64)[None, :] * stride_w
        _, ce_weight, _, kl_weight, _, _ = load_pixel(pixels, ptrs, None, None, exists, in_view)
        # A class id out of range weighs NaN, which is for the loss alone.
        ce += tl.where(ce_weight == ce_weight, ce_weight, 0.0).to(tl.float64)
        kl += kl_weight.to(tl.float64)
    tl.store(counts_ptr, tl.sum(tl.sum(ce, 1), 0))
    tl.store(counts_ptr + 1, tl.sum(tl.sum(kl, 1), 0))


@triton.jit(
    do_not_specialize=[
        "k", "h", "w", "ht", "wt", "H", "view_height", "view_width", "student_blocks", "target_blocks",
        "count_blocks",
    ],
    do_not_specialize_on_alignment=["window_ptr", "flip_ptr", "class_weight_ptr"],
)  # fmt: skip
def prepare_kernel(
    student_ptr, student_strides, student_out_ptr, student_lost_ptr, target_ptr, indices_ptr, tail_ptr, target_out_ptr,
    target_lost_ptr, mix_ptr, class_weight_ptr, pixels, window_ptr, flip_ptr, ranges_ptr, counts_ptr, plane,
    target_plane, k, h, w, ht, wt, H, W, view_height, view_width, student_blocks, target_blocks, count_blocks,
    student_limit, target_limit, scale, stretch,
    FLAT: tl.constexpr, STUDENT_C: tl.constexpr, TARGET_C: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Normalise the student's and the target's logits for the CE + KL loss kernels, and count the loss's pixels.

    A normalised logit is (logit - maximum over the classes) * log2(e) / T. Each program handles BLOCK positions of one
    logit map, or ROWS label rows of one image.

    Shapes and units:
        student_ptr: (B, C, h, w) logits. C is `pixels.num_classes`. student_strides: their strides in elements.
        target_ptr: (B, k, ht, wt) values of the packed target, or None. indices_ptr: (B, k, ht, wt) class ids, and
            tail_ptr: (B, ht, wt) tails, or None if k = C.
        class_weight_ptr: (C,) class weights, or None for weights of 1. Only mix_ptr needs them.
        pixels: `Pixels`, the labels and pixel weights, for counting.
        window_ptr: (B, 4) float64 edges in pixels of the view, or None for the whole view. flip_ptr: (B,) uint8, 1 if
            the image is mirrored, or None.
        plane, target_plane: h * w and ht * wt. H, W: label size. view_height, view_width: size of the view in pixels.
        student_blocks, target_blocks, count_blocks: how many programs of an image read the student, read the target,
            and count, in this order.
        student_limit, target_limit: the largest magnitude of a usable logit. scale: log2(e) / T. stretch: 1 / min(T,
            1).
        FLAT: whether rows of the student's logits follow each other without a gap. DEPENDENT: whether the kernel may
            start before the previous one has ended, see `take_turn`.
        STUDENT_C, TARGET_C: how many of the C classes are read at a time from the student and from the target.
            COLUMNS: label columns that are read at a time.
    Results:
        student_out_ptr, student_lost_ptr, target_out_ptr, target_lost_ptr: the fields `student`, `student_lost`,
            `target` and `target_lost` of `Prepared`. target_out_ptr is None if the target is read in place.
        mix_ptr: (B, h, w) float32, the sum over the classes of class weight * normalised student logit, or None without
            label smoothing.
        ranges_ptr: (B, student_blocks + target_blocks) float32, one number per program that reads logits. At each
            position, the maximum minus the minimum over the classes is a range. The number is the largest range of the
            program's positions, times stretch.
        counts_ptr: (B, count_blocks, 2) float64, per program that counts: the sum of the class weights of labelled
            pixels, and the number of pixels that KL counts.
    """
    take_turn(DEPENDENT)
    programs = student_blocks + target_blocks + count_blocks
    image = tl.program_id(0) // programs
    block = tl.program_id(0) % programs
    image64 = image.to(tl.int64)
    num_classes = pixels.num_classes
    ranges_ptr += image * (student_blocks + target_blocks) + block
    if block < student_blocks:
        if mix_ptr is not None:
            mix_ptr += image64 * plane
        _normalise(
            student_ptr + image64 * student_strides[0], student_strides,
            student_out_ptr + image64 * num_classes * plane, student_lost_ptr + image64 * plane, ranges_ptr,
            mix_ptr, class_weight_ptr, block, num_classes, plane, w, student_limit, scale, stretch, FLAT, STUDENT_C,
            BLOCK,
        )  # fmt: skip
    elif block < student_blocks + target_blocks:
        if target_ptr is not None:
            out_ptr = target_out_ptr
            if out_ptr is not None:
                out_ptr += image64 * num_classes * target_plane
            lost_ptr = target_lost_ptr + image64 * target_plane
            if indices_ptr is not None:
                _densify(
                    target_ptr + image64 * k * target_plane, indices_ptr + image64 * k * target_plane,
                    tail_ptr + image64 * target_plane, out_ptr, lost_ptr, ranges_ptr, block - student_blocks, k,
                    num_classes, target_plane, target_limit, scale, stretch, TARGET_C, BLOCK,
                )  # fmt: skip
            else:
                _normalise(
                    target_ptr + image64 * num_classes * target_plane, (0, target_plane, wt, 1), out_ptr, lost_ptr,
                    ranges_ptr, None, None, block - student_blocks, num_classes, target_plane, wt, target_limit, scale,
                    stretch, True, TARGET_C, BLOCK,
                )  # fmt: skip
    else:
        block -= student_blocks + target_blocks
        count_block(
            pixels, window_ptr, flip_ptr, counts_ptr + 2 * (image * count_blocks + block), image, block, H, W,
            view_height, view_width, ROWS, COLUMNS,
        )  # fmt: skip


def fast_stride(problem: LossProblem) -> int:
    """Return the label pixels per logit along an axis if a fast kernel may run, else 0.

    The fast kernels are `pixels` (stride 1) and `cells` (strides 2, 4 and 8). The result depends on sizes and arguments
    only. Values on the device, such as windows, can still send an image to `tiles`.
    """
    (H, W), (C, h, w), target = problem.size, problem.student.shape[1:], problem.target
    stride = H // h
    if stride not in (1, 2, 4, 8) or (h * stride, w * stride) != (H, W) or problem.align_corners:
        return 0
    if stride > 1 and (w < 2 or C >= 2**15 or problem.focal_gamma > 0):
        return 0  # a focal pixel needs its label's logit before the gradient, which cells knows after it
    if target is None:
        return stride
    ht, wt = target.values.shape[2:]
    windowed = problem.window is not None
    if target.align_corners or (stride > 1 and wt < 2) or (not windowed and (ht, wt) != (h, w)):
        return 0
    return stride


def _scale(temperature: float) -> float:
    """Return 1 / (T ln 2), the factor from logits to base-2 exponents."""
    return min(math.log2(math.e) / temperature, LARGEST)


def _reads_packed(problem: LossProblem) -> bool:
    """Return True if kernels read the target's packed float16 values in place. They must be dense, without a window."""
    target = problem.target
    if target is None or target.indices is not None or problem.window is not None:
        return False
    return fast_stride(problem) > 1 and 65504 * _scale(problem.temperature) < 1e30


def classes_at_once(num_classes: int, device: torch.device, *, pixel_per_lane: bool) -> int:
    """Return how many classes a program of `prepare_kernel` reads at a time.

    A program handles a block of 128 positions. On a GPU with `pixel_per_lane`, each lane takes one position and reads
    its classes one after the other, so the result is 1. Otherwise it is 4 to 32, depending on `num_classes`.
    """
    if pixel_per_lane and device.type != "cpu":  # the interpreter's time grows with the turns
        return 1
    return max(4, min(32, power_of_2(num_classes)))


def prepare(problem: LossProblem) -> Prepared:
    """Prepare the input of the loss kernels for a batch of at least one image, in two launches.

    The first launch normalises the logits: it subtracts the maximum over the classes and multiplies by log2(e) / T. The
    second finds the neighbouring logits of each label pixel, and which loss kernel computes each image.

    Memory: 4 bytes for each logit of the student, and 4 for each logit of the target unless kernels read it in place.
    """
    target = problem.target
    window = None if target is None or problem.window is None else problem.window.to(torch.float64).contiguous()
    flip = None if target is None or problem.flip is None else problem.flip.contiguous().view(torch.uint8)
    masked = window is not None or not (problem.distill_void or problem.labels is None)
    counts_ce = problem.use_ce and problem.ce_denominator is None
    counts_kl = problem.use_kl and problem.kl_denominator is None and masked
    mix = None
    if problem.label_smoothing > 0:
        (B, _, h, w), device = problem.student.shape, problem.student.device
        mix = torch.empty((B, h, w), dtype=torch.float32, device=device)
    logits, ranges, counts = _launch_prepare(problem, window, flip, counts_ce, counts_kl, mix)
    return _launch_geometry(problem, window, flip, counts_ce, counts_kl, logits, ranges, counts, mix)


def _launch_prepare(
    problem: LossProblem,
    window: Tensor | None,
    flip: Tensor | None,
    counts_ce: bool,
    counts_kl: bool,
    mix: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Return (student, student_lost, target, target_lost), (B, programs) ranges and (B, programs, 2) counts.

    The target is its own values where these are read as they are.
    """
    student, target, T, device = problem.student, problem.target, problem.temperature, problem.student.device
    (B, C, h, w), (H, W) = student.shape, problem.size
    blocks = (
        cdiv(h * w, PIXELS),
        0 if target is None else cdiv(target.values.shape[2] * target.values.shape[3], PIXELS),
        cdiv(H, COUNT_ROWS) if counts_ce or counts_kl else 0,
    )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    ranges, counts = empty(B, blocks[0] + blocks[1]), empty(B, blocks[2], 2, dtype=torch.float64)
    students = empty(B, C, h, w), empty(B, h, w, dtype=torch.uint8)
    values = indices = tail = target_out = None
    k, ht, wt, view = 0, 1, 1, (1, 1)
    if target is None:
        targets = empty(1, 1, 1, 1), empty(1, 1, 1, dtype=torch.uint8)
    else:
        k, ht, wt = target.values.shape[1:]
        view = target.view_size
        values = target.values.contiguous()
        target_out = None if _reads_packed(problem) else empty(B, C, ht, wt)
        targets = values if target_out is None else target_out, empty(B, ht, wt, dtype=torch.uint8)
        indices = None if target.indices is None else target.indices.contiguous()
        tail = None if target.tail is None else target.tail.contiguous()
    counted = label_pixels(
        problem.labels, problem.class_weight, C, problem.ignore_index,
        use_ce=counts_ce, use_kl=counts_kl, distill_void=problem.distill_void,
    )  # fmt: skip
    prepare_kernel[(B * sum(blocks),)](
        student, student.stride(), *students, values, indices, tail, target_out, targets[1], mix,
        None if mix is None else counted.class_weight, counted, window,
        None if window is None else flip, ranges, counts,
        h * w, ht * wt, k, h, w, ht, wt, H, W, *view, *blocks,
        LARGEST / 8 * min(1.0, T), min(LARGEST / 8 * T, LARGEST), _scale(T), max(1.0, 1 / T),
        FLAT=student.stride(2) == w * student.stride(3) or h == 1,
        STUDENT_C=classes_at_once(C, device, pixel_per_lane=student.stride(3) == 1 and h * w >= PIXELS),
        TARGET_C=classes_at_once(C, device, pixel_per_lane=ht * wt >= PIXELS),
        BLOCK=PIXELS, ROWS=COUNT_ROWS, COLUMNS=COUNT_COLUMNS, num_warps=4, enable_fp_fusion=False,
        **dependent(device),
    )  # fmt: skip
    return (*students, *targets), ranges, counts


def _launch_geometry(
    problem: LossProblem, window: Tensor | None, flip: Tensor | None, counts_ce: bool, counts_kl: bool,
    logits: tuple[Tensor, Tensor, Tensor, Tensor], ranges: Tensor, counts: Tensor, mix: Tensor | None,
) -> Prepared:  # fmt: skip
    """Return tables of neighbours, routes, shifts and factors, from what `_launch_prepare` returned."""
    target, device, stride = problem.target, problem.student.device, fast_stride(problem)
    (B, _, h, w), (H, W) = problem.student.shape, problem.size
    ht, wt = (1, 1) if target is None else target.values.shape[2:]
    view = (1, 1) if target is None else target.view_size

    moved = window is not None or flip is not None
    target_batch = 0 if target is None else B if moved else 1
    tables = torch.empty(tables_size(H, W, target_batch), dtype=torch.int32, device=device)
    route = torch.empty((B, 4), dtype=torch.int32, device=device)
    factors = torch.empty(8, dtype=torch.float32, device=device)
    geometry_kernel[(1 + B + 2 * (1 + target_batch),)](
        window, flip, ranges, counts, problem.ce_weight, problem.kl_weight, problem.ce_denominator,
        problem.kl_denominator, tables, route, factors, target_batch,
        B, h, w, ht, wt, H, W, *view, ranges.shape[1], B * counts.shape[1], B * H * W, problem.temperature,
        None if mix is None or problem.class_weight is None else problem.class_weight.contiguous(),
        problem.student.shape[1], problem.label_smoothing, problem.focal_gamma,
        USE_CE=problem.use_ce, USE_KL=problem.use_kl, STUDENT_ALIGN=problem.align_corners,
        TARGET_ALIGN=target is not None and target.align_corners, FAST=stride > 0, GUARD_RANGE=stride > 1,
        COUNTS_CE=counts_ce, COUNTS_KL=counts_kl, BLOCK=TABLE, num_warps=8, enable_fp_fusion=False,
        **dependent(device),
    )  # fmt: skip
    scale = _scale(problem.temperature) if _reads_packed(problem) else None
    return Prepared(*logits, scale, tables, target_batch, route, factors, mix, stride)
