"""Packing and densifying targets on CUDA: one pixel per lane, dynamic loops over classes, nothing waits for the device.

The classes of a pixel are read again for every four ranks rather than held in registers: the kernel then needs no
padding of C to a power of two, has no limit on C and one variant for every C and k, and 128 neighbouring pixels times
150 classes stay in the L2 cache between two readings. k = 8 reads them four times (maximum, ranks 0 to 3, ranks 4 to 7,
tail). For sm_90: 40 registers, no spills, 32 instructions per class and four ranks.

Order is decided on the bits of `maximum - logit`, a non-negative float, whose bits order as integers do: what is not
there is the largest integer, and no infinity can be mistaken for it.

Legend: B batch, C classes, k kept classes, h w target pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..topk import LOGIT_LIMIT, check_logits, check_packed, index_dtype
from .common import cdiv

BLOCK = 128
OPTIONS = {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": False}
"""Launch options of the kernels that give each lane a pixel."""
LIMIT = tl.constexpr(LOGIT_LIMIT)
LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
INFINITY_BITS = tl.constexpr(0x7F800000)
NOTHING = tl.constexpr(0x7FFFFFFF)
RANKS = tl.constexpr(4)


@triton.jit
def pixels(num_pixels, total, BLOCK: tl.constexpr):
    """Return (image, pixel, exists) of this program's BLOCK lanes, with one pixel per lane.

    An image has `num_pixels` pixels, and all images together have `total`. `image` and `pixel` are int64, because
    offsets can exceed int32. Lanes beyond the last pixel have exists False, image 0 and pixel 0.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offs < total
    offs = tl.where(exists, offs, 0)
    image = offs // num_pixels
    return image, offs - image * num_pixels, exists


