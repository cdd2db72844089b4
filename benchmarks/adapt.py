"""What are images without labels worth, and do rounds over stores reach an online teacher?

Source: procedural scenes in style game. Target: CamVid over the classes that both have (`SHARED`; the rest is void),
96x128. Two stages, each a recipe of `kdcache sweep` whose commands are run one after the other:

    choices  adapt-choices.toml, judged on the sequence 0006R0, which nothing is trained on
    final    adapt.toml, with fresh seeds, judged on CamVid's val, which nothing was chosen by

A finished run is a row of the result file and is not repeated; an interrupted one resumes. The score is that of the
moving average at the last iteration. Seconds are processor time: the wall clock waits for whatever else a machine does.

    python benchmarks/adapt.py --data camvid --out adapt --json benchmarks/results/adapt-cpu.json --stages final
    python benchmarks/adapt.py --data camvid --out adapt --json benchmarks/results/adapt-cpu.json --cost
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image

from adapt_cost import measure_cost
from common import MIX, earlier, header, run, write
from effect import interval
from kdcache.analysis.statistics import difference
from kdcache.bench.timing import LEAST_REPEATS
from kdcache.data import Split, open_split, write_scenes
from kdcache.data.classes import write_classes
from kdcache.data.scenes.street import CLASSES
from kdcache.run_folder import RESULT, Run
from kdcache.sweep import Job, Sweep, plan_sweep, read_recipe
from kdcache.sweep.inputs import is_done
from kdcache.sweep.plan import folder_name
from kdcache_cli.app import app
from kdcache_cli.verbs.sweep import flags_of

RECIPES = {"choices": "adapt-choices.toml", "final": "adapt.toml"}
HEIGHT, WIDTH = 96, 128
SCENES = f"scenes:{HEIGHT}x{WIDTH},train=1000,val=1,style=game"
FEW_SCENES = f"scenes:{HEIGHT}x{WIDTH},train=16,val=1,style=game"
JUDGE = "0006R0"
"""The sequence of CamVid's train that choices are judged on, and that nothing is trained on."""
SHARED = {
    "Sky": "sky",
    "Building": "building",
    "Road": "road",
    "Tree": "vegetation",
    "Pole": "pole",
    "Car": "vehicle",
    "Pedestrian": "pedestrian",
}
"""CamVid's class -> that of the scenes. Pavement, SignSymbol, Fence and Bicyclist are void."""
RESTYLE = Path(__file__).parents[1] / "examples" / "restyle.py"
RESTYLED = "fda-"
"""Begin of the name of a stream of the source restyled by FDA; its reach of frequencies follows."""
FEW = ("student.iterations=4", "student.val-every=4", "student.warmup=0", "seeds=[0]")
VERBS: Any = typer.main.get_command(app)
BASELINE = "source only"
ONLINE = tuple(f"EMA consistency{more}" for more in ("", ", ClassMix, by class", ", ClassMix, after source only"))
VOID = 255


class Stage:
    """A recipe of the study, its data, and the processor seconds of its commands."""

    def __init__(self, name: str, camvid: Path, out: Path, *, few: bool = False) -> None:
        self.out = out / name
        recipe = read_recipe(str(Path(__file__).parent / RECIPES[name]), changes=FEW if few else ())
        self.data = made_data(out / "data", name, camvid, [str(table["name"]) for table in recipe.stream], few=few)
        self.sweep: Sweep = plan_sweep(recipe, None, self.out, flags_of(VERBS), self.data)
        self.jobs = {job.name: job for job in self.sweep.jobs}

    def runs(self) -> Iterator[tuple[str, int, Job]]:
        """Yield arm, seed and training: every arm once before any twice."""
        trainings = {job.done: job for job in self.sweep.jobs}
        for number, seed in enumerate(self.sweep.recipe.seeds):
            for arm, folders in self.sweep.runs.items():
                yield arm, seed, trainings[folders[number] / RESULT]

    def before(self, job: Job) -> list[Job]:
        """Return all jobs that a job depends on, in an order in which they can run."""
        needed = [self.jobs[name] for name in job.needs]
        return list({earlier.name: earlier for need in needed for earlier in (*self.before(need), need)}.values())

    def do(self, job: Job) -> None:
        """Run a job unless it has already run."""
        assert job.done is not None
        if is_done(job):
            return
        began = time.process_time()
        kdcache(job.next_words)
        if not is_done(job):  # a training that is told to stop saves its state and returns
            raise SystemExit(f"{job.name} was interrupted: run the same command again to go on")
        path = self._seconds_file(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(round(time.process_time() - began, 2)))

    def seconds(self, job: Job) -> float:
        """Return the processor seconds of a training's steps, or of a whole command that is not a training."""
        assert job.done is not None
        if job.done.name == RESULT:
            return float(Run.open(job.done.parent).result["cpu_seconds"])
        return float(json.loads(self._seconds_file(job).read_text()))

    def _seconds_file(self, job: Job) -> Path:
        return self.out / "seconds" / f"{folder_name(job.name)}.json"


