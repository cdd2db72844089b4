"""The shared part of the CPU kernels of the loss: 2**x and log2 that LLVM vectorises.

numba's wheels bring no vector exponential, and the C library's computes one pixel at a time. The polynomials here are
14 instructions for 8 floats on AVX2. NaN and infinity never reach them (logits are cleaned before), but `nnan` and
`ninf` stay off, because with them LLVM may delete the comparison that finds a NaN.

Two habits of numba decide whether a loop is vectorised at all, a factor of 5. An index that may be negative is compared
with 0 for every element, so loops run from 0 along rows, with constant offsets. And a division by zero raises, unless
the error model is numpy's.

Everything is inlined by force. A separate function would exist twice in a process that compiles, once by itself and
once within the kernel, with other roundings, and the choice between them would depend on where the kernel came from.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from ..sources import digest_of

_SETTINGS: Any = numba.config
LN2 = float(np.log(2))
FASTMATH = {"contract", "nsz", "arcp"}
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": FASTMATH, "nogil": True, "forceinline": True}
SUMS: dict[str, Any] = {**OPTIONS, "fastmath": FASTMATH | {"reassoc"}}
"""LLVM chooses the order of a sum, once, when it compiles."""
UNFUSED: dict[str, Any] = {**OPTIONS, "fastmath": FASTMATH - {"contract"}}
"""A product is rounded before it is subtracted, so that equal ones leave 0."""


_SOURCES = digest_of("cpu/**/*.py", "topk.py")
"""All files whose functions or constants enter the machine code; `topk.py` has a limit of logits."""


class KernelCache(FunctionCache):
    """numba's cache of compiled kernels on disk, which is discarded when any source file of this package changes.

    numba's own cache checks only the file of the kernel, not the files of the functions that it calls. If the cache
    cannot be read or written, kernels are compiled again. `function` is the Python function of the kernel.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = _SOURCES

    def load_overload(self, sig, target_context):
        """Load a compiled kernel from disk, or return None if its file is missing or damaged.

        `sig` (the argument types) and `target_context` are numba's.
        """
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # pickle raises anything over a damaged file
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        """Save a compiled kernel to disk, or do nothing if writing fails, for example on a full disk.

        `sig` (the argument types) and `data` (the compiled function) are numba's.
        """
        with suppress(OSError):  # a full disk
            super().save_overload(sig, data)


@contextmanager
def _compiling() -> Iterator[None]:
    """Compile in a with block also under NUMBA_DISABLE_JIT, which would leave functions in Python."""
    disabled, _SETTINGS.DISABLE_JIT = _SETTINGS.DISABLE_JIT, 0
    try:
        yield
    finally:
        _SETTINGS.DISABLE_JIT = disabled


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function with `numba.njit(**options)`, even if NUMBA_DISABLE_JIT is set.

    The functions of this package use compiler intrinsics, which plain Python cannot run.
    """

    @_compiling()
    def dispatched(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        dispatcher.compile = _compiling()(dispatcher.compile)  # when it is first called
        return dispatcher

    return dispatched


def kernel(function: Callable[..., Any], options: dict[str, Any] = OPTIONS) -> Any:
    """Return `function` as a kernel that numba compiles at the first call.

    Its machine code is kept on disk if numba finds a writable folder. Only kernels are cached on disk. Functions that
    they call are compiled into them. `options` are the options of `numba.njit`.
    """
    dispatcher = njit(**options)(function)
    with suppress(RuntimeError):  # a read-only install and an unwritable home
        dispatcher._cache = KernelCache(function)
    return dispatcher


TILE = 96
"""Most pixels of a tile in each phase: rows of scratch have this length, a constant."""

ONE, SQUARE, TWO = 1, 2, 0
"""Exponentials of the student: one for both terms, its square for CE (T = 2), or one for each term."""

_f = np.float32
_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_HALF_ROOT = 0x3F3504F3  # the bits of sqrt(1/2): mantissas lie between it and its double
# x + _SHIFT has round(x) + 127 in its lowest bits; moved up by 23 they are the float 2**round(x), 0 for -127.
_SHIFT, _LOWEST = _f(1.5 * 2**23 + 127), _f(-127)
# Minimax polynomials: 2**x for |x| < 1/2 to 2e-9 relative, log2(1 + x) / x around 0 to 3e-8.
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = map(
    _f, (1, 0.6931471825, 0.2402264625, 0.0555032864, 0.00961848907, 0.00133999309, 0.000153458124)
)
_L0, _L1, _L2, _L3, _L4 = map(_f, (1.4426950216, -0.721347332, 0.480910629, -0.360703677, 0.287916243))
_L5, _L6, _L7, _L8 = map(_f, (-0.238944814, 0.215715617, -0.207269818, 0.125837058))


def _on_bits(build):
    """Return an operation on the bits of a float32, which numba would widen to 64 bits for plain integers."""

    @intrinsic
    def operation(typing_context, x):
        def generate(context, builder, signature, arguments):
            return build(builder, builder.bitcast(arguments[0], _INT))

        return types.float32(types.float32), generate

    return operation


_power_of_two = _on_bits(lambda b, bits: b.bitcast(b.shl(bits, _INT(23)), _FLOAT))
_exponent = _on_bits(lambda b, bits: b.sitofp(b.ashr(b.sub(bits, _INT(_HALF_ROOT)), _INT(23)), _FLOAT))
_mantissa = _on_bits(
    lambda b, bits: b.bitcast(b.sub(bits, b.and_(b.sub(bits, _INT(_HALF_ROOT)), _INT(-(2**23)))), _FLOAT)
)


@njit(**OPTIONS)
def exp2(x):
    """Return 2**x for x < 127.5, with a relative error of 1e-7, and exactly 0 for x < -127."""
    x = max(x, _LOWEST)
    shifted = x + _SHIFT
    d = x - (shifted - _SHIFT)
    return ((((((_E6 * d + _E5) * d + _E4) * d + _E3) * d + _E2) * d + _E1) * d + _E0) * _power_of_two(shifted)


@njit(**OPTIONS)
def log2(x):
    """Return the base-2 logarithm of a normal float above 0, with a relative error of 2e-7, even near 1."""
    m = _mantissa(x) - _f(1)
    p = ((((((_L8 * m + _L7) * m + _L6) * m + _L5) * m + _L4) * m + _L3) * m + _L2) * m + _L1
    return _exponent(x) + m * (m * p + _L0)


@njit(**SUMS)
def total(x, start, n):
    """Return the float64 sum of x[start : start + n]. The order of the additions is always the same."""
    part = x[start : start + n]
    result = 0.0
    for k in range(n):
        result += part[k]
    return result
