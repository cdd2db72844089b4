"""The errors that a user of kdcache_kernels can meet.

    KernelError (a ValueError)
    ├── ShapeError          a tensor has the wrong shape, dtype, layout or device
    └── ValueRangeError     a number, a class id or a name is outside its range

They have the form of kdcache's errors, without importing them, because this package knows only tensors.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor


class KernelError(ValueError):
    """Base of every error that kdcache_kernels raises on purpose.

    Args:
        problem: what is wrong, naming the argument with its value, in one sentence.
        fix: a step that the caller can take.
        rule: what must hold, if it adds something.
    """

    def __init__(self, problem: str, *, fix: str, rule: str = "") -> None:
        super().__init__(problem, fix, rule)
        self.problem, self.fix, self.rule = problem, fix, rule

    def __str__(self) -> str:
        return "\n  ".join(part for part in (self.problem, f"fix: {self.fix}", self.rule) if part)

    def __reduce__(self) -> tuple[object, ...]:
        """Let an error cross a process boundary (a DataLoader worker) with its parts."""
        return partial(type(self), fix=self.fix, rule=self.rule), (self.problem,)


class ShapeError(KernelError):
    """Raised for a tensor with the wrong shape, dtype, layout or device."""


class ValueRangeError(KernelError):
    """Raised for a number, a class id or a name that is outside its range."""


def misfit(name: str, value: Any, wanted: str, fix: str) -> ShapeError:
    """Return the error for an argument that is not a tensor of the `wanted` shape and dtype."""
    return ShapeError(f"Invalid {name}: {describe(value)}, not {wanted}", fix=fix)


def describe(value: Any) -> str:
    """Return a tensor's shape, dtype, strides and device (unless CPU) as text, or the type's name of another value."""
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
    strides = f"strides {value.stride()}" if value.layout == torch.strided else str(value.layout)
    place = "" if value.device.type == "cpu" else f", on {value.device}"
    return f"{tuple(value.shape)} {value.dtype}, {strides}{place}"
