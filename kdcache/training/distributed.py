"""The processes of a training as `torchrun` starts them: their ranks, and how they end together.

Every process runs the same program on its part of each batch. Only process 0 writes the run and its output. An error in
one process is raised in all, so none waits for a process that has ended. A training of one process has no process group
and no overhead. Small objects (errors, requests to stop) travel between hosts through gloo, also with GPUs, because
reading a flag from the device would have to wait for the device.
"""

import gc
import os
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which its default arguments would keep alive
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kdcache.errors import KDCacheError, ModelError, RecipeError
from kdcache.training.interrupt import Interrupted

T = TypeVar("T")
START_S = 1800
"""Seconds that processes may start apart; torch waits as long for their first exchange."""
_POLL_S = 0.02


@dataclass
class Agreement:
    """The answer that `World.together` gives to its with block: whether to stop.

    Attributes:
        stop: True if any process was asked to stop. It is set at the end of the with block.
    """

    stop: bool = False


@dataclass(frozen=True)
class World:
    """This process, as one of the processes that train together.

    Attributes:
        rank: its number, from 0.
        size: the number of processes.
        local_rank: its number on this machine, which is also the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> "World":
        """Return the world of this process, from the environment that torchrun sets.

        Without torchrun it has one process.
        """
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def first(self) -> bool:
        """True for process 0, which writes the run folder and prints."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the elementwise mean of the tensors of all processes, on `tensor`'s device. All have one shape."""
        return tensor if self.size == 1 else self.total(tensor) / self.size

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of the processes' tensors, on the tensor's device. The argument stays unchanged."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the tensors (N, ...) of all processes, concatenated along the first axis in the order of ranks.

        Every process must pass equally many rows N. Only this process's rows carry a gradient.
        """
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.detach().contiguous())
        parts[self.rank] = tensor
        return torch.cat(parts)

    def gather(self, thing: T) -> list[T]:
        """Return a list with the `thing` of each process, in the order of ranks.

        `thing` must be small, and pickle must support it.
        """
        if self.size == 1:
            return [thing]
        things: list[T | None] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things  # type: ignore[return-value]

    @contextmanager
    def together(self, *, stop: bool = False) -> Iterator[Agreement]:
        """Run a with block that all processes enter. If it fails in one process, raise that error in all of them.

        `stop` is True if this process was asked to stop. The block gets an `Agreement`. After the block, `stop` of the
        agreement is True if any process was asked to stop.

        Raises: a KDCacheError with the first failed process's error. Process 0 raises its own error unchanged.
        """
        agreement, local_error = Agreement(stop), None
        if self.size == 1:
            yield agreement
            return
        try:
            yield agreement
        except Exception as error:
            local_error = error
        failed, stops = self.total(torch.tensor([local_error is not None, stop], dtype=torch.float64)).tolist()
        agreement.stop = stops > 0
        if failed:
            if local_error is not None and self.first:
                self.gather(self._shareable(local_error))
                raise local_error
            errors = self.gather(None if local_error is None else self._shareable(local_error))
            raise next(error for error in errors if error is not None) from local_error

    def check_batch_size(self, batch_size: int, together: int = 1, parts: int = 1) -> None:
        """Raise RecipeError if the processes cannot divide a batch evenly.

        Args:
            batch_size: samples in a batch of all processes.
            together: size of groups of samples that must stay in one process.
            parts: number of parts into which each process divides its share, to accumulate gradients (`--accumulate`).
        """
        unit = self.size * together * parts
        if batch_size % unit:
            less = batch_size - batch_size % unit
            sizes = f"{less} or {less + unit}" if less else f"{unit}"
            raise RecipeError(
                f"Cannot share --batch-size {batch_size} evenly: {self.size} process{'es' * (self.size > 1)}"
                + (f", which hold {together} samples together" if together > 1 else "")
                + (f", and --accumulate {parts}" if parts > 1 else ""),
                fix=f"Use --batch-size {sizes}, or another number of processes" + (" or of parts" if parts > 1 else ""),
                rule="--batch-size is that of all processes together.",
            )

    def seed(self, seed: int, step: int) -> int:
        """Return this process's own seed for a training that begins or resumes at `step`.

        `seed` is the run's seed. Process 0 gets it unchanged. Every other process gets a number that depends on the
        seed, the process and the step.
        """
        if self.first:
            return seed
        return int(np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _shareable(self, error: Exception) -> KDCacheError:
        """Return the error as the other processes raise it."""
        if isinstance(error, KDCacheError):
            return error
        parts = [getattr(error, name, None) for name in ("problem", "fix", "rule")]
        if all(isinstance(part, str) for part in parts):
            problem, fix, rule = map(str, parts)
            return ModelError(problem, fix=fix, rule=rule)
        return ModelError(
            f"Process {self.rank} failed: {type(error).__name__}: {error}",
            fix="Repair it there. With --debug that process shows its traceback.",
        )


@contextmanager
def processes() -> Iterator[World]:
    """Set up the processes that torchrun started, in a with block that gets the `World`.

    Without torchrun, the world has one process.

    Raises: ModelError if another process ends while this one exchanges data with it.
    """
    ours = not dist.is_initialized()
    if ours:
        if World.of_environment().size == 1:
            yield World()
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(backend, store=_own_part(store, rank, size), rank=rank, world_size=size)
    rank = dist.get_rank()
    try:
        yield World(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ModelError(
            "Another process of the training has gone",
            fix="See its output. --resume goes on from the last checkpoint, with any number of processes.",
        ) from error
    except KDCacheError:
        _leave(ours)  # all raise the same
        raise
    except Interrupted as stop:
        traceback.clear_frames(stop.__traceback__)  # the frames hold the trainer, and the trainer the group
        _leave(ours)
        raise
    else:
        _leave(ours)


def _own_part(store: Store, rank: int, size: int) -> Store:
    """Return a part of the store that only these processes know, and no processes that ran before them.

    torchrun restarts processes on the store of those that died. Their addresses are still there, and who reads one
    before the new process has written its own waits for the dead (pytorch issue 135712); TORCHELASTIC_RESTART_COUNT
    separates nothing, for machines count apart (108158). So process 0 names the part, and tells those alone that answer
    with what they made up when they started.

    Raises: ModelError for a process that does not start in time.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + START_S
    name, waiting = (mine, set(range(1, size))) if rank == 0 else ("", {0})
    if rank:
        store.set(f"hello/{rank}", mine)
    while True:
        if rank == 0:
            waiting = {peer for peer in waiting if not _welcomed(store, peer, mine)}
        else:
            answered, _, name = _read(store, f"welcome/{rank}").partition(" ")
            if answered == mine:
                store.set(f"here/{rank}", name)
                waiting.clear()
        if not waiting:
            return PrefixStore(name, store)
        if time.monotonic() > until:
            raise ModelError(
                f"Process {rank} has waited {START_S} s for process {', '.join(map(str, sorted(waiting)))} to start",
                fix="See its output, and start as many as WORLD_SIZE says.",
            )
        time.sleep(_POLL_S)


