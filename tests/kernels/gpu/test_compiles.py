"""Every Triton kernel compiles for the GPUs at hand nowadays, on machines that have none.

The interpreter, in which the other tests run, takes much that the compiler refuses: types that change in a loop,
constants that are none, a `tl.dot` of the wrong shape. The launches are the package's own; see benchmarks/sass.py.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compile_cache import compile_cache
from triton.backends.compiler import GPUTarget
from triton_cases import make_problem

from kdcache_kernels.gpu import cells, tiles
from kdcache_kernels.gpu.common import launch_options

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
LARGEST = """
import sys
from functools import partial
sys.path.insert(0, sys.argv[1])
import sass, torch
call = partial(sass.loss.distill_loss, sass.problem(sass.CELLS["any ratio"], torch.float16))
for target in sys.argv[2:]:
    compiled = sass.compile_all(sass.gpu_target(target), iter([("any ratio", call)]))
    print(target, *(f"{one.name}:{one.kernel.metadata.shared}" for one in compiled))
"""
"""What compiles the largest kernel, and those that it needs, for some targets."""
COUNT = """
import collections, json, sys
sys.path.insert(0, sys.argv[1])
import sass, torch, triton
from kdcache_kernels.gpu import loss
kernels = collections.defaultdict(set)
def record(*, key, fn, **_):
    kernels[fn.jit_function.fn.__name__].add(key)
    return True  # nothing is compiled
triton.knobs.runtime.jit_cache_hook = record
sass.compile_instead(sass.gpu_target("90"))
window = sass.empty(sass.BATCH, 4, dtype=torch.float64)
for stride, h, w in (4, 7, 9), (4, 16, 32), (4, 90, 120), (4, 13, 128), (4, 128, 13), (4, 1, 2), (1, 7, 9), (1, 16, 16):
    H, W = h * stride, w * stride
    grid = sass.PackedTarget(sass.empty(sass.BATCH, 21, h, w, dtype=torch.float16), None, None, 21, (H, W))
    labels, gate = (sass.empty(sass.BATCH, H, W, dtype=kind) for kind in (torch.uint8, torch.float32))
    problem = sass.problem(1, torch.float16, student=sass.empty(sass.BATCH, 21, h, w), labels=labels, target=grid,
                           size=(H, W), window=window, pixel_weight=gate)
    loss.distill_loss(problem)
print(json.dumps({name: len(keys) for name, keys in kernels.items()}))
"""


def compile_in_a_process(*words: str) -> str:
    """What a program prints; TRITON_INTERPRET is set in this process. A warning is an error there too.

    Compiled kernels stay on the disk, and Triton compiles those anew whose source changed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_CACHE_DIR": str(compile_cache() / "triton"),
        "PYTHONWARNINGS": "error",
    }
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow  # a minute or two each: what tiles becomes is long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("target", "calls"), [("90", "--compile-only"), ("gfx942", "--brief")])
def test_every_kernel_compiles(target, calls):
    """For one GPU of NVIDIA, with several settings, and for one of AMD.

    On sm_90 a kernel of the loss may start before the one before has ended. Its machine code waits first.
    """
    output = compile_in_a_process(str(BENCHMARKS / "sass.py"), calls, "--capability", target)
    assert f"{target}: compiled" in output
    if target == "90":
        assert int(re.search(r"sm_90: (\d+) wait first", output)[1]) >= 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_largest_kernel_compiles_for_every_generation():
    """NVIDIA's oldest and newest generation, around the one whose kernels are all compiled.

    Without shared memory: its lanes are threads in every block, so no value waits for another thread.
    """
    targets = ["75", "120"]
    lines = compile_in_a_process("-c", LARGEST, str(BENCHMARKS), *targets).splitlines()
    assert [line.split()[0] for line in lines] == targets
    assert all("tiles_kernel:0" in line.split() for line in lines)


def test_a_step_of_another_size_compiles_nothing_anew():
    """By Triton's own cache keys. Of pixels and prepare there is one for sizes that 16 divides and one for others."""
    counts = json.loads(compile_in_a_process("-c", COUNT, str(BENCHMARKS)))
    assert counts.pop("prepare_kernel") <= 8
    assert counts.pop("pixels_kernel") <= 2
    assert counts.pop("geometry_kernel") == 2  # with stride 1, no range is guarded
    assert counts == {"cells_kernel": 1, "tiles_kernel": 1, "totals_kernel": 2}  # with seams of cells, and without


class _Driver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target


@pytest.mark.parametrize(
    ("target", "lanes", "limited"),
    [
        (GPUTarget("cuda", 90, 32), 32, True),
        (GPUTarget("hip", "gfx942", 64), 64, False),
        (GPUTarget("hip", "gfx1100", 32), 32, False),
    ],
    ids=["NVIDIA", "CDNA", "RDNA"],
)
@pytest.mark.parametrize("kernel", [cells, tiles], ids=["cells", "tiles"])
def test_a_program_is_one_warp_and_asks_for_what_the_compiler_knows(kernel, target, lanes, limited, monkeypatch):
    """AMD's compiler raises KeyError at `maxnreg`, and half of a warp of 64 lanes would idle over 32."""
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(target))
    problem = make_problem(4, (16, 16), B=4)
    problem = dataclasses.replace(problem, student=problem.student.to("meta"))
    assert kernel.choose_tiling(problem).lanes == lanes
    options = launch_options(lanes, kernel.REGISTERS, problem.student.device)
    assert options == {"num_warps": 1, **({"maxnreg": kernel.REGISTERS} if limited else {})}
    assert launch_options(4 * lanes, kernel.REGISTERS, problem.student.device)["num_warps"] == 4


@pytest.mark.parametrize(
    ("batch", "grid", "rows"),
    [(16, (128, 128), 6), (8, (128, 128), 3), (16, (72, 96), 4), (16, (96, 96), 5), (1, (64, 64), 1), (1, (1, 2), 1)],
    ids=str,
)
def test_strips_are_short_enough_for_several_warps_of_a_scheduler(batch, grid, rows, monkeypatch):
    """On 132 multiprocessors. Where one strip would do, as in a small image, it has one row of cells."""
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(GPUTarget("cuda", 90, 32)))
    problem = make_problem(4, grid, B=batch)
    problem = dataclasses.replace(problem, student=problem.student.to("meta"))
    assert cells.choose_tiling(problem).rows == rows
