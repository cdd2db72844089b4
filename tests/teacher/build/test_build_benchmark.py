"""benchmarks/build.py: it measures builds of data with labels of depth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "build.py"


@pytest.mark.slow
def test_a_build_of_two_heads_is_measured_on_data_with_depth(tmp_path: Path) -> None:
    words = ["--data", "scenes:48x64,train=8,val=2,depth=exact,tasks=halves", "--size", "48x64", "--records", "8"]
    words += ["--repeats", "3", "--heads-only", "kdcache:hydra", "--json", str(tmp_path / "build.json")]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: slower than its bound, which is no matter here
    (row,) = json.loads((tmp_path / "build.json").read_text(encoding="utf-8"))["builds"]
    assert (row["heads"], row["records"]) == (["depth", "segmentation"], 8)
