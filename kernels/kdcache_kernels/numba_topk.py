# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls
"""Packing and densifying targets on the CPU: numba kernels that stream blocks of pixels through the cache.

A block of pixels (64 of them at 150 classes) is read once, whatever its dtype and strides, and everything happens in
a scratch of classes x pixels that stays in the L1 or L2 cache. Lanes run along pixels, so that every inner loop
vectorises. The k largest are found in k rounds of (smallest distance to the maximum, lowest id of it): k * C simple
steps per pixel where a sort takes C * log C branches. On two cores this packs 8 x 21 x 128^2 at k = 8 in XX ms and
2 x 150 x 128^2 in XX ms (the sort of the reference: XX and XX); rounds lose to it only above k of about XX.

Order is decided on the bits of `maximum - logit`, a non-negative float, whose bits order as integers do: a class that
was taken gets the largest integer, and no infinity can be mistaken for it.

numba has no float16 on the CPU, so the conversions are written here, in integers, and round as the hardware does.

Legend: B batch, C classes, k kept classes, h w target pixels; N = h * w of them; n pixels of a block.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from . import topk
from .threads import run
from .topk import LOGIT_LIMIT, check_ids, check_logits, check_packed, index_dtype

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
"""With Python's error model a division looks for a zero, and the loop around it does not vectorise."""
FLOAT, HALF, BRAIN = 0, 1, 2
"""How the bits of an input are read: float32, float16, bfloat16."""
KINDS = {torch.float32: FLOAT, torch.float16: HALF, torch.bfloat16: BRAIN}

Array = np.ndarray[Any, Any]
_i = np.int32
_f = np.float32
_LIMIT = _f(LOGIT_LIMIT)
_LARGEST = _f(np.finfo(np.float32).max)
_INFINITY = _f(np.inf)
_NAN = _f(np.nan)
_TAKEN = _i(0x7FFFFFFF)
_LOG2_E = _f(math.log2(math.e))
_SCRATCH = 32768
"""Elements of a block: 128 KiB of float32. Shorter rows cost more than leaving the L1 cache does."""


def _bitcast(source, result):
    """A compiled function that takes the bits of one type as another's."""

    def define(typing_context, x):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(source), generate

    return intrinsic(define)


bits_of: Any = _bitcast(types.float32, types.int32)
float_of: Any = _bitcast(types.int32, types.float32)


@njit(**OPTIONS)
def half_to_float(bits):
    """Exact, subnormals, infinities and NaN included."""
    shifted = _i(_i(bits & _i(0x7FFF)) << _i(13))
    exponent = _i(shifted & _i(0x7C00 << 13))
    normal = float_of(_i(shifted + _i(112 << 23)))
    special = float_of(_i(shifted + _i(224 << 23)))
    # A subnormal: 2^-14 with its bits as the fraction, less 2^-14, is exact.
    subnormal = _f(float_of(_i(shifted + _i(113 << 23))) - float_of(_i(113 << 23)))
    magnitude = normal
    if exponent == _i(0):
        magnitude = subnormal
    if exponent == _i(0x7C00 << 13):
        magnitude = special
    return float_of(_i(bits_of(magnitude) | _i(_i(bits & _i(0x8000)) << _i(16))))


@njit(**OPTIONS)
def float_to_half(x):
    """Round to the nearest, ties to even; |x| at most 6.5e4, or NaN."""
    bits = bits_of(x)
    magnitude = _i(bits & _i(0x7FFFFFFF))
    odd = _i(_i(magnitude >> _i(13)) & _i(1))
    normal = _i(_i(_i(magnitude + _i(0xFFF - (112 << 23))) + odd) >> _i(13))
    # Below 2^-14 the unit of float16 is 2^-24, which is the unit of a float32 at 0.5: adding 0.5 rounds.
    subnormal = _i(bits_of(_f(float_of(magnitude) + _f(0.5))) - _i(126 << 23))
    result = normal
    if magnitude < _i(113 << 23):
        result = subnormal
    if magnitude > _i(0x7F800000):
        result = _i(0x7E00)
    return np.int16(_i(result | _i(_i(bits >> _i(16)) & _i(0x8000))))


