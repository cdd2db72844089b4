"""The roofline, and the way of a run on a GPU: on a real one where there is one, and on a pretended one everywhere."""

from __future__ import annotations

import contextlib
import json
import time
import types

import pytest
import torch

from kdcache.bench import timing
from kdcache.bench.kernels import (
    PRESETS,
    Case,
    Measured,
    Settings,
    Shape,
    Spread,
    measure,
    measure_ceilings,
    memory,
    roofline,
    run,
)
from kdcache.bench.kernels.inputs import make_inputs

SMALL = Shape(2, 5, 24, 32, 4)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.parametrize(
    ("shape", "kept", "megabytes", "sfu_us", "issue_us"),
    [("voc", 8, 33, 22.1, 77.2), ("ade", 8, 168, 158, 474), ("cityscapes", 8, 35, 22.4, 79.5)],
)
def test_the_least_work_of_the_headline_shapes(
    shape: str, kept: int, megabytes: float, sfu_us: float, issue_us: float
) -> None:
    case = Case(PRESETS[shape][0], dtype="bf16", kept=kept)
    h200 = roofline.Ceilings(copy_bytes=4.3e12, exps=16 * 132 * 1.98e9)
    work = roofline.least_work(case)
    assert work.bytes / 1e6 == pytest.approx(megabytes, rel=0.02)
    shares = roofline.fractions(work, h200, milliseconds=1.0)
    assert shares["bytes"] == pytest.approx(megabytes / 4.3e3, rel=0.02)
    assert shares["sfu"] * 1e3 == pytest.approx(sfu_us, rel=0.01)
    assert shares["issue"] * 1e3 == pytest.approx(issue_us, rel=0.01)
    assert max(shares, key=shares.__getitem__) == "issue"


@pytest.mark.parametrize(
    ("stride", "temperature", "height", "per_class_pixel"),
    [(2, 2.0, 64, 4.0), (8, 1.0, 64, 1.0), (4, 2.5, 64, 1.5), (1, 2.0, 64, 4), (4, 2.5, 63, 6), (16, 2.0, 64, 4)],
)
def test_exponentials_per_class_pixel(stride: int, temperature: float, height: int, per_class_pixel: float) -> None:
    """Twice, in both walks over the classes; of cells at the edges, too, which are half outside the image."""
    case = Case(Shape(1, 3, height, 64, stride), temperature=temperature)
    class_pixels = case.shape.class_pixels
    if stride in (2, 4, 8) and height == 64:
        class_pixels = 3 * (64 + stride) ** 2 * 32 / 31
    assert roofline.least_work(case).exps == pytest.approx(per_class_pixel * class_pixels)


def test_a_drawn_window_costs_an_exponential_per_softmax() -> None:
    case = Case(Shape(1, 3, 64, 64, 4), kind="warp")
    assert roofline.least_work(case).exps == 4 * case.shape.class_pixels


def test_the_least_work_of_relations_is_that_of_cells() -> None:
    case = Case(PRESETS["voc"][0], dtype="bf16", kind="dist")
    work, class_cells = roofline.least_work(case), 16 * 21 * 128 * 128
    assert work.bytes == 6 * class_cells, "both logits and the gradient, two bytes each"
    assert work.exps == 2 * class_cells
    assert work.instructions == roofline.INSTRUCTIONS_PER_CLASS_CELL * class_cells


@NO_GPU
def test_a_run_on_a_gpu() -> None:
    settings = Settings(torch.device("cuda"), (Shape(2, 21, 128, 128, 4),), ("bf16",), repeats=3, against=("eager",))
    ceilings = measure_ceilings(settings)
    assert ceilings is not None
    rows = list(measure(settings, ceilings))
    assert 1e11 < ceilings.copy_bytes < 1e14
    assert 1e11 < ceilings.exps < 1e14
    ours, (eager,) = rows[0].ours, rows[0].rivals
    assert (ours.problem, eager.problem) == ("", "")
    assert ours.graph is not None
    assert set(ours.floors) == {"bytes", "sfu", "issue"}
    assert all(0 < share < 1.2 for share in ours.floors.values())
    tensor_mib = 4 * rows[0].case.shape.class_pixels / memory.MIB
    assert eager.peak_mib is not None
    assert 4 * tensor_mib < eager.peak_mib < 12 * tensor_mib


