"""When does distilling help, and how much of it is the teacher?

    E1  controls: labels, losses without a teacher, labels in the teacher's place, the teacher
    E2  teachers: which is strong enough
    E3  plateau: how long plain training goes on gaining
    E4  few labels: teachers and students that have a block of them
    E5  at the plateau: other losses
    E6  final: fresh seeds on val, which nothing was chosen by

A finished run is a row of the result file and is not repeated; an interrupted one resumes. Teachers and stores are made
where a run needs them. The score is that of the last iteration, never that of the best.

    python benchmarks/effect.py --data camvid --out study --json benchmarks/results/study-cpu.json --stages E1,E3
"""

import argparse
import math
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from arms import (
    ARMS,
    BLOCKS,
    COMBINED,
    DATA,
    MORE_BLOCKS,
    QUESTIONS,
    STORES,
    STUDENT,
    TAUGHT,
    TEACHER,
    TEACHERS,
    VIEWS,
    Arm,
    Data,
)
from common import MIX, earlier, header, run, write
from kdcache.analysis.statistics import difference, t_quantile
from kdcache.data import open_split
from kdcache.metrics import Metrics, evaluate_model
from kdcache.models.ensemble import Tta
from kdcache.run_folder import RESULT, Run
from kdcache.teacher import load_teachers

HERE = Path(__file__).parent


class Folders:
    """Data sets, teachers and caches below one folder. Each is made when it is first asked for.

    Attributes:
        ends: the time on the monotonic clock at which running commands are stopped.
    """

    def __init__(self, camvid: Path, out: Path) -> None:
        self.camvid, self.out, self.ends = camvid, out, math.inf
        self._locks: dict[Path, threading.Lock] = {}
        self._lock = threading.Lock()

    def alone(self, path: Path) -> threading.Lock:
        """Return the lock that a thread holds while it makes `path`."""
        with self._lock:
            return self._locks.setdefault(path, threading.Lock())

    def data(self, name: str) -> Path:
        """Return the folder of a data set of `DATA`, made of links to CamVid's files."""
        out = self.out / "data" / name
        with self.alone(out):
            if not (out / "classes.txt").exists():
                link_frames(self.camvid, DATA[name], out)
                (out / "classes.txt").symlink_to(self.camvid / "classes.txt")  # last: a folder with it is complete
        return out

    def teacher(self, name: str, data: str, seed: int = 0) -> Path:
        """Return the run folder of a teacher of `TEACHERS`, trained on `data`."""
        out = self.out / "teachers" / f"{name}-{data}-{seed}"
        with self.alone(out):
            if not (out / RESULT).is_file():
                flags = TEACHERS[name].format(here=HERE)
                resume = "--resume" if out.exists() else ""
                kdcache(f"train-teacher --data {self.data(data)} --out {out} --seed {seed} --threads 1 {TEACHER} "
                        f"{flags} {resume}", ends=self.ends)  # fmt: skip
        return out

    def store(self, name: str, data: str, teacher_data: str) -> Path:
        """Return the cache of `STORES` for the images of `data`."""
        store = STORES[name]
        teacher_data = store.trained_on or teacher_data
        out = self.out / "stores" / f"{name}-{data}-{teacher_data}.zarr"
        with self.alone(out):
            if not (out / "complete.json").is_file():
                teachers = " ".join(f"--teacher {self.teacher(teacher, teacher_data)}" for teacher in store.teachers)
                kdcache(f"build-teacher-cache --data {self.data(data)} --out {out} --threads 1 --views {store.views} "
                        f"{VIEWS} {store.flags} {teachers}", ends=self.ends)  # fmt: skip
        return out


def link_frames(camvid: Path, data: Data, out: Path) -> None:
    """Write the images and labels of a data set as symbolic links: train, and the validation sequence as val."""
    frames = sorted(path.stem for path in (camvid / "images" / "train").iterdir())
    sequence, begin, end = {**BLOCKS, **MORE_BLOCKS}[data.labels] if data.labels else ("", 0, None)
    labelled = set([frame for frame in frames if frame.startswith(sequence)][begin:end])
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            (out / kind / split).mkdir(parents=True, exist_ok=True)
        for path in (camvid / kind / "train").iterdir():
            has_label = path.stem in labelled
            if data.judge and path.stem.startswith(data.judge):
                link(path, out / kind / "val")
            elif not (data.without and path.stem.startswith(data.without)) and (
                has_label or (kind == "images" and not data.labelled_only)
            ):
                link(path, out / kind / "train")
        if not data.judge:
            for path in (camvid / kind / "val").iterdir():
                link(path, out / kind / "val")


