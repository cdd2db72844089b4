"""The native stride of any module: its last bilinear resize is taken off what it answers with.

A map that is the result of a resize knows what it was resized from. Nothing else changes: resized again, the native map
is the module's answer bit for bit. Eager mode only: compiled, a module answers as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_RESIZED_FROM = "_kdcache_resized_from"
_WHOLE: ContextVar[bool] = ContextVar("whole", default=False)


class Resize(NamedTuple):
    """A bilinear resize: its input (B, C, h, w), and its `align_corners`."""

    native: Tensor
    align_corners: bool


class NotingResizes(TorchFunctionMode):
    """Inside, every result of a bilinear upsampling keeps what it was resized from."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.interpolate:
            names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            native = given["input"]
            if given.get("mode") == "bilinear" and not given.get("antialias") and _enlarges(native, result, given):
                setattr(result, _RESIZED_FROM, Resize(native, bool(given.get("align_corners"))))
        return result


def resize_of(answer_BCHW: Tensor) -> Resize | None:
    """Return the resize that a map is the result of; None for any other map."""
    return getattr(answer_BCHW, _RESIZED_FROM, None)


def is_exact(answer_BCHW: Tensor, resize: Resize) -> bool:
    """Return True if resizing the native map again gives the answer bit for bit."""
    size = answer_BCHW.shape[-2:]
    again = F.interpolate(resize.native, size=size, mode="bilinear", align_corners=resize.align_corners)
    return again.dtype == answer_BCHW.dtype and torch.equal(again, answer_BCHW)


def peels() -> bool:
    """Return True where resizes are taken off: in eager mode, outside `whole_answers`."""
    return not torch.compiler.is_compiling() and not _WHOLE.get()


@contextmanager
def whole_answers() -> Iterator[None]:
    """Inside, modules answer with their last resize."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def _enlarges(native: Tensor, result: Tensor, given: Mapping[str, Any]) -> bool:
    """Return True for a resize to a larger map whose size says all: a factor that was rounded has other positions."""
    before, after = native.shape[-2:], result.shape[-2:]
    factor = given.get("scale_factor")
    if factor is not None and not given.get("recompute_scale_factor"):
        factors = factor if isinstance(factor, tuple | list) else (factor, factor)
        if any(one * scale != other for one, scale, other in zip(before, factors, after, strict=True)):
            return False
    return before != after and all(one <= other for one, other in zip(before, after, strict=True))
