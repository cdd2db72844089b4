"""Time one step, and several in turn.

CUDA: 25 warm-ups, then events around the step, with the L2 cache overwritten before every repeat (in a training the
inputs are not there either), and again as a captured graph, which leaves the launches out: the device's own time. The
CPU's time to issue a step is measured by its own clock, with the device idle before every call, because a full queue
would make it wait. If it is longer than the graph, the events have timed the host.

CPU: contestants take turns, a few calls each, over several rounds, so other load on the machine slows all of them. Then
the best times are compared. One call of each per turn would not do: after a step, torch's threads spin for a while
before they sleep, on cores that the next one wants.

All times are in milliseconds.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdcache.errors import RecipeError
from kdcache.metrics.timing import no_garbage_collection

CUDA_WARM_UPS, CPU_WARM_UPS = 25, 2
CUDA_REPEATS, CPU_REPEATS = 100, 15
ROUNDS = 5
"""Turns that each contestant gets on the CPU."""
LEAST_REPEATS = 3
"""Repeats that a published median needs."""
LEAST_FLUSH_BYTES = 2**28


@dataclass(frozen=True)
class Spread:
    """The summary of repeated measurements of a time, in milliseconds.

    Attributes:
        best: the smallest sample.
        p20, p50, p80: the 20th percentile, the median and the 80th percentile.
        repeats: number of samples.
    """

    best: float
    p20: float
    p50: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> "Spread":
        """Summarise samples in milliseconds. p20 and p80 are the samples nearest to these percentiles."""
        ordered = sorted(samples_ms)
        last = len(ordered) - 1
        return cls(
            best=ordered[0],
            p20=ordered[round(0.2 * last)],
            p50=statistics.median(ordered),
            p80=ordered[round(0.8 * last)],
            repeats=len(ordered),
        )


def check_repeats(count: int, flag: str = "--repeats") -> None:
    """Raise RecipeError if `count`, a number of repeats, is below 3. The error names `flag`."""
    if count < LEAST_REPEATS:
        raise RecipeError(f"Too few repeats for a median: {count}", fix=f"Use {flag} {LEAST_REPEATS} or more.")


def default_repeats(device: torch.device) -> int:
    """Return the default number of timed samples of each compared implementation: 100 on CUDA, else 15."""
    return CUDA_REPEATS if device.type == "cuda" else CPU_REPEATS


def warm_up(step: Callable[[], Any], device: torch.device) -> None:
    """Call a step 25 times if `device` is CUDA, else twice, so that everything is compiled and loaded before timing."""
    for _ in range(CUDA_WARM_UPS if device.type == "cuda" else CPU_WARM_UPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turn(steps: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Spread]:
    """Time several steps on the CPU by turns, so that other load on the machine slows all of them.

    Args:
        steps: the steps by name, warmed up already.
        repeats: calls of each step, spread over up to five rounds.
    Returns: the measured times by the steps' names.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    rounds = min(ROUNDS, repeats)
    with no_garbage_collection():
        for turn in range(rounds):
            calls = repeats // rounds + (turn < repeats % rounds)
            for name, step in steps.items():
                for _ in range(calls):
                    began = time.perf_counter()
                    step()
                    samples[name].append(1e3 * (time.perf_counter() - began))
    return {name: Spread.of(values) for name, values in samples.items()}


def on_device(step: Callable[[], Any], repeats: int) -> Spread:
    """Measure `repeats` times how long a step takes on the current CUDA device, in milliseconds, with CUDA events.

    The L2 cache is overwritten before each measurement. The step must be warmed up already.
    """
    flush = torch.empty(_flush_bytes(), dtype=torch.uint8, device="cuda")
    event: Any = torch.cuda.Event
    events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
    with no_garbage_collection():
        for begin, end in events:
            flush.zero_()
            begin.record()
            step()
            end.record()
        torch.cuda.synchronize()
    return Spread.of([begin.elapsed_time(end) for begin, end in events])


def on_host(step: Callable[[], Any], repeats: int) -> Spread:
    """Measure `repeats` times how long the CPU takes to launch a step on the current CUDA device, in milliseconds.

    The step must be warmed up already.
    """
    samples = []
    with no_garbage_collection():
        for _ in range(repeats):
            torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            samples.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return Spread.of(samples)


def as_graph(step: Callable[[], Any], repeats: int) -> Spread:
    """Capture a step as a CUDA graph, and return the times of `repeats` replays in milliseconds.

    They are measured with CUDA events, and with the L2 cache overwritten before each replay.

    Raises: RuntimeError if the step cannot be captured.
    """
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    spread = on_device(graph.replay, repeats)
    del outputs
    return spread


def _flush_bytes() -> int:
    """Return twice the L2 cache: H100 and H200 have 50 MiB."""
    cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
    return max(2 * int(cache), LEAST_FLUSH_BYTES)
