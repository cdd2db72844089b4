"""The distillation loss on CUDA: which kernels run, in which order, and their sum.

Five launches at most and no wait for the device: prepare, geometry, tiles, the fast kernel (cells or pixels), totals,
which also adds up the edges of cells. Tiles takes any geometry and any range of logits; the fast kernel takes what
meets the student's grid cell by cell, at a third of the time. Which image goes where is decided on the device, so both
are launched, and each passes by the other's images in a few microseconds. Where the host knows that the fast
kernel cannot run at all (sizes, aligned corners), tiles runs alone. Tiles comes first: its scratch is then free for
the edges, which last until totals.

Geometry has a launch of its own because all of its image's programs must be done: as a part of the loss kernels, each
of their programs would sum up all counts, and their variants would be twice as many.

Legend: B batch, C classes, h w student's size, P programs of a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError, describe
from ..problem import LossProblem, LossResult
from . import cells, pixels, tiles
from .common import Buffers, Needs, cdiv, dependent, sum_pairs, take_turn
from .prep import fast_stride, prepare
from .prepared import Prepared

SUMS = 2048
"""Partial sums that the one program of totals reads at a time."""
EDGES = tl.constexpr(1024)
"""Elements of an edge that a program of totals combines."""
OFFSETS = 2**31
"""Elements that an offset of 32 bits can reach."""
SCALED = 4096
"""Elements of a program of scale_gradient."""


@triton.jit
def _combine(program, edges_ptr, route_ptr, gradient_ptr, num_classes, h, w, strips, rows, GROUPS: tl.constexpr):
    """Add the rows of logits at the seam of two strips: the upper strip's remainder plus the lower strip's top.

    A row of an image takes ceil(C w / EDGES) programs.
    """
    PLANES: tl.constexpr = 2 if GROUPS == 1 else 4
    plane = num_classes * w
    blocks = tl.cdiv(plane, EDGES)
    image = program // blocks // (strips - 1)
    strip = program // blocks % (strips - 1) + 1
    edges_ptr += (image.to(tl.int64) * strips + strip) * PLANES * plane
    gradient_ptr += image.to(tl.int64) * num_classes * (h * w) + (strip * rows - 1) * w
    bottom_plane = 1
    if GROUPS > 1:
        bottom_plane = 1 + (rows - 1) % 2
    offs_n = program % blocks * EDGES + tl.arange(0, EDGES)
    exists = (offs_n < plane) & (tl.load(route_ptr + 4 * image) == 1)
    before = tl.load(edges_ptr + (bottom_plane - PLANES) * plane + offs_n, mask=exists, other=0.0)
    value = before + tl.load(edges_ptr + offs_n, mask=exists, other=0.0)
    ptrs = gradient_ptr + offs_n // w * (h * w) + offs_n % w
    tl.store(ptrs, value.to(gradient_ptr.dtype.element_ty), mask=exists)


@triton.jit(
    do_not_specialize=["num_partials", "num_classes", "h", "w", "strips", "rows"],
    do_not_specialize_on_alignment=["ce_weight_ptr", "kl_weight_ptr"],
)
def totals_kernel(
    partials_ptr, num_partials, factors_ptr, ce_weight_ptr, kl_weight_ptr, loss_ptr, ce_ptr, kl_ptr, edges_ptr,
    route_ptr, gradient_ptr, num_classes, h, w, strips, rows,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Add up the loss, CE and KL from the programs' partial sums, and complete the gradient where two strips meet.

    Program 0 adds the partial sums in float64. Every other program completes at most 1024 elements of the gradient on a
    row of logits between two strips of `cells_kernel`. Each element is the upper strip's share plus the lower strip's.

    Shapes and units:
        partials_ptr: (num_partials, 2) float64, sums of weighted CE and KL in nats.
        factors_ptr, route_ptr: `Prepared.factors` and `Prepared.route`.
        ce_weight_ptr, kl_weight_ptr: one float each. loss_ptr, ce_ptr, kl_ptr: one float32 result each.
        edges_ptr: the shares that `cells_kernel` left, or None if there are no strips. gradient_ptr: (B, C, h, w),
            completed.
        num_classes: C. strips: strips per image. rows: rows of bilinear cells per strip.
        GROUPS: the groups of pixel rows into which `cells_kernel` divides a cell: 4 at stride 8, else 1. BLOCK: partial
            sums that are read at a time.
        DEPENDENT: whether the kernel may start before the previous one ends.
    """
    take_turn(DEPENDENT)
    if tl.program_id(0) > 0:
        if edges_ptr is not None:
            _combine(tl.program_id(0) - 1, edges_ptr, route_ptr, gradient_ptr, num_classes, h, w, strips, rows, GROUPS)
    else:
        ce, kl = sum_pairs(partials_ptr, num_partials, BLOCK)
        ce *= tl.load(factors_ptr + 2).to(tl.float64)
        kl *= tl.load(factors_ptr + 3).to(tl.float64)
        loss = tl.load(ce_weight_ptr).to(tl.float64) * ce + tl.load(kl_weight_ptr).to(tl.float64) * kl
        tl.store(loss_ptr, loss.to(tl.float32))
        tl.store(ce_ptr, ce.to(tl.float32))
        tl.store(kl_ptr, kl.to(tl.float32))


