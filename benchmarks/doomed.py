"""Processes that run the command line, to be killed at a drawn moment.

They are forked from one that has everything imported: their life is their work, and not the imports.
"""

import importlib
import os
import pkgutil
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kdcache
import kdcache_kernels
from kdcache_cli.app import main as command_line

LIMIT_S = 300  # of one process: beyond, it hangs


class DifferenceError(Exception):
    """Something differs from the uninterrupted work."""


@dataclass
class Process:
    """A forked process that runs one command line."""

    pid: int
    log: Path
    code: int | None = None

    @classmethod
    def start(cls, words: Sequence[object], log: Path) -> "Process":
        """Fork a process that runs a command line, with its output in `log`."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return cls(pid, log)
        code: Any = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            command_line([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def ended(self) -> bool:
        """Return whether the process has ended, and keep its exit code."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        """Wait for the process to end and return its exit code. Raises: DifferenceError if it takes too long."""
        until = time.monotonic() + LIMIT_S
        while not self.ended():
            if time.monotonic() > until:
                self.kill()
                raise DifferenceError(f"a process hung for {LIMIT_S} s: {self.log_end()}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def kill(self) -> bool:
        """Kill the process. Return whether it was still alive."""
        if self.ended():
            return False
        os.kill(self.pid, signal.SIGKILL)
        while not self.ended():
            time.sleep(0.0005)
        return self.code == -signal.SIGKILL

    def finish(self) -> None:
        """Wait for the process to end. Raises: DifferenceError unless it succeeds."""
        if self.wait():
            raise DifferenceError(f"exit code {self.code}: {self.log_end()}")

    def log_end(self) -> str:
        """Return the last 1,500 characters of the process's output, for messages."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-1500:]


@dataclass
class Doom:
    """The moment to kill a process: `seconds` after it has done `steps` units of work (shards, iterations)."""

    steps: int
    seconds: float

    @classmethod
    def draw(cls, rng: random.Random, done: int, total: int, each_s: float, start_s: float) -> "Doom":
        """Draw the moment at which a process is killed.

        `done` and `total` are units of work, `each_s` the seconds of a unit, and `start_s` the seconds of the start.
        """
        steps = rng.randint(done, min(total, done + 1 + total // 4))
        # Before its first step a process starts up; after the last it has little to do.
        most = start_s + each_s if steps == done else each_s if steps < total else each_s / 4
        return cls(steps, rng.uniform(0, most))

    def wait(self, count: Callable[[], int], processes: Sequence[Process]) -> None:
        """Wait for the moment of the kill, or until all processes have ended."""
        while count() < self.steps and not all(process.ended() for process in processes):
            time.sleep(0.0005)
        time.sleep(self.seconds)


@dataclass
class Tally:
    """The kills and the number of finished works, for the result file."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    finished: int = 0

    def killed(self, **facts: Any) -> None:
        """Count a kill, keep its facts, and print them."""
        self.kills.append(facts)
        print(f"kill {len(self.kills)}: " + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)


def import_everything() -> None:
    """Import everything that commands import when needed, so a forked child has it. No threads are started."""
    importlib.import_module("torch._dynamo")
    for package in (kdcache, kdcache_kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    assert len(os.listdir("/proc/self/task")) == 1, (
        "a fork would lose threads: set OMP_NUM_THREADS=1 before the first import"
    )