@njit(**OPTIONS)
def read_float(bits, kind):
    """The float32 of a value whose bits were read as int16 or int32."""
    if kind == HALF:
        return half_to_float(_i(bits))
    if kind == BRAIN:
        return float_of(_i(_i(bits) << _i(16)))
    return float_of(_i(bits))


@njit(**OPTIONS, fastmath={"contract"})
def exp(x):
    """e^x in float32, to 1e-6 where x > -16; 0 below 2^-125; infinities and NaN as ever. libm's does not vectorise."""
    t = _f(x * _LOG2_E)
    tiny = t < _f(-125)
    if tiny:
        t = _f(-125)
    if t > _f(128):
        t = _f(128)
    # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    shifted = _f(t + _f(12582912))
    f = _f(t - _f(shifted - _f(12582912)))
    p = _f(1.5403530e-4)
    p = _f(p * f + _f(1.3333558e-3))
    p = _f(p * f + _f(9.6181291e-3))
    p = _f(p * f + _f(5.5504109e-2))
    p = _f(p * f + _f(2.4022651e-1))
    p = _f(p * f + _f(6.9314718e-1))
    p = _f(p * f + _f(1))
    result = _f(p * float_of(_i(_i(bits_of(shifted) + _i(127)) << _i(23))))
    if tiny:
        result = _f(0)
    return result


@njit(**OPTIONS)
def larger(x, y):
    """The larger; y if x is NaN. For `y[j] = larger(x, y[j])`.

    "+ 0" keeps LLVM from storing the new ones alone, through a mask, which is five times slower on a Zen.
    """
    return _f((x if x > y else y) + _f(0))


@njit(**OPTIONS)
def clamp(x):
    """Into +-6e4; NaN stays NaN."""
    if x > _LIMIT:
        x = _LIMIT
    if x < -_LIMIT:
        x = -_LIMIT
    return x


@njit(**OPTIONS, cache=True)
def _read_block(logits, kind, start, strides, n, block, largest):
    """Read n pixels into `block` (C, width), as distances to the maximum over classes, 0 in pixels that are lost.

    `largest` (width,) becomes the maxima, NaN in lost pixels. Lanes beyond n hold pixels of zeros.
    """
    num_classes, width = block.shape
    class_stride, pixel_stride = strides
    if n < width:
        block.fill(0)
    if pixel_stride == 1:
        for c in range(num_classes):
            row = block[c]
            base = start + c * class_stride
            given = logits[base : base + n]
            for j in range(n):
                row[j] = read_float(given[j], kind)
    else:  # channels last: a pixel's classes share a cache line
        for j in range(n):
            base = start + j * pixel_stride
            for c in range(num_classes):
                block[c, j] = read_float(logits[base + c * class_stride], kind)
    lost = np.zeros(width, np.int32)
    largest.fill(-_INFINITY)
    for c in range(num_classes):
        row = block[c]
        for j in range(width):
            largest[j] = larger(row[j], largest[j])
            lost[j] |= _i(0) if row[j] <= _LARGEST else _i(1)  # NaN and +inf
    for j in range(width):
        largest[j] = _NAN if lost[j] != _i(0) or largest[j] == -_INFINITY else largest[j]
    for c in range(num_classes):
        row = block[c]
        for j in range(width):
            distance = _f(largest[j] - row[j])
            row[j] = distance if distance > _f(0) else _f(0)  # neither NaN nor -0, whose bits are negative


@njit(**OPTIONS, cache=True)
def _take_nearest(bits, nearest, ids):
    """Find the smallest of every column of `bits` (C, width) and the lowest class that has it, and take it out."""
    nearest.fill(_TAKEN)
    for c in range(bits.shape[0]):
        row = bits[c]
        this = _i(c)
        for j in range(nearest.size):
            # Loaded before anything is stored, else the loop does not vectorise.
            x, so_far, id = row[j], nearest[j], ids[j]
            closer = x < so_far
            nearest[j] = x if closer else so_far
            ids[j] = this if closer else id
    for j in range(nearest.size):
        bits[ids[j], j] = _TAKEN


