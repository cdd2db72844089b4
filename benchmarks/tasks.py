"""Is one network for two tasks as good as one for each, and what does a stored teacher add?

Procedural scenes of 96x128: half of the training images have labels of classes, the others a LiDAR's depth. All arms
read the same views of one store, with equal steps and, of each task, equally many labelled rows a step:

    segmentation   kdcache:tiny on labels of classes
    depth          kdcache:tiny+depth on labels of depth
    both           kdcache:hydra on both
    taught         kdcache:hydra on both, and on the store's classes and depth of every image

Seeds are paired. A finished run is a row of the result file and is not repeated; an interrupted one resumes. The score
is that of the last iteration. The store's teacher is made first, of networks of a single task with other seeds, on the
same labels; it predicts the mean over an image and the mirrored one. Its networks see the views that the students will
see, so that a store of these, of whose targets nothing is learnt, comes before them.

    python benchmarks/tasks.py --out tasks --json benchmarks/results/tasks-cpu.json
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import MIX, earlier, header, run, write
from effect import interval, kdcache
from kdcache.bench.timing import Spread, check_repeats
from kdcache.metrics.cost import WARM_UP, count_flops
from kdcache.metrics.timing import no_garbage_collection
from kdcache.models import build_model
from kdcache.run_folder import RESULT, Run
from kdcache.store.ledger import COMPLETE
from kdcache.tasks import DEPTH, SEGMENTATION

SIZE, CLASSES = (96, 128), 7
DATA = "scenes:96x128,train=2000,val=200,depth=sparse,tasks=halves"
FEW = "scenes:96x128,train=32,val=8,depth=sparse,tasks=halves"
ROWS = 8
"""Rows of a step with labels of a task; a shared network sees twice as many."""
SILOG = "--term depth-silog,weight=0.1"
STORE = "--size 96x128 --views 4 --depth-zoom divide --threads 1"
VIEWS = f"--model kdcache:tiny+depth --method none {SILOG} --depth-zoom divide --batch-size {ROWS}"
"""The training, of one step, whose store gives the views."""
TEACHERS = (("segmentation", 100), ("depth", 100), ("depth", 101))
"""Arms and seeds of the networks that are the teacher: of depth it is the mean of two."""
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
    "both": f"--method none {SILOG} --batch-size {2 * ROWS}",
    "taught": f"--method kl {SILOG} {SILOG},reference=teacher --batch-size {2 * ROWS}",
}
SCORES = {"miou": "segmentation", "depth_rmse": "depth"}
"""Score -> the arm of one task that it belongs to."""


class Queue:
    """The rows of the result file, and the runs that they come from."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out, self.json = Path(arguments.out).resolve(), Path(arguments.json)
        self.data = FEW if arguments.few else DATA
        self.iterations = arguments.iterations
        self.ends = time.monotonic() + 60 * arguments.minutes
        content = earlier(self.json, "tasks", mix=arguments.mix)
        self.also: list[Any] = content.get("also", [])
        self.rows: list[dict[str, Any]] = content.get("rows", [])
        self.cost: dict[str, Any] = content.get("cost", {})
        self.teacher: dict[str, Any] = content.get("teacher", {})

    def store(self) -> Path:
        """Return the teacher's cache. If it is missing, it and everything that it depends on are made."""
        store = self.out / "store.zarr"
        runs = {f"{arm} {seed}": self._trained(arm, self.views(), seed) for arm, seed in TEACHERS}
        if not (store / COMPLETE).is_file():
            teachers = " ".join(f"--teacher {run}" for run in runs.values())
            kdcache(f"build-teacher-cache {teachers} --tta flip --data {self.data} --out {store} {STORE}")
        self.teacher = {name: scores(Run.open(run)) for name, run in runs.items()}
        return store

    def views(self) -> Path:
        """Return the cache of the views on which all networks are trained."""
        run, views = self.out / "views", self.out / "views.zarr"
        if not (views / COMPLETE).is_file():
            self._train(run, f"--data {self.data} --size 96x128 {VIEWS} --threads 1", 1, 0)
            kdcache(f"build-teacher-cache --teacher {run} --data {self.data} --out {views} {STORE}")
        return views

    def run(self, arm: str, seed: int) -> None:
        """Train an arm and add its row, unless the row exists or the time is up."""
        key = {"arm": arm, "seed": seed, "iterations": self.iterations}
        if any(key.items() <= row.items() for row in self.rows) or time.monotonic() > self.ends:
            return
        run = self._trained(arm, self.store(), seed)
        row = {**key, "flags": f"--model {MODELS[arm]} {ARMS[arm]}", **scores(Run.open(run)), **_machine()}
        self.rows.append(row)
        self.write()
        print(arm, f"seed {seed}", *(f"{name} {row[name]}" for name in SCORES if name in row), flush=True)

    def write(self) -> None:
        """Write the result file with the existing rows and costs."""
        result = {"data": self.data, "teacher": self.teacher, "cost": self.cost, "summary": summary(self.rows)}
        write(self.json, {**header("tasks", self.also), **result, "rows": self.rows})

    def _trained(self, arm: str, store: Path, seed: int) -> Path:
        """Return the run of an arm, which is trained where it is not there."""
        run = self.out / "runs" / f"{arm}-{self.iterations}-{seed}"  # delete it when its flags change
        if not (run / RESULT).is_file():
            flags = f"--cache {store} --model {MODELS[arm]} {ARMS[arm]} {STUDENT}"
            self._train(run, flags, self.iterations, seed)
        return run

    def _train(self, run: Path, flags: str, iterations: int, seed: int) -> None:
        resume = "--resume" if run.exists() else ""
        length = f"--iterations {iterations} --val-every {max(1, iterations // 4)} --seed {seed}"
        kdcache(f"train-student --val {self.data} --out {run} {length} {flags} {resume}")


