"""benchmarks/steps.py: steps a second after a first step, ratios to eager, and the loss's share of a step's parts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.errors import RecipeError
from kdcache.store import open_cache

CPU = torch.device("cpu")


@pytest.fixture
def steps(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("steps")


@pytest.fixture
def arguments(options) -> Any:
    return options(student="kdcache:tiny", device="cpu", batch_size=3, seconds=0.1, repeats=4)


def test_a_rate_leaves_the_first_step_out(steps, clock, monkeypatch) -> None:
    monkeypatch.setattr(steps, "time", clock)
    ms = iter([5000.0, *[20.0] * 4])
    assert steps.rate(lambda batch: clock.work(next(ms)), None, CPU, 4) == pytest.approx(50)


def test_ratios_are_of_medians_to_eager(steps) -> None:
    rows = [{"step": "eager", "notes": []}, {"step": "compiled", "notes": ["a note"]}]
    found = steps.compare(rows, [[10.0, 20.0, 90.0], [1.0, 30.0, 30.0]])
    assert [row["over_eager"] for row in found] == [1, 1.5]
    assert found[1]["steps_per_s"] == {"p20": 1, "p50": 30, "p80": 30}
    assert steps.compare(rows, [[10.0] * 3, [5.0] * 3])[1]["over_eager"] == 0.5


def test_a_share_is_of_all_parts(steps) -> None:
    found = steps.shares("auto", {"student": 60.0, "loss": 30.0, "optimizer": 10.0})
    assert found == {"impl": "auto", "ms": {"student": 60, "loss": 30, "optimizer": 10}, "loss_share": 0.3}


def test_kinds_are_those_of_the_device(steps) -> None:
    assert steps.kinds(CPU) == ("eager", "compiled")
    assert steps.kinds(torch.device("cuda")) == ("eager", "compiled", "graphed")


def test_the_busy_time_is_per_call_in_milliseconds(steps, monkeypatch) -> None:
    calls: list[str] = []
    events = [SimpleNamespace(self_cpu_time_total=4000.0), SimpleNamespace(self_cpu_time_total=6000.0)]

    class Profile:
        def __init__(self, activities: Any) -> None: ...

        def __enter__(self) -> Any:
            calls.append("begin")
            return SimpleNamespace(key_averages=lambda: events)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(steps, "profile", Profile)
    assert steps.busy_ms(lambda: calls.append("call"), CPU) == pytest.approx(10 / steps.PROFILED)
    assert calls == ["call", "begin", *["call"] * steps.PROFILED]


def test_kinds_of_steps_take_turns_on_one_batch(steps, store, arguments, monkeypatch) -> None:
    monkeypatch.setattr(steps, "kinds", lambda device: ("eager", "compiled"))
    monkeypatch.setattr(steps, "make_step", lambda kind, eager, batch, note: note(f"of {kind}") or kind)
    timed: list[tuple[str, int]] = []

    def rate(step: str, batch: Any, device: Any, count: int) -> float:
        assert batch[0].pixels.shape == (3, 32, 48, 3)
        assert batch[0].targets
        timed.append((step, count))
        return 200.0 if step == "compiled" else 100.0

    monkeypatch.setattr(steps, "rate", rate)
    rows = steps.measure_steps(open_cache(store), arguments)
    assert timed == [("eager", 3), ("compiled", 3), *[("eager", 10), ("compiled", 20)] * 4]
    assert [(row["step"], row["over_eager"], row["notes"]) for row in rows] == [
        ("eager", 1, ["of eager"]),
        ("compiled", 2, ["of compiled"]),
    ]


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_the_parts_are_a_student_its_loss_and_the_optimizer(steps, store, arguments, monkeypatch, impl) -> None:
    made: list[Any] = []
    make = steps.student_step
    monkeypatch.setattr(
        steps, "student_step", lambda *given, **more: made.append((make(*given, **more), more)) or made[-1][0]
    )
    results: list[Any] = []
    monkeypatch.setattr(steps, "busy_ms", lambda part, device: results.append(part()) or float(10 ** len(results)))
    found = steps.measure_parts(open_cache(store), arguments, impl)
    ((eager, more),) = made
    assert more["impl"] == found["impl"] == impl
    assert found["ms"] == {"student": 10, "loss": 100, "optimizer": 1000}
    assert all(parameter.grad is not None for parameter in eager.model.parameters())
    assert results[1].shape == (3, open_cache(store).num_classes, 8, 12), "the gradient of the loss on the logits"
    assert results[1].abs().sum() > 0


def test_too_few_repeats(steps, call) -> None:
    with pytest.raises(RecipeError, match="Too few repeats for a median: 1"):
        call(steps, "--repeats", 1)
