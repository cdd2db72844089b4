"""Do two actors of a Ray cluster teach as fast as two processes of torchrun?

Both build the same store with one thread each, in turns, as whole commands in fresh processes. A build is timed twice:
as a whole, with what Ray or torchrun takes to start, and from its first shard to its last, which is what a long build
consists of. Every store is compared with the first, array file by array file.

    python benchmarks/build_engines.py --data camvid --json benchmarks/results/build-engines-cpu.json
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import header, spread, write
from common import run as run_script
from kdcache.bench.timing import check_repeats
from kdcache.store import open_cache

BOUND = 0.9
"""The least throughput of actors, as a share of that of processes."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
CLI = ("-m", "kdcache_cli")
ENGINES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "torchrun": (("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *CLI), ()),
    "ray": (CLI, ("--engine", "ray", "--actors", "2")),
}


def run(words: Sequence[object]) -> float:
    """Run a Python command and return its seconds. Raises: SystemExit with its output if it fails."""
    began = time.perf_counter()
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.perf_counter() - began


def shards_of(store: Path) -> tuple[float, dict[str, str]]:
    """Return the images per second between the first and the last shard, and the digest of every array file."""
    cache = open_cache(store)
    assert cache.ledger is not None
    records = [cache.ledger.record(shard) for shard in range(len(cache.ledger))]
    digests = {key: file.sha256 for record in records for key, file in record.files.items()}
    ended = sorted(max((store / key).stat().st_mtime for key in record.files) for record in records)
    done = cache.manifest.records * (len(records) - 1) / len(records)
    return done / (ended[-1] - ended[0]), digests


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return seconds and digests of the same build under Ray and under torchrun, which take turns."""
    teacher, store = work / "teacher", work / "store.zarr"
    run([*CLI, "train-teacher", "--data", arguments.data, "--model", arguments.model, "--size", arguments.size,
         "--iterations", 2, "--val-every", 2, "--threads", 1, "--out", teacher])  # fmt: skip
    words = ["build-teacher-cache", "--data", arguments.data, "--teacher", teacher, "--out", store, "--threads", 1,
             "--size", arguments.size, "--views", arguments.views,
             "--shard-records", arguments.shard_records]  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    taught: dict[str, list[float]] = {name: [] for name in ENGINES}
    first: dict[str, str] = {}
    for _ in range(arguments.repeats):
        for name, (before, after) in ENGINES.items():
            seconds[name].append(run([*before, *words, *after]))
            images_per_s, digests = shards_of(store)
            taught[name].append(images_per_s)
            first = first or digests
            if digests != first:
                raise SystemExit(f"{name} wrote other files than the first build")
            shutil.rmtree(store)
            print(f"{name}: {seconds[name][-1]:.1f} s, {images_per_s:.2f} images/s between shards", flush=True)
    return {
        "model": arguments.model,
        "size": arguments.size,
        "shards": len({key.rsplit("/", 1)[-1] for key in first}),
        "files": len(first),
        **compare(seconds, taught),
    }


def compare(whole: dict[str, list[float]], taught: dict[str, list[float]]) -> dict[str, Any]:
    """Return seconds, images per second, and the best throughput of Ray's actors divided by the best of torchrun."""
    return {
        "seconds": {name: spread(values) | {"best": min(values)} for name, values in whole.items()},
        "images_per_s": {name: spread(values) | {"best": max(values)} for name, values in taught.items()},
        "ratio": max(taught["ray"]) / max(taught["torchrun"]),
        "ratio_of_whole_commands": min(whole["torchrun"]) / min(whole["ray"]),
    }


def main() -> None:
    """Measure both engines, print their ratio, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="kdcache:base")
    parser.add_argument("--size", default="288x384")
    parser.add_argument("--views", default="4")
    parser.add_argument("--shard-records", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_repeats(arguments.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        row = measure(arguments, Path(scratch))
    print(
        f"ray over torchrun: {row['ratio']:.3f} between shards, {row['ratio_of_whole_commands']:.3f} of whole commands"
    )
    if arguments.json:
        write(arguments.json, {**header("build-engines"), **row, "bound": BOUND, "met": row["ratio"] >= BOUND})
    sys.exit(0 if row["ratio"] >= BOUND else 1)


if __name__ == "__main__":
    run_script(main)