class Queue:
    """The rows of the result file, and the stages whose runs they come from."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.json: Path = arguments.json
        self.only, self.ends = arguments.only, time.monotonic() + 60 * arguments.minutes
        content = earlier(self.json, "adapt", mix=arguments.mix)
        self.also: list[Any] = content.get("also", [])
        self.rows: list[dict[str, Any]] = content.get("rows", [])
        self.cost: dict[str, Any] = content.get("cost", {})

    def run(self, name: str, stage: Stage) -> None:
        """Train the arms of a stage that do not have a row, and add their rows, until the time is up."""
        for arm, seed, job in stage.runs():
            key = {"stage": name, "arm": arm, "seed": seed}
            if (self.only and arm not in self.only) or any(key.items() <= row.items() for row in self.rows):
                continue
            for step in (*stage.before(job), job):
                if time.monotonic() > self.ends:
                    return
                stage.do(step)
            self.rows.append({**key, **row_of(stage, job)})
            self.write()
            print(name, arm, f"seed {seed}:", self.rows[-1]["miou"], flush=True)

    def write(self) -> None:
        """Write the result file."""
        data = {"source": SCENES, "target": "CamVid, 96x128", "classes": SHARED, "judge_of_choices": JUDGE}
        parts = {"summary": summary(self.rows), "differences": differences(self.rows), "shares": shares(self.rows)}
        write(self.json, {**header("adapt", self.also), "data": data, "cost": self.cost, **parts, "rows": self.rows})


def kdcache(words: Sequence[str]) -> None:
    """Run a command of kdcache in this process. In a new process, imports alone would take a fifth of the time."""
    VERBS(args=list(words), standalone_mode=False)


def made_data(out: Path, stage: str, camvid: Path, streams: list[str], *, few: bool) -> dict[str, str]:
    """Return the data set of every stream by name. Missing data sets are made first."""
    source, target = out / "game", out / stage
    if not (source / "labels" / "val").is_dir():  # which is written last
        write_scenes(source, FEW_SCENES if few else SCENES)
    write_target(camvid, target, JUDGE if stage == "choices" else None)
    for stream in streams:
        if stream.startswith(RESTYLED):  # which keeps the images that are there
            beta = stream.removeprefix(RESTYLED)
            words = f"{source} --like {target} --beta {beta} --out {out / f'{stage}-{stream}'}".split()
            subprocess.run([sys.executable, str(RESTYLE), *words], check=True)
    folders = {"source": str(source), "target": str(target)}
    return {stream: folders.get(stream, f"{source},images={out / f'{stage}-{stream}'}") for stream in streams}


def write_target(camvid: Path, out: Path, judge: str | None) -> None:
    """Write CamVid's frames at the size of the training, with the classes of the scenes.

    `judge` names the training sequence that becomes val. None takes CamVid's own val. Train never has frames of
    `JUDGE`.
    """
    if (out / "classes.txt").exists():
        return
    train, val = (open_split(str(camvid), split) for split in ("train", "val"))
    write_frames(train, out, "train", [name for name in train.ids if not name.startswith(JUDGE)])
    if judge is None:
        write_frames(val, out, "val", list(val.ids))
    else:
        write_frames(train, out, "val", [name for name in train.ids if name.startswith(judge)])
    write_classes(out, CLASSES)  # last: a folder with it is complete


def write_frames(split: Split, out: Path, name: str, ids: list[str]) -> None:
    """Write the frames with some ids, resized to `SIZE`.

    Images are averaged over the pixels of the smaller image, labels take the nearest pixel.
    """
    table = np.full(VOID + 1, VOID, np.uint8)
    for number, of_camvid in enumerate(split.classes.names):
        if of_camvid in SHARED:
            table[number] = CLASSES.names.index(SHARED[of_camvid])
    for kind in ("images", "labels"):
        (out / kind / name).mkdir(parents=True, exist_ok=True)
    for sample in ids:
        number, file = split.ids.index(sample), f"{name}/{Path(sample).name}.png"
        image, label = Image.fromarray(split.image(number)), Image.fromarray(table[split.label(number)])
        image.resize((WIDTH, HEIGHT), Image.Resampling.BOX).save(out / "images" / file)
        label.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST).save(out / "labels" / file)


def row_of(stage: Stage, job: Job) -> dict[str, Any]:
    """Return the row of a run: mIoU and IoU in percent, processor seconds, and shares of confident pixels.

    `chain_seconds` is the sum over the run and everything that it depends on: teachers and caches.
    """
    assert job.done is not None
    run = Run.open(job.done.parent)
    lines = run.metrics or ()
    last = [line for line in lines if line["kind"] == "validation"][-1]
    trained = [line for line in lines if line["kind"] == "train"]
    seconds = stage.seconds(job)
    row: dict[str, Any] = {
        "iterations": run.result["iterations"],
        "miou": round(100 * last["ema_miou"], 2),
        "miou_of_weights": round(100 * last["miou"], 2),
        "classes": {of["name"]: round(100 * of["iou"], 1) for of in last["ema_classes"] if of["iou"] is not None},
        "cpu_seconds": round(seconds, 1),
        "chain_seconds": round(seconds + sum(map(stage.seconds, stage.before(job))), 1),
        "seconds": round(run.result["seconds"], 1),
    }
    for line in trained[-1:]:
        row |= {key: round(value, 4) for key, value in line.items() if "confident" in key or key == "weak_view_seconds"}
    return row


def by_arm(rows: list[dict[str, Any]], stage: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Return rows by arm and seed."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["stage"] == stage:
            arms.setdefault(row["arm"], {})[row["seed"]] = row
    return arms


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mIoU with its 95 % interval over seeds and mean processor seconds, by stage and arm."""
    mean = lambda runs, key: round(float(np.mean([run[key] for run in runs])), 1)  # noqa: E731
    return {
        stage: {
            arm: {
                **interval([run["miou"] for run in runs.values()]),
                **{key: mean(runs.values(), key) for key in ("cpu_seconds", "chain_seconds")},
            }
            for arm, runs in by_arm(rows, stage).items()
        }
        for stage in RECIPES
    }


