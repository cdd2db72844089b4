"""Does a training take more and more memory? And what part of it waits for data?

Trains a student from a store through the command line, without and with resident records, and samples the resident
memory of all its processes. Starting up and, with `--resident ram`, the first epoch may grow; flat means that the
highest of the last quarter of the steps' time is that of the quarter before, within a hundredth.

    python benchmarks/training_memory.py --cache camvid.zarr --json benchmarks/results/training-memory-cpu.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from common import header, write
from kdcache.run_folder import METRICS, Run

MIB = 2**20
FLAT = 1.01


def resident_mib(process: psutil.Process) -> float:
    """The memory of a process and its children, as far as they are still there."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / MIB


def train(cache: str, out: Path, resident: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training; its memory by quarters of the time after the first logged step."""
    words = ["train-student", "--cache", cache, "--model", arguments.student, "--out", str(out)]
    words += ["--resident", resident, "--epochs", str(arguments.epochs), "--log-every", "10"]
    words += ["--workers", str(arguments.workers), "--threads", str(arguments.threads), "--gradients-every", "0"]
    samples: list[tuple[float, float]] = []
    with subprocess.Popen([sys.executable, "-m", "kdcache_cli", *words], stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if (out / METRICS).is_file() and (out / METRICS).stat().st_size:
                samples.append((time.monotonic(), resident_mib(watched)))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    samples = [(when, size) for when, size in samples if size > 0][:-1]
    begin, end = samples[0][0], samples[-1][0]
    quarters: list[list[float]] = [[], [], [], []]
    for when, size in samples:
        quarters[min(3, int(4 * (when - begin) / (end - begin)))].append(size)
    peaks = [round(max(quarter), 1) for quarter in quarters]
    result = Run.open(out).result
    speed = {name: result[name] for name in ("iterations", "images_per_second", "wait_share")}
    return {"resident": resident, "peak_mib_by_quarter": peaks, "flat": peaks[3] <= FLAT * peaks[2], **speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", required=True)
    parser.add_argument("--student", default="kdcache:tiny")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as work:
        for resident in ("off", "ram"):
            runs.append(train(arguments.cache, Path(work, resident), resident, arguments))
            print(json.dumps(runs[-1]))
    if arguments.json is not None:
        write(arguments.json, {**header("training-memory"), "student": arguments.student, "runs": runs})
    sys.exit(0 if all(run["flat"] for run in runs) else 1)


if __name__ == "__main__":
    main()