def link(path: Path, folder: Path) -> None:
    """Make a symbolic link to a file in a folder. A link with the same name is replaced."""
    (folder / path.name).unlink(missing_ok=True)
    (folder / path.name).symlink_to(path)


def run_name(arm: str, seed: int) -> str:
    """Return the name of the folder of an arm's run."""
    return f"{re.sub('[^a-z0-9.]+', '-', arm.lower())}-{seed}"


def kdcache(words: str, live: str = "", ends: float = math.inf) -> None:
    """Run a command of kdcache with one thread. `live` names a teacher that runs in every step.

    Raises: SystemExit with its output if it fails. TimeoutError if it still runs at `ends` on the monotonic clock. Then
    it is stopped, and the same command can continue it.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    program = [str(HERE / "live_teacher.py"), live] if live else ["-m", "kdcache_cli"]
    command = [sys.executable, *program, *words.split(), "--trust"]  # the teachers' code is pretrained.py
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, errors = process.communicate(timeout=None if math.isinf(ends) else max(0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate()
            raise TimeoutError(words) from None
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output[-2000:]}{errors}")


class Study:
    """The rows of the result file, and the runs that they come from."""

    theme = "effect"

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folders = Folders(Path(arguments.data).resolve(), Path(arguments.out).resolve())
        self.json = Path(arguments.json)
        self.ends = time.monotonic() + 60 * arguments.minutes
        content = earlier(self.json, self.theme, mix=arguments.mix)
        self.rows: list[dict[str, Any]] = content.get("rows", [])
        self.also: list[Any] = content.get("also", [])
        self._lock = threading.Lock()

    def run(self, arm: Arm, seed: int) -> None:
        """Train an arm and add its row, unless the row exists or the time is up."""
        key = {"stage": arm.stage, "arm": arm.name, "seed": seed, "iterations": arm.iterations}
        if any(key.items() <= row.items() for row in self.rows) or time.monotonic() > self.ends:
            return
        out = self.folders.out / "runs" / arm.stage / run_name(arm.name, seed)
        if not (out / RESULT).is_file():
            data = self.folders.data(arm.data)
            source = f"train-teacher --data {data} --size 144x192"
            if arm.store:
                store = self.folders.store(arm.store, arm.data, arm.teacher_data or arm.data)
                source = f"train-student --cache {store} --val {data}"
            resume = "--resume" if out.exists() else ""
            length = f"--seed {seed} --iterations {arm.iterations} --val-every {max(1, arm.iterations // 5)}"
            live = str(self.folders.teacher(arm.live, arm.data)) if arm.live else ""
            flags = arm.flags.format(runs=self.folders.out / "runs")
            kdcache(f"{source} --out {out} {length} {STUDENT} {flags} {resume}", live, self.folders.ends)
        self.add({**key, "store": arm.store, "data": arm.data, "flags": arm.flags, **scores(Run.open(out))})

    def teach(self, stage: str, arm: str, teacher: str, data: str) -> None:
        """Train a teacher and add its row, unless the row exists or the time is up."""
        key = {"stage": stage, "arm": arm, "seed": 0}
        if any(key.items() <= row.items() for row in self.rows) or time.monotonic() > self.ends:
            return
        run = Run.open(self.folders.teacher(teacher, data))
        flags = TEACHERS[teacher].format(here=HERE.name)
        self.add({**key, "iterations": run.result["iterations"], "data": data, "flags": flags, **scores(run)})

    def combine(self, name: str) -> None:
        """Evaluate several teachers (or views of one) as one teacher, and add a row, unless it exists."""
        key = {"stage": "E2", "arm": name, "seed": 0}
        if any(key.items() <= row.items() for row in self.rows) or time.monotonic() > self.ends:
            return
        members, tta = COMBINED[name]
        for member in members:
            self.folders.teacher(member.split("-dev-")[0], "dev")
        split = open_split(str(self.folders.data("dev")), "val")
        origins = [str(self.folders.out / "teachers" / member) for member in members]
        model = load_teachers(origins, split.classes, tta=Tta.parse(tta) if tta else None).model
        metrics = evaluate_model(model, split, Run.open(origins[0].partition("@")[0]).model.size, threads=1)
        self.add(
            {
                **key,
                "data": "dev",
                "flags": " and ".join(members) + (f" --tta {tta}" if tta else ""),
                **percent(metrics),
            }
        )

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write the result file with all rows and their summary. Threads may call it."""
        with self._lock:
            self.rows.append(row)
            write(
                self.json,
                {
                    **header(self.theme, self.also),
                    "summary": summary(self.rows),
                    "differences": differences(self.rows),
                    "rows": self.rows,
                },
            )
        print(f"{row['stage']} {row['arm']}, seed {row['seed']}: {row['miou']:.2f}", flush=True)


