"""The teacher's class and its probability at label size on CUDA: a label pixel per lane, no wait for the device.

A lane reads its four target pixels from tables of neighbours, which the loss's own code writes (`geometry`: float64,
once per row and column of an image), and walks the classes once: blend, keep the largest and its class, and add up
exponentials relative to the largest so far. No class is kept, so C has no limit and nothing is padded. The four loads
per class hit the L1 cache, for neighbouring lanes share them. A packed target is densified first, at its own size. For
sm_90: 40 registers, no spills, 56 instructions per class, and no float64 outside the tables.

Legend: B batch, C classes, H W label size, h w the target's own size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..topk import PackedTarget, argmax_dtype
from .common import cdiv
from .geometry import Taps, store_taps
from .topk import BLOCK, OPTIONS, densify, first_class, pixels

TABLE = 512
"""Entries of a table that are written at a time."""
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


@triton.jit(
    do_not_specialize=["H", "W", "h", "w", "view_h", "view_w"],
    do_not_specialize_on_alignment=["window_ptr", "flip_ptr"],
)
def _taps_kernel(
    window_ptr, flip_ptr, row_taps, column_taps, H, W, h, w, view_h, view_w,
    ALIGN_CORNERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the neighbouring logits of the label pixels of an image, or of all images without window and flip."""
    image = tl.program_id(0)
    HAS_WINDOW: tl.constexpr = window_ptr is not None
    y0, x0, y1, x1 = image, image, image, image
    flip = image < 0
    if HAS_WINDOW:  # as it is, also beside the view: the class is then that of the nearest edge
        y0 = tl.load(window_ptr + 4 * image)
        x0 = tl.load(window_ptr + 4 * image + 1)
        y1 = tl.load(window_ptr + 4 * image + 2)
        x1 = tl.load(window_ptr + 4 * image + 3)
    if flip_ptr is not None:
        flip = tl.load(flip_ptr + image) != 0
    store_taps(row_taps, image * H, H, view_h, h, y0, y1, image < 0, HAS_WINDOW, ALIGN_CORNERS, BLOCK)
    store_taps(column_taps, image * W, W, view_w, w, x0, x1, flip, HAS_WINDOW, ALIGN_CORNERS, BLOCK)


@triton.jit
def _load_taps(taps, offs):
    """Return (neighbour, next neighbour, weight, next weight, whether in the view). NaN windows have NaN weights."""
    index = tl.load(taps.index + offs).to(tl.int64)
    fraction = tl.load(taps.fraction + offs)
    next_index = tl.where(fraction > 0, index + 1, index)
    return index, next_index, 1.0 - fraction, fraction, tl.load(taps.inside + offs) != 0


@triton.jit(
    do_not_specialize=["row_stride", "column_stride", "total", "num_classes", "H", "W", "h", "w"],
    do_not_specialize_on_alignment=["strides"],
)
def _argmax_kernel(
    logits_ptr, strides, lost_ptr, row_taps, row_stride, column_taps, column_stride, argmax_ptr, confidence_ptr, total,
    num_classes, H, W, h, w,
    BLOCK: tl.constexpr,
):  # fmt: skip
    num_pixels = tl.cast(H, tl.int64) * W
    image, pixel, exists = pixels(num_pixels, total, BLOCK)
    row, next_row, weight_y, next_weight_y, inside_y = _load_taps(row_taps, image * row_stride + pixel // W)
    column, next_column, weight_x, next_weight_x, inside_x = _load_taps(column_taps, image * column_stride + pixel % W)

    lost_ptrs = lost_ptr + image * h * w
    lost00 = tl.load(lost_ptrs + row * w + column) != 0
    lost01 = tl.load(lost_ptrs + row * w + next_column) != 0
    lost10 = tl.load(lost_ptrs + next_row * w + column) != 0
    lost11 = tl.load(lost_ptrs + next_row * w + next_column) != 0
    lost = lost00 | lost01 | lost10 | lost11  # a next cell of weight 0 is the cell itself

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
    probability = tl.where(inside_y & inside_x, probability, 0.0)
    offs = image * num_pixels + pixel
    tl.store(argmax_ptr + offs, best.to(argmax_ptr.dtype.element_ty), mask=exists)
    tl.store(confidence_ptr + offs, probability.to(tl.float16), mask=exists)


def argmax_confidence(
    target: PackedTarget, size: tuple[int, int], window_B4: Tensor | None, flip_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `kdcache_kernels.target_argmax_confidence` on CUDA, without waiting for the device.

    Args:
        target: packed teacher logits.
        size: (H, W) of the result in pixels.
        window_B4: (B, 4) float64 edges in pixels of the view, or None for the whole view. A NaN edge makes all
            confidences of the image NaN.
        flip_B: (B,) bool, whether to mirror left to right, or None.
    Returns: (class ids, float16 probabilities), (B, H, W) each.
    Memory: the result, and 4 * B*C*h*w bytes for a target with k < C.
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
    window = None if window_B4 is None else window_B4.to(torch.float64).contiguous()
    flip = None if flip_B is None else flip_B.contiguous().view(torch.uint8)
    Bt = 1 if window is None and flip is None else B
    rows, columns = Taps.empty(device, Bt, H), Taps.empty(device, Bt, W)
    lost_Bhw = torch.empty((B, h, w), dtype=torch.uint8, device=device)
    with torch.cuda.device_of(logits_BChw):
        _taps_kernel[(Bt,)](
            window, flip, rows, columns, H, W, h, w, *target.view_size,
            ALIGN_CORNERS=target.align_corners, BLOCK=TABLE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _lost_kernel[(cdiv(B * h * w, BLOCK),)](
            logits_BChw, logits_BChw.stride(), lost_Bhw, B * h * w, h * w, num_classes, w, **OPTIONS
        )
        _argmax_kernel[(cdiv(B * H * W, BLOCK),)](
            logits_BChw, logits_BChw.stride(), lost_Bhw, rows, H if Bt > 1 else 0, columns, W if Bt > 1 else 0,
            argmax_BHW, confidence_BHW, B * H * W, num_classes, H, W, h, w, **OPTIONS,
        )  # fmt: skip
    return argmax_BHW, confidence_BHW
