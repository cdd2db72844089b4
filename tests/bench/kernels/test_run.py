"""Time, memory and the run: the figures mean what they say. Nothing here asserts a speed."""

from __future__ import annotations

import gc
import itertools
import json
from dataclasses import replace

import pytest
import torch

from kdcache.bench import timing
from kdcache.bench.header import header
from kdcache.bench.kernels import (
    RIVALS,
    Case,
    Measured,
    Row,
    Settings,
    Shape,
    Spread,
    losses,
    measure,
    measure_ceilings,
    memory,
    run,
)
from kdcache.bench.kernels.rivals import OURS, Contestant, UnavailableError
from kdcache.errors import RecipeError
from kdcache_kernels import ValueRangeError

CPU = torch.device("cpu")
SMALL = Shape(2, 5, 24, 32, 4)
TINY_RUN = Settings(CPU, (SMALL,), ("fp32",), impl="reference", repeats=2, weigh=False, against=("eager",))


# Time


def test_a_spread_is_of_the_samples() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 60.0])
    assert (spread.best, spread.p20, spread.p50, spread.p80, spread.repeats) == (1, 2, 3.5, 5, 6)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 1)


@pytest.mark.parametrize("repeats", [2, 7, 15])
def test_contestants_take_turns(repeats: int) -> None:
    calls: list[str] = []
    found = timing.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, repeats)
    assert all(spread.repeats == repeats == calls.count(name) for name, spread in found.items())
    turns = 1 + sum(one != other for one, other in itertools.pairwise(calls))
    assert turns == 2 * min(timing.ROUNDS, repeats)


def test_collections_wait_until_the_samples_are_taken() -> None:
    assert gc.isenabled()
    seen = []
    timing.in_turn({"a": lambda: seen.append(gc.isenabled())}, 1)
    assert seen == [False]
    assert gc.isenabled()


class Clock:
    """Stands for the module `time`: steps move it, and nothing else."""

    def __init__(self) -> None:
        self.seconds = 10.0

    def perf_counter(self) -> float:
        return self.seconds

    def work(self, milliseconds: float) -> None:
        self.seconds += milliseconds / 1e3


def test_samples_are_milliseconds_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    ms = {"a": iter([5.0, 1.0, 9.0, 7.0]), "b": iter([20.0, 40.0, 30.0, 50.0])}
    found = timing.in_turn({name: lambda name=name: clock.work(next(ms[name])) for name in ms}, 4)
    assert (found["a"].best, found["a"].p50) == (pytest.approx(1), pytest.approx(6))
    assert (found["b"].best, found["b"].p50) == (pytest.approx(20), pytest.approx(35))


def test_every_contestant_is_warm_before_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(run, "prepare", lambda name, *_: Contestant(lambda: calls.append(name), name))
    monkeypatch.setattr(timing, "in_turn", lambda steps, repeats: calls.append(f"{repeats} samples") or {})
    next(measure(replace(TINY_RUN, against=("eager", "chunked"), repeats=9)))
    warm = [OURS, "eager", "chunked"]
    assert calls == [*(name for name in warm for _ in range(timing.CPU_WARM_UPS)), "9 samples"]
    assert timing.CPU_WARM_UPS >= 1


@pytest.mark.parametrize(("count", "problem"), [(0, "0"), (2, "2"), (3, "")])
def test_a_median_needs_repeats(count: int, problem: str) -> None:
    if not problem:
        timing.check_repeats(count)
        return
    with pytest.raises(RecipeError, match=f"Too few repeats for a median: {problem}"):
        timing.check_repeats(count)


# Memory


@pytest.mark.parametrize("mib", [40, 80])  # glibc maps what is above 32 MiB, and so gives it back
def test_memory_sees_what_a_step_allocates(mib: int) -> None:
    before = torch.ones(64 * memory.MIB, dtype=torch.uint8)  # resident already: not of the step

    def step() -> None:
        for _ in range(2):  # one after the other, not both at once
            torch.ones(mib * memory.MIB, dtype=torch.uint8)

    assert memory.peak_in_process(step) == pytest.approx(mib, abs=4)
    assert before.numel() == 64 * memory.MIB


@pytest.mark.slow
def test_memory_of_a_contestant_in_a_process_of_its_own() -> None:
    case = Case(Shape(1, 8, 512, 512, 4))
    tensor_mib = 4 * case.shape.class_pixels / memory.MIB
    grown = {name: memory.peak_in_fresh_process(name, case, "reference", threads=1) for name in ("eager", OURS)}
    assert 4 * tensor_mib < grown["eager"] < 12 * tensor_mib
    assert 4 * tensor_mib < grown[OURS] < 12 * tensor_mib