def _welcomed(store: Store, peer: int, name: str) -> bool:
    """Tell another process the part's name, and return whether it knew it."""
    if _read(store, f"here/{peer}") == name:
        return True
    store.set(f"welcome/{peer}", f"{_read(store, f'hello/{peer}')} {name}")
    return False


def _read(store: Store, key: str) -> str:
    """Return a value of the store, or an empty string."""
    return store.get(key).decode() if store.check([key]) else ""


def _leave(ours: bool) -> None:
    """Destroy the process group if kdcache created it. After an error in one process this does not wait for others.

    A group that something still holds keeps its threads. If one of them frees a tensor while the interpreter ends, it
    aborts the process (pytorch 179291).
    """
    if ours:
        dist.destroy_process_group()
        gc.collect()


def pick_device(name: str, world: World | None = None) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is a GPU if there is one.

    Each of several processes gets its own GPU. `world` is by default read from torchrun's environment.

    Raises: RecipeError for a device that this machine lacks.
    """
    world = world or World.of_environment()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise RecipeError(
            f"Cannot use --device {name!r}" + ("" if torch.cuda.is_available() else ": this machine has no usable GPU"),
            fix="Use --device auto, cpu or cuda.",
        )
    if name == "cpu" or world.size == 1:
        return torch.device(name)
    if name != "cuda" or world.local_rank >= torch.cuda.device_count():
        raise RecipeError(
            f"Cannot use --device {name} for process {world.local_rank} of this machine, which has "
            f"{torch.cuda.device_count()} GPUs",
            fix="Use --device cuda, and as many processes as there are GPUs.",
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def default_workers(device: torch.device) -> int:
    """Return the default number of loader workers for this process.

    It is 0 if the training runs on a CPU. With a GPU, it is 1 to 8, depending on the number of CPU cores per process.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, cores - 1)) if device.type == "cuda" else 0
