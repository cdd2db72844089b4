"""Time contestants in turns on one machine, so other work on it slows all of them.

A loader that draws ahead would fill its buffers in the others' turns. So each contestant empties its buffers off the
clock first, and the next one waits until the machine is quiet.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from common import check_equal
from kdcache.bench.timing import Spread, check_repeats
from kdcache.metrics.timing import no_garbage_collection

POLL_S, MOST_POLLS = 0.03, 30
QUIET = 0.1
"""CPU seconds per second below which the machine counts as quiet."""


@dataclass(frozen=True)
class Contestant:
    """A contestant that takes turns.

    Attributes:
        name: its name.
        work: the work of a turn.
        samples: number of samples in a turn.
        before: work at the start of a turn that is not timed.
        processes: ids of its worker processes, whose CPU time counts.
        size: shape of a batch, which must be equal for all contestants. None is not compared.
    """

    name: str
    work: Callable[[], Any]
    samples: int
    before: Callable[[], Any] = lambda: None
    processes: tuple[int, ...] = ()
    size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Pace:
    """Milliseconds per sample, one value per turn: wall time, and CPU time (None if unknown)."""

    time: Spread
    cpu: Spread | None


def in_turn(contestants: Sequence[Contestant], rounds: int) -> dict[str, Pace]:
    """Time contestants in turns, each after a warm-up. Return the pace of each by name.

    Raises: RecipeError for too few rounds, or contestants of different sizes.
    """
    check_repeats(rounds)
    check_equal("sizes", {contestant.name: contestant.size for contestant in contestants})
    clock: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    spent: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    with no_garbage_collection():
        for _ in range(rounds):
            for contestant in contestants:
                contestant.before()
                cpu, began = cpu_seconds(contestant.processes), time.perf_counter()
                contestant.work()
                took, used = time.perf_counter() - began, cpu_seconds(contestant.processes)
                clock[contestant.name].append(1e3 * took / contestant.samples)
                if cpu is not None and used is not None:
                    spent[contestant.name].append(1e3 * (used - cpu) / contestant.samples)
                settle(contestant.processes)
    return {name: Pace(Spread.of(clock[name]), Spread.of(spent[name]) if spent[name] else None) for name in clock}


def settle(processes: Sequence[int]) -> None:
    """Wait until loaders have filled their buffers and idle threads have stopped spinning."""
    before = cpu_seconds(processes)
    for _ in range(MOST_POLLS):
        time.sleep(POLL_S)
        now = cpu_seconds(processes)
        if before is None or now is None or now - before < QUIET * POLL_S:
            return
        before = now


def cpu_seconds(processes: Sequence[int]) -> float | None:
    """Return the CPU seconds of this process and of other processes. Theirs come in ticks of mostly 10 ms."""
    try:
        times = [psutil.Process(process).cpu_times() for process in processes]
    except psutil.Error:
        return None
    return time.process_time() + sum(float(spent.user + spent.system) for spent in times)
