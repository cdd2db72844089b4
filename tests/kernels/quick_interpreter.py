"""Triton's interpreter in half of its time and with the same bits: without work that changes nothing.

    with quick_interpreter():
        ...

The interpreter patches `triton.language` for every function that a kernel calls, although its launch did so. It looks
for overflows of integers, which it reports only in debug mode. It builds a table whenever it looks up a dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """Leave out what is done twice or for nothing, in a with block."""
    patch, builder = interpreter._patch_lang, interpreter.interpreter_builder
    dtype_of_scalar, pointer = functools.cache(interpreter._get_np_dtype), np.dtype(np.uint64)

    @functools.cache
    def languages(fn: Callable[..., object]) -> list[ModuleType]:
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def patch_once(fn: Callable[..., object]) -> Any:
        done = all(language.static_print is print for language in languages(fn))
        return interpreter._LangPatchScope() if done else patch(fn)

    def dtype_of(kind: tl.dtype) -> np.dtype[Any]:
        return pointer if isinstance(kind.scalar, tl.pointer_type) else dtype_of_scalar(kind.scalar)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter, "_get_np_dtype", dtype_of),
        mock.patch.object(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)),
    ):
        yield
