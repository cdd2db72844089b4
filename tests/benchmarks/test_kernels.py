"""benchmarks/small.py, choice.py, listing.py, gpu_checks.py: contestants compute the same, and times compare right."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.bench.timing import Spread

# small.py


@pytest.fixture
def small(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("small")


def test_the_best_of_each_step_is_in_microseconds(small, clock, monkeypatch) -> None:
    monkeypatch.setattr(small, "time", clock)
    monkeypatch.setattr(small, "SECONDS", 0.01)
    order: list[str] = []
    ms = {"forward": iter([4.0, 2.0, 3.0, 9.0]), "both": iter([1.0, 5.0, 6.0, 9.0])}

    def step(name: str) -> None:
        order.append(name)
        clock.work(next(ms[name]))

    found = small.best({name: lambda name=name: step(name) for name in ms})
    assert found == pytest.approx({"forward": 2000.0, "both": 1000.0})
    assert order == ["forward", "both"] * (len(order) // 2), "they alternate"


def test_rows_keep_the_least_and_share_the_rival(small) -> None:
    rows: dict[str, Any] = {}
    small.add(rows, "before", {"case": {"forward": 10.0, "both": 40.0, "eager": 100.0}})
    small.add(rows, "after", {"case": {"forward": 8.0, "both": 20.0, "eager": 90.04}})
    small.add(rows, "before", {"case": {"forward": 11.0, "both": 30.0, "eager": 95.0}})
    (row,) = rows.values()
    assert row == {"before_forward": 10, "before_both": 30, "eager": 90.0, "after_forward": 8, "after_both": 20}
    assert small.ratios(row) == {"eager_over_before": 3.0, "eager_over_after": 4.5}
    assert small.ratios({"eager": 10.0, "before_both": 20.0, "after_both": 40.0}) == {
        "eager_over_before": 0.5,
        "eager_over_after": 0.25,
    }


def test_checkouts_with_other_cases_are_not_compared(small) -> None:
    rows = {"case": {"before_both": 1.0}}
    with pytest.raises(SystemExit, match="after has other cases: another, case"):
        small.add(rows, "after", {"another": {"both": 1.0}})


def test_kdcache_and_its_rival_compute_the_same(small, monkeypatch) -> None:
    monkeypatch.setattr(small, "SHAPES", ("1x3x16x16/4", "5x7x1x1/1"))
    monkeypatch.setattr(small, "RELATIONS", ("2x3x16x16/4",))
    monkeypatch.setattr(small, "KEPT", {"5x7x1x1/1": 4})
    found = small.steps()
    assert len(found) == 3
    for steps in found.values():
        assert list(steps) == ["forward", "both", "eager"]
        assert steps["forward"]().dim() == 0
        assert torch.allclose(steps["both"](), steps["eager"](), atol=1e-5)


def test_both_checkouts_are_asked_in_turns_and_warmed_up(small, call, monkeypatch, tmp_path) -> None:
    asked: list[str] = []

    class Worker:
        def __init__(self, command: Any, env: dict[str, str], **_: Any) -> None:
            self.name = env["PYTHONPATH"].split("/kernels")[0].rsplit("/", 1)[-1]
            self.stdin = io.StringIO()
            assert env["OMP_NUM_THREADS"] == "1"
            assert command[-1] == "--worker"
            self.stdout = SimpleNamespace(readline=self.answer)

        def answer(self) -> str:
            asked.append(self.name)
            slow = 2 if self.name == "old" else 1
            return json.dumps({"case": {"forward": 5.0, "both": 10.0 * slow + len(asked), "eager": 50.0}})

        def communicate(self) -> None: ...

    monkeypatch.setattr(small, "subprocess", SimpleNamespace(Popen=Worker, PIPE=None))
    assert call(small, tmp_path / "old", tmp_path / "new", "--json", tmp_path / "a.json") == 0
    assert asked == ["old", "new"] * small.ROUNDS
    row = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["microseconds"]["case"]
    assert (row["before_both"], row["after_both"]) == (21, 12)
    assert row["eager_over_after"] == round(50 / 12, 2)


def test_a_worker_calls_each_step_once_before_it_is_timed(small, monkeypatch, capsys) -> None:
    calls: list[str] = []
    monkeypatch.setattr(small, "steps", lambda: {"case": {"both": lambda: calls.append("both")}})
    monkeypatch.setattr(small, "best", lambda timed: {"both": float(len(calls))})
    monkeypatch.setattr(small.sys, "stdin", io.StringIO("\n\n"))
    small.work()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == 2 * [{"case": {"both": 1.0}}]


# choice.py


@pytest.fixture
def choice(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("choice")


def test_families_step_on_the_same_tensors_by_themselves(choice, monkeypatch) -> None:
    asked: list[str] = []
    loss = choice.distill_loss
    monkeypatch.setattr(choice, "distill_loss", lambda *a, impl, **o: asked.append(impl) or loss(*a, impl=impl, **o))
    for kept in (5, 40):
        gradients = {family: step() for family, step in choice.steps(2, kept, 3, 2).items()}
        assert torch.allclose(gradients["numba"], gradients["torch"], atol=1e-6)
        assert gradients["numba"].abs().max() > 0
    assert asked == ["numba", "torch"] * 2


def test_a_ratio_is_of_best_times_after_a_warm_up(choice, monkeypatch) -> None:
    warmed: list[Any] = []
    paces = {"numba": Spread.of([6.0, 3.0, 9.0]), "torch": Spread.of([12.0, 12.0, 4.0])}
    monkeypatch.setattr(choice, "steps", lambda *of: {"numba": "ours", "torch": "theirs"})
    monkeypatch.setattr(choice.timing, "warm_up", lambda step, device: warmed.append((step, device.type)))
    monkeypatch.setattr(choice.timing, "in_turn", lambda steps, repeats: paces if repeats >= 3 else None)
    assert choice.ratio(1, 10, 4, 1) == 0.75, "numba over torch"
    assert warmed == [("ours", "cpu"), ("theirs", "cpu")]
    assert choice.ratio(10**6, 1000, 32, 4) is None, "nobody chooses there"


def test_the_table_is_by_kind_classes_and_pixels(choice, call, monkeypatch, tmp_path) -> None:
    problems: list[tuple[int, ...]] = []
    monkeypatch.setattr(choice, "ratio", lambda *problem: problems.append(problem) or len(problems) - 1)
    assert call(choice, "--json", tmp_path / "choice.json") == 0
    told = json.loads((tmp_path / "choice.json").read_text(encoding="utf-8"))
    committed = json.loads(
        (choice.Path(choice.__file__).parents[1] / "kernels/kdcache_kernels/plain/choice.json").read_text()
    )
    assert (told["classes"], set(told["kinds"])) == (committed["classes"], set(committed["kinds"]))
    for kind, table in told["kinds"].items():
        assert table["pixels"] == committed["kinds"][kind]["pixels"]
        for classes, row in zip(told["classes"], table["ratios"], strict=True):
            for pixels, place in zip(table["pixels"], row, strict=True):
                images, own, cells, stride = problems[place]
                assert own == classes
                assert pixels == (images if kind == choice.ONE_CELL else (cells * stride) ** 2)
                assert kind in (choice.ONE_CELL, str(stride))


# listing.py, which sass.py reads machine code with

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ACQBULK ;
.L_x_0:
        /*0020*/                   MUFU.EX2 R2, R2 ;
.L_x_1:
        /*0030*/                   FFMA R3, R2, R2, R3 ;
        /*0040*/              @P0  BRA `(.L_x_1) ;
        /*0050*/                   STG.E [R4], R3 ;
        /*0060*/             @!P1  BRA `(.L_x_0) ;
        /*0070*/                   BRA `(.L_x_9) ;
        /*0080*/                   NOP ;
"""


