"""Packing and densifying targets on the CPU: numba kernels that stream blocks of pixels through the cache.

A block of pixels (128 of them at 150 classes) is read once and turned into distances to the maximum, in a scratch of
classes x pixels that stays in the L1 or L2 cache. Lanes run along pixels, so that every inner loop vectorises. The k
largest are found in k rounds of (smallest distance left, lowest id that has it): k * C simple steps per pixel where a
sort takes C * log C branches: on one core 25 times faster than the reference's sort at C = 150 and k = 8, 9 times at
C = 21. Densifying and packing with k = C are bound by memory, as they are in the reference; they are here so that
nothing depends on how torch divides work among threads.

Everything is float32 inside: half-precision logits and packed targets are converted by torch, which costs a copy of
them. numba has no float16 on the CPU, and conversions written by hand doubled the length of this file.

Legend: B batch, C classes, k kept classes, h w target pixels; N = h * w of them; n pixels of a block.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..topk import LOGIT_LIMIT, check_ids, check_logits, check_packed, index_dtype
from .math import exp2, kernel, njit
from .threads import run

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
"""With Python's error model a division checks for a zero, and the loop around it does not vectorise.

The loss has other options: values here may be infinite, and a cache holds the sign of a zero.
"""
exact_kernel = partial(kernel, options=OPTIONS)
"""`math.kernel` without the liberties that the loss takes with floats."""
_SCRATCH = 32768
"""Elements of a block: 128 KiB of float32. Shorter rows cost more than leaving the L1 cache does."""

_f = np.float32
_LIMIT = _f(LOGIT_LIMIT)
_LARGEST = _f(np.finfo(np.float32).max)
_TAKEN = _f(np.inf)
_NAN = _f(np.nan)
LOG2_E = _f(math.log2(math.e))


@njit(**OPTIONS)
def larger(x, y):
    """Return the larger of two float32 numbers, or y if x is NaN.

    Call it as `y[j] = larger(x, y[j])`. The function adds 0, so that LLVM stores every element of y instead of only the
    changed ones. This is five times faster on a Zen processor.
    """
    return _f((x if x > y else y) + _f(0))


@njit(**OPTIONS)
def _read_block(logits, start, strides, n, block, largest):
    """Read n pixels into `block` (C, width) as distances to the maximum over classes, 0 to the largest float.

    `largest` becomes the maxima, or NaN in lost pixels: those with NaN, +inf or nothing but -inf. Their distances are
    0, so their class ids are 0, 1, 2, ...
    """
    num_classes = block.shape[0]
    class_stride, pixel_stride = strides
    if pixel_stride == 1:
        for c in range(num_classes):
            base, row = start + c * class_stride, block[c]
            source = logits[base : base + n]  # an index that starts at 0 is known not to be negative
            for j in range(n):  # an assignment of slices takes three times as long
                row[j] = source[j]
    else:  # channels last: a pixel's classes share a cache line
        for j in range(n):
            base = start + j * pixel_stride
            for c in range(num_classes):
                block[c, j] = logits[base + c * class_stride]
    lost = np.zeros(n, np.int32)
    largest[:n] = -np.inf
    for c in range(num_classes):
        row = block[c]
        for j in range(n):
            largest[j] = larger(row[j], largest[j])
            lost[j] |= 0 if row[j] <= _LARGEST else 1
    for j in range(n):
        largest[j] = _NAN if lost[j] != 0 or largest[j] == -np.inf else largest[j]
    for c in range(num_classes):
        row = block[c]
        for j in range(n):
            distance = _f(largest[j] - row[j])
            row[j] = min(distance, _LARGEST) if distance > _f(0) else _f(0)


@njit(**OPTIONS)
def _find_nearest(block, n, nearest, ids):
    """Find the smallest of every column and the lowest class that has it."""
    nearest[:n] = _TAKEN
    for c in range(block.shape[0]):
        row, this = block[c], np.int32(c)
        for j in range(n):
            # Loaded before anything is stored, else the loop does not vectorise.
            x, so_far, id = row[j], nearest[j], ids[j]
            closer = x < so_far
            nearest[j] = _f((x if closer else so_far) + _f(0))
            ids[j] = this if closer else id


@njit(**OPTIONS)
def _write_values(distance, largest, n, out):
    """Write the stored values of a class, or NaN if the maximum is NaN."""
    for j in range(n):
        out[j] = _f(_f(0) - min(distance[j], _LIMIT)) + _f(largest[j] - largest[j])  # never -0


@njit(**OPTIONS)
def _write_tail(block, nearest, mass, largest, n, rest, out):
    """Write the log-odds of the remaining mass in `block` to the sum `mass`, both relative to the maximum."""
    rest[:n] = 0
    for c in range(block.shape[0]):
        row = block[c]
        for j in range(n):
            rest[j] += exp2(_f(nearest[j] - row[j]) * LOG2_E)
    for j in range(n):
        odds = _f(_f(math.log(_f(rest[j] / mass[j]))) - nearest[j])
        out[j] = min(max(odds, -_LIMIT), _LIMIT) + _f(largest[j] - largest[j])


@exact_kernel
def pack_tasks(first, last, logits, strides, shape, width, values, indices, tail):
    """Pack the top-k logits of a range of blocks of `width` neighbouring pixels.

    The blocks are `first` to `last` - 1, counted row by row and image by image. The last block of a row may be
    narrower. Image shapes are (h, w), with N = h * w pixels.

    Shapes and units:
        logits: flat float32 memory of the (B, C, h, w) logits.
        strides: element strides (image, class, row, column). shape: (C, h, w).
        values: (B, k, N) float32 result, kept logits minus the pixel's largest.
        indices: (B, k, N) int32 result, their class ids. Not written if k = C.
        tail: (B, N) float32 result, log-odds of the mass of the dropped classes. Not written if k = C.
    """
    num_classes, h, w = shape
    k = values.shape[1]
    blocks = (w + width - 1) // width
    block, ids = np.empty((num_classes, width), np.float32), np.zeros(width, np.int32)
    largest, nearest = np.empty(width, np.float32), np.empty(width, np.float32)
    mass, rest = np.empty(width, np.float32), np.empty(width, np.float32)
    for task in range(first, last):
        b, i, x = task // (h * blocks), (task // blocks) % h, (task % blocks) * width
        n = min(width, w - x)
        offset = b * strides[0] + i * strides[2] + x * strides[3]
        _read_block(logits, offset, (strides[1], strides[3]), n, block, largest)
        here = slice(i * w + x, i * w + x + n)
        if k == num_classes:
            for c in range(k):
                _write_values(block[c], largest, n, values[b, c][here])
            continue
        mass[:n] = 0
        for rank in range(k):
            _find_nearest(block, n, nearest, ids)
            _write_values(nearest, largest, n, values[b, rank][here])
            indices[b, rank][here] = ids[:n]
            for j in range(n):
                mass[j] += exp2(_f(_f(0) - nearest[j]) * LOG2_E)
                block[ids[j], j] = _TAKEN
        _find_nearest(block, n, nearest, ids)
        _write_tail(block, nearest, mass, largest, n, rest, tail[b][here])


@njit(**OPTIONS)
def _spread_tail(values, tail, n, log_missing, largest, fill):
    """Find the logit of classes that were not kept: log-sum-exp of `values` (k, n) + tail - log_missing, clamped."""
    largest[:n] = -_LARGEST
    for rank in range(values.shape[0]):
        row = values[rank]
        for j in range(n):
            largest[j] = larger(row[j], largest[j])
    fill[:n] = 0
    for rank in range(values.shape[0]):
        row = values[rank]
        for j in range(n):
            x = row[j]
            term = exp2(_f(x - largest[j]) * LOG2_E)
            fill[j] += term if x <= _LARGEST else x  # exp2 takes neither infinity nor NaN
    for j in range(n):
        # In float64, rounded once: C - k classes share the error.
        x = math.log(np.float64(fill[j])) + np.float64(largest[j]) + np.float64(tail[j]) - log_missing
        x = LOGIT_LIMIT if x > LOGIT_LIMIT else x
        fill[j] = -LOGIT_LIMIT if x < -LOGIT_LIMIT else x


@exact_kernel
def densify_tasks(first, last, values, indices, tail, width, out):
    """Compute the logits of all classes from top-k logits, for a range of blocks of `width` neighbouring pixels.

    The blocks are `first` to `last` - 1, counted image by image. N is the number of pixels of an image.

    Shapes and units:
        values: (B, k, N) float32 kept logits minus the pixel's largest.
        indices: (B, k, N) int32 class ids of the kept logits.
        tail: (B, N) float32 log-odds of the mass of the dropped classes, which share it evenly.
        out: (B, C, N) float32 result, also minus the pixel's largest logit.
    """
    k, pixels = values.shape[1:]
    num_classes = out.shape[1]
    blocks = (pixels + width - 1) // width
    log_missing = math.log(num_classes - k)
    largest, fill = np.empty(width, np.float32), np.empty(width, np.float32)
    for task in range(first, last):
        b, start = task // blocks, (task % blocks) * width
        here = slice(start, min(start + width, pixels))
        n = here.stop - start
        _spread_tail(values[b][:, here], tail[b][here], n, log_missing, largest, fill)
        for c in range(num_classes):
            row = out[b, c][here]
            for j in range(n):
                row[j] = fill[j]
        for rank in range(k):
            for j in range(start, here.stop):
                out[b, indices[b, rank, j], j] = values[b, rank, j]


def pack(logits_BChw: Tensor, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keep the k largest logits of every pixel, in float32 on the CPU, with the same bits for any number of threads.

    It is the "numba" implementation of `kdcache_kernels.pack`.

    Args:
        logits_BChw: any floating dtype, any strides.
        k: 1 to C. C keeps every class in class order.
    Returns: (values, indices, tail) as in `PackedTarget`: the kept logits (B, k, h, w) minus the pixel's largest, their
        class ids, and the log-odds (B, h, w) of the other classes' mass. With k = C, indices and tail are None.
    Raises: ShapeError for a tensor that is not (B, C, h, w) of floats, ValueRangeError for k.
    Memory: the result in float32 and int32. Logits that are not contiguous float32 are copied.
    """
    check_logits(logits_BChw, k)
    B, num_classes, h, w = shape = logits_BChw.shape
    dense = k == num_classes
    values = torch.empty((B, k, h, w))
    indices = torch.empty((B, 0 if dense else k, h, w), dtype=torch.int32)
    tail = torch.empty((B, 0 if dense else h, w))
    if values.numel() > 0:
        logits_BChw = logits_BChw.detach().float()
        strides = logits_BChw.stride()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if h == 1 or strides[2] == w * strides[3]:
            h, w = 1, h * w
        width = block_width(num_classes, w)
        run(
            pack_tasks,
            B * h * -(-w // width),
            *(logits_BChw.as_strided((extent,), (1,)).numpy(), strides, (num_classes, h, w), width),
            *(part.flatten(-2).numpy() for part in (values, indices, tail)),
        )
    if dense:
        return values.half(), None, None
    return values.half(), indices.to(index_dtype(num_classes)), tail.half()


def densify(values: Tensor, indices: Tensor | None, tail: Tensor | None, num_classes: int) -> Tensor:
    """Compute `kdcache_kernels.densify` on the CPU. The result is (B, C, h, w) float32, new and contiguous.

    `values`, `indices` and `tail` are the fields of a `PackedTarget`, and `num_classes` is C.

    Raises: ShapeError for wrong shapes, dtypes or devices, ValueRangeError for class ids out of range.
    Memory: the result, and 8 bytes per stored value.
    """
    check_packed(values, indices, tail, num_classes)
    if indices is None or tail is None:
        return values.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    check_ids(indices, num_classes)
    B, _, h, w = values.shape
    dense_BChw = torch.empty((B, num_classes, h, w))
    width = block_width(num_classes, h * w)
    parts = (values.float(), indices.int(), tail.float())
    run(
        densify_tasks,
        B * -(-h * w // width),
        *(part.detach().contiguous().flatten(-2).numpy() for part in parts),
        *(width, dense_BChw.flatten(-2).numpy()),
    )
    return dense_BChw


def block_width(num_classes: int, pixels: int) -> int:
    """Return how many pixels to process at a time, so that a block of (num_classes, width) floats fits the CPU's cache.

    It is a power of two from 16 to 256, or `pixels` if that is less.
    """
    width = 1 << max(4, min(8, (_SCRATCH // num_classes).bit_length() - 1))
    return int(min(width, pixels))