@njit(**OPTIONS, cache=True)
def _log_odds(bits, nearest, kept, rest):
    """The log-odds of the mass of what is left in `bits` to the sum `kept`; both relative to the maximum."""
    num_classes, width = bits.shape
    nearest.fill(_TAKEN)
    for c in range(num_classes):
        row = bits[c]
        for j in range(width):
            nearest[j] = min(row[j], nearest[j])
    rest.fill(0)
    for c in range(num_classes):
        row = bits[c]
        for j in range(width):
            x, so_far = row[j], rest[j]
            term = exp(_f(float_of(nearest[j]) - float_of(x)))
            rest[j] = so_far + (term if x != _TAKEN else _f(0))
    for j in range(width):
        odds = _f(_f(math.log(_f(rest[j] / kept[j]))) - float_of(nearest[j]))
        # Where nothing but -inf is left its sum is NaN.
        rest[j] = odds if nearest[j] < bits_of(_INFINITY) else -_INFINITY


@njit(**OPTIONS, cache=True)
def _write_half(x, largest, out, base, n):
    """Write n numbers as float16, clamped; NaN where the maximum is."""
    part = out[base : base + n]  # an index that starts at 0 is known not to be negative: the loop vectorises
    for j in range(n):
        part[j] = float_to_half(clamp(x[j]) if largest[j] == largest[j] else _NAN)


@njit(**OPTIONS, cache=True)
def _pack_tasks(first, last, logits, kind, strides, shape, k, width, values, indices, tail):
    """Pack the blocks `first` to `last` of `width` pixels of a row; everything flat, the outputs contiguous."""
    num_classes, h, w = shape
    blocks = (w + width - 1) // width
    block = np.empty((num_classes, width), np.float32)
    bits = block.view(np.int32)
    largest, x, kept = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    nearest, ids = np.empty(width, np.int32), np.empty(width, np.int32)
    for task in range(first, last):
        b, i, start = task // (h * blocks), (task // blocks) % h, (task % blocks) * width
        n = min(width, w - start)
        offset = b * strides[0] + i * strides[2] + start * strides[3]
        _read_block(logits, kind, offset, (strides[1], strides[3]), n, block, largest)
        pixel = i * w + start
        if k == num_classes:
            for c in range(k):
                row = block[c]
                for j in range(width):
                    row[j] = _f(_f(0) - row[j])  # never -0
                _write_half(row, largest, values, (b * k + c) * h * w + pixel, n)
            continue
        kept.fill(0)
        for rank in range(k):
            _take_nearest(bits, nearest, ids)
            for j in range(width):
                x[j] = _f(_f(0) - float_of(nearest[j]))
                kept[j] += exp(x[j])
            base = (b * k + rank) * h * w + pixel
            _write_half(x, largest, values, base, n)
            for j in range(n):
                indices[base + j] = ids[j]
        _log_odds(bits, nearest, kept, x)
        _write_half(x, largest, tail, b * h * w + pixel, n)


@njit(**OPTIONS)
def densify_block(values, indices, tail, shape, image, pixel, n, out, base, stride, work):
    """Write n pixels of every class to `out[base + c * stride + j]`; return whether a class id is out of range.

    `work` (2, at least n) is scratch.
    """
    num_classes, k, pixels = shape
    largest, fill = work[0], work[1]  # unpacked as one, they would not vectorise
    for j in range(n):
        largest[j] = -_INFINITY
        fill[j] = 0
    for rank in range(k):
        start = (image * k + rank) * pixels + pixel
        given = values[start : start + n]
        for j in range(n):
            largest[j] = larger(half_to_float(given[j]), largest[j])
    for j in range(n):
        largest[j] = largest[j] if abs(largest[j]) <= _LARGEST else _f(0)
    for rank in range(k):
        start = (image * k + rank) * pixels + pixel
        given = values[start : start + n]
        for j in range(n):
            fill[j] += exp(_f(half_to_float(given[j]) - largest[j]))
    log_missing = _f(math.log(num_classes - k))
    start = image * pixels + pixel
    given = tail[start : start + n]
    for j in range(n):
        kept = _f(_f(math.log(fill[j])) + largest[j])
        fill[j] = clamp(_f(_f(kept + half_to_float(given[j])) - log_missing))
    for c in range(num_classes):
        line = out[base + c * stride : base + c * stride + n]
        for j in range(n):
            line[j] = fill[j]
    wrong = False
    for rank in range(k):
        start = (image * k + rank) * pixels + pixel
        for j in range(n):
            kept_class = np.int64(indices[start + j])
            if kept_class < num_classes:
                out[base + kept_class * stride + j] = half_to_float(values[start + j])
            else:
                wrong = True
    return wrong