def scores(run: Run) -> dict[str, Any]:
    """Return the row of a run: mIoU in percent at the end and by iteration, IoU by class at the end, and seconds."""
    lines = [line for line in run.metrics or () if line["kind"] == "validation"]
    percent = {key: round(100 * lines[-1][key], 3) for key in ("miou", "ema_miou") if key in lines[-1]}
    return {
        **percent,
        "by_iteration": {line["step"]: round(100 * line["miou"], 3) for line in lines},
        "classes": {of["name"]: round(100 * of["iou"], 2) for of in lines[-1]["classes"] if of["iou"] is not None},
        "seconds": round(run.result["seconds"]),
    }


def percent(metrics: Metrics) -> dict[str, Any]:
    """Return mIoU and IoU by class in percent."""
    classes = {name: round(100 * iou, 2) for name, iou in zip(metrics.class_names, metrics.iou, strict=True)}
    return {"miou": round(100 * metrics.miou, 3), "classes": classes}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, 95 % interval over seeds (Student's t) and number of runs, by stage and arm."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        scores.setdefault(row["stage"], {}).setdefault(row["arm"], []).append(row["miou"])
    return {stage: {arm: interval(values) for arm, values in arms.items()} for stage, arms in scores.items()}


def differences(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the differences of arms that answer the study's questions, with 95 % intervals (paired and Welch's)."""
    scores: dict[str, dict[tuple[int], float]] = {}
    for row in rows:
        scores.setdefault(f"{row['stage']} {row['arm']}", {})[(row["seed"],)] = row["miou"]
    return {
        f"{arm} - {baseline}": difference(scores[arm], scores[baseline], baseline).to_json()
        for arm, baseline in QUESTIONS
        if arm in scores and baseline in scores
    }


def interval(values: list[float]) -> dict[str, float | None]:
    """Return the mean and half the width of its 95 % interval over seeds, which is None for one run."""
    n = len(values)
    half = round(float(t_quantile(n - 1) * np.std(values, ddof=1) / n**0.5), 2) if n > 1 else None
    return {"mean": round(float(np.mean(values)), 2), "half": half, "runs": n}


def main() -> None:
    """Train the arms of the chosen stages that have no row yet, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CamVid")
    parser.add_argument("--out", default="study", help="folder of data sets, teachers, stores and runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--stages", default="E1,E2,E3,E4,E5,E6")
    parser.add_argument("--only", action="append", metavar="ARM", help="these arms alone")
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side, of one thread each")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further run after so long")
    parser.add_argument("--mix", action="store_true", help=MIX)
    arguments = parser.parse_args()
    study = Study(arguments)
    is_wanted = lambda name: not arguments.only or name in arguments.only  # noqa: E731
    with ThreadPoolExecutor(arguments.parallel) as pool:
        jobs = []
        for stage in arguments.stages.split(","):
            arms = [arm for arm in ARMS if arm.stage == stage and is_wanted(arm.name)]
            jobs += [
                pool.submit(study.teach, *taught) for taught in TAUGHT if taught[0] == stage and is_wanted(taught[1])
            ]
            if stage == "E2":
                jobs += [pool.submit(study.combine, name) for name in COMBINED if is_wanted(name)]
            for seed in sorted({seed for arm in arms for seed in arm.seeds}):  # every arm once before any twice
                jobs += [pool.submit(study.run, arm, seed) for arm in arms if seed in arm.seeds]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    run(main)