def test_a_disassembly_is_opcodes_and_innermost_loops(script) -> None:
    listing = script("listing")
    opcodes, loops = listing.read_listing(LISTING)
    assert opcodes == ["LDC", "ACQBULK", "MUFU", "FFMA", "BRA", "STG", "BRA", "BRA", "NOP"]
    assert loops == [(3, 4)], "the outer loop has a loop inside, and the last jump goes forward"
    assert listing.before_wait(opcodes) == ["LDC"]
    assert listing.count(opcodes) == {"total": 8, "FMA/ALU": 2, "MUFU": 1, "LDG/STG": 1, "LDC": 1, "branch": 3}
    assert {"STG", "LDG", "ATOM", "RED", "ST"}.isdisjoint(listing.HARMLESS), "memory is touched after the wait"


# gpu_checks.py


@pytest.fixture
def checks(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("gpu_checks")


def test_an_error_is_relative_to_the_largest_value_and_no_number_is_infinite(checks) -> None:
    right = torch.tensor([4.0, -8.0])
    assert checks.relative_error(right, right) == 0
    assert checks.relative_error(torch.tensor([4.0, -6.0]), right) == 0.25
    assert checks.relative_error(torch.tensor([math.nan, -8.0]), right) == math.inf


def test_results_that_differ_between_two_calls_are_infinite(checks) -> None:
    results = iter([torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2) * 1.5])
    assert checks._twice(lambda: next(results)).tolist() == [1, 1]
    assert checks._twice(lambda: next(results)).tolist() == [math.inf] * 2