@NO_GPU
def test_memory_on_a_gpu_sees_what_a_step_allocates() -> None:
    step = lambda: [torch.empty(24 * memory.MIB, dtype=torch.uint8, device="cuda") for _ in range(2)]  # noqa: E731
    assert memory.peak_on_device(step) == pytest.approx(48, abs=1)


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        assert other is not self


class _Cuda:
    """Of torch.cuda what the benchmark uses, computing on the CPU. Memory is counted per call of a step: 3 MiB each."""

    Event, Stream = _Event, _Stream

    def __init__(self) -> None:
        self.captured: list[str] = []
        self.base = 7 * memory.MIB
        outside = _Stream()
        self.current_stream = lambda: outside
        self.stream = lambda stream: contextlib.nullcontext()
        self.synchronize = self.empty_cache = lambda: None
        self.current_device = lambda: 0
        self.get_device_properties = lambda device: types.SimpleNamespace(L2_cache_size=5 * 2**20)
        self.CUDAGraph = lambda: types.SimpleNamespace(replay=lambda: self.captured.append("replay"))
        self.memory_allocated = lambda: self.base
        self.max_memory_allocated = lambda: self.base + 3 * memory.MIB

    def reset_peak_memory_stats(self) -> None:
        self.captured.append("reset")

    @contextlib.contextmanager
    def graph(self, graph: object):
        self.captured.append("begin")
        yield
        self.captured.append("end")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    cuda = _Cuda()
    for name in [
        name for name in (*vars(_Cuda), *vars(cuda)) if not name.startswith("__") and hasattr(torch.cuda, name)
    ]:
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    empty = torch.empty
    monkeypatch.setattr(timing.torch, "empty", lambda *size, device=None, **kw: empty(*size, **kw))
    monkeypatch.setattr(timing, "LEAST_FLUSH_BYTES", 1)
    monkeypatch.setattr(timing, "CUDA_WARM_UPS", 2)
    monkeypatch.setattr(run, "make_inputs", lambda case, device: make_inputs(case, torch.device("cpu")))
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: roofline.Ceilings(4e12, 4e12))
    return cuda


def test_the_way_on_a_gpu(pretended: _Cuda) -> None:
    settings = Settings(
        types.SimpleNamespace(type="cuda"),  # type: ignore[arg-type]
        (SMALL,),
        ("bf16",),
        impl="reference",
        repeats=3,
        against=("eager", "chunked", "liger"),
    )
    ceilings = measure_ceilings(settings)
    assert ceilings is not None
    rows = list(measure(settings, ceilings))
    eager, chunked, liger = rows[0].rivals
    for one in (rows[0].ours, eager, chunked):
        assert one.time is not None
        assert one.graph is not None
        assert one.host is not None
        assert one.time.repeats == one.graph.repeats == one.host.repeats == 3
        assert one.peak_mib == 3
        assert one.problem == ""
    assert set(rows[0].ours.floors) == {"bytes", "sfu", "issue"}
    assert "liger-kernel" in liger.problem
    assert pretended.captured == ["reset", "begin", "end", *["replay"] * 3] * 3
    assert json.loads(json.dumps(rows[0].to_json()))["rivals"][0]["ratio"]["memory"] == 1


def test_a_step_that_cannot_be_captured(pretended: _Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    settings = Settings(
        types.SimpleNamespace(type="cuda"), (SMALL,), ("fp32",), impl="reference", repeats=2, against=()
    )  # type: ignore[arg-type]
    ours = next(measure(settings)).ours
    assert ours.time is not None
    assert ours.graph is None
    assert "no CUDA graph" in ours.problem
    assert "\n" not in ours.problem


@pytest.mark.parametrize(
    ("time_ms", "graph_ms", "host_ms", "bound"),
    [(0.8, 0.2, 0.75, True), (0.25, 0.2, 0.1, False), (0.8, None, 0.75, True), (4.0, None, 0.75, False)],
)
def test_where_the_gpu_waits_for_the_host(time_ms: float, graph_ms: float | None, host_ms: float, bound: bool) -> None:
    graph = None if graph_ms is None else Spread.of([graph_ms])
    one = Measured("kdcache", "kdcache", Spread.of([time_ms]), graph, Spread.of([host_ms]))
    assert one.host_bound is bound
    assert one.headline is (graph or one.time)
