"""`--resident`: whether the decoded records of a cache stay in memory, and where.

| choice | what stays | when |
| --- | --- | --- |
| ram | every array that a sample is read from | a record is kept when it is first read |
| gpu | the targets, on the device; pixels come from the cache | all are read before the first step |
| off | nothing | |
| auto | gpu, else ram, else nothing | what takes at most half of the free memory; gpu not from a remote cache |

At most half of the free memory is used: the page cache, the model and other programs need the rest.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from kdcache.errors import RecipeError
from kdcache.store import Cache
from kdcache.training.input.dataset import DrawnDataset
from kdcache.training.input.resident_records import DeviceTargets, RamRecords, decoded_bytes

CGROUP = Path("/sys/fs/cgroup")


def keep_records(
    dataset: DrawnDataset,
    choice: str,
    device: torch.device,
    *,
    workers: int = 0,
    among: int = 1,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Let a dataset keep decoded records in memory or on the GPU, as `--resident` says.

    Args:
        dataset: the dataset, which is changed.
        choice: `ram`, `gpu`, `off`, or `auto` for the best of them that takes at most half of the free memory.
        device: the device of the training.
        workers: number of the loader's workers. Worker processes share no memory, so each would keep its own records.
        among: number of datasets that share the free memory.
        note: is called with a text: how much is kept and where, or why nothing is kept.
    Raises: RecipeError for a choice that is not possible here. With `gpu` also KDCacheError for a record that cannot be
        read.
    """
    if choice == "gpu" and device.type != "cuda":
        raise RecipeError(
            f"Cannot use --resident gpu on the device {device.type}", fix="Use --resident ram, or leave it out."
        )
    if choice == "off":
        return
    cache = dataset.cache
    if cache is None:
        if choice != "auto":
            raise RecipeError(
                f"Cannot use --resident {choice} for a data folder: it keeps the decoded records of a cache",
                fix="Leave --resident out, or train from a cache.",
            )
        return
    on_gpu = choice == "gpu" or (choice == "auto" and device.type == "cuda" and not dataset.remote)
    if on_gpu and _keep_on_device(dataset, cache, choice, device, note, among):
        return
    processes = 1 if dataset.threads_suffice else max(1, workers)
    if choice == "auto" and processes > 1:
        note(f"resident: off, {processes} worker processes would each keep records of their own")
    else:
        _keep_in_memory(dataset, cache, choice, processes, note, among)


def free_bytes() -> int:
    """Return the free memory in bytes, of the system or of this process's control group, whichever is less.

    Memory of the file cache that can be reclaimed counts as free.
    """
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        files = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        free = min(free, limit - used + files)
    return max(0, free)


def _keep_on_device(
    dataset: DrawnDataset, cache: Cache, choice: str, device: torch.device, note: Callable[[str], None], among: int
) -> bool:
    """Load the targets to the device if they fit, and return True if so.

    Raises: RecipeError if `choice` is `gpu` and they do not fit.
    """
    needed = decoded_bytes(cache, dataset.target_paths)
    half = torch.cuda.mem_get_info(device)[0] // 2 // among
    if needed > half and choice == "gpu":
        raise _too_large(
            f"{_gib(needed)} of targets on the GPU", half, "Use --resident ram or off, or a smaller --top-k."
        )
    if needed > half or not needed:
        return False
    dataset.on_device = DeviceTargets.load(cache, device, dataset.heads)
    note(f"resident: {_gib(needed)} of decoded targets are kept on the GPU (half of free: {_gib(half)})")
    return True


def _keep_in_memory(
    dataset: DrawnDataset, cache: Cache, choice: str, processes: int, note: Callable[[str], None], among: int
) -> None:
    # Processes that share a batch visit all records between them: each comes to keep the whole store.
    copies = processes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, half = copies * decoded_bytes(cache, dataset.paths), free_bytes() // 2 // among
    if not needed:
        note("resident: off, no record is read from this cache")
        return
    what = f"{_gib(needed)} of decoded records" + (f" in {copies} processes" if copies > 1 else "")
    if needed <= half:
        dataset.records = RamRecords(cache, dataset.paths)
        note(f"resident: {what} are kept in memory (half of free: {_gib(half)})")
    elif choice == "auto":
        note(f"resident: off, {what} are more than half of what is free ({_gib(half)})")
    else:
        raise _too_large(f"{what} in memory", half, "Leave --resident out: the cache is read as fast as it decodes.")


def _too_large(what: str, half: int, fix: str) -> RecipeError:
    return RecipeError(f"Cannot keep {what}: half of what is free is {_gib(half)}", fix=fix)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2g} GiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
