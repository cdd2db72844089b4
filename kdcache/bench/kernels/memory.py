"""Peak memory of one step above its inputs, including the gradient.

CUDA: the allocator counts. CPU: the peak of the resident set, in a fresh process per contestant (the allocator keeps
what an earlier contestant has freed), in MiB above the resident set before the step. A step on a tiny shape comes
first, so loading code does not count. Memory that a contestant keeps for later calls does count, because the weighed
step is the first at its shape. torch.compile is the exception: it compiles per shape, so a step at that shape comes
first.

The peak is `VmHWM` after a reset through `/proc/self/clear_refs`: exact, and without a sampling thread. Only Linux has
it.
"""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from kdcache.bench.kernels.inputs import make_inputs
from kdcache.bench.kernels.rivals import UnavailableError, prepare
from kdcache.bench.kernels.shapes import Case, Shape

MIB = 2**20
_WEIGH = "import sys; from kdcache.bench.kernels.memory import weigh; weigh(sys.argv[1])"


def peak_on_device(step: Callable[[], Any]) -> float:
    """Run a step, and return its peak memory on the current CUDA device, in MiB.

    Memory that was allocated before the step does not count.
    """
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def peak_in_process(step: Callable[[], Any]) -> float:
    """Run a step, and return its peak resident memory in this process, in MiB.

    Memory that was resident before the step does not count.

    Raises: OSError if the system cannot reset the peak. Only Linux can.
    """
    gc.collect()
    _give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident_kib("VmRSS")
    step()
    return (_resident_kib("VmHWM") - before) / 1024


def peak_in_fresh_process(name: str, case: Case, impl: str, threads: int) -> float:
    """Measure the peak memory of a contestant's step in a new process, in MiB above the memory before the step.

    Args:
        name: the contestant, "kdcache" or a name of `rivals.RIVALS`, such as "eager".
        case: the case of the benchmark.
        impl: implementation of kdcache's loss.
        threads: number of torch's threads.
    Raises: UnavailableError with one line that says why there is no result.
    """
    request = json.dumps({"name": name, "case": asdict(case), "impl": impl, "threads": threads})
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", _WEIGH, request],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == -signal.SIGKILL:
        raise UnavailableError("out of memory")
    if done.returncode:
        # The error's own line: what is indented below it belongs to it.
        lines = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]
        raise UnavailableError(f"memory was not measured: {lines[-1] if lines else done.returncode}")
    return float(done.stdout.strip().splitlines()[-1])


def weigh(request: str) -> None:
    """Run one step of a contestant in this process, and print its peak memory in MiB as the last line.

    `request` is a JSON object with the contestant's `name`, the `case`, the implementation `impl` of kdcache's loss,
    and the number of `threads`. A step on a tiny shape runs first, so that loading code does not count.
    """
    words = json.loads(request)
    case = Case(**{**words["case"], "shape": Shape(**words["case"]["shape"])})
    name, impl, cpu = words["name"], words["impl"], torch.device("cpu")
    torch.set_num_threads(words["threads"])
    tiny = case.tiny()
    prepare(name, tiny, make_inputs(tiny, cpu), impl).step()
    contestant = prepare(name, case, make_inputs(case, cpu), impl)
    if name.startswith("compile"):
        contestant.step()
    print(peak_in_process(contestant.step))


def available_bytes() -> int:
    """Return the bytes of memory that are available to processes of this machine."""
    return int(psutil.virtual_memory().available)


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def _give_back_freed_memory() -> None:
    """Let glibc return free memory, because a step that reuses old pages would seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