@triton.jit
def scale_kernel(
    gradient_ptr, factor_ptr, loss_ptr, out_ptr, num_elements, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Compute out = gradient * factor in float32, or NaN everywhere if the loss is not finite.

    One program handles BLOCK of the `num_elements` elements. `factor_ptr` and `loss_ptr` point to one float each.
    `gradient_ptr` and `out_ptr` are contiguous and may differ in dtype. DEPENDENT says whether the kernel may start
    before the previous one has ended (see `take_turn`).
    """
    take_turn(DEPENDENT)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offs_n < num_elements
    gradient = tl.load(gradient_ptr + offs_n, mask=exists, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr).to(tl.float32) + 0.0 * tl.load(loss_ptr)
    tl.store(out_ptr + offs_n, (gradient * factor).to(out_ptr.dtype.element_ty), mask=exists)


def distill_loss(problem: LossProblem) -> LossResult:
    """Compute the fused CE + KL loss, its terms and its gradient on CUDA, from checked arguments.

    The result has the same bits every time.

    Raises: ShapeError if the logits, labels or weights of one image span 2^31 elements or more in memory.
    Memory: the gradient, 4 bytes per logit of the student, and 4 per logit of the target unless kernels read it in
        place. In addition, the largest `Needs.scratch` of the kernels. Nothing has label size times C elements.
    """
    student, device = problem.student, problem.student.device
    check_offsets(problem)
    shape = student.shape if problem.need_gradient else (0,)
    if student.shape[0] == 0 or not (problem.use_ce or problem.use_kl):
        loss, ce, kl = (torch.zeros((), device=device) for _ in range(3))
        return LossResult(loss, ce, kl, torch.zeros(shape, dtype=problem.gradient_dtype, device=device))
    gradient = torch.empty(shape, dtype=problem.gradient_dtype, device=device)
    with torch.cuda.device_of(student):
        loss, ce, kl = _launch_all(problem, gradient if problem.need_gradient else None)
    return LossResult(loss, ce, kl, gradient)


def check_offsets(problem: LossProblem) -> None:
    """Raise ShapeError if one image of a problem's logits, labels or pixel weights spans 2^31 elements or more.

    The kernels count elements in 32 bits.
    """
    h, w = problem.student.shape[2:]
    target = (0, 0) if problem.target is None else problem.target.values.shape[2:]
    num_classes = problem.student.shape[1]
    logits = num_classes * max(h * w, target[0] * target[1])
    if logits >= OFFSETS:
        raise ShapeError(
            f"One image has too many logits for the CUDA kernels: {logits:,}, above 2^31 - 1 "
            f"({num_classes} classes, student {(h, w)}, target {tuple(target)})",
            fix="Crop the images, or pass impl='reference'.",
        )
    strided = {
        "student_logits_BChw": problem.student,
        "labels_BHW": problem.labels,
        "pixel_weight_BHW": problem.pixel_weight,
        "ce_pixel_weight_BHW": problem.ce_pixel_weight,
    }
    for name, tensor in strided.items():
        if tensor is not None and (reach := _reach(tensor)) >= OFFSETS:
            raise ShapeError(
                f"One image of {name} spans too much memory for the CUDA kernels: {reach:,} elements, above 2^31 - 1 "
                f"({describe(tensor)})",
                fix=f"Pass {name}.contiguous(). If it is as long, crop the images.",
            )


def _reach(tensor: Tensor) -> int:
    """Return the offset of the last element of one image from its first."""
    return sum((n - 1) * abs(stride) for n, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _launch_all(problem: LossProblem, gradient: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    stride = fast_stride(problem)
    of_tiles = tiles.choose_tiling(problem, all_images=stride == 0)
    slow, fast, seams = tiles.needs(problem, of_tiles), Needs(0), None
    if stride > 1:
        of_cells = cells.choose_tiling(problem)
        fast, seams = cells.needs(problem, stride, of_cells), cells.seams(problem, stride, of_cells)
    elif stride == 1:
        of_pixels = pixels.choose_tiling(problem)
        fast = pixels.needs(problem, of_pixels)
    prepared = prepare(problem)
    buffers = make_buffers(problem, slow, fast)
    tiles.launch(problem, prepared, gradient, buffers, of_tiles, all_images=stride == 0)
    after_tiles = buffers._replace(first=slow.programs)
    if stride > 1:
        cells.launch(problem, prepared, gradient, after_tiles, of_cells, stride=stride)
    elif stride == 1:
        pixels.launch(problem, prepared, gradient, after_tiles, of_pixels)
    return add_up(problem, prepared, gradient, buffers, seams)


def make_buffers(problem: LossProblem, *needs: Needs) -> Buffers:
    """Return the `Buffers` for one loss: partial sums of all kernels' programs, and scratch for the largest need.

    `needs` has one `Needs` per kernel. If `problem` does not need a gradient, the scratch is empty.
    """
    device = problem.student.device
    partials = torch.empty((sum(need.programs for need in needs), 2), dtype=torch.float64, device=device)
    scratch = max(need.scratch for need in needs) if problem.need_gradient else 0
    return Buffers(partials, torch.empty(scratch, device=device))


def add_up(
    problem: LossProblem, prepared: Prepared, gradient: Tensor | None, buffers: Buffers, seams: cells.Seams | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, CE, KL) from the partial sums, and complete the gradient where strips of bilinear cells meet.

    Args:
        problem: the checked arguments.
        prepared: the result of `prepare` for the problem.
        gradient: (B, C, h, w), completed in place, or None.
        buffers: the partial sums, and the scratch of `cells.launch`.
        seams: how `cells.launch` cut the images into strips, or None if it did not run.
    Returns: three 0-dimensional float32 tensors, nats per pixel.
    """
    loss, ce, kl = (torch.empty((), dtype=torch.float32, device=problem.student.device) for _ in range(3))
    partials, (B, C, h, w) = buffers.partials, problem.student.shape
    strips, rows, groups = cells.Seams(1, 1, 1) if seams is None or gradient is None else seams
    programs = B * (strips - 1) * cdiv(C * w, EDGES.value)
    totals_kernel[(1 + programs,)](
        partials, partials.shape[0], prepared.factors, problem.ce_weight, problem.kl_weight, loss, ce, kl,
        *((buffers.scratch, prepared.route, gradient) if programs else (None, None, None)), C, h, w, strips, rows,
        GROUPS=groups, BLOCK=SUMS, num_warps=8, enable_fp_fusion=False, **dependent(loss.device),
    )  # fmt: skip
    return loss, ce, kl


def scale_gradient(gradient: Tensor, factor: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor in `dtype`, contiguous, or NaN everywhere if the loss is not finite.

    The product is computed in float32.

    Args:
        gradient: any floating dtype and strides.
        factor: 0-dimensional float on the same device.
        loss: 0-dimensional float32 on the same device.
        dtype: dtype of the result.
    """
    gradient = gradient.contiguous()
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            scale_kernel[(cdiv(gradient.numel(), SCALED),)](
                gradient,
                factor,
                loss,
                out,
                gradient.numel(),
                BLOCK=SCALED,
                num_warps=8,
                enable_fp_fusion=False,
                **dependent(gradient.device),
            )
    return out
