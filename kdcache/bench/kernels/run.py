"""One benchmark: every case, ours and the rivals on the same tensors, in one run.

A rival that cannot run (not installed, out of memory, no compiler) stays in the result with the reason. If ours cannot
run, it raises.
"""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from kdcache.bench import timing
from kdcache.bench.kernels import memory, roofline
from kdcache.bench.kernels.inputs import Inputs, make_inputs
from kdcache.bench.kernels.rivals import OURS, RIVALS, Contestant, UnavailableError, prepare, resolved
from kdcache.bench.kernels.roofline import Ceilings
from kdcache.bench.kernels.shapes import Case, Shape
from kdcache.bench.timing import Spread
from kdcache.metrics.timing import is_out_of_memory

Note = Callable[[str], None]
HOST_SHARE = 0.9
OUT_OF_MEMORY = "out of memory"
PEAK_BYTES = {"eager": 32, "chunked": 32, "compile": 16, "compile-max-autotune": 16}
"""Bytes per class-pixel, rounded up; on a CPU, using more than there is ends the process instead of raising."""


@dataclass(frozen=True)
class Settings:
    """The choice of measurements of one benchmark. Every combination of shape, kind and dtype is a case.

    Attributes:
        device: where to compute.
        shapes: shapes of the batches of label images.
        dtypes: names of `shapes.DTYPES`, such as "fp32".
        kinds: names of `shapes.KINDS` that say which loss to compute, such as "plain".
        against: names of `rivals.RIVALS` to compare kdcache with, such as "eager".
        impl: implementation of kdcache's loss, such as "auto".
        repeats: timed steps of kdcache and of each rival. None means 100 on CUDA and 15 on the CPU.
        weigh: whether to measure memory also. On the CPU, this starts a new process for kdcache and for each rival.
    """

    device: torch.device
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...] = ("plain",)
    against: tuple[str, ...] = ("eager", "compile", "liger")
    impl: str = "auto"
    repeats: int | None = None
    weigh: bool = True

    def cases(self) -> Iterator[Case]:
        """Yield a `Case` for every combination of a shape, a kind of loss and a dtype of the settings, each once."""
        grid = itertools.product(self.shapes, self.kinds, self.dtypes)
        yield from dict.fromkeys(Case(shape, dtype, kind=kind) for shape, kind, dtype in grid)


@dataclass
class Measured:
    """The measurements of one contestant (kdcache or a rival) on one case. None means not measured.

    Attributes:
        name: "kdcache" or a name of `rivals.RIVALS`, such as "eager".
        title: the name in tables.
        time: one forward and backward. On a GPU, it includes the launches.
        graph: the same step as a CUDA graph, which leaves out the CPU's time.
        host: the CPU's time to launch the step on a GPU.
        peak_mib: peak memory above the inputs, in MiB.
        floors: for kdcache on a GPU: "bytes", "sfu" and "issue", each the least possible time divided by the measured
            time, from `roofline.fractions`.
        problem: a message that says why numbers are missing, or "".
    """

    name: str
    title: str
    time: Spread | None = None
    graph: Spread | None = None
    host: Spread | None = None
    peak_mib: float | None = None
    floors: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def headline(self) -> Spread | None:
        """The time of the CUDA graph if it was measured, else `time`."""
        return self.graph or self.time

    @property
    def host_bound(self) -> bool:
        """True if the GPU waits for the CPU, so that `time` measures the CPU's launches."""
        if self.host is None or self.time is None:
            return False
        # Without a graph the device's own time is not known; events around a step that waits have the host's.
        return self.host.p50 > (self.graph.p50 if self.graph is not None else HOST_SHARE * self.time.p50)


@dataclass
class Row:
    """The measurements of kdcache and its rivals on one case.

    Attributes:
        case: the shape, kind of loss and dtype that were measured.
        ours: kdcache's measurements.
        rivals: the measurements of each rival, such as eager PyTorch.
    """

    case: Case
    ours: Measured
    rivals: list[Measured]

    def ratios(self, rival: Measured) -> dict[str, float | None]:
        """Return a rival's measurements divided by kdcache's, so above 1 means slower or larger.

        The keys are "best" and "median" (of `time`), "graph" and "host" (medians) and "memory" (peaks). A value is None
        if one of the two is missing.
        """
        return {
            "best": _ratio(_of(rival.time, "best"), _of(self.ours.time, "best")),
            "median": _ratio(_of(rival.time, "p50"), _of(self.ours.time, "p50")),
            "graph": _ratio(_of(rival.graph, "p50"), _of(self.ours.graph, "p50")),
            "host": _ratio(_of(rival.host, "p50"), _of(self.ours.host, "p50")),
            "memory": _ratio(rival.peak_mib, self.ours.peak_mib),
        }

    def to_json(self) -> dict[str, Any]:
        """Return a dict with the keys "case", "ours" and "rivals": the case, and what was measured.

        "ours" is a dict of kdcache's measurements. "rivals" is a list with such a dict for each rival. A rival's dict
        also has the key "ratio", the dict that `ratios` returns. Times are in milliseconds and memory in MiB.
        """
        case = {**asdict(self.case), "shape": str(self.case.shape), "kept": self.case.k}
        rivals = [{**_plain(rival), "ratio": self.ratios(rival)} for rival in self.rivals]
        return {"case": case, "ours": _plain(self.ours), "rivals": rivals}


