"""Do two checkouts train the same students, to the bit?

A refactoring changes no weight. BEFORE makes two small stores of procedural scenes. Then both checkouts train the same
cases, one after the other, and their weights and logged losses are compared bit by bit. Digests are not kept: they
depend on the machine and its libraries, so both sides run in one sitting. Exits with 1 on any difference, and on a
case that one of them cannot train.

A change of what computes a loss, and not of the loss, moves its last bits. `--within` names how far the loss of a step
may differ, relatively, and prints the part or gradient that differs most. Both sides then start from a student of
BEFORE and keep its weights: training makes ten times as much of a rounding in one to four steps. Each step has another
batch.

    python benchmarks/identical.py ../before .
    python benchmarks/identical.py ../before . --only 'kl*' dist/plain --steps 50
    python benchmarks/identical.py ../before . --steps 8 --within 1e-6

A case is named by its method and a variant: `kl/mix`.
"""

import argparse
import fnmatch
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SCENES = "scenes:48x64,train=24,val=4"
TEACHER = "--model kdcache:tiny --size 48x64 --iterations 60 --val-every 60 --gradients-every 0"
STORES = {
    "dense.zarr": "--views 2 --view-scale 0.5:2 --statistics at:head --features head --raw-logits --shard-records 16",
    "sparse.zarr": "--views full --top-k 3 --pixels source",
}
COMMON = "--model kdcache:tiny --batch-size 8 --log-every 1 --gradients-every 40 --no-flip --device cpu"
STUDENT = "--resident off"
DENSE = "--cache dense.zarr"
"""The cache of a case that names none. A second cache would be joined to it."""
STARTED = "--iterations 60 --val-every 60 --method kl --out started"
STILL = "--init started/last.safetensors --lr 1e-12 --gradients-every 1"
"""Settings for `--within`: its steps move no weight and log every norm."""
TIMES = ("images_per_second", "wait_share", "weak_view_seconds", "seconds")
PROCESSES = 2

METHODS = ("none", "kl", "dist", "kl+at")
VARIANTS = {
    "plain": "",
    "mix": "--mix cutmix",
    "accumulate": "--accumulate 2",
    "processes": "",
}
IMPOSSIBLE = ("dist/mix", "kl+at/mix", "dist/accumulate")
"""Refused by the settings: these terms follow no pasted pixels, or compare a whole batch."""
STREAMS = f'--stream taught,method=kl,weight=0.7 --stream labelled,"data={SCENES}",method=none'
FURTHER = {
    "kl/mix+accumulate": "--method kl --mix classmix:0.7 --accumulate 2",
    "kl/mix+processes": "--method kl --mix cutmix",
    "kl+at/accumulate+processes": "--method kl+at --accumulate 2",
    "kl/gate": "--method kl --gate correct --class-balance sqrt",
    "kl+pseudo+at/gate": "--method kl+pseudo+at --gate confidence:0.5 --no-distill-void",
    "kl+dist+dkd+cwd/gate": "--method kl+dist+dkd+cwd --gate correct --class-balance median",
    "kl+hint+cosine+sp/gate": "--method kl+hint+cosine+sp --gate confidence:0.5",
    "kl+pseudo+hint/gate+accumulate": "--method kl+pseudo+hint --gate confidence:0.5 --accumulate 2",
    "kl+pseudo+cwd/gate+processes": "--method kl+pseudo+cwd --gate confidence:0.5",
    "kl/replay": "--method kl --augment replay",
    "kl+at/replay+accumulate": "--method kl+at --augment replay --accumulate 2",
    "kl/replay+mix": "--method kl --augment replay --mix cutmix --no-distill-void",
    "kl/fade+labels": "--method kl --teacher labels --distill-schedule fade --limit-labels 8",
    "kl+at/ram": "--method kl+at --resident ram",
    "kl/threads": "--method kl --workers 2",
    "kl/sparse+source": f"--method kl --cache sparse.zarr --data {SCENES} --workers 1",
    "teacher/mix": f"--data {SCENES} --size 48x64 --mix classmix",
    "kl/compiled": "--method kl --step compiled",
    "streams/plain": STREAMS,
    "streams/accumulate": f"{STREAMS} --accumulate 2",
    "streams/processes": STREAMS,
    "streams/paste": f"{STREAMS},paste=classmix,paste-from=taught",
}


def cases() -> dict[str, str]:
    """Return the flags of train-student for each case, by its name."""
    grid = {f"{method}/{name}": f"--method {method} {flags}" for method in METHODS for name, flags in VARIANTS.items()}
    return {name: flags for name, flags in (grid | FURTHER).items() if name not in IMPOSSIBLE}


