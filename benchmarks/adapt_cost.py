"""The cost of adaptation steps: a round's student, FixMatch and an EMA teacher, against plain training.

Every training sees 8 rows of the source and 8 of a store of the target, with the same views, jitter and moving average:

    plain     labels of both
    round     labels of the source, the surest half of each class of the store's targets
    fixmatch  labels of the source, pseudo labels of the student's own prediction on the weak view
    ema       labels of the source, pseudo labels of its moving average's prediction on the weak view

They take turns, a short training each; the first steps of each are not counted. The forward on 8 weak views is timed
alone, too.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kdcache.bench.timing import check_repeats
from kdcache.models import build_model
from kdcache.run_folder import Run

ROWS, STEPS, TURNS = 8, 80, 9
TRAINING = (
    "train-student --model kdcache:tiny --size 96x128 --method none --ema 0.99 --jitter randaugment:2,9 --threads 1 "
    "--gradients-every 0 --val-every 1000"
)
LEARNT = {
    "plain": "labels=all",
    "round": 'labels=none,method=none,"term=pseudo,quantile=0.5"',
    "fixmatch": 'labels=none,method=none,"term=consistency,by=student"',
    "ema": 'labels=none,method=none,"term=consistency,by=ema"',
}
"""What each training learns from the target."""


def measure_cost(
    kdcache: Callable[[Sequence[str]], None],
    source: str,
    target: str,
    out: Path,
    *,
    turns: int = TURNS,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Return the milliseconds of a step of each training (medians over turns, and the best), and their ratios.

    Args:
        kdcache: function that runs a command of kdcache.
        source: the data set with labels.
        target: the data set without labels.
        out: the folder of caches.
        turns: number of turns.
        steps: steps in a turn.
    """
    teacher, store = out / "teacher", out / "store.zarr"
    shutil.rmtree(out / "turns", ignore_errors=True)
    source_rows = f"--stream source,data={source}"
    if not (teacher / "result.json").is_file():
        kdcache(f"{TRAINING} {source_rows} --batch-size 8 --iterations {steps // 2} --out {teacher}".split())
    if not (store / "complete.json").is_file():
        build = f"--data {target} --views full --size 96x128 --threads 1"
        kdcache(f"build-teacher-cache --teacher {teacher} {build} --out {store}".split())
    length = f"--batch-size {2 * ROWS} --iterations {steps} --log-every {steps // 4}"
    ms: dict[str, list[float]] = {name: [] for name in LEARNT}
    weak: dict[str, list[float]] = {"fixmatch": [], "ema": []}
    for turn in range(turns):
        first = turn % len(LEARNT)
        for name in (*list(LEARNT)[first:], *list(LEARNT)[:first]):
            run = out / "turns" / f"{name}-{turn}"
            target_rows = f"--stream target,cache={store},share=0.5,augment=warp,scale=1:2,{LEARNT[name]}"
            kdcache(f"{TRAINING} {source_rows} {target_rows} {length} --out {run}".split())
            lines = [line for line in Run.open(run).metrics or () if line["kind"] == "train"]
            ms[name].append(step_ms(lines))
            if name in weak:
                weak[name].append(1000 * lines[-1]["weak_view_seconds"])
    return result(ms, weak, forward_ms())


def step_ms(lines: list[dict[str, Any]]) -> float:
    """Return the milliseconds of a step, without the first steps in the log."""
    seconds = [2 * ROWS * line["step"] / line["images_per_second"] for line in lines]
    return 1000 * (seconds[-1] - seconds[0]) / (lines[-1]["step"] - lines[0]["step"])


def forward_ms(repeats: int = 50) -> float:
    """Return the median milliseconds of a forward pass of 8 images to logits, in eval mode and without gradients."""
    model, x_B3HW = build_model("kdcache:tiny", 7).eval(), torch.zeros(ROWS, 3, 96, 128)
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.perf_counter()
            model(x_B3HW)
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def result(ms: dict[str, list[float]], weak: dict[str, list[float]], forward: float) -> dict[str, Any]:
    """Return milliseconds by training, their ratios to plain training, and the cost of weak views in forward passes.

    `extra` is the step's time beyond a round's step, which has the same rows and a pseudo label for each target row.
    `logged` is `weak_view_seconds` of metrics.jsonl. Both are in milliseconds.

    Raises: RecipeError for too few turns.
    """
    check_repeats(len(ms["plain"]), "turns")
    best = {name: min(times) for name, times in ms.items()}
    median = {name: statistics.median(times) for name, times in ms.items()}
    rows = {}
    for name in ms:
        turns = [times / plain for times, plain in zip(ms[name], ms["plain"], strict=True)]
        rows[name] = {
            "best_ms": best[name],
            "median_ms": median[name],
            "over_plain_best": best[name] / best["plain"],
            "over_plain_median_of_turns": statistics.median(turns),
        }
        if name in weak:
            rows[name] |= {"extra_best": best[name] - best["round"], "extra_median": median[name] - median["round"]}
            rows[name] |= {"logged_best": min(weak[name]), "logged_median": statistics.median(weak[name])}
    rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in rows.items()}
    return {"turns": len(ms["plain"]), "forward_of_8_ms": round(forward, 3), "steps": rounded}
