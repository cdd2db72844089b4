"""Running out of memory: what was asked for, and what would have fitted, in one error."""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kdcache.errors import ModelError
from kdcache.metrics.oom import is_out_of_memory
from kdcache.train.config import TrainConfig

RULE = "a batch must fit into memory"
UNTOUCHED = "the last checkpoint is untouched"
_ASKED = re.compile(r"(?:tried|unable) to allocate ([0-9.]+) ?([KMGTPE]?i?B|bytes)\b", re.IGNORECASE)


def asked_for(error: BaseException) -> str:
    """'7.1 GiB', as the error says it; 'more memory' where it does not."""
    found = _ASKED.search(str(error))
    if found is None:
        return "more memory"
    number, unit = found.groups()
    return f"{number} {unit}" if unit.lower() != "bytes" else f"{int(number) / 2**30:.3g} GiB"


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_fitting(attempt: Callable[[int], None], size: int, device: torch.device, together: int = 1) -> int | None:
    """The largest half, quarter, eighth ... of a batch for which `attempt` does not run out of memory; None is none.

    Args:
        size: of the batch that does not fit.
        together: samples that stay together.
    """
    while size > together:
        size = max(together, size // 2 // together * together)
        free_memory(device)
        try:
            attempt(size)
        except Exception as error:
            if not is_out_of_memory(error):
                return None  # a batch of one, which BatchNorm may refuse, tells nothing
        else:
            return size
    return None


def memory_error(
    config: TrainConfig, device: torch.device, asked: str, fits: int | None, processes: int = 1
) -> ModelError:
    """With the batch sizes that would do.

    Args:
        asked: as `asked_for` says it.
        fits: how many samples of a process go through the model at once, as measured; None when not even one does.
    """
    parted = f" --accumulate {config.accumulate}" if config.accumulate > 1 else ""
    received = f"--batch-size {config.batch_size}{parted} on the device {device}, which could not give {asked}"
    if fits is None:
        remedy = "no smaller batch was found to fit: use a smaller --size or --model, or --device cpu"
    else:
        remedy = f"use --batch-size {fits * config.accumulate * processes}{parted}"
        parts = _parts(config, fits, processes)
        otherwise = f" with --method kl instead of {', '.join(config.whole_batch)}" if config.whole_batch else ""
        keeping = "" if parts is None else f", or --accumulate {parts}{otherwise} to keep the batch"
        remedy += f"{keeping}, with another --out"
    return ModelError(RULE, received=received, remedy=f"{remedy}; {UNTOUCHED}")


def _parts(config: TrainConfig, fits: int, processes: int) -> int | None:
    """The fewest parts of the batch that are no larger than what fits; None where there are none."""
    together, share = 1 if config.mix is None else 2, config.batch_size // processes
    return next((share // n for n in range(fits, 0, -1) if share % n == 0 and n % together == 0), None)


@contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Turn what ran out of memory inside into an error without a measurement: one of several processes cannot try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where = "a GPU" if isinstance(error, torch.OutOfMemoryError) else "the machine"
        raise ModelError(
            RULE,
            received=f"--batch-size {config.batch_size}, for which {where} could not give {asked_for(error)}",
            remedy=f"use a smaller --batch-size, a higher --accumulate, a smaller --size or --model; {UNTOUCHED}",
        ) from error
