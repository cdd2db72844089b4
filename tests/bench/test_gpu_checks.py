"""benchmarks/gpu_checks.py: every kernel is launched, tilings are set and put back, ncu's figures are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quick_interpreter import quick_interpreter
from triton.runtime.interpreter import InterpretedFunction

from kdcache_kernels.gpu import cells

REPORT = """Profiling something
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","us","register/thread"
"0","cells_kernel","1,105.5","168"
"1","tiles_kernel","57",""
"""


def test_the_figures_of_ncu_are_numbers(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    (tmp_path / "ncu.csv").write_text(REPORT)
    script("gpu_checks").read_ncu(tmp_path / "ncu.json", tmp_path / "ncu.csv")
    result = json.loads((tmp_path / "ncu.json").read_text())
    assert result["units"] == {"gpu__time_duration.sum": "us", "launch__registers_per_thread": "register/thread"}
    assert result["launches"] == [
        {"ID": 0, "Kernel Name": "cells_kernel", "gpu__time_duration.sum": 1105.5, "launch__registers_per_thread": 168},
        {"ID": 1, "Kernel Name": "tiles_kernel", "gpu__time_duration.sum": 57},
    ]


def test_a_tiling_holds_within_its_context(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = script("gpu_checks")
    before, launch = (cells.choose_tiling, cells.REGISTERS), cells.launch
    (case,) = checks.cases("1x3x16x16/4", "plain")
    launched = []

    def watched(*arguments: Any, **options: Any) -> None:
        launched.append((arguments[-1].rows, cells.REGISTERS))
        launch(*arguments, **options)

    monkeypatch.setattr(cells, "launch", watched)
    for rows in (3, 40):
        with checks.tiled(rows=rows, registers=152):
            checks.ours(case, checks.make_inputs(case, checks.DEVICE), "triton").step()
    assert launched == [(3, 152), (5, 152)], "4 rows of logits have 5 rows of cells"
    assert (cells.choose_tiling, cells.REGISTERS) == before


@pytest.fixture
def run(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function that runs the program in this process and returns its exit code."""

    def watch(kernel: InterpretedFunction[Any], hook: Callable[..., object]) -> None:
        monkeypatch.setattr(kernel, "pre_run_hooks", [*kernel.pre_run_hooks, hook])

    def program(*words: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["gpu_checks.py", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            script("gpu_checks").main()
        return caught.value.code

    monkeypatch.setattr(InterpretedFunction, "add_pre_run_hook", watch)
    with quick_interpreter():
        yield program
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_every_kernel_is_launched_and_right(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("once", "--of", 301, "--json", tmp_path / "once.json") == 0
    result = json.loads((tmp_path / "once.json").read_text())
    assert result["complete"]
    assert min(result["launches"].values()) > 0
    assert len(result["rows"]) >= 15


def test_a_report_that_is_not_there_fails(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("ncu", tmp_path / "a.csv").startswith(f"Report not found: {tmp_path}/a.csv. Fix: ")