def differences(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the differences of the final's mIoU with 95 % intervals.

    They are measured from training on the source only, and from online teachers.
    """
    scores = {arm: {(seed,): run["miou"] for seed, run in runs.items()} for arm, runs in by_arm(rows, "final").items()}
    return {
        f"{arm} - {rival}": difference(scores[arm], scores[rival], rival).to_json()
        for rival in (BASELINE, *ONLINE)
        for arm in scores
        if arm != rival and rival in scores and len(scores[arm]) > 1
    }


def shares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each arm's CPU seconds, with all that it depends on, over the CPU seconds of the online teachers."""
    chains = summary(rows)["final"]
    return {
        f"{arm} over {rival}": round(chain["chain_seconds"] / chains[rival]["chain_seconds"], 2)
        for rival in ONLINE
        for arm, chain in chains.items()
        if rival in chains and arm != rival
    }


def main() -> None:
    """Run the chosen stages of the queue until it is empty or the time is up, or measure the cost of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CamVid")
    parser.add_argument("--out", type=Path, default=Path("adapt"), help="folder of data sets, stores and runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--stages", default="final", help="choices, final, or both with a comma between")
    parser.add_argument("--only", action="append", metavar="ARM", help="these arms alone")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further command after so long")
    parser.add_argument("--cost", action="store_true", help="measure steps beside each other, on a machine at rest")
    parser.add_argument("--few", action="store_true", help="a few steps: to try the queue")
    parser.add_argument("--mix", action="store_true", help=MIX)
    arguments = parser.parse_args()
    queue, out = Queue(arguments), arguments.out.resolve()
    if arguments.cost:
        data = Stage("final", arguments.data, out, few=arguments.few).data
        short = {"turns": LEAST_REPEATS, "steps": 8} if arguments.few else {}
        queue.cost = measure_cost(kdcache, data["source"], data["target"], out / "cost", **short)
    else:
        for name in arguments.stages.split(","):
            queue.run(name, Stage(name, arguments.data, out, few=arguments.few))
    queue.write()


if __name__ == "__main__":
    run(main)
