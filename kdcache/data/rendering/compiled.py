"""Compile the CPU kernels of this room: once per machine, for one signature, at the first import.

Import a kernel's module inside the function that calls it, so that `import kdcache.data` does not import numba.
Compiling is part of that import: Python's import lock makes it safe for threads that come first at once, and later
processes load the machine code from disk. One signature saves the seconds that numba would take for every other kind of
array (read-only, strided). Writable arrays pass as read-only ones.

numba's cache watches only the file of the kernel, so everything that a kernel calls or freezes as a constant is in its
own file. There is no `fastmath`, so nothing is fused or reordered: float results follow the formulas as written, on
every machine, whether a process compiled a helper, inlined it or loaded it.
"""

from collections.abc import Callable
from typing import Any

import numba
from numba import types

_SETTINGS: Any = numba.config
OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}

BYTES = {ndim: types.Array(types.uint8, ndim, "C") for ndim in (2, 3)}
READ_ONLY_BYTES = {ndim: types.Array(types.uint8, ndim, "C", readonly=True) for ndim in (2, 3)}


def njit(*signatures: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return numba's `njit` decorator with these arguments. It compiles even if NUMBA_DISABLE_JIT is set.

    Some kernels use numba intrinsics, which plain Python cannot run.
    """

    def compile_anyway(function: Callable[..., Any]) -> Any:
        disabled, _SETTINGS.DISABLE_JIT = _SETTINGS.DISABLE_JIT, 0
        try:
            return numba.njit(*signatures, **options)(function)
        finally:
            _SETTINGS.DISABLE_JIT = disabled

    return compile_anyway


def kernel(*arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that compiles a function for these numba argument types.

    The machine code is cached on disk if possible.
    """

    def compile_now(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            compiled: Callable[..., Any] = njit([arguments], cache=True, **OPTIONS)(function)
        except RuntimeError:  # nowhere to write
            compiled = njit([arguments], **OPTIONS)(function)
        return compiled

    return compile_now
