"""Running out of memory: one check for every library's error."""

import torch

_WORDS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no more: CUDA's error, Python's, or that of torch's CPU allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
