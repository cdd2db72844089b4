"""Compare distillation from a cache with distillation from a live teacher, in otherwise equal trainings.

Pairs of runs share seed, initialisation, pixels and order. One takes its targets from the store (warped with the
pixels), the other runs the teacher on the pixels that the student gets. Reported are the paired difference of mIoU
with its 95 % interval (Student's t), the time of both, what the cached run had reached when the live one was through a
part of its steps, and their peak memory.

    python benchmarks/live.py --data camvid --teacher runs/teacher --cache camvid.zarr --pairs 5 \
        --json benchmarks/results/live-cpu.json
"""

import argparse
import json
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import check_equal, header, write
from common import run as run_script
from kdcache.analysis.statistics import t_quantile
from kdcache.bench.timing import LEAST_REPEATS
from kdcache.data import open_split
from kdcache.run_folder import Run
from kdcache.teacher import load_teacher
from kdcache.training import make_config
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World
from kdcache.training.run.metrics_log import Observer
from live_teacher import LiveStep


def run(arguments: argparse.Namespace, seed: int, live: bool, out: Path) -> None:
    """Run one training in a new process, so its peak memory is measured separately."""
    torch.set_num_threads(arguments.threads)
    config = make_config(
        verb="train-student",
        model=arguments.student,
        cache=arguments.cache,
        val=arguments.data,
        method="kl",
        kl_weight=arguments.kl_weight,
        temperature=arguments.temperature,
        class_weights="sqrt",
        augment=arguments.augment,
        scale=tuple(arguments.scale),
        lr=arguments.lr,
        warmup=100,
        iterations=arguments.iterations,
        val_every=max(1, arguments.iterations // 10),
        gradients_every=0,
        step="eager",
        seed=seed,
        device=arguments.device,
        threads=arguments.threads,
    )
    trainer = make_trainer(config, out, World(), Observer(), resume=out.exists())
    if live:
        teacher = load_teacher(arguments.teacher, open_split(arguments.data, "train").classes)
        trainer.use(LiveStep(trainer.eager, teacher.model))
    trainer.train(resume=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if arguments.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    (out / "peak.json").write_text(json.dumps(round(peak, 1)))


def finished(arguments: argparse.Namespace, seed: int, live: bool) -> dict[str, Any]:
    """Return a run's result. The training runs only if an earlier command has not finished it."""
    out = Path(arguments.out, f"{'live' if live else 'cached'}-{seed}")
    if not (out / "peak.json").is_file():
        process = multiprocessing.get_context("spawn").Process(target=run, args=(arguments, seed, live, out))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
    finished_run = Run.open(out)
    result = finished_run.result
    scores = {line["step"]: 100 * line["miou"] for line in finished_run.metrics or () if line["kind"] == "validation"}
    return {
        "seed": seed,
        "miou": scores[max(scores)],
        "best_miou": 100 * result["best_miou"],
        "by_step": scores,
        "seconds": result["seconds"],
        "peak_mib": json.loads((out / "peak.json").read_text()),
    }


def paired(differences: list[float]) -> dict[str, float]:
    """Return the mean of paired differences and its 95 % interval, which is NaN for a single pair."""
    mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1)) if len(differences) > 1 else np.nan
    half = t_quantile(len(differences) - 1) * spread / len(differences) ** 0.5 if len(differences) > 1 else np.nan
    return {"mean": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3)}


def at_equal_time(cached: dict[str, Any], live: dict[str, Any]) -> float:
    """Return the mIoU of the live run at its last validation within the time that the cached run took."""
    share = min(1.0, cached["seconds"] / live["seconds"])
    steps = [step for step in live["by_step"] if step <= share * max(live["by_step"])]
    return float(live["by_step"][max(steps)]) if steps else 0.0


def compare(pairs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the paired differences of mIoU, at the end and at equal time, and the median ratio of the times.

    Raises: RecipeError for runs that were validated at different iterations.
    """
    for pair in pairs:
        check_equal("iterations", {name: tuple(sorted(run["by_step"])) for name, run in pair.items()})
    ratios = [pair["live"]["seconds"] / pair["cached"]["seconds"] for pair in pairs]
    return {
        "cached_minus_live": paired([pair["cached"]["miou"] - pair["live"]["miou"] for pair in pairs]),
        "at_equal_time": paired([p["cached"]["miou"] - at_equal_time(p["cached"], p["live"]) for p in pairs]),
        "live_over_cached_seconds": round(float(np.median(ratios)), 3) if len(pairs) >= LEAST_REPEATS else None,
    }


def main() -> None:
    """Train pairs of runs, from the cache and with a live teacher, and write their differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--out", default="live-runs", help="folder of the runs; those that are there are kept")
    parser.add_argument("--student", default="kdcache:tiny")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--kl-weight", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--augment", choices=("warp", "replay"), default="warp")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.5, 2.0), help="zoom that warp draws")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pairs = []
    for seed in range(arguments.pairs):
        cached, live = finished(arguments, seed, False), finished(arguments, seed, True)
        pairs.append({"cached": cached, "live": live})
        print(f"seed {seed}: cached {cached['miou']:.2f} in {cached['seconds']:.0f} s, live {live['miou']:.2f} in "
              f"{live['seconds']:.0f} s", flush=True)  # fmt: skip
    results = compare(pairs)
    print(json.dumps(results))
    if arguments.json is not None:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "out")}
        settings |= {name: Path(settings[name]).name for name in ("data", "teacher", "cache")}
        write(arguments.json, {**header("live"), "settings": settings, **results, "pairs": pairs})


if __name__ == "__main__":
    run_script(main)
