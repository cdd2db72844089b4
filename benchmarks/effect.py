"""When does distilling help? A queue of short runs on CamVid that goes on where it stopped.

All train on four fifths of train; fold 0 of 5 judges everything that is chosen, val the final comparison alone.

    search     one seed or two of every arm, scored on fold 0
    final      the best arm and the stronger plain one (and --also) with fresh seeds, scored on val, in pairs of a seed

A finished run is a row of the result file and is not repeated, wherever the queue goes on: rows name what decides a
run. Teachers, and stores of what they say, are made where a run needs them and they are missing; on one kind of machine
they come out the same.

    python benchmarks/effect.py --data camvid --out effect-runs --json benchmarks/results/effect-cpu.json

Runs take one thread each, as many side by side as there are cores.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import header, write
from live import paired

HELD_OUT = "0/5"
TEACHER = "--model kdcache:base --batch-size 8 --lr 2e-3 --warmup 100 --class-weights sqrt"
# "base" sees what students see; "sharp" crops at twice to four times the resolution, for looks at --large.
TEACHERS = {
    "base-0": "--seed 0 --iterations {t}",
    "sharp-0": "--seed 0 --iterations {longer} --scale 1:4",
}
STUDENT = "--model kdcache:tiny --batch-size 8 --warmup 100 --class-weights sqrt --gradients-every 0"


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        store: whose pixels and targets; "" trains from the data folder.
        flags: beside those of all students.
        seeds: of the search.
    """

    name: str
    store: str
    flags: str
    seeds: int = 1

    @property
    def plain(self) -> bool:
        return self.store == "" or ("--method none" in self.flags and "--term" not in self.flags)


STORES = {
    "one": "--teacher {base-0}",
    "large": "--teacher {sharp-0} --teacher-size {large} --teacher-grid view --raw-logits --features head",
    "ensemble": "--teacher {sharp-0} --teacher {base-0} --tta flip --teacher-size {large} --teacher-grid view",
    "views": "--teacher {sharp-0} --teacher-size {large} --teacher-grid view --views 16 --view-scale 1:2",
}
SOURCE = " with pixels from the files"
"""After the name of a store: its copy without pixels. Zooms are then as sharp as those of plain from files."""

