"""The teacher's class and its probability at label size on CUDA: a label pixel per lane, no wait for the device.

A lane finds its four target pixels from its position (in float64, as `window.hat_matrix` does) and walks the classes
once: blend, keep the largest and its class, and add up exponentials relative to the largest so far. No class is kept,
so C has no limit and nothing is padded. The four loads per class hit the L1 cache, for neighbouring lanes share them.
A packed target is densified first, at its own size. For sm_90: 48 registers, no spills, 51 instructions per class.

Legend: B batch, C classes, H W label size, h w the target's own size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..topk import PackedTarget, argmax_dtype
from ..window import view_positions
from .topk import BLOCK, OPTIONS, densify, first_class, pixels

USABLE = tl.constexpr(torch.finfo(torch.float32).max / 8)  # as in the loss: a logit beyond it is lost


@triton.jit(do_not_specialize=["total", "num_pixels", "num_classes", "w"], do_not_specialize_on_alignment=["strides"])
def _lost_kernel(logits_ptr, strides, lost_ptr, total, num_pixels, num_classes, w, BLOCK: tl.constexpr):
    image, pixel, exists = pixels(num_pixels, total, BLOCK)
    logits_ptrs, stride_c = first_class(logits_ptr, strides, image, pixel, w)
    lost = tl.zeros((BLOCK,), tl.int32)
    for _ in range(num_classes):
        x = tl.load(logits_ptrs, mask=exists, other=0.0).to(tl.float32)
        lost = tl.where(tl.abs(x) <= USABLE, lost, 1)
        logits_ptrs += stride_c
    tl.store(lost_ptr + image * num_pixels + pixel, lost.to(tl.uint8), mask=exists)


@triton.jit
def _taps(position, n_view, n_in, ALIGN_CORNERS: tl.constexpr):
    """(cell, next cell, weight, next weight, whether outside the view) of positions on one axis."""
    if ALIGN_CORNERS:
        # A view of one pixel has its centre on the first cell's.
        source = tl.where(n_view == 1, 0.0, (position - 0.5) * (n_in - 1) / tl.maximum(n_view - 1, 1))
    else:
        source = position * n_in / n_view - 0.5
    source = tl.where(source < 0, 0.0, tl.where(source > n_in - 1, n_in - 1.0, source))
    cell = tl.where(source == source, tl.floor(source), 0.0)  # NaN: the weights carry it
    weight = 1.0 - (source - cell)
    next_weight = 1.0 - (cell + 1.0 - source)
    index = cell.to(tl.int64)
    outside = (position < 0) | (position > n_view)
    return index, tl.minimum(index + 1, n_in - 1), weight.to(tl.float32), next_weight.to(tl.float32), outside


@triton.jit(
    do_not_specialize=[
        "stride_yb", "stride_xb", "total", "num_classes", "H", "W", "h", "w", "view_h", "view_w",
    ],
    do_not_specialize_on_alignment=["strides"],
)  # fmt: skip
def _argmax_kernel(
    logits_ptr, strides, lost_ptr, rows_ptr, stride_yb, columns_ptr, stride_xb, argmax_ptr, confidence_ptr, total,
    num_classes, H, W, h, w, view_h, view_w,
    ALIGN_CORNERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_pixels = tl.cast(H, tl.int64) * W
    image, pixel, exists = pixels(num_pixels, total, BLOCK)
    y = tl.load(rows_ptr + image * stride_yb + pixel // W)
    x = tl.load(columns_ptr + image * stride_xb + pixel % W)
    row, next_row, weight_y, next_weight_y, outside_y = _taps(y, view_h, h, ALIGN_CORNERS)
    column, next_column, weight_x, next_weight_x, outside_x = _taps(x, view_w, w, ALIGN_CORNERS)

    lost_ptrs = lost_ptr + image * h * w
    lost00 = tl.load(lost_ptrs + row * w + column) != 0
    lost01 = tl.load(lost_ptrs + row * w + next_column) != 0
    lost10 = tl.load(lost_ptrs + next_row * w + column) != 0
    lost11 = tl.load(lost_ptrs + next_row * w + next_column) != 0
    below, right = next_weight_y > 0, next_weight_x > 0
    lost = lost00 | (lost01 & right) | (lost10 & below) | (lost11 & below & right)

    stride_b, stride_c, stride_h, stride_w = strides
    ptrs = logits_ptr + image * stride_b
    ptrs00 = ptrs + row * stride_h + column * stride_w
    ptrs01 = ptrs + row * stride_h + next_column * stride_w
    ptrs10 = ptrs + next_row * stride_h + column * stride_w
    ptrs11 = ptrs + next_row * stride_h + next_column * stride_w
    load00, load01 = exists & (lost00 == 0), exists & (lost01 == 0)
    load10, load11 = exists & (lost10 == 0), exists & (lost11 == 0)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    for c in range(num_classes):
        z00 = tl.load(ptrs00, mask=load00, other=0.0).to(tl.float32)
        z01 = tl.load(ptrs01, mask=load01, other=0.0).to(tl.float32)
        z10 = tl.load(ptrs10, mask=load10, other=0.0).to(tl.float32)
        z11 = tl.load(ptrs11, mask=load11, other=0.0).to(tl.float32)
        left = z00 * weight_y + z10 * next_weight_y
        z = left * weight_x + (z01 * weight_y + z11 * next_weight_y) * next_weight_x
        best = tl.where(z > largest, c, best)
        larger = tl.maximum(largest, z)
        sum_exp = sum_exp * tl.exp(largest - larger) + tl.exp(z - larger)
        largest = larger
        ptrs00 += stride_c
        ptrs01 += stride_c
        ptrs10 += stride_c
        ptrs11 += stride_c
    probability = tl.where(lost, float("nan"), 1.0 / sum_exp)
    probability = tl.where(outside_y | outside_x, 0.0, probability)
    offs = image * num_pixels + pixel
    tl.store(argmax_ptr + offs, best.to(argmax_ptr.dtype.element_ty), mask=exists)
    tl.store(confidence_ptr + offs, probability.to(tl.float16), mask=exists)


def argmax_confidence(
    target: PackedTarget, size: tuple[int, int], window_B4: Tensor | None, flip_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute what `kdcache_kernels.target_argmax_confidence` documents.

    Where a window is NaN the confidence is NaN. Memory: the result, and 4 * B*C*h*w bytes for a target with k < C.
    """
    B, num_classes, device = target.batch_size, target.num_classes, target.device
    H, W = size
    h, w = target.values.shape[2:]
    argmax_BHW = torch.empty((B, H, W), dtype=argmax_dtype(num_classes), device=device)
    confidence_BHW = torch.empty((B, H, W), dtype=torch.float16, device=device)
    if B == 0:
        return argmax_BHW, confidence_BHW
    logits_BChw = target.values
    if target.indices is not None:
        logits_BChw = densify(target.values, target.indices, target.tail, num_classes)
    positions = view_positions(window_B4, flip_B, target.view_size, size, device)
    rows, columns = positions.y.contiguous(), positions.x.contiguous()
    lost_Bhw = torch.empty((B, h, w), dtype=torch.uint8, device=device)
    with torch.cuda.device_of(logits_BChw):
        _lost_kernel[(triton.cdiv(B * h * w, BLOCK),)](
            logits_BChw, logits_BChw.stride(), lost_Bhw, B * h * w, h * w, num_classes, w, **OPTIONS
        )
        _argmax_kernel[(triton.cdiv(B * H * W, BLOCK),)](
            logits_BChw, logits_BChw.stride(), lost_Bhw, rows, H if len(rows) > 1 else 0,
            columns, W if len(columns) > 1 else 0, argmax_BHW, confidence_BHW,
            B * H * W, num_classes, H, W, h, w, *target.view_size, ALIGN_CORNERS=target.align_corners, **OPTIONS,
        )  # fmt: skip
    return argmax_BHW, confidence_BHW
