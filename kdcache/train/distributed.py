"""The processes of a training, as `torchrun` starts them: who they are, and how they come to the same end.

Every process runs the same program on its part of each batch. Process 0 alone writes the run and speaks; what fails on
one is raised on all, so that none waits for another that has gone. A training of one process has no process group and
pays nothing. Small things (errors, wishes to stop) travel between the hosts through gloo, also beside a GPU: a flag on
the device could only be read by waiting for the device.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kdcache.errors import KDCacheError, ModelError, RecipeError
from kdcache.train.interrupt import Interrupted

T = TypeVar("T")


@dataclass
class Agreement:
    """What the processes agreed on; known when `World.together` ends."""

    stop: bool = False


@dataclass(frozen=True)
class World:
    """This process among the `size` of a training.

    Attributes:
        local_rank: among the processes of this machine: the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> "World":
        """As torchrun numbers this process; the only one without it."""
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """Over the processes, on the tensor's own device."""
        return tensor if self.size == 1 else self.total(tensor) / self.size

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes; the tensor stays as it is."""
        found = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(found)
        return found

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, as many of each, in the order of their ranks; those of this one with gradient."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.detach().contiguous())
        parts[self.rank] = tensor
        return torch.cat(parts)

    def gather(self, thing: T) -> list[T]:
        """A small object of every process, in the order of their ranks."""
        if self.size == 1:
            return [thing]
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, thing)
        return found  # type: ignore[return-value]

    @contextmanager
    def together(self, *, stop: bool = False) -> Iterator[Agreement]:
        """Do something that may fail on one process alone: its error is then raised on all.

        Args:
            stop: whether this process was asked to stop; the agreement says whether any was.
        """
        agreement, own = Agreement(stop), None
        if self.size == 1:
            yield agreement
            return
        try:
            yield agreement
        except Exception as error:
            own = error
        failed, asked = self.total(torch.tensor([own is not None, stop], dtype=torch.float64)).tolist()
        agreement.stop = asked > 0
        if failed:
            if own is not None and self.first:
                self.gather(self._tellable(own))
                raise own
            errors = self.gather(None if own is None else self._tellable(own))
            raise next(one for one in errors if one is not None) from own

    def check_batch_size(self, batch_size: int, together: int = 1, parts: int = 1) -> None:
        """Raises RecipeError for a batch that processes and parts cannot share evenly, `together` samples staying so.

        Args:
            parts: in which each process learns from its share (`--accumulate`).
        """
        unit = self.size * together * parts
        if batch_size % unit:
            less = batch_size - batch_size % unit
            sizes = f"{less} or {less + unit}" if less else f"{unit}"
            whole = "--batch-size is that of all processes together, which share it evenly"
            raise RecipeError(
                whole if parts == 1 else f"{whole}; --accumulate takes that in equal parts",
                received=f"--batch-size {batch_size} for {self.size} processes"
                + (f", which hold {together} samples together" if together > 1 else "")
                + (f", and --accumulate {parts}" if parts > 1 else ""),
                remedy=f"use --batch-size {sizes}, or another number of processes"
                + (" or of parts" if parts > 1 else ""),
            )

    def seed(self, seed: int, step: int) -> int:
        """Of this process's own random numbers from a step on; process 0 has the run's seed, as one alone."""
        if self.first:
            return seed
        return int(np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _tellable(self, error: Exception) -> KDCacheError:
        """The error as the other processes raise it."""
        if isinstance(error, KDCacheError):
            return error
        parts = [getattr(error, name, None) for name in ("rule", "received", "remedy")]
        if all(isinstance(part, str) for part in parts):
            return ModelError(str(parts[0]), received=str(parts[1]), remedy=str(parts[2]))
        return ModelError(
            "what every process of a training does must succeed on each",
            received=f"process {self.rank}: {type(error).__name__}: {error}",
            remedy="repair it there; with --debug that process shows its traceback",
        )


@contextmanager
def processes() -> Iterator[World]:
    """The processes that torchrun started (or who set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); else this one alone.

    Raises: ModelError when another process has gone.
    """
    ours = not dist.is_initialized()
    if ours:
        if World.of_environment().size == 1:
            yield World()
            return
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    try:
        yield World(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ModelError(
            "all processes of a training run to its end",
            received="another process has gone",
            remedy="see what it said; --resume goes on from the last checkpoint, with any number of processes",
        ) from error
    except (KDCacheError, Interrupted):
        _leave(ours)  # all raise the same
        raise
    else:
        _leave(ours)


def _leave(ours: bool) -> None:
    """End the group, unless it is the caller's. After an error of one process alone it would wait for the others."""
    if ours:
        dist.destroy_process_group()


def pick_device(name: str, world: World | None = None) -> torch.device:
    """`auto` is a GPU when there is one, and of several processes each has its own.

    Args:
        world: default as torchrun numbers this process, which may belong to no process group (a build needs none).
    Raises: RecipeError for one that is not here.
    """
    world = world or World.of_environment()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise RecipeError(
            "--device is auto, cpu or cuda",
            received=f"{name!r}" + ("" if torch.cuda.is_available() else "; this machine has no usable GPU"),
            remedy="use --device auto",
        )
    if name == "cpu" or world.size == 1:
        return torch.device(name)
    if name != "cuda" or world.local_rank >= torch.cuda.device_count():
        raise RecipeError(
            "every process has a GPU of its own",
            received=f"--device {name} for process {world.local_rank} of this machine, "
            f"which has {torch.cuda.device_count()} GPUs",
            remedy="use --device cuda, and as many processes as there are GPUs",
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def default_workers(device: torch.device) -> int:
    """Who draws ahead, per process: beside a GPU its share of the cores up to 8; on a CPU the cores are the model's."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, cores - 1)) if device.type == "cuda" else 0