def test_a_process_that_fails_says_so_in_a_line() -> None:
    with pytest.raises(UnavailableError, match="Unknown impl ") as caught:
        memory.peak_in_fresh_process(OURS, Case(SMALL), "nonsense", threads=1)
    assert "\n" not in str(caught.value)


# A run


def test_a_run_is_told_as_json() -> None:
    stages: list[str] = []
    settings = replace(TINY_RUN, against=("eager", "chunked"), dtypes=("fp32", "bf16"))
    assert measure_ceilings(settings) is None
    rows = list(measure(settings, note=stages.append))
    assert len(rows) == 2
    row = json.loads(json.dumps(rows[0].to_json()))
    case = {"shape": str(SMALL), "dtype": "fp32", "temperature": 2.0, "kept": 5, "kind": "plain"}
    assert row["case"] == case
    assert [rival["name"] for rival in row["rivals"]] == ["eager", "chunked"]
    assert row["ours"]["time"]["repeats"] == 2
    assert any("eager" in stage and "warm-up" in stage for stage in stages)
    for row in rows:
        assert row.ours.time is not None
        for rival in row.rivals:
            assert rival.time is not None
            assert rival.problem == ""
            assert row.ratios(rival)["best"] == rival.time.best / row.ours.time.best
            assert row.ratios(rival)["median"] == rival.time.p50 / row.ours.time.p50


def test_a_row_comes_before_the_next_case_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    rows = measure(replace(TINY_RUN, dtypes=("fp32", "bf16")), note=stages.append)
    assert next(rows).case.dtype == "fp32"
    assert stages
    assert all(" fp32 " in stage for stage in stages)
    assert next(rows).case.dtype == "bf16"


def test_ratios() -> None:
    ours = Measured(OURS, OURS, Spread(2, 3, 4, 5, 9), Spread(1, 1, 1, 1, 9), Spread(2, 2, 2, 2, 9), peak_mib=10)
    rival = Measured("eager", "eager", Spread(6, 7, 10, 11, 9), None, Spread(3, 3, 3, 3, 9), peak_mib=45)
    ratios = Row(Case(SMALL), ours, [rival]).ratios(rival)
    assert ratios == {"best": 3, "median": 2.5, "graph": None, "host": 1.5, "memory": 4.5}
    gone = Measured("liger", "liger", problem="not installed")
    assert set(Row(Case(SMALL), ours, [gone]).ratios(gone).values()) == {None}


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17.80 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (UnavailableError("it is not here"), "it is not here"),
        (KeyError("first\nsecond"), "failed: KeyError: 'first\\nsecond'"),
    ],
)
def test_a_rival_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str) -> None:
    def fail(case: Case, inputs: object) -> None:
        raise error

    monkeypatch.setitem(RIVALS, "compile", fail)
    rows = list(measure(replace(TINY_RUN, against=("compile", "eager"))))
    failed, eager = rows[0].rivals
    assert failed.problem == problem
    assert failed.time is None
    assert eager.time is not None
    assert json.loads(json.dumps(rows[0].to_json()))["rivals"][0]["problem"] == problem


def test_a_rival_that_needs_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 32 * SMALL.class_pixels // 2)
    rows = list(measure(replace(TINY_RUN, against=("eager", "chunked"))))
    eager, chunked = rows[0].rivals
    assert eager.problem.startswith("out of memory")
    assert chunked.time is not None


def test_a_fresh_process_is_asked_for_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def weigh(name: str, case: Case, impl: str, threads: int) -> float:
        asked.append((name, case, impl, threads))
        if name == "chunked":
            raise UnavailableError("memory was not measured: no")
        return {OURS: 2.0, "eager": 30.0}[name]

    monkeypatch.setattr(memory, "peak_in_fresh_process", weigh)
    rows = list(measure(replace(TINY_RUN, against=("eager", "chunked"), weigh=True)))
    assert asked == [(name, rows[0].case, "reference", torch.get_num_threads()) for name in (OURS, "eager", "chunked")]
    eager, chunked = rows[0].rivals
    assert rows[0].ratios(eager)["memory"] == 15
    assert chunked.time is not None
    assert chunked.problem == "memory was not measured: no"


def test_our_own_failure_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueRangeError, match="numbaa"):
        list(measure(replace(TINY_RUN, impl="numbaa")))

    def fail(*args: object, **options: object) -> None:
        raise ArithmeticError

    monkeypatch.setattr(losses, "distill_loss", fail)
    with pytest.raises(ArithmeticError):
        list(measure(TINY_RUN))


def test_a_result_says_where_it_comes_from() -> None:
    first = header("kernels", "kdcache bench-kernels", {"threads": 3, "gpu": None})
    assert list(first) == ["theme", "date", "commit", "command", "machine"]
    assert first["machine"]["threads"] == 3
    assert first["machine"]["memory_gib"] > 0