def test_other_operators_are_held_to_their_bounds(checks, monkeypatch) -> None:
    """Their names and bounds, with the reference in the kernels' place: nothing is compiled."""

    def by_reference(name: str) -> None:
        operator = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda *a, impl, **o: operator(*a, impl="reference", **o))

    for name in ("pack", "densify", "target_argmax_confidence", "distill_denominators", "relation_loss"):
        by_reference(name)
    rows = list(checks.other_operators(5, 3))
    assert {name: bound for name, _, bound in rows} == {
        "pack": 1e-3, "densify": 1e-6, "confidence": 1e-3, "denominators": 1e-6, "relations": 1e-4,
        "relations through windows": 1e-4, "relations of another size": 1e-4,
    }  # fmt: skip
    assert all(error <= bound for _, error, bound in rows)


def test_exponentials_are_per_second(checks, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(checks.timing, "warm_up", lambda step, device: None)
    monkeypatch.setattr(checks, "time_step", lambda step: Spread.of([4.0, 2.0, 8.0]))
    assert checks.ceilings(tmp_path / "a.json") == 0
    told = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    programs = (
        1 if not torch.cuda.is_available() else told["exps_measured"] * 2e-3 / checks.EXP_BLOCK / checks.EXP_ROUNDS
    )
    assert told["exps_measured"] == pytest.approx(programs * checks.EXP_BLOCK * checks.EXP_ROUNDS / 2e-3)


def test_the_best_tiling_is_the_one_of_the_least_median(checks, monkeypatch, tmp_path, capsys) -> None:
    paces = iter(
        [Spread.of([9.0, 9.0, 9.0]), Spread.of([1.0, 8.0, 8.0]), *(Spread.of([7.0, 7, 7 + n]) for n in range(9))]
    )
    stepped: list[Any] = []
    contestant = SimpleNamespace(step=lambda: stepped.append(None))
    monkeypatch.setattr(checks, "ours", lambda case, inputs, impl: contestant)
    monkeypatch.setattr(checks, "time_step", lambda step: next(paces))
    assert checks.tune(tmp_path / "a.json", "1x3x16x16/4", "plain") == 0
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["ms"], row["best_ms"]) for row in rows[:3]] == [(9, 9), (8, 1), (7, 7)]
    assert len(stepped) == len(rows), "each is called before it is timed"
    assert f"7.0000 ms at {rows[2]['rows']} rows, {rows[2]['registers']} registers" in capsys.readouterr().out


def test_one_of_so_many_points_is_taken(checks) -> None:
    settings = checks.Few(checks.torch.device("cpu"), of=301)
    every = list(checks.CheckSettings(checks.torch.device("cpu")).points())
    assert list(settings.points()) == every[::301]
