"""benchmarks/step.py: it measures a step of two streams beside one of a store, and with the teacher in the loop."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kdcache.store import open_cache


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "kinds"), [([], {"none", "kl", "two", "live"}), (["--streams-only"], {"kl", "two"})])
def test_every_contestant_takes_its_turns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[str], ModuleType],
    flags: list[str],
    kinds: set[str],
) -> None:
    words = ["--data", "scenes:32x48,train=8,val=2", "--size", "32x48", "--batch-size", "4", "--steps", "1", *flags]
    words += ["--repeats", "3", "--student", "kdcache:tiny", "--teacher", "kdcache:tiny"]
    step = script("step")
    elsewhere = step.peak_elsewhere

    def peak(store: Path, kind: str) -> float:
        """Measure one kind in a new process, as the script does; to import torch for each takes long."""
        if kind == "live":
            return elsewhere(store, kind)
        arguments = argparse.Namespace(batch_size=4, device="cpu", student="kdcache:tiny", teacher="kdcache:tiny")
        arguments.workers = 0
        return step.peak_mib(open_cache(store), kind, arguments)

    monkeypatch.setattr(step, "peak_elsewhere", peak)
    monkeypatch.setattr(sys, "argv", [step.__file__, *words, "--json", str(tmp_path / "step.json")])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code in (0, 1)  # 1: slower than its bound, which is no matter here
    row = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert row["two_streams_over_one"] > 0
    assert set(row["ms_per_step"]) == kinds
    if not flags:
        assert row["peak_mib"].keys() == kinds
        assert row["peak_mib"]["live"] > 0
