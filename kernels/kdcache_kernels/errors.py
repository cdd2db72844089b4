"""The errors a user of kdcache_kernels can meet.

    KernelError (a ValueError)
    ├── ShapeError          a tensor has the wrong shape, dtype, layout or device
    └── ValueRangeError     a number, a class id or a name is outside its range

They are laid out as kdcache's own errors are, without importing them: this package knows tensors only.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor


class KernelError(ValueError):
    """Base of every error that kdcache_kernels raises on purpose.

    Args:
        rule: what must hold, naming the argument, in one sentence.
        received: the value or property found instead.
        remedy: a step that the caller can take.
    """

    def __init__(self, rule: str, *, received: str, remedy: str) -> None:
        super().__init__(rule, received, remedy)
        self.rule = rule
        self.received = received
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.rule}\n  received: {self.received}\n  remedy:   {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        """Let an error cross a process boundary (a DataLoader worker) with its parts."""
        return partial(type(self), received=self.received, remedy=self.remedy), (self.rule,)


class ShapeError(KernelError):
    """A tensor has the wrong shape, dtype, layout or device."""


class ValueRangeError(KernelError):
    """A number, a class id or a name is outside its range."""


def describe(value: Any) -> str:
    """A tensor's shape, dtype and strides, and where it is unless on the CPU; the type of anything else."""
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"
    strides = f"strides {value.stride()}" if value.layout == torch.strided else str(value.layout)
    place = "" if value.device.type == "cpu" else f", on {value.device}"
    return f"{tuple(value.shape)} {value.dtype}, {strides}{place}"