@triton.jit
def first_class(logits_ptr, strides, image, pixel, w):
    """Return pointers to class 0 of each lane's pixel, and the stride from one class to the next in elements.

    Shapes and units:
        logits_ptr: (B, C, h, w) logits. strides: the four strides of the logits in elements.
        image, pixel: int64, number of each lane's image, and of its pixel in the image, row by row.
        w: columns of an image.
    """
    return logits_ptr + image * strides[0] + (pixel // w) * strides[2] + (pixel % w) * strides[3], strides[1]


@triton.jit
def _distance_bits(logits_ptrs, largest, exists):
    """Return the bits of maximum - logit, 0 in lost pixels (NaN maximum), so their ids are 0, 1, 2, ..."""
    distance = largest - tl.load(logits_ptrs, mask=exists, other=0.0).to(tl.float32)
    # Neither NaN nor -0, the bits of which are negative.
    return tl.where(distance > 0, distance, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _follows(bits, c, last_bits, last_id):
    """Return whether class c comes after the last one taken: farther from the maximum, or as far with a higher id."""
    return (bits > last_bits) | ((bits == last_bits) & (c > last_id))


@triton.jit
def _store_half(ptrs, x, largest, exists):
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    tl.store(ptrs, tl.where(largest == largest, x, float("nan")).to(tl.float16), mask=exists)


@triton.jit
def _largest_logit(logits_ptrs, stride_c, num_classes, exists, BLOCK: tl.constexpr):
    """Return maxima over classes, NaN in lost pixels: those with NaN, +inf or nothing but -inf."""
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    lost = tl.zeros((BLOCK,), tl.int32)
    for _ in range(num_classes):
        x = tl.load(logits_ptrs, mask=exists, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x)
        lost = tl.where(x <= LARGEST_FLOAT, lost, 1)
        logits_ptrs += stride_c
    return tl.where((lost != 0) | (largest == float("-inf")), float("nan"), largest)


@triton.jit
def _next_ranks(logits_ptrs, stride_c, num_classes, largest, last_bits, last_id, exists, BLOCK: tl.constexpr):
    """Return the next four classes after the last one taken, and the distance of the fifth: five bits, four ids."""
    bits0 = tl.full((BLOCK,), NOTHING, tl.int32)
    bits1, bits2, bits3, bits4 = bits0, bits0, bits0, bits0
    id0 = tl.zeros((BLOCK,), tl.int32)
    id1, id2, id3 = id0, id0, id0
    for c in range(num_classes):
        bits = _distance_bits(logits_ptrs, largest, exists)
        bits = tl.where(_follows(bits, c, last_bits, last_id), bits, NOTHING)
        # Sorted insertion from the far end. Equal ones stay ahead: classes come in order of their ids.
        before0, before1, before2, before3 = bits < bits0, bits < bits1, bits < bits2, bits < bits3
        id3 = tl.where(before2, id2, tl.where(before3, c, id3))
        id2 = tl.where(before1, id1, tl.where(before2, c, id2))
        id1 = tl.where(before0, id0, tl.where(before1, c, id1))
        id0 = tl.where(before0, c, id0)
        bits4 = tl.maximum(bits3, tl.minimum(bits, bits4))
        bits3 = tl.maximum(bits2, tl.minimum(bits, bits3))
        bits2 = tl.maximum(bits1, tl.minimum(bits, bits2))
        bits1 = tl.maximum(bits0, tl.minimum(bits, bits1))
        bits0 = tl.minimum(bits, bits0)
        logits_ptrs += stride_c
    return (bits0, bits1, bits2, bits3, bits4), (id0, id1, id2, id3)


@triton.jit
def _log_odds(
    logits_ptrs, stride_c, num_classes, largest, last_bits, last_id, nearest, mass, exists, BLOCK: tl.constexpr
):
    """Return log-odds of the mass after the last kept class to `mass`. `nearest` is its smallest distance."""
    rest = tl.zeros((BLOCK,), tl.float32)
    for c in range(num_classes):
        bits = _distance_bits(logits_ptrs, largest, exists)
        term = tl.exp(_float(nearest) - _float(bits))
        rest += tl.where(_follows(bits, c, last_bits, last_id), term, 0.0)
        logits_ptrs += stride_c
    odds = tl.log(rest) - tl.log(mass) - _float(nearest)
    # Where nothing but -inf is left its sum is NaN.
    return tl.where(nearest < INFINITY_BITS, odds, -LIMIT)


@triton.jit(
    do_not_specialize=["total", "num_pixels", "num_classes", "k", "w"], do_not_specialize_on_alignment=["strides"]
)
def _pack_kernel(
    logits_ptr, strides, values_ptr, indices_ptr, tail_ptr, total, num_pixels, num_classes, k, w,
    DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, pixel, exists = pixels(num_pixels, total, BLOCK)
    logits_ptrs, stride_c = first_class(logits_ptr, strides, image, pixel, w)
    largest = _largest_logit(logits_ptrs, stride_c, num_classes, exists, BLOCK)
    values_ptrs = values_ptr + image * k * num_pixels + pixel
    if DENSE:
        for _ in range(num_classes):
            distance = _float(_distance_bits(logits_ptrs, largest, exists))
            _store_half(values_ptrs, 0.0 - distance, largest, exists)
            logits_ptrs += stride_c
            values_ptrs += num_pixels
    else:
        indices_ptrs = indices_ptr + image * k * num_pixels + pixel
        last_bits = tl.full((BLOCK,), -1, tl.int32)
        last_id = tl.full((BLOCK,), -1, tl.int32)
        nearest = last_bits  # of what is not kept
        mass = tl.zeros((BLOCK,), tl.float32)
        for rank in range(0, k, RANKS):
            bits, ids = _next_ranks(logits_ptrs, stride_c, num_classes, largest, last_bits, last_id, exists, BLOCK)
            for slot in tl.static_range(RANKS):
                if rank + slot < k:
                    last_bits, last_id, nearest = bits[slot], ids[slot], bits[slot + 1]
                    distance = _float(last_bits)
                    mass += tl.exp(-distance)
                    _store_half(values_ptrs, 0.0 - distance, largest, exists)
                    tl.store(indices_ptrs, last_id.to(indices_ptr.dtype.element_ty), mask=exists)
                    values_ptrs += num_pixels
                    indices_ptrs += num_pixels
        odds = _log_odds(logits_ptrs, stride_c, num_classes, largest, last_bits, last_id, nearest, mass, exists, BLOCK)
        _store_half(tail_ptr + image * num_pixels + pixel, odds, largest, exists)


@triton.jit
def tail_fill(largest, mass, tail, num_classes, k):
    """Return the float64 logit that each dropped class of a top-k target gets, clamped to -6e4 to 6e4.

    The dropped classes share the tail's mass evenly.

    Shapes and units:
        largest: the largest kept logit of each pixel. mass: the sum over kept logits of exp(logit - largest).
        tail: log-odds of the mass of the dropped classes.
        num_classes, k: C, and the number of kept classes.
    """
    unit = tl.full((), 1.0, tl.float64)
    fill = largest.to(tl.float64) + tl.log(mass.to(tl.float64)) + tail.to(tl.float64) - tl.log((num_classes - k) * unit)
    # Written with comparisons, which leave a NaN what it is.
    return tl.where(fill > LIMIT, LIMIT, tl.where(fill < -LIMIT, -LIMIT, fill))


@triton.jit(do_not_specialize=["total", "num_pixels", "num_classes", "k"])
def _densify_kernel(
    values_ptr, indices_ptr, tail_ptr, dense_ptr, total, num_pixels, num_classes, k, BLOCK: tl.constexpr
):
    image, pixel, exists = pixels(num_pixels, total, BLOCK)
    start = image * k * num_pixels + pixel
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    highest_id = tl.zeros((BLOCK,), tl.int32)
    offs = start
    for _ in range(k):
        largest = tl.maximum(largest, tl.load(values_ptr + offs, mask=exists, other=0.0).to(tl.float32))
        highest_id = tl.maximum(highest_id, tl.load(indices_ptr + offs, mask=exists, other=0).to(tl.int32))
        offs += num_pixels
    largest = tl.where(tl.abs(largest) <= LARGEST_FLOAT, largest, 0.0)
    mass = tl.zeros((BLOCK,), tl.float32)
    offs = start
    for _ in range(k):
        mass += tl.exp(tl.load(values_ptr + offs, mask=exists, other=0.0).to(tl.float32) - largest)
        offs += num_pixels
    tail = tl.load(tail_ptr + image * num_pixels + pixel, mask=exists, other=0.0).to(tl.float32)
    fill = tail_fill(largest, mass, tail, num_classes, k).to(tl.float32)
    wrong = highest_id >= num_classes
    fill = tl.where(wrong, float("nan"), fill)
    dense_ptrs = dense_ptr + image * num_classes * num_pixels + pixel
    class_ptrs = dense_ptrs
    for _ in range(num_classes):
        tl.store(class_ptrs, fill, mask=exists)
        class_ptrs += num_pixels
    # The kept classes overwrite what other threads of this program may have written.
    tl.debug_barrier()
    offs = start
    for _ in range(k):
        c = tl.load(indices_ptr + offs, mask=exists, other=0).to(tl.int64)
        x = tl.load(values_ptr + offs, mask=exists, other=0.0).to(tl.float32)
        tl.store(dense_ptrs + tl.where(wrong, 0, c) * num_pixels, tl.where(wrong, float("nan"), x), mask=exists)
        offs += num_pixels


def pack(logits_BChw: Tensor, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keep the k largest logits of every pixel, in float32 on CUDA. It is the "triton" implementation of `pack`.

    Returns: the fields (values, indices, tail) of a `PackedTarget`, the last two None if k = C.
    Raises: ShapeError for a tensor that is not (B, C, h, w) of floats, ValueRangeError for k.
    Memory: the result. Logits other than float32, float16 and bfloat16 are first copied to float32.
    """
    check_logits(logits_BChw, k)
    logits_BChw = logits_BChw.detach()
    if logits_BChw.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        logits_BChw = logits_BChw.float()
    B, num_classes, h, w = logits_BChw.shape
    dense = k == num_classes
    device = logits_BChw.device
    values = torch.empty((B, k, h, w), dtype=torch.float16, device=device)
    indices = torch.empty((B, 0 if dense else k, h, w), dtype=index_dtype(num_classes), device=device)
    tail = torch.empty((B, 0 if dense else h, w), dtype=torch.float16, device=device)
    if values.numel() > 0:
        with torch.cuda.device_of(logits_BChw):
            _pack_kernel[(cdiv(B * h * w, BLOCK),)](
                logits_BChw, logits_BChw.stride(), values, indices, tail, B * h * w, h * w, num_classes, k, w,
                DENSE=dense, **OPTIONS,
            )  # fmt: skip
    return (values, None, None) if dense else (values, indices, tail)


def densify(values: Tensor, indices: Tensor | None, tail: Tensor | None, num_classes: int) -> Tensor:
    """Compute the logits of all classes, (B, C, h, w) float32, from packed logits on CUDA, as a new, contiguous tensor.

    The dropped classes of a pixel share the tail's mass evenly. A pixel with a class id out of range is NaN in every
    class. Checking the ids would wait for the device.

    Args:
        values: the kept logits, as in `PackedTarget`.
        indices: their class ids, or None if all classes are kept.
        tail: the log-odds of the dropped classes together, or None if all classes are kept.
        num_classes: C.

    Raises: ShapeError for wrong shapes, dtypes or devices.
    """
    check_packed(values, indices, tail, num_classes)
    if indices is None or tail is None:
        return values.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    B, k, h, w = values.shape
    dense_BChw = torch.empty((B, num_classes, h, w), dtype=torch.float32, device=values.device)
    if B > 0:
        with torch.cuda.device_of(values):
            _densify_kernel[(cdiv(B * h * w, BLOCK),)](
                values.contiguous(), indices.contiguous(), tail.contiguous(), dense_BChw,
                B * h * w, h * w, num_classes, k, **OPTIONS,
            )  # fmt: skip
    return dense_BChw
