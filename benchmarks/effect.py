"""When does distilling help? A queue of short runs on CamVid that goes on where it stopped.

All train on four fifths of train; fold 0 of 5 judges everything that is chosen, val the final comparison alone.

    search     one seed or two of every arm, scored on fold 0
    final      the best arm and the stronger plain one (and --also) with fresh seeds, scored on val, in pairs of a seed

A finished run is a row of the result file and is not repeated, wherever the queue goes on: rows name what decides a
run. Teachers, and stores of their targets, are made where a run needs them and they are missing; on one kind of machine
they come out the same.

    python benchmarks/effect.py --data camvid --out effect-runs --json benchmarks/results/effect-cpu.json

Runs take one thread each, as many side by side as there are cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from arms import ARMS, HELD_OUT, JUDGED, SOURCE, STORES, STUDENT, TEACHER, TEACHERS, Arm
from common import header, write
from kdcache.data import folds_of, open_split, parse_fold
from kdcache.run_folder import RESULT, Run
from live import paired


class Queue:
    """Runs, stores and teachers below a folder, and the rows of the result file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Path(arguments.out)
        self.lock = threading.Lock()
        self.makes = {name: threading.Lock() for name in (*TEACHERS, *STORES, "plain", "copy", "part")}
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
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")

    def side_by_side(self, jobs: list[Any]) -> None:
        with ThreadPoolExecutor(self.arguments.parallel) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()

    # --- teachers and stores -------------------------------------------------------------------------------

    def teacher(self, name: str) -> Path:
        out, a = self.out / "teachers" / name, self.arguments
        with self.makes[name]:  # the first that needs it makes it
            if not (out / RESULT).is_file():
                t = a.teacher_iterations
                flags = self.filled(TEACHERS[name], shorter=t // 2, t=t, longer=3 * t // 2)
                resume = "--resume" if out.exists() else ""
                self.kdcache(f"train-teacher --size {a.size} --out {out} --threads 1 {resume} {TEACHER} {flags}")
        return out

    def store(self, name: str) -> Path:
        if name.endswith(SOURCE):
            return self.without_pixels(self.store(name.removesuffix(SOURCE)))
        out, a = self.out / "stores" / f"{name.replace(' ', '-')}.zarr", self.arguments
        with self.makes[name]:
            if not (out / "complete.json").is_file():
                teachers = {teacher: self.teacher(teacher) for teacher in TEACHERS if f"{{{teacher}}}" in STORES[name]}
                flags = self.filled(STORES[name], large=a.large, **teachers)
                self.kdcache(f"build-teacher-cache --size {a.size} --out {out} --threads 1 {flags}")
        return out

    def filled(self, text: str, **values: Any) -> str:
        part = self.part() if "{part}" in text else None
        return text.format(data=self.arguments.data, part=part, **values)

    def part(self) -> Path:
        """The part of train that trainings see, as a data set: its folds hold nothing of the fold that judges."""
        out, data = self.out / "part", Path(self.arguments.data)
        with self.makes["part"]:
            if not (out / "classes.txt").is_file():
                fold, folds = parse_fold(HELD_OUT)
                ids = open_split(str(data), "train").ids
                seen = {id for id, of in zip(ids, folds_of(ids, folds), strict=True) if of != fold}
                for kind in ("images", "labels"):
                    for path in sorted((data / kind / "train").iterdir()):
                        if path.stem in seen:
                            (out / kind / "train").mkdir(parents=True, exist_ok=True)
                            shutil.copy(path, out / kind / "train")
                shutil.copy(data / "classes.txt", out)
        return out

    def without_pixels(self, store: Path) -> Path:
        out = store.with_name(f"{store.stem}-source.zarr")
        with self.makes["copy"]:
            if not (out / "complete.json").is_file():
                self.kdcache(f"copy {store} {out} --pixels source")
        return out

    # --- runs ----------------------------------------------------------------------------------------------

    def search(self) -> None:
        arms = [arm for arm in ARMS if arm.name in (self.arguments.only or [arm.name])]
        jobs = [(arm, seed) for seed in (0, 1) for arm in arms if seed < arm.seeds]
        stores = {arm.store.removesuffix(SOURCE) for arm, seed in jobs if not self.is_recorded("search", arm, seed)} - {
            ""
        }
        needed = [name for name in TEACHERS if any(f"{{{name}}}" in STORES[store] for store in stores)]
        teachers = [lambda name=name: self.teacher(name) for name in needed]
        self.side_by_side(teachers + [lambda arm=arm, seed=seed: self.run("search", arm, seed) for arm, seed in jobs])

    def plain_run(self) -> Path:
        """The run that trust is measured against."""
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
        """The stronger plain arm and the best other, one student on all labels, by the mean over the search's seeds."""
        means = self.means("search").get(str(self.arguments.iterations), {})
        means = {name: scores for name, scores in means.items() if "quarter" not in name and "like" not in name}
        arms = {arm.name: arm for arm in ARMS}
        ranked = sorted((arms[name] for name in means if name in arms), key=lambda arm: -means[arm.name])
        return next(arm for arm in ranked if arm.plain), next(arm for arm in ranked if not arm.plain)

    def run(self, phase: str, arm: Arm, seed: int, again: bool = False) -> Path:
        """Train an arm, unless its row is there."""
        a, key, recorded = self.arguments, self.key(phase, arm, seed), self.is_recorded(phase, arm, seed)
        iterations = key["iterations"]
        out = self.out / f"{phase}-{iterations}" / f"{arm.name.replace(' ', '-').replace(',', '')}-{seed}"
        done = (out / RESULT).is_file() if again else recorded
        if (done and recorded) or self.late:
            return out
        flags = arm.flags.format(data=a.data, plain=self.plain_run() if "{plain}" in arm.flags else None)
        if arm.store:
            words = f"train-student --cache {self.store(arm.store)} --val {a.data} "
        else:
            words = f"train-teacher --data {a.data} --size {a.size} "
        words += f"--out {out} --seed {seed} --threads 1 --iterations {iterations} {STUDENT} {flags} "
        words += "--resume " if out.exists() else ""
        words += f"--val-every {iterations} {arm.fold} " + (JUDGED if phase == "search" else "")
        self.kdcache(words)
        result = Run.open(out).result
        if not recorded:
            self.add({**key, "flags": arm.flags, "store": arm.store, "miou": round(100 * result["best_miou"], 3),
                      "seconds": round(result["seconds"])})  # fmt: skip
        return out

    def key(self, phase: str, arm: Arm, seed: int) -> dict[str, Any]:
        """The settings that decide a run."""
        a = self.arguments
        iterations = a.iterations if phase == "search" else a.final_iterations
        return {"phase": phase, "arm": arm.name, "seed": seed, "iterations": iterations, "size": a.size}

    def is_recorded(self, phase: str, arm: Arm, seed: int) -> bool:
        key = self.key(phase, arm, seed)
        return any(key.items() <= row.items() for row in self.rows)

    # --- rows ----------------------------------------------------------------------------------------------

    def add(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows.append(row)
            self.save()
        print(f"{row['phase']}: {row['arm']}, seed {row['seed']}: {row['miou']:.2f} ({row['seconds']} s)", flush=True)

    def means(self, phase: str) -> dict[str, dict[str, float]]:
        """By iterations and arm, over seeds."""
        scores: dict[str, dict[str, list[float]]] = {}
        for row in self.rows:
            if row["phase"] == phase:
                scores.setdefault(str(row["iterations"]), {}).setdefault(row["arm"], []).append(row["miou"])
        return {steps: {name: float(np.mean(of)) for name, of in arms.items()} for steps, arms in scores.items()}

    def save(self) -> None:
        results: dict[str, Any] = {"search": self.means("search"), "final": self.means("final")}
        results["gains"] = [gain for steps in results["final"] for gain in self.gains(int(steps))]
        write(self.arguments.json, {**header("effect"), **results, "rows": self.rows})

    def gains(self, iterations: int) -> list[dict[str, Any]]:
        """Every arm of the final comparison over every plain one of as many iterations, seed by seed."""
        rows = [row for row in self.rows if row["phase"] == "final" and row["iterations"] == iterations]
        finals = {(row["arm"], row["seed"]): row["miou"] for row in rows}
        arms = [arm for arm in ARMS if any(name == arm.name for name, _ in finals)]
        gains = []
        for over in (arm.name for arm in arms if arm.plain):
            for name in (arm.name for arm in arms if arm.name != over):
                seeds = [seed for arm_name, seed in finals if arm_name == over and (name, seed) in finals]
                pairs = [finals[name, seed] - finals[over, seed] for seed in sorted(seeds)]
                if pairs:
                    of = {"arm": name, "over": over, "iterations": iterations, "pairs": len(pairs)}
                    gains.append({**of, **paired(pairs)})
        return gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="effect-runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", default="144x192")
    parser.add_argument("--large", default="288x384", help="the size of teachers' pixels")
    parser.add_argument("--teacher-iterations", type=int, default=4000)
    parser.add_argument("--iterations", type=int, default=1500, help="of a run of the search")
    parser.add_argument("--final-iterations", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=8, help="of the final comparison")
    names = [arm.name for arm in ARMS]
    parser.add_argument(
        "--also", action="append", default=[], choices=names, metavar="ARM", help="further arms of that comparison"
    )
    parser.add_argument("--only", action="append", choices=names, metavar="ARM", help="search these alone")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further run after so long")
    parser.add_argument("--phases", default="search,final")
    queue = Queue(parser.parse_args())
    for phase in queue.arguments.phases.split(","):
        getattr(queue, phase)()


if __name__ == "__main__":
    main()
