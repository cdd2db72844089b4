"""Compile the kernels for a GPU, without one.

The package's own launch code runs on meta tensors, and every launch compiles the kernel instead, for any GPU:
signatures, constants and options are those of a real call. Running on meta tensors also proves that nothing reads a
value, which would wait for the device.

All of this changes Triton and the operators of this process permanently, so use a separate process.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import triton
from torch._library.custom_ops import CustomOpDef
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .. import library, ops
from ..on_cells import library as on_cells
from . import loss

Launched = list[tuple[str, Any]]
"""The name of each kernel and what it was compiled to (None where a hook of Triton's passed it by)."""


class _Driver:
    """Replaces the driver of a GPU. Triton caches kernels by device, so each target is its own device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return hash(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def gpu_target(name: str) -> GPUTarget:
    """Return the compilation target for a GPU's name, such as "sm_90" (NVIDIA) or "gfx942" (AMD)."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def compile_instead(target: GPUTarget) -> Launched:
    """Make every later kernel launch of this process only compile the kernel for `target`, which needs no GPU.

    Returns: an empty list, to which each launch appends the pair (kernel's name, compiled kernel).
    """
    kernels: Launched = []

    def launch(self: Any, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            kernels.append((self.fn.__name__, self.run(*args, grid=grid, warmup=True, **options)))

        return compile_only

    JITFunction.__getitem__ = launch
    triton.runtime.driver.set_active(_Driver(target))
    return kernels


def launch_from_meta_tensors() -> None:
    """Make the package's public functions also launch their Triton kernels for meta tensors, forward and backward.

    Meta tensors have a shape, but no memory. Use it with `compile_instead`, so that each launch only compiles its
    kernel. The change lasts for the rest of the process.
    """
    ops._DEVICES["triton"] = "meta"
    for operator in (*vars(library).values(), *vars(on_cells).values()):
        if isinstance(operator, CustomOpDef):
            operator.register_fake(operator._init_fn)
    library.scale_gradient.register_fake(loss.scale_gradient)  # the operator itself asks for the device