@njit(**OPTIONS, cache=True)
def _densify_tasks(first, last, values, indices, tail, shape, width, out, wrong):
    """Densify the blocks `first` to `last` of `width` pixels, everything flat; `wrong` has one element per block."""
    num_classes, _, pixels = shape
    blocks = (pixels + width - 1) // width
    work = np.empty((2, width), np.float32)
    for task in range(first, last):
        image, pixel = task // blocks, (task % blocks) * width
        n, base = min(width, pixels - pixel), image * num_classes * pixels + pixel
        wrong[task] = densify_block(values, indices, tail, shape, image, pixel, n, out, base, pixels, work)


def pack(logits_BChw: Tensor, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute what `kdcache_kernels.pack` documents, in float32, and bitwise the same for any number of threads.

    Memory: the result. (Of a dtype other than float32, float16 and bfloat16 a float32 copy is made.)
    """
    check_logits(logits_BChw, k)
    B, num_classes, h, w = logits_BChw.shape
    dense = k == num_classes
    values = torch.empty((B, k, h, w), dtype=torch.float16)
    indices = torch.empty((B, 0 if dense else k, h, w), dtype=index_dtype(num_classes))
    tail = torch.empty((B, 0 if dense else h, w), dtype=torch.float16)
    if values.numel() > 0:
        if logits_BChw.dtype not in KINDS:
            logits_BChw = logits_BChw.float()
        bits, kind = flat_bits(logits_BChw)
        strides = logits_BChw.stride()
        if h == 1 or strides[2] == w * strides[3]:
            h, w = 1, h * w
        width = block_width(num_classes, w)
        run(
            _pack_tasks,
            B * h * -(-w // width),
            *(bits, kind, strides, (num_classes, h, w), k, width),
            *(flat_bits(values)[0], indices.flatten().numpy(), flat_bits(tail)[0]),
        )
    return (values, None, None) if dense else (values, indices, tail)


def densify(values: Tensor, indices: Tensor | None, tail: Tensor | None, num_classes: int) -> Tensor:
    """Compute what `kdcache_kernels.densify` documents for float32: a new, contiguous tensor.

    Values that are not float16, which `pack` never makes, go through the reference.
    """
    check_packed(values, indices, tail, num_classes)
    if indices is None or tail is None:
        return values.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if values.dtype != torch.float16 or tail.dtype != torch.float16:
        return topk.densify(values, indices, tail, num_classes)
    B, k, h, w = values.shape
    dense_BChw = torch.empty((B, num_classes, h, w), dtype=torch.float32)
    if B > 0:
        width = block_width(num_classes, h * w)
        wrong = np.zeros(B * -(-h * w // width), np.uint8)
        run(
            _densify_tasks,
            len(wrong),
            *packed_memory(values, indices, tail),
            *((num_classes, k, h * w), width, dense_BChw.flatten().numpy(), wrong),
        )
        if wrong.any():
            check_ids(indices, num_classes)
    return dense_BChw


def packed_memory(values: Tensor, indices: Tensor | None, tail: Tensor | None) -> tuple[Array, Array, Array]:
    """Return the flat memory of float16 values and tail, as int16, and of the indices; empty where there are none."""
    nothing = np.empty(0, np.int16)
    return (
        flat_bits(values.contiguous())[0],
        nothing.view(np.uint8) if indices is None else indices.contiguous().flatten().numpy(),
        nothing if tail is None else flat_bits(tail.contiguous())[0],
    )


def flat_bits(tensor: Tensor) -> tuple[Array, int]:
    """Return the memory of a tensor of any strides as flat integers, and how to read them as float32."""
    tensor = tensor.detach()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
    kind = KINDS[tensor.dtype]
    bits: Array = memory.view(torch.int32 if kind == FLOAT else torch.int16).numpy()
    return bits, kind


def block_width(num_classes: int, pixels: int) -> int:
    """Return how many pixels make a block: a power of two from 16 to 256 that fits the cache, or all pixels."""
    width = 1 << max(4, min(8, (_SCRATCH // num_classes).bit_length() - 1))
    return int(min(width, pixels))
