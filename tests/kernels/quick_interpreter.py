"""Triton's interpreter in a third of its time and with the same bits: without work that changes nothing.

    with quick_interpreter():
        ...

The interpreter patches `triton.language` for every function that a kernel calls, although its launch did so. It looks
for overflows of integers, which it reports only in debug mode. It builds a table whenever it looks up a dtype, makes
every type of a block anew, and broadcasts blocks of the same shape.
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

PARTS = ("_LangPatchScope", "_get_np_dtype", "_patch_lang", "interpreter_builder", "interpreter_semantic")
"""The names of Triton 3.8 that are replaced or used."""


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """Leave out what is done twice or for nothing, in a with block. Another Triton may have no such parts: it stays."""
    if not all(hasattr(interpreter, name) for name in PARTS):
        yield
        return
    patch, builder, semantic = (
        interpreter._patch_lang,
        interpreter.interpreter_builder,
        interpreter.interpreter_semantic,
    )
    broadcast, blocks = semantic.broadcast_impl_value, dict[tuple[Any, ...], tl.block_type]()
    dtype_of_scalar, pointer = functools.cache(interpreter._get_np_dtype), np.dtype(np.uint64)

    @functools.cache
    def languages(fn: Callable[..., object]) -> list[ModuleType]:
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def patch_once(fn: Callable[..., object]) -> Any:
        done = all(language.static_print is print for language in languages(fn))
        return interpreter._LangPatchScope() if done else patch(fn)

    def dtype_of(kind: tl.dtype) -> np.dtype[Any]:
        return pointer if isinstance(kind.scalar, tl.pointer_type) else dtype_of_scalar(kind.scalar)

    def with_element_ty(block: tl.block_type, element: tl.dtype) -> tl.block_type:
        key = (element.name, *block.shape.values)
        return blocks.get(key) or blocks.setdefault(key, tl.block_type(element, block.shape))

    def broadcast_unless_alike(left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        both = left.type.is_block() and right.type.is_block()
        alike = both and left.type.shape.values == right.type.shape.values
        return (left, right) if alike else broadcast(left, right)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter, "_get_np_dtype", dtype_of),
        mock.patch.object(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)),
        mock.patch.object(semantic, "broadcast_impl_value", broadcast_unless_alike),
        mock.patch.object(tl.block_type, "with_element_ty", with_element_ty),
    ):
        yield