def command(checkout: Path, words: Sequence[str], folder: Path, processes: int = 1) -> None:
    """Run the kdcache of a checkout, with one thread in each process. Raises: CalledProcessError."""
    paths = [str(checkout / part) for part in ("", "kernels", "cli")]
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "NUMBA")}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = [sys.executable, *(launch if processes > 1 else []), "-m", "kdcache_cli", *words]
    # From a folder that holds no package: `-m` looks there first.
    subprocess.run(
        start,
        check=True,
        cwd=folder,
        env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def make_stores(checkout: Path, folder: Path) -> None:
    """Make two caches of a teacher that has learnt a little. Some views of the dense one reach beyond their image."""
    command(checkout, ["train-teacher", "--data", SCENES, *TEACHER.split(), "--out", "teacher"], folder)
    for name, flags in STORES.items():
        words = ["build-teacher-cache", "--data", SCENES, "--teacher", "teacher", *flags.split(), "--out", name]
        command(checkout, words, folder)


def train(checkout: Path, case: str, steps: int, run: Path, more: str = "") -> None:
    """Train a case into the folder `run`, next to the caches. If a flag is given twice, the last one counts."""
    flags = cases()[case]
    cache = "" if "--cache" in flags else DENSE
    verb = ["train-teacher"] if case.startswith("teacher/") else ["train-student", *STUDENT.split(), *cache.split()]
    length = ["--iterations", str(steps), "--val-every", str(steps)]
    words = [*verb, *COMMON.split(), *length, *flags.split(), *more.split(), "--out", run.name]
    command(checkout, words, run.parent, PROCESSES if "processes" in case else 1)


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def differences(before: Path, after: Path) -> list[str]:
    """Return the differences between two runs in words, or an empty list if all bits are equal."""
    weights = [load_file(run / "last.safetensors") for run in (before, after)]
    names = weights[0].keys() | weights[1].keys()
    other = [name for name in sorted(names) if not same_bits(weights[0].get(name), weights[1].get(name))]
    lines = [logged(run) for run in (before, after)]
    pairs = zip(*lines, strict=False)
    first = next((a for a, b in pairs if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True)), None)
    texts = [f"{len(other)} of {len(names)} tensors, {other[0]} first"] if other else []
    if first is not None:
        texts.append(f"{first['kind']} line of step {first['step']}")
    elif len(lines[0]) != len(lines[1]):
        texts.append(f"{len(lines[0])} and {len(lines[1])} logged lines")
    return texts


def largest_differences(before: Path, after: Path) -> dict[str, float]:
    """Return the largest relative difference over the steps for each logged value: losses and norms of gradients.

    It is infinite if the two runs did not log the same steps and values.
    """
    lines = [[line for line in logged(run) if line["kind"] in ("train", "gradients")] for run in (before, after)]
    if [list(line) for line in lines[0]] != [list(line) for line in lines[1]]:
        return {"loss": math.inf}
    found: dict[str, float] = {}
    for a, b in zip(*lines, strict=True):
        for name, value in a.items():
            if isinstance(value, float):
                key = name if a["kind"] == "train" else f"gradient of {name}"
                found[key] = max(found.get(key, 0.0), relative_difference(value, b[name]))
    return found


def relative_difference(a: float, b: float) -> float:
    """Return |a - b| relative to the larger one. It is infinite if only one is a number, and 0 if neither is."""
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return abs(a - b) / max(abs(a), abs(b), sys.float_info.min)


def same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Return whether two tensors have the same shape, dtype and bits. NaN equals NaN. None equals no tensor."""
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def compare(case: str, folder: Path, arguments: argparse.Namespace) -> tuple[str, bool]:
    """Train a case in both checkouts. Return the verdict in words, and whether it fails."""
    runs = []
    for side in ("before", "after"):
        runs.append(folder / f"{case.replace('/', '-')}-{side}")
        try:
            train(getattr(arguments, side), case, arguments.steps, runs[-1], STILL if arguments.within else "")
        except subprocess.CalledProcessError as error:
            return f"{side} does not train it:\n{error.stdout[-1500:]}", True
    text = "; ".join(differences(*runs))
    if not text or not arguments.within:
        return text or "identical", bool(text)
    found = largest_differences(*runs)
    worst = max(found, key=lambda name: found[name])
    return f"loss within {found['loss']:.1e}, {worst} {found[worst]:.1e}", not found["loss"] <= arguments.within


def main() -> None:
    """Train every case with both checkouts, print the differences, and exit with 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=lambda text: Path(text).resolve())
    parser.add_argument("after", type=lambda text: Path(text).resolve())
    parser.add_argument("--only", "--cases", nargs="+", default=["*"], metavar="PATTERN", help="of cases")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--within", type=float, default=0.0, help="relative difference of a loss that may pass")
    parser.add_argument("--list", action="store_true", help="name the cases, train nothing")
    arguments = parser.parse_args()
    wanted = [case for case in cases() if any(fnmatch.fnmatch(case, pattern) for pattern in arguments.only)]
    if arguments.list or not wanted:
        print("\n".join(wanted or cases()))
        sys.exit(not wanted)
    failed, same = 0, 0
    with tempfile.TemporaryDirectory() as name:
        make_stores(arguments.before, Path(name))
        if arguments.within:
            words = ["train-student", *STUDENT.split(), *DENSE.split(), *COMMON.split(), *STARTED.split()]
            command(arguments.before, words, Path(name))
        for case in wanted:
            began = time.perf_counter()
            text, fails = compare(case, Path(name), arguments)
            failed, same = failed + fails, same + (text == "identical")
            print(f"{case:32s} {time.perf_counter() - began:5.0f} s  {text}", flush=True)
    print(f"{same} of {len(wanted)} cases identical after {arguments.steps} steps, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
