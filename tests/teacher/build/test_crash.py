"""Builds and trainings killed at random moments, by the tool that does it: benchmarks/crash.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from kdcache.teacher import build_cache

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "crash.py"


@pytest.mark.parametrize(
    ("kills", "trainings"), [(3, 1), pytest.param(12, 3, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_kill_never_harms(tmp_path: Path, kills: int, trainings: int) -> None:
    report = tmp_path / "report.json"
    words = ["--kills", kills, "--training-kills", trainings, "--data", "scenes:36x52,train=12,val=2"]
    words += ["--size", "32x48", "--iterations", 16, "--json", report]
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *map(str, words)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert told["failure"] is None
    for part, count in (("builds", kills), ("trainings", trainings)):
        assert len(told[part]["kills"]) == count
        assert told[part]["finished"] >= 1


@pytest.fixture(scope="module")
def crash() -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("crash", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        sys.modules["crash"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
        del sys.modules["crash"]
    return module


def test_what_differs_is_found(crash, split, teacher, options, tmp_path) -> None:
    """In any file, and files that only one has; but for the time of the build."""
    one, other = tmp_path / "one", tmp_path / "other"
    for store in (one, other):
        build_cache(split, teacher, store, options())
        time.sleep(1)  # of which the stamp counts whole ones
    assert (one / "zarr.json").read_bytes() != (other / "zarr.json").read_bytes()
    assert crash.differences(one, other) == []
    for name in ("records/view/c/0", "ledger.jsonl", "complete.json", "samples/zarr.json"):
        content = (other / name).read_bytes()
        (other / name).write_bytes(content[:-9] + b"x" + content[-8:])
        assert crash.differences(one, other) == [name]
        (other / name).write_bytes(content)
    (other / "more").touch()
    (other / "zarr.json").write_bytes((other / "zarr.json").read_bytes().replace(b"tiny", b"base"))
    assert crash.differences(one, other) == ["complete.json", "manifest.json", "more", "zarr.json"]
