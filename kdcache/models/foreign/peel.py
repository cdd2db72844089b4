"""Find the native stride of any module by removing the last bilinear resize from its output.

A map from a resize remembers what it was resized from. Nothing else changes: resized again, the native map is the
module's output bit for bit. This works in eager mode only. A compiled module keeps its output.
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
    """A bilinear resize that a network ended with.

    Attributes:
        native: the tensor (B, C, h, w) before the resize.
        align_corners: the resize's argument `align_corners`.
    """

    native: Tensor
    align_corners: bool


class NotingResizes(TorchFunctionMode):
    """A context manager that records the input of each bilinear upsampling by `F.interpolate`.

    `resize_of` then returns this input for the upsampled tensor.
    """

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
    """Return the bilinear upsampling that gave this tensor inside `NotingResizes`, or None for other tensors."""
    return getattr(answer_BCHW, _RESIZED_FROM, None)


def is_exact(answer_BCHW: Tensor, resize: Resize) -> bool:
    """Return True if a network's result is exactly what a recorded resize gives.

    For this, `resize.native` is resized to the size of `answer_BCHW`, the network's result. All values and the dtype
    must be equal.
    """
    size = answer_BCHW.shape[-2:]
    again = F.interpolate(resize.native, size=size, mode="bilinear", align_corners=resize.align_corners)
    return again.dtype == answer_BCHW.dtype and torch.equal(again, answer_BCHW)


def peels() -> bool:
    """Return True if wrapped networks now leave out their last bilinear resize.

    They do so unless `torch.compile` traces them, or a with block of `whole_answers` is active.
    """
    return not torch.compiler.is_compiling() and not _WHOLE.get()


@contextmanager
def whole_answers() -> Iterator[None]:
    """Let wrapped networks return their output at full size, in a with block.

    Outside the block, `WrappedModel` leaves out a network's last bilinear resize.
    """
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def _enlarges(native: Tensor, result: Tensor, given: Mapping[str, Any]) -> bool:
    """Return True if a resize enlarges its input and its size describes it fully. A rounded factor does not."""
    before, after = native.shape[-2:], result.shape[-2:]
    factor = given.get("scale_factor")
    if factor is not None and not given.get("recompute_scale_factor"):
        factors = factor if isinstance(factor, tuple | list) else (factor, factor)
        if any(side * scale != enlarged for side, scale, enlarged in zip(before, factors, after, strict=True)):
            return False
    return before != after and all(side <= enlarged for side, enlarged in zip(before, after, strict=True))
