"""LightlyTrain's `distillationv3` with a cache in the place of its teacher: `scripts/test-clients` runs this."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # a fresh environment compiles all kernels


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `benchmarks/lightly_client.py` measures with a tiny teacher, in a process of its own."""
    out = tmp_path_factory.mktemp("client") / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "lightly_client.py")]
    command += ["--teachers", "tiny", "--count", "16", "--json", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    measured: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["teachers"]["tiny"]
    return measured


def test_a_cache_gives_the_gradient_of_the_live_teacher_in_float16(teacher: dict[str, Any]) -> None:
    assert teacher["error_of_rounded"]["fp16"]["gradient"] < 2e-5
    assert teacher["error_of_live"]["fp16"]["gradient"] < 1e-3


def test_bytes_give_the_gradient_within_half_a_percent(teacher: dict[str, Any]) -> None:
    assert teacher["error_of_live"]["uint8"]["gradient"] < 5e-3


def test_features_of_other_images_would_be_seen(teacher: dict[str, Any]) -> None:
    assert teacher["error_of_live"]["other images"]["gradient"] > 0.5
