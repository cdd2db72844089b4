"""Is one network for two tasks as good as one for each, and what does a stored teacher add? A queue that goes on.

Procedural scenes of 96x128: half of the training images have labels of classes, the others a LiDAR's depth. All arms
read the same views of one store, with equal steps and, of each task, equally many labelled rows a step:

    segmentation   kdcache:tiny on labels of classes
    depth          kdcache:tiny+depth on labels of depth
    both           kdcache:hydra on both
    taught         kdcache:hydra on both, and on the store's classes and depth of every image

Seeds are paired. A finished run is a row of the result file and is not repeated; an interrupted one resumes. The score
is that of the last iteration. The teacher (kdcache:base+depth, on the same labels) and its store are made first.

    python benchmarks/tasks.py --out tasks --json benchmarks/results/tasks-cpu.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import header, write
from effect import interval, kdcache
from kdcache.metrics.cost import measure_cost
from kdcache.models import build_model
from kdcache.run_folder import RESULT, Run

SIZE, CLASSES = (96, 128), 7
DATA = "scenes:96x128,train=2000,val=200,depth=sparse,tasks=halves"
FEW = "scenes:96x128,train=32,val=8,depth=sparse,tasks=halves"
ROWS = 8
"""Rows of a step with labels of a task; a shared network sees twice as many."""
ALL_LABELS = f"--method none --term depth-silog --batch-size {2 * ROWS}"
ZOOM = "--depth-zoom divide"
TEACHER = f"--model kdcache:base+depth {ALL_LABELS} {ZOOM} --lr 2e-3 --warmup 100 --log-every 100 --threads 1"
STORE = f"--views 4 {ZOOM} --threads 1"
STUDENT = "--lr 6e-3 --warmup 100 --gradients-every 0 --log-every 100 --threads 1"
MODELS = {
    "segmentation": "kdcache:tiny",
    "depth": "kdcache:tiny+depth",
    "both": "kdcache:hydra",
    "taught": "kdcache:hydra",
}
ARMS = {
    "segmentation": f"--method none --labels segmentation --batch-size {ROWS}",
    "depth": f"--method none --labels depth --ce-weight 0 --term depth-silog --batch-size {ROWS}",
    "both": ALL_LABELS,
    "taught": f"--method kl --term depth-silog --term depth-silog,reference=teacher --batch-size {2 * ROWS}",
}
SCORES = {"miou": "segmentation", "depth_rmse": "depth"}
"""Score -> the arm of one task that it belongs to."""


class Queue:
    """The rows of the result file, and the runs that they come from."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out, self.json = Path(arguments.out).resolve(), Path(arguments.json)
        self.data = FEW if arguments.few else DATA
        self.iterations, self.teacher_iterations = arguments.iterations, arguments.teacher_iterations
        self.ends = time.monotonic() + 60 * arguments.minutes
        content = json.loads(self.json.read_text()) if self.json.is_file() else {}
        self.rows: list[dict[str, Any]] = content.get("rows", [])
        self.cost: dict[str, Any] = content.get("cost") or cost(arguments.repeats)
        self.teacher: dict[str, Any] = content.get("teacher", {})

    def store(self) -> Path:
        """The teacher's store; both are made where they are not there."""
        run, store, source = self.out / "teacher", self.out / "store.zarr", f"--data {self.data} --size 96x128"
        if not (run / RESULT).is_file():
            self._train(run, f"{source} {TEACHER}", self.teacher_iterations, 0)
        self.teacher = scores(Run.open(run))
        if not (store / "complete.json").is_file():
            kdcache(f"build-teacher-cache --teacher {run} {source} --out {store} {STORE}")
        return store

    def run(self, arm: str, seed: int) -> None:
        """Train an arm and add its row, unless it is there or time is up."""
        key = {"arm": arm, "seed": seed, "iterations": self.iterations}
        if any(key.items() <= row.items() for row in self.rows) or time.monotonic() > self.ends:
            return
        store, flags = self.store(), f"--model {MODELS[arm]} {ARMS[arm]}"
        run = self.out / "runs" / f"{arm}-{self.iterations}-{seed}"
        if not (run / RESULT).is_file():
            self._train(run, f"--cache {store} {flags} {STUDENT}", self.iterations, seed)
        row = {**key, "flags": flags, **scores(Run.open(run))}
        self.rows.append(row)
        result = {"data": self.data, "teacher": self.teacher, "cost": self.cost, "summary": summary(self.rows)}
        write(self.json, {**header("tasks"), **result, "rows": self.rows})
        print(arm, f"seed {seed}", *(f"{name} {row[name]}" for name in SCORES if name in row), flush=True)

    def _train(self, run: Path, flags: str, iterations: int, seed: int) -> None:
        resume = "--resume" if run.exists() else ""
        length = f"--iterations {iterations} --val-every {max(1, iterations // 4)} --seed {seed}"
        kdcache(f"train-student --val {self.data} --out {run} {length} {flags} {resume}")


