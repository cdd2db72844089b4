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
    """Base class of all errors that kdcache_kernels raises on purpose.

    Args:
        problem: one sentence that says what is wrong and names the argument with its value.
        fix: a step that the caller can take.
        rule: the rule that the value breaks, or "" if the problem already says it.
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
    """Raised for a number or class id outside its range, and for a name that is not one of the allowed names."""


def misfit(name: str, value: Any, wanted: str, fix: str) -> ShapeError:
    """Return a ShapeError that says that an argument is not a tensor of the expected shape and dtype.

    Args:
        name: the argument's name.
        value: the argument's value.
        wanted: the expected shape and dtype as text, such as "a dense (B, H, W)".
        fix: a step that the caller can take.
    """
    return ShapeError(f"Invalid {name}: {describe(value)}, not {wanted}", fix=fix)


def describe(value: Any) -> str:
    """Return a value as text for an error message.

    For a tensor, the text has its shape, dtype, strides and device (unless CPU). For another value, it is "None" or the
    name of its type.
    """
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
    strides = f"strides {value.stride()}" if value.layout == torch.strided else str(value.layout)
    place = "" if value.device.type == "cpu" else f", on {value.device}"
    return f"{tuple(value.shape)} {value.dtype}, {strides}{place}"
