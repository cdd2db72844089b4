"""Out-of-memory errors: the failed request and the batch sizes that fit, in one error."""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kdcache.errors import ModelError
from kdcache.metrics.timing import is_out_of_memory
from kdcache.training.config import TrainConfig

UNTOUCHED = "the last checkpoint is untouched"
_REQUEST = re.compile(r"(?:tried|unable) to allocate ([0-9.]+) ?([KMGTPE]?i?B|bytes)\b", re.IGNORECASE)


def requested_memory(error: BaseException) -> str:
    """Return the size that an out-of-memory error names, such as '7.1 GiB', or 'more memory' if it names none."""
    match = _REQUEST.search(str(error))
    if match is None:
        return "more memory"
    number, unit = match.groups()
    return f"{number} {unit}" if unit.lower() != "bytes" else f"{int(number) / 2**30:.3g} GiB"


def largest_fitting(attempt: Callable[[int], None], size: int, device: torch.device, together: int = 1) -> int | None:
    """Return the largest batch below `size` that fits into memory, or None if none was found.

    Half of the size is tried first, then a quarter, and so on.

    Args:
        attempt: runs a step on a number of samples, and raises an out-of-memory error if they do not fit.
        size: the number of samples that did not fit.
        device: its memory is freed before each attempt.
        together: size of groups of samples that must stay together. 2 if samples are mixed in pairs.
    """
    while size > together:
        size = max(together, size // 2 // together * together)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            attempt(size)
        except Exception as error:
            if not is_out_of_memory(error):
                return None  # such as BatchNorm's, which may refuse a batch of one: no measurement
        else:
            return size
    return None


def memory_error(
    config: TrainConfig, device: torch.device, requested: str, fits: int | None, processes: int = 1
) -> ModelError:
    """Return the error for a batch that does not fit into memory. Its fix names settings that fit.

    Args:
        config: the training's settings.
        device: the device that ran out of memory.
        requested: the size that could not be given, such as `7.1 GiB` (from `requested_memory`).
        fits: how many samples fit in one process at once. None if no number fits.
        processes: the number of processes.
    """
    parted = f" --accumulate {config.optimizer.accumulate}" if config.optimizer.accumulate > 1 else ""
    if fits is None:
        fix = "No smaller batch was found to fit: use a smaller --size or --model, or --device cpu"
    else:
        fix = f"Use --batch-size {fits * config.optimizer.accumulate * processes}{parted}"
        parts = _parts(config, fits, processes)
        whole_batch_terms = ", ".join(term.kind for term in config.all_terms if term.whole_batch)
        otherwise = f" with --method kl instead of {whole_batch_terms}" if whole_batch_terms else ""
        keeping = "" if parts is None else f", or --accumulate {parts}{otherwise} to keep the batch"
        fix += f"{keeping}, with another --out"
    batch = f"--batch-size {config.optimizer.batch_size}{parted}"
    return ModelError(
        f"Out of memory: {batch} on the device {device}, which could not give {requested}", fix=f"{fix}; {UNTOUCHED}"
    )


def _parts(config: TrainConfig, fits: int, processes: int) -> int | None:
    """Return the least number of parts of a batch that fit into memory, or None."""
    together, share = 1 if config.augmentation.mix is None else 2, config.optimizer.batch_size // processes
    return next((share // n for n in range(fits, 0, -1) if share % n == 0 and n % together == 0), None)


@contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Turn an out-of-memory error of a with block into a ModelError, which names the batch size in `config`.

    Smaller batches are not tried, because one of several processes cannot do that alone.

    Raises: ModelError for an out-of-memory error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where = "a GPU" if isinstance(error, torch.OutOfMemoryError) else "the machine"
        batch = f"--batch-size {config.optimizer.batch_size}"
        raise ModelError(
            f"Out of memory: {batch}, for which {where} could not give {requested_memory(error)}",
            fix=f"Use a smaller --batch-size, a higher --accumulate, a smaller --size or --model; {UNTOUCHED}",
        ) from error
