"""benchmarks/step.py: it measures a step of two streams beside one of a store, and with the teacher in the loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "step.py"


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "kinds"), [([], {"none", "kl", "two", "live"}), (["--streams-only"], {"kl", "two"})])
def test_every_contestant_takes_its_turns(tmp_path: Path, flags: list[str], kinds: set[str]) -> None:
    words = ["--data", "scenes:32x48,train=8,val=2", "--size", "32x48", "--batch-size", "4", "--steps", "1", *flags]
    words += ["--repeats", "3", "--student", "kdcache:tiny", "--teacher", "kdcache:tiny"]
    command = [sys.executable, SCRIPT, *words, "--json", str(tmp_path / "step.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: slower than its bound, which is no matter here
    row = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert row["two_streams_over_one"] > 0
    assert set(row["ms_per_step"]) == kinds