def measure_ceilings(settings: Settings, note: Note = lambda text: None) -> Ceilings | None:
    """Return the highest speeds of the GPU, or None on the CPU.

    `note` is called with a line of progress.

    Raises: ValueRangeError if `settings.impl` cannot run on the device.
    """
    resolved(settings.impl, settings.device)
    if settings.device.type != "cuda":
        return None
    note("ceilings: a copy")
    return roofline.measure_ceilings()


def measure(settings: Settings, ceilings: Ceilings | None = None, note: Note = lambda text: None) -> Iterator[Row]:
    """Run a benchmark, and yield the measurements of each case when they are ready.

    Args:
        settings: the cases, and the rivals to compare kdcache with.
        ceilings: the GPU's highest speeds, to compute `Measured.floors`, or None to leave them out.
        note: called with a line of progress at every stage.
    Raises: any error of kdcache's loss, such as ValueRangeError for an implementation that cannot run here. A rival's
        error is stored in `Measured.problem` instead.
    """
    resolved(settings.impl, settings.device)
    for case in settings.cases():
        yield _measure_case(case, settings, ceilings, note)


def _measure_case(case: Case, settings: Settings, ceilings: Ceilings | None, note: Note) -> Row:
    note(f"{case}: inputs")
    # A compiled function remembers earlier shapes, and after eight of them it refuses the next.
    torch.compiler.reset()
    inputs = make_inputs(case, settings.device)
    names = (OURS, *(name for name in settings.against if name != OURS))
    assert set(names[1:]) <= set(RIVALS)
    if settings.device.type == "cuda":
        measured = [_on_cuda(name, case, inputs, settings, note) for name in names]
    else:
        measured = _on_cpu(names, case, inputs, settings, note)
    ours = measured[0]
    if ceilings is not None and (time := ours.headline) is not None:
        ours.floors = roofline.fractions(roofline.least_work(case), ceilings, time.p50)
    return Row(case, ours, measured[1:])


def _on_cuda(name: str, case: Case, inputs: Inputs, settings: Settings, note: Note) -> Measured:
    """Return one contestant after another: the events time the device alone."""
    repeats = settings.repeats or timing.default_repeats(settings.device)
    measured = Measured(name, name)

    def run() -> None:
        contestant = _ready(name, case, inputs, settings, note)
        measured.title = contestant.title
        note(f"{case}: {contestant.title}: {repeats} repeats")
        measured.time = timing.on_device(contestant.step, repeats)
        measured.host = timing.on_host(contestant.step, repeats)
        if settings.weigh:
            measured.peak_mib = memory.peak_on_device(contestant.step)
        if contestant.capturable:
            try:
                measured.graph = timing.as_graph(contestant.step, repeats)
            except RuntimeError as error:
                measured.problem = f"no CUDA graph: {_one_line(error)}"

    measured.problem = _attempt(name, run) or measured.problem
    gc.collect()
    torch.cuda.empty_cache()
    return measured


def _on_cpu(names: Sequence[str], case: Case, inputs: Inputs, settings: Settings, note: Note) -> list[Measured]:
    """Time all contestants in turn, then weigh them."""
    repeats = settings.repeats or timing.default_repeats(settings.device)
    measured = {name: Measured(name, name) for name in names}
    ready: dict[str, Contestant] = {}

    def get_ready(name: str) -> None:
        _check_room(name, case)
        ready[name] = _ready(name, case, inputs, settings, note)
        measured[name].title = ready[name].title

    for name in names:
        measured[name].problem = _attempt(name, partial(get_ready, name)) or ""
    note(f"{case}: {repeats} repeats of {', '.join(ready)} in turn")
    for name, spread in timing.in_turn({name: contestant.step for name, contestant in ready.items()}, repeats).items():
        measured[name].time = spread
    threads = torch.get_num_threads()
    for name in ready if settings.weigh else ():
        note(f"{case}: {measured[name].title}: memory, in a process of its own")
        try:
            measured[name].peak_mib = memory.peak_in_fresh_process(name, case, settings.impl, threads)
        except UnavailableError as error:
            measured[name].problem = str(error)
    return list(measured.values())


def _ready(name: str, case: Case, inputs: Inputs, settings: Settings, note: Note) -> Contestant:
    contestant = prepare(name, case, inputs, settings.impl)
    takes = " (compiling, which takes a minute)" if name.startswith("compile") else ""
    note(f"{case}: {contestant.title}: warm-up{takes}")
    timing.warm_up(contestant.step, inputs.student.device)
    return contestant


def _attempt(name: str, work: Callable[[], None]) -> str | None:
    """Do some work, and return a rival's failure as one line."""
    try:
        work()
    except Exception as error:
        if name == OURS:
            raise
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    if isinstance(error, UnavailableError):
        return text[0]
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return f"failed: {type(error).__name__}: {text[0]}"[:200]


def _check_room(name: str, case: Case) -> None:
    """Refuse a rival that would need more memory than there is."""
    free = memory.available_bytes()
    needed = PEAK_BYTES.get(name, 0) * case.shape.class_pixels // (case.shape.batch if name == "chunked" else 1)
    if needed > free:
        raise UnavailableError(f"{OUT_OF_MEMORY}: about {needed / 2**30:.1f} GiB of {free / 2**30:.1f}")


def _of(spread: Spread | None, what: str) -> float | None:
    return None if spread is None else float(getattr(spread, what))


def _ratio(theirs: float | None, mine: float | None) -> float | None:
    return theirs / mine if theirs is not None and mine else None


def _plain(measured: Measured) -> dict[str, Any]:
    figures = {key: value for key, value in asdict(measured).items() if value not in (None, "", {})}
    return figures if measured.host is None else {**figures, "host_bound": measured.host_bound}