def scores(run: Run) -> dict[str, Any]:
    """What a row keeps of a run: mIoU in percent, depth's rmse in metres at the end and by iteration, seconds."""
    by_iteration: dict[int, dict[str, float]] = {}
    for line in run.metrics or ():
        if line["kind"] == "validation":
            values = {name: line[name] for name in SCORES if line.get(name) is not None}
            values |= {"miou": 100 * values["miou"]} if "miou" in values else {}
            by_iteration[line["step"]] = {name: round(value, 4) for name, value in values.items()}
    last = by_iteration[max(by_iteration)]
    return {**last, "by_iteration": by_iteration, "seconds": round(run.result["seconds"])}


def cost(repeats: int) -> dict[str, Any]:
    """Multiply-adds and milliseconds of an image for each network, and of the shared one beside the two together."""
    models = {name: MODELS[name] for name in ("segmentation", "depth", "both")}
    costs = {name: measure_cost(build_model(spec, CLASSES), SIZE, repeats=repeats) for name, spec in models.items()}
    macs = {name: own.macs for name, own in costs.items()}
    ms = {name: own.latency.median_ms for name, own in costs.items() if own.latency is not None}
    over = lambda of: round(of["both"] / (of["segmentation"] + of["depth"]), 4)  # noqa: E731
    return {"macs": macs, "median_ms": ms, "macs_over_two": over(macs), "ms_over_two": over(ms)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means by arm, and what the shared networks gain on each single-task one: 95 % intervals over paired seeds.

    Of mIoU the gain is in points; of rmse the change is in percent, below 0 where the shared network is better.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    means: dict[str, Any] = {}
    gains: dict[str, Any] = {}
    for name, single in SCORES.items():
        for arm in (single, "both", "taught"):
            if arm in by_arm:
                means.setdefault(arm, {})[name] = interval([run[name] for run in by_arm[arm].values()])
        for arm, rival in (("both", single), ("taught", single), ("taught", "both")):
            own, theirs = by_arm.get(arm, {}), by_arm.get(rival, {})
            pairs = [(own[seed][name], theirs[seed][name]) for seed in own if seed in theirs]
            if pairs:
                change = [a - b if name == "miou" else 100 * (a / b - 1) for a, b in pairs]
                gains[f"{arm} against {rival}, {name}"] = interval(change)
    return {"means": means, "gains": gains}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="tasks", help="folder of the teacher, the store and the runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--teacher-iterations", type=int, default=3000)
    parser.add_argument("--only", action="append", metavar="ARM", choices=tuple(ARMS), help="these arms alone")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further run after so long")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of each network")
    parser.add_argument("--few", action="store_true", help="a few images: to try the queue")
    arguments = parser.parse_args()
    queue = Queue(arguments)
    for seed in range(arguments.seeds):  # every arm once before any twice
        for arm in arguments.only or ARMS:
            queue.run(arm, seed)


if __name__ == "__main__":
    main()
