"""Contestants take turns on one machine, so that a neighbour on it slows all of them.

In each of several rounds every contestant does the same work once. A loader that draws ahead would fill its buffers
while others work, and hand them over for nothing: it first does some work off the clock, which empties them, and the
next contestant waits until it has filled them again. So what is timed is the steady state.

CPU time is that of all threads of this process and of the contestant's worker processes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from kdcache.bench.timing import Spread
from kdcache.metrics.timing import no_garbage_collection

_POLL_S, _MOST_POLLS = 0.03, 30
_QUIET = 0.1  # of a core


@dataclass(frozen=True)
class Contestant:
    """A contestant that takes turns.

    Attributes:
        work: what a turn does.
        samples: number of samples that a turn yields.
        before: done at the start of a turn, off the clock.
        processes: ids of its workers.
    """

    name: str
    title: str
    work: Callable[[], Any]
    samples: int
    before: Callable[[], Any] = lambda: None
    processes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pace:
    """Milliseconds per sample, a value per turn: by the clock, and of CPU (None where that is unknown)."""

    time: Spread
    cpu: Spread | None

    @property
    def per_second(self) -> float:
        """Samples, by the median."""
        return 1e3 / self.time.p50

    @property
    def cpu_us(self) -> float | None:
        """Microseconds of CPU per sample, by the median."""
        return None if self.cpu is None else 1e3 * self.cpu.p50


def in_turn(contestants: Sequence[Contestant], rounds: int) -> dict[str, Pace]:
    """Time contestants, warmed up before; name -> pace."""
    clock: dict[str, list[float]] = {one.name: [] for one in contestants}
    spent: dict[str, list[float]] = {one.name: [] for one in contestants}
    with no_garbage_collection():
        for _ in range(rounds):
            for one in contestants:
                one.before()
                cpu, began = _cpu_seconds(one.processes), time.perf_counter()
                one.work()
                took, used = time.perf_counter() - began, _cpu_seconds(one.processes)
                clock[one.name].append(1e3 * took / one.samples)
                if cpu is not None and used is not None:
                    spent[one.name].append(1e3 * (used - cpu) / one.samples)
                _settle(one.processes)
    return {name: Pace(Spread.of(clock[name]), Spread.of(spent[name]) if spent[name] else None) for name in clock}


def _settle(processes: Sequence[int]) -> None:
    """Wait until nobody works any more: loaders have filled their buffers, idle threads have stopped to spin."""
    before = _cpu_seconds(processes)
    for _ in range(_MOST_POLLS):
        time.sleep(_POLL_S)
        now = _cpu_seconds(processes)
        if before is None or now is None or now - before < _QUIET * _POLL_S:
            return
        before = now


def _cpu_seconds(processes: Sequence[int]) -> float | None:
    """CPU time of this process and of some others; theirs comes in ticks of mostly 10 ms."""
    try:
        times = [psutil.Process(process).cpu_times() for process in processes]
    except psutil.Error:
        return None
    return time.process_time() + sum(float(spent.user + spent.system) for spent in times)
