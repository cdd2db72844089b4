"""Write the study's final weights, which other images can evaluate, and the plot of the README.

    python benchmarks/study_results.py --json benchmarks/results/study-cpu.json --runs study/runs \
        --weights benchmarks/results/weights --plot docs/assets/study.png

Each file of weights names its classes, size and normalisation, so that any split judges it:

    kdcache evaluate kdcache:tiny@benchmarks/results/weights/e6-distilled-all-100.safetensors --data camvid
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter
from safetensors.torch import load_file, save_file

from arms import BLOCKS
from effect import run_name
from kdcache.analysis.statistics import t_quantile
from kdcache.run_folder import Run

FEW_SEEDS, FINAL_SEEDS = (0,), (100, 101, 102)  # 10 MB are the most that results may take
LEAST_SEEDS = 3  # of a band: the interval of two is wider than the plot
TICKS_S = (30, 60, 120, 300, 600, 1200, 2400)
LINES = {
    "distilled: targets from the cache": ("E6", "distilled, all", "#0072B2"),
    "control: the same loss, labels in the teacher's place": ("E6", "control, all", "#E69F00"),
    "labels only: without a teacher": ("E6", "plain, all", "#666666"),
    "live: the teacher runs in every step": ("E6", "live, all", "#CC79A7"),
}
DATA = "Description"
"""The PNG's text that holds what is drawn, as JSON."""


def write_weights(runs: Path, out: Path) -> int:
    """Write the last weights of some runs of E4 and E6 as float16. Return their total bytes."""
    out.mkdir(parents=True, exist_ok=True)
    names = [f"E4/{run_name(f'{arm}, {block}', seed)}" for arm in ("plain", "distilled") for block in BLOCKS
             for seed in FEW_SEEDS]  # fmt: skip
    names += [f"E6/{run_name(f'{arm}, {data}', seed)}" for arm in ("plain", "control", "distilled")
              for data in ("all", "apart") for seed in FINAL_SEEDS]  # fmt: skip
    size = 0
    for name in names:
        size += write_halves(Run.open(runs / name), out / f"{name.lower().replace('/', '-')}.safetensors")
    return size


def write_halves(run: Run, path: Path) -> int:
    """Write the last weights of a run as float16. Return their bytes."""
    tensors = load_file(run.folder / "last.safetensors")
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    save_file(halves, path, metadata={"format": "pt", **run.model.metadata()})
    return path.stat().st_size


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the plotted values of each arm: seeds, seconds of training, mean mIoU and half its 95 % interval.

    The seconds are from an arm's fastest run, because other work slowed the rest. `half` is None for fewer than three
    seeds.
    """
    drawn = {}
    for label, (stage, arm, _) in LINES.items():
        runs = [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]
        if not runs:
            continue
        seconds = min(row["seconds"] for row in runs)
        steps = sorted(map(int, runs[0]["by_iteration"]))
        scores = np.array([[row["by_iteration"][str(step)] for step in steps] for row in runs])
        half = None
        if len(runs) >= LEAST_SEEDS:
            half = (t_quantile(len(runs) - 1) * scores.std(0, ddof=1) / len(runs) ** 0.5).round(3).tolist()
        drawn[label] = {
            "seeds": len(runs),
            "seconds": [round(step / steps[-1] * seconds, 1) for step in steps],
            "miou": scores.mean(0).round(3).tolist(),
            "half": half,
        }
    return drawn


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw mIoU on val against seconds of training, with 95 % intervals over seeds. The PNG also holds the numbers."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    drawn = curves(rows)
    for label, curve in drawn.items():
        x, mean, half = np.array(curve["seconds"]), np.array(curve["miou"]), curve["half"]
        words = f"{label} ({curve['seeds']} seeds{', no band' if half is None else ''})"
        colour = LINES[label][2]
        axes.plot(x, mean, color=colour, marker="o", markersize=3, label=words)
        if half is not None:
            axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(TICKS_S, labels=map(str, TICKS_S))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="wall-clock seconds of training, one CPU core (logarithmic)", ylabel="mIoU on CamVid's val, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata={DATA: json.dumps(drawn)})
    plt.close(figure)


def main() -> None:
    """Write the final weights and the plot, if flags name a file for them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", type=Path, help="folder of the study's runs")
    parser.add_argument("--weights", type=Path, help="folder for the final weights")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    arguments = parser.parse_args()
    if arguments.weights is not None:
        print(f"{arguments.weights}: {write_weights(arguments.runs, arguments.weights) / 1e6:.1f} MB")
    if arguments.plot is not None:
        draw(json.loads(arguments.json.read_text())["rows"], arguments.plot)


if __name__ == "__main__":
    main()