# In the order in which they are run: what is most likely to matter first.
ARMS = (
    # Plain: about as many trials of the learning rate as the recipe gets of its weights.
    Arm("plain lr 0.004", "one", "--method none --lr 4e-3", 2),
    *(Arm(f"plain lr {lr:g}", "one", f"--method none --lr {lr:g}") for lr in (1e-3, 2e-3, 6e-3, 8e-3)),
    *(Arm(f"plain from files, lr {lr:g}", "", f"--lr {lr:g}") for lr in (2e-3, 3e-3, 4e-3, 6e-3, 8e-3)),
    Arm("kl w 0.3 T 2", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --temperature 2"),
    Arm("kl from an ensemble, balanced", "ensemble", "--method kl --lr 4e-3 --kl-weight 0.3 --class-balance sqrt"),
    Arm("kl from an ensemble", "ensemble", "--method kl --lr 4e-3 --kl-weight 0.3"),
    Arm("kl from an ensemble, fading", "ensemble", "--method kl --lr 4e-3 --kl-weight 1 --distill-schedule fade"),
    Arm("kl balanced", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --class-balance sqrt"),
    Arm("dist", "ensemble", "--method dist --lr 4e-3"),
    Arm("cwd", "large", "--method cwd --lr 4e-3"),
    Arm("dist w 3", "ensemble", "--method none --term dist,weight=3 --lr 4e-3"),
    Arm("dist w 3, lr 0.006", "ensemble", "--method none --term dist,weight=3 --lr 6e-3"),
    Arm("dist, lr 0.006", "ensemble", "--method dist --lr 6e-3"),
    Arm("dist w 3, lr 0.006, pixels from files", "ensemble" + SOURCE,
        "--method none --term dist,weight=3 --lr 6e-3 --data {data}"),
    Arm("kl balanced, lr 0.006, pixels from files", "ensemble" + SOURCE,
        "--method kl --kl-weight 0.3 --class-balance sqrt --lr 6e-3 --data {data}"),
    Arm("dist w 1, lr 0.006, pixels from files", "ensemble" + SOURCE, "--method dist --lr 6e-3 --data {data}"),
    Arm("dist, one teacher", "one", "--method dist --lr 4e-3"),
    Arm("kl w 1 T 2", "one", "--method kl --lr 4e-3 --kl-weight 1 --temperature 2"),
    Arm("dist and cwd", "large", "--method dist+cwd --lr 4e-3"),
    Arm("kl w 0.1 T 2", "one", "--method kl --lr 4e-3 --kl-weight 0.1 --temperature 2"),
    Arm("kl gate correct", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --gate correct"),
    Arm("kl trusted", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --class-trust auto --trust-against {plain}"),
    Arm("kl from a larger rendering", "large", "--method kl --lr 4e-3 --kl-weight 0.3"),
    Arm("at", "large", "--method at --lr 4e-3"),
    Arm("sp", "large", "--method sp --lr 4e-3"),
    Arm("plain, a quarter of the labels", "one", "--method none --lr 4e-3 --limit-samples 0.25"),
    Arm("kl on all, a quarter of the labels", "ensemble", "--method kl --lr 4e-3 --kl-weight 0.3 --limit-labels 0.25"),
    Arm("plain, 16 views", "views", "--method none --augment replay --lr 4e-3"),
    Arm("kl, 16 views", "views", "--method kl --augment replay --lr 4e-3 --kl-weight 0.3"),
    Arm("kl w 0.3 T 1", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --temperature 1"),
    Arm("kl w 0.3 T 4", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --temperature 4"),
    Arm("kl from a larger rendering, balanced", "large",
        "--method kl --lr 4e-3 --kl-weight 0.3 --class-balance sqrt"),
    Arm("kl from an ensemble, w 1", "ensemble", "--method kl --lr 4e-3 --kl-weight 1"),
    Arm("plain, cutmix", "one", "--method none --lr 4e-3 --mix cutmix:0.5"),
    Arm("kl, cutmix", "ensemble", "--method kl --lr 4e-3 --kl-weight 0.3 --mix cutmix:0.5"),
)  # fmt: skip


class Queue:
    """Runs, stores and teachers below a folder, and the rows of the result file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Path(arguments.out)
        self.lock = threading.Lock()
        self.makes = {name: threading.Lock() for name in (*TEACHERS, *STORES, "plain", "copy")}
        self.rows: list[dict[str, Any]] = []
        self.ends = time.monotonic() + 60 * arguments.minutes
        if arguments.json.is_file():
            self.rows = json.loads(arguments.json.read_text())["rows"]

    @property
    def late(self) -> bool:
        return time.monotonic() > self.ends

    def kdcache(self, words: str) -> None:
        """A verb of the command line, with one thread."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "kdcache_cli", *words.split()]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if found.returncode:
            raise SystemExit(f"{' '.join(command)}\n{found.stderr}")

    def side_by_side(self, jobs: list[Any]) -> None:
        with ThreadPoolExecutor(self.arguments.parallel) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()

    # --- teachers and stores -------------------------------------------------------------------------------

    def teacher(self, name: str) -> Path:
        out, a = self.out / "teachers" / name, self.arguments
        words = f"train-teacher --data {a.data} --size {a.size} --out {out} --threads 1 --resume {TEACHER} "
        words += TEACHERS[name].format(t=a.teacher_iterations, longer=3 * a.teacher_iterations // 2)
        with self.makes[name]:  # the first that needs it makes it
            if not (out / "result.json").is_file():
                self.kdcache(f"{words} --fold {HELD_OUT} --val-split train --val-fold {HELD_OUT}")
        return out

    def store(self, name: str) -> Path:
        if name.endswith(SOURCE):
            return self.without_pixels(self.store(name.removesuffix(SOURCE)))
        out, a = self.out / "stores" / f"{name}.zarr", self.arguments
        with self.makes[name]:
            if not (out / "complete.json").is_file():
                teachers = {known: self.teacher(known) for known in TEACHERS if f"{{{known}}}" in STORES[name]}
                flags = STORES[name].format(large=a.large, **teachers)
                self.kdcache(f"build-teacher-cache --data {a.data} --size {a.size} --out {out} --threads 1 {flags}")
        return out

    def without_pixels(self, store: Path) -> Path:
        out = store.with_name(f"{store.stem}-source.zarr")
        with self.makes["copy"]:
            if not (out / "complete.json").is_file():
                self.kdcache(f"copy {store} {out} --pixels source")
        return out

    # --- runs ----------------------------------------------------------------------------------------------

    def search(self) -> None:
        jobs = [(arm, seed) for seed in (0, 1) for arm in ARMS if seed < arm.seeds]
        teachers = [lambda name=name: self.teacher(name) for name in TEACHERS]
        self.side_by_side(teachers + [lambda arm=arm, seed=seed: self.run("search", arm, seed) for arm, seed in jobs])

    def plain_run(self) -> Path:
        """What trust is measured against."""
        with self.makes["plain"]:
            return self.run("search", next(arm for arm in ARMS if arm.name == "plain lr 0.004"), 0, again=True)

    def final(self) -> None:
        also = [next(arm for arm in ARMS if arm.name == name) for name in self.arguments.also]
        arms = list(dict.fromkeys((*self.choose(), *also)))
        print(f"final: {', '.join(arm.name for arm in arms)}")
        seeds = range(100, 100 + self.arguments.seeds)
        jobs = [(arm, seed) for seed in seeds for arm in arms]
        self.side_by_side([lambda arm=arm, seed=seed: self.run("final", arm, seed) for arm, seed in jobs])

    def choose(self) -> tuple[Arm, Arm]:
        """The stronger plain arm and the best other, on all labels, by the mean over the search's seeds."""
        means = {name: scores for name, scores in self.means("search").items() if "quarter" not in name}
        arms = {arm.name: arm for arm in ARMS}
        ranked = sorted((arms[name] for name in means if name in arms), key=lambda arm: -means[arm.name])
        return next(arm for arm in ranked if arm.plain), next(arm for arm in ranked if not arm.plain)

    def run(self, phase: str, arm: Arm, seed: int, again: bool = False) -> Path:
        """Train an arm, unless its row is there."""
        a = self.arguments
        out = self.out / phase / f"{arm.name.replace(' ', '-').replace(',', '')}-{seed}"
        iterations = a.iterations if phase == "search" else a.final_iterations
        key = {"phase": phase, "arm": arm.name, "seed": seed, "iterations": iterations, "size": a.size}
        known = any(key.items() <= row.items() for row in self.rows)
        done = (out / "result.json").is_file() if again else known
        if (done and known) or self.late:
            return out
        flags = arm.flags.format(data=a.data, plain=self.plain_run() if "{plain}" in arm.flags else None)
        if arm.store:
            words = f"train-student --cache {self.store(arm.store)} --val {a.data} "
        else:
            words = f"train-teacher --data {a.data} --size {a.size} "
        words += f"--out {out} --seed {seed} --threads 1 --iterations {iterations} --resume {STUDENT} {flags} "
        words += f"--val-every {iterations} --fold {HELD_OUT} "
        words += f"--val-split train --val-fold {HELD_OUT}" if phase == "search" else ""
        self.kdcache(words)
        result = json.loads((out / "result.json").read_text())
        if not known:
            self.add({**key, "flags": arm.flags, "store": arm.store, "miou": round(100 * result["best_miou"], 3),
                      "seconds": round(result["seconds"])})  # fmt: skip
        return out

    # --- rows ----------------------------------------------------------------------------------------------

    def add(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows.append(row)
            self.save()
        print(f"{row['phase']}: {row['arm']}, seed {row['seed']}: {row['miou']:.2f} ({row['seconds']} s)", flush=True)

    def means(self, phase: str) -> dict[str, float]:
        scores: dict[str, list[float]] = {}
        for row in self.rows:
            if row["phase"] == phase:
                scores.setdefault(row["arm"], []).append(row["miou"])
        return {name: float(np.mean(values)) for name, values in scores.items()}

    def save(self) -> None:
        found: dict[str, Any] = {"search": self.means("search"), "final": self.means("final"), "gains": self.gains()}
        write(self.arguments.json, {**header("effect"), **found, "rows": self.rows})

    def gains(self) -> list[dict[str, Any]]:
        """Every arm of the final comparison over every plain one of it, seed by seed."""
        finals = {(row["arm"], row["seed"]): row["miou"] for row in self.rows if row["phase"] == "final"}
        arms = [arm for arm in ARMS if any(name == arm.name for name, _ in finals)]
        found = []
        for over in (arm.name for arm in arms if arm.plain):
            for name in (arm.name for arm in arms if arm.name != over):
                seeds = [seed for known, seed in finals if known == over and (name, seed) in finals]
                pairs = [finals[name, seed] - finals[over, seed] for seed in sorted(seeds)]
                if pairs:
                    found.append({"arm": name, "over": over, "pairs": len(pairs), **paired(pairs)})
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="effect-runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", default="144x192")
    parser.add_argument("--large", default="288x384", help="what teachers look at")
    parser.add_argument("--teacher-iterations", type=int, default=4000)
    parser.add_argument("--iterations", type=int, default=1500, help="of a run of the search")
    parser.add_argument("--final-iterations", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=8, help="of the final comparison")
    parser.add_argument("--also", action="append", default=[], metavar="ARM", help="further arms of that comparison")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further run after so long")
    parser.add_argument("--phases", default="search,final")
    queue = Queue(parser.parse_args())
    for phase in queue.arguments.phases.split(","):
        getattr(queue, phase)()


if __name__ == "__main__":
    main()
