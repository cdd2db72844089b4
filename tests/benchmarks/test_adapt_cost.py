"""benchmarks/adapt_cost.py: the first steps are not counted, turns rotate, and ratios are over plain training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kdcache.errors import RecipeError


@pytest.fixture
def cost(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("adapt_cost")


def test_milliseconds_of_a_step_leave_the_first_logged_ones_out(cost) -> None:
    """16 rows a step: 20 steps took 32 s, the next 60 took 3 s."""
    lines = [{"step": 20, "images_per_second": 10.0}, {"step": 80, "images_per_second": 16 * 80 / 35}]
    assert cost.step_ms(lines) == pytest.approx(50)


MS = {
    "plain": [10.0, 20.0, 40.0],
    "round": [11.0, 30.0, 20.0],
    "fixmatch": [15.0, 60.0, 44.0],
    "ema": [16.0, 18.0, 100.0],
}
WEAK = {"fixmatch": [4.0, 3.0, 9.0], "ema": [5.0, 7.0, 6.0]}


def test_a_step_is_compared_with_the_plain_one_of_its_turn(cost) -> None:
    found = cost.result(MS, WEAK, 2.5)
    assert (found["turns"], found["forward_of_8_ms"]) == (3, 2.5)
    assert found["steps"]["round"] == {
        "best_ms": 11,
        "median_ms": 20,
        "over_plain_best": 1.1,
        "over_plain_median_of_turns": 1.1,
    }
    ema = found["steps"]["ema"]
    assert (ema["best_ms"], ema["median_ms"], ema["over_plain_best"]) == (16, 18, 1.6)
    assert ema["over_plain_median_of_turns"] == 1.6, "the median of 1.6, 0.9 and 2.5"
    assert (ema["extra_best"], ema["extra_median"]) == (5, -2), "beyond a round's step, and not clipped"
    assert (ema["logged_best"], ema["logged_median"]) == (5, 6)
    assert found["steps"]["fixmatch"]["over_plain_median_of_turns"] == 1.5


def test_too_few_turns(cost) -> None:
    two = {name: values[:2] for name, values in MS.items()}
    with pytest.raises(RecipeError, match="Too few repeats for a median: 2"):
        cost.result(two, WEAK, 1.0)


def test_trainings_differ_in_what_they_learn_from_the_target_alone(cost, monkeypatch, tmp_path) -> None:
    commands: list[list[str]] = []
    lines = [{"kind": "train", "step": step, "images_per_second": 16.0, "weak_view_seconds": 0.25} for step in (2, 8)]
    monkeypatch.setattr(cost.Run, "open", lambda run: SimpleNamespace(metrics=lines))
    monkeypatch.setattr(cost, "forward_ms", lambda: 1.0)

    def kdcache(words: Sequence[str]) -> None:
        commands.append(list(words))

    found = cost.measure_cost(kdcache, "game", "camvid", tmp_path, turns=4, steps=8)
    teacher, store, *trainings = commands
    assert teacher[0] == "train-student"
    assert store[:3] == ["build-teacher-cache", "--teacher", str(tmp_path / "teacher")]
    names = [words[-1].rsplit("/", 1)[-1] for words in trainings]
    order = list(cost.LEARNT)
    assert names == [f"{name}-{turn}" for turn in range(4) for name in (*order[turn:], *order[:turn])]
    first = {name: words for name, words in zip(names, trainings, strict=True) if name.endswith("-0")}
    common = [[word for word in words[:-1] if not word.startswith("target,")] for words in first.values()]
    assert all(words == common[0] for words in common)
    assert common[0][common[0].index("--batch-size") + 1] == "16"
    assert common[0][common[0].index("--iterations") + 1] == "8"
    for name, words in zip(names, trainings, strict=True):
        (target,) = (word for word in words if word.startswith("target,"))
        assert "share=0.5" in target
        assert target.endswith(cost.LEARNT[name.rpartition("-")[0]])
    assert found["steps"]["plain"]["best_ms"] == pytest.approx(1000)
    assert found["steps"]["ema"]["logged_median"] == 250, "milliseconds"


def test_a_forward_is_of_eight_images_in_milliseconds(cost, clock, monkeypatch) -> None:
    times = iter([9.0, 2.0, 3.0, 4.0, 50.0])
    seen: list[Any] = []

    class Model:
        def eval(self) -> Model:
            return self

        def __call__(self, x: Any) -> None:
            seen.append(tuple(x.shape))
            clock.work(next(times))

    monkeypatch.setattr(cost, "time", clock)
    monkeypatch.setattr(cost, "build_model", lambda spec, classes: Model())
    assert cost.forward_ms(5) == pytest.approx(4)
    assert seen == 5 * [(8, 3, 96, 128)]