def _machine() -> dict[str, str]:
    """Return what a row keeps of the machine, since one table may hold rows of several."""
    machine = header("tasks")["machine"]
    return {"cpu": machine["cpu"], "torch": machine["packages"]["torch"]}


def scores(run: Run) -> dict[str, Any]:
    """Return the row of a run: mIoU in percent, depth's rmse in metres at the end and by iteration, and seconds."""
    by_iteration: dict[int, dict[str, float]] = {}
    for line in run.metrics or ():
        if line["kind"] == "validation":
            values = {name: line[name] for name in SCORES if line.get(name) is not None}
            values |= {"miou": 100 * values["miou"]} if "miou" in values else {}
            by_iteration[line["step"]] = {name: round(value, 4) for name, value in values.items()}
    last = by_iteration[max(by_iteration)]
    return {**last, "by_iteration": by_iteration, "seconds": round(run.result["seconds"])}


def cost(repeats: int) -> dict[str, Any]:
    """Return multiply-adds and milliseconds per image for each network, and the shared one divided by the two together.

    The networks take turns. A call ends with the maps of the network's tasks at the image's size.
    """
    heads = {"segmentation": [SEGMENTATION], "depth": [DEPTH], "both": [SEGMENTATION, DEPTH]}
    models = {name: build_model(MODELS[name], CLASSES).eval().to(memory_format=torch.channels_last) for name in heads}
    image = torch.rand(1, 3, *SIZE).contiguous(memory_format=torch.channels_last)

    def predict(name: str) -> None:
        outputs = models[name](image)
        for head in heads[name]:
            models[name].upsample(outputs.heads[head], SIZE)

    with torch.inference_mode():
        paces = time_calls({name: partial(predict, name) for name in models}, repeats)
    macs = {name: count_flops(model, SIZE) // 2 for name, model in models.items()}
    here = header("tasks")
    return {"date": here["date"], "machine": here["machine"], "repeats": repeats, **costs(macs, paces)}


def time_calls(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, Spread]:
    """Time calls in milliseconds, one of each per turn. The first WARM_UP calls of each do not count."""
    check_repeats(repeats)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with no_garbage_collection():
        for _ in range(WARM_UP + repeats):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                samples[name].append(1e3 * (time.perf_counter() - began))
    return {name: Spread.of(ms[WARM_UP:]) for name, ms in samples.items()}


def costs(macs: dict[str, int], paces: dict[str, Spread]) -> dict[str, Any]:
    """Return multiply-adds and milliseconds by network, and the shared one's divided by the sum of the two."""
    best, median = ({name: getattr(pace, of) for name, pace in paces.items()} for of in ("best", "p50"))
    over = lambda of: round(of["both"] / (of["segmentation"] + of["depth"]), 4)  # noqa: E731
    ratios = {"macs_over_two": over(macs), "best_ms_over_two": over(best), "median_ms_over_two": over(median)}
    return {"macs": macs, "best_ms": best, "median_ms": median, **ratios}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means by arm, and the gains of the shared networks over each single-task one, with 95 % intervals.

    Intervals are over seeds, paired. A gain in mIoU is in points. A change of rmse is in percent, below 0 if the shared
    network is better.
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
            ours, theirs = by_arm.get(arm, {}), by_arm.get(rival, {})
            pairs = [(ours[seed][name], theirs[seed][name]) for seed in ours if seed in theirs]
            if pairs:
                change = [a - b if name == "miou" else 100 * (a / b - 1) for a, b in pairs]
                gains[f"{arm} against {rival}, {name}"] = interval(change)
    return {"means": means, "gains": gains}


def main() -> None:
    """Train the missing rows until the time is up, or measure the networks' cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="tasks", help="folder of the teacher, the store and the runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--only", action="append", metavar="ARM", choices=tuple(ARMS), help="these arms alone")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further run after so long")
    parser.add_argument("--cost", action="store_true", help="measure the networks' cost, and train nothing")
    parser.add_argument("--repeats", type=int, default=1000, help="timed calls of each network")
    parser.add_argument("--few", action="store_true", help="a few images: to try the queue")
    parser.add_argument("--mix", action="store_true", help=MIX)
    arguments = parser.parse_args()
    check_repeats(arguments.repeats)
    queue = Queue(arguments)
    if arguments.cost:
        torch.set_num_threads(1)
        queue.cost = cost(arguments.repeats)
        queue.write()
        return
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):  # every arm once before any twice
        for arm in arguments.only or ARMS:
            queue.run(arm, seed)


if __name__ == "__main__":
    run(main)
