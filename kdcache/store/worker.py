"""Workers: the shards that each of several processes writes. Numbers come from the user, torchrun or a scheduler."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kdcache.errors import StoreError

AUTO = "auto"


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that build one cache together. Worker i writes the shards k with k % count == i.

    Attributes:
        index: this worker's number, from 0.
        count: number of workers.
        take_over: whether this worker also writes other workers' missing shards, after its own.
    """

    index: int = 0
    count: int = 1
    take_over: bool = False

    def shards(self, shards: int) -> list[int]:
        """Return the numbers of the shards that this worker is to write, whether they exist or not.

        Its own shards come first, and with `take_over` the shards of all other workers follow. `shards` is the cache's
        total number of shards.
        """
        mine = list(range(self.index, shards, self.count))
        if not self.take_over:
            return mine
        return mine + [shard for shard in range(shards) if shard % self.count != self.index]

    def describe(self, what: str) -> str:
        """Return `what`, followed by this worker's number if there are several workers, for messages."""
        if self.count == 1:
            return what
        others = ", with the shards of all others" if self.take_over else ""
        return f"{what}, worker {self.index} of {self.count}{others}"


def worker_of(text: str | None, take_over: bool = False) -> Worker:
    """Return the worker that a value of `--worker` describes.

    Args:
        text: "2/8" is the third of eight workers. "auto" reads number and total from a job scheduler or torchrun.
            "auto/8" reads only the number. None reads number and total from torchrun, if torchrun started this process.
            Otherwise None is a single worker.
        take_over: whether the worker also writes other workers' missing shards.
    Raises: StoreError for an invalid number, or for `take_over` with a single worker.
    """
    if text is None:
        numbered = _torchrun(os.environ)
        worker = _checked(numbered) if numbered is not None else (0, 1)
    elif text.partition("/")[0] == AUTO:
        worker = _automatic(text, os.environ)
    else:
        worker = _numbers(text)
    if take_over and worker[1] == 1:
        raise StoreError(
            "--take-over needs several workers, but this one writes every shard",
            fix="Leave it out, or number this worker as before: --worker I/N",
        )
    return Worker(*worker, take_over)


@dataclass(frozen=True)
class _Numbered:
    """A number and a count from environment variables, with the names and values of these."""

    index: str
    count: str
    variables: str


def _torchrun(environment: Mapping[str, str]) -> _Numbered | None:
    rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is None and size is None:
        return None
    return _Numbered(rank or "0", size or "1", f"RANK={rank}, WORLD_SIZE={size}")


def _slurm(environment: Mapping[str, str]) -> _Numbered | None:
    """Return the number and total of a Slurm array task, or None outside of Slurm arrays.

    Task ids may begin at any number and have a step.
    """
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP")]
    task, count, first, step = (environment.get(name) for name in names)
    if task is None:
        return None
    variables = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
    if not all(number is None or number.isdecimal() for number in (task, first, step)):
        return _Numbered(task, count or "", variables)
    index, rest = divmod(int(task) - int(first or 0), max(int(step or 1), 1))
    return _Numbered("" if rest else str(index), count or "", variables)


def _kubernetes(environment: Mapping[str, str]) -> _Numbered | None:
    """Return the number of a pod of an indexed Kubernetes Job, or None elsewhere. The pod does not know the total."""
    index = environment.get("JOB_COMPLETION_INDEX")
    return None if index is None else _Numbered(index, "", f"JOB_COMPLETION_INDEX={index}")


def _automatic(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    ways = (_slurm, _kubernetes, _torchrun)
    numbered = next((found for way in ways if (found := way(environment)) is not None), None)
    if numbered is None:
        raise StoreError(
            "--worker auto finds no number: SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX and RANK are not set",
            fix="Use a Slurm array, a Kubernetes Job of completionMode Indexed, or torchrun. Or number the workers: "
            "--worker I/N",
        )
    _, _, count = text.partition("/")
    if count or text.endswith("/"):
        numbered = _Numbered(numbered.index, count, f"{numbered.variables} with --worker {text}")
    if not numbered.count:
        raise StoreError(
            f"--worker auto needs a total: the environment has only {numbered.variables}",
            fix="Add it, for example for eight workers: --worker auto/8",
        )
    return _checked(numbered)


def _checked(numbered: _Numbered) -> tuple[int, int]:
    """Return the two numbers. Raises: StoreError, because a worker without shards would end as if all were done."""
    index, count = numbered.index, numbered.count
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise StoreError(
        f"Invalid worker number in the environment: {numbered.variables}",
        fix="Unset these variables, or number the workers with --worker I/N",
        rule="Workers are numbered from 0, below their total (tasks 0-7 of a Slurm array for eight).",
    )


def _numbers(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise StoreError(
            f"Invalid value of --worker: {text!r}",
            fix="Use auto, or I/N: number I, from 0, of N workers. On the first of four machines: --worker 0/4",
        )
    return int(index), int(count)
