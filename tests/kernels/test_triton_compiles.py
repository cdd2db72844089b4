"""Every Triton kernel compiles for the GPUs at hand nowadays, on machines that have none.

The interpreter, in which the other tests run, takes much that the compiler refuses: types that change in a loop,
constants that are none, a `tl.dot` of the wrong shape. The launches are the package's own; see benchmarks/sass.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sass.py"


@pytest.mark.slow  # two minutes: what tiles becomes is long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability, tmp_path):
    """In a process of its own: TRITON_INTERPRET is set in this one. A warning is an error there too."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(SCRIPT), "--compile-only", "--capability", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"sm_{capability}: compiled" in done.stdout
