"""Time without the garbage collector's, and the name of the processor."""

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable Python's garbage collection in a with block, so it does not disturb timings."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cpu_name() -> str:
    """Return the name of the processor's model, such as "AMD EPYC 7763", or "unknown".

    On other systems than Linux, it is the text that Python's `platform` gives.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


_WORDS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that CUDA, Python or torch's CPU allocator ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
