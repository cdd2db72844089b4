"""Intervals over images for the weights that the study has kept, next to its intervals over seeds.

An interval over seeds is about other trainings on the very images that judge. These draw the images anew, 10,000 times,
for the runs that there are: each image by itself, and in stretches of ten, since frames of a video are alike.

    python benchmarks/study_images.py --data camvid --out study --json benchmarks/results/study-images-cpu.json
    python benchmarks/study_images.py --data camvid --few --json benchmarks/results/few-labels-images-cpu.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import BLOCKS
from common import RESULTS, header, run, write
from effect import Folders, run_name
from few_labels import SEEDS
from kdcache.analysis.statistics import Blocks, resample
from kdcache.data import Split, open_split
from kdcache.metrics import Metrics, evaluate_model
from kdcache.teacher import load_teacher
from study_results import FEW_SEEDS, FINAL_SEEDS

WEIGHTS = RESULTS / "weights"
SIZE = (144, 192)
STRETCH = 10  # images in a row
SPANS = {"images": 1, f"stretches of {STRETCH} images": STRETCH}


def judge(name: str, split: Split) -> Metrics:
    """Return the metrics of a run's weights, such as `e6-plain-all-100`, with the counts of every image."""
    model = load_teacher(f"kdcache:tiny@{WEIGHTS / name}.safetensors", split.classes).model
    return evaluate_model(model, split, SIZE, threads=1)


def row(stage: str, arms: tuple[str, str], seeds: Sequence[int], split: Split) -> dict[str, Any]:
    """Return the difference of two arms in points of mIoU, as means over seeds, with 95 % intervals over images."""
    ours, theirs = ([judge(f"{stage.lower()}-{run_name(arm, seed)}", split) for seed in seeds] for arm in arms)
    mean = sum(our_run.miou - their_run.miou for our_run, their_run in zip(ours, theirs, strict=True)) / len(seeds)
    images = [[metrics.images for metrics in side if metrics.images is not None] for side in (ours, theirs)]
    spans = {}
    for over, length in SPANS.items():
        blocks = Blocks.of({sample: str(number // length) for number, sample in enumerate(sorted(split.ids))}, over)
        drawn = resample(*images, blocks)
        spans[over] = {"blocks": drawn.count, "low": round(100 * drawn.low, 2), "high": round(100 * drawn.high, 2)}
    return {
        "stage": stage,
        "arm": arms[0],
        "to": arms[1],
        "seeds": list(seeds),
        "points": round(100 * mean, 2),
        **spans,
    }


def main() -> None:
    """Compute the intervals over images and over seeds for each pair of arms, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CamVid")
    parser.add_argument("--out", default="study", help="folder of data sets")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--few", action="store_true", help="judge the weights of few_labels.py on val instead")
    arguments = parser.parse_args()
    final = open_split(str(arguments.data), "val")
    if arguments.few:
        pairs = [("F1", (f"distilled, {block}", f"labels only, {block}"), SEEDS, final) for block in BLOCKS]
    else:
        folders = Folders(Path(arguments.data).resolve(), Path(arguments.out).resolve())
        few = open_split(str(folders.data("dev")), "val")
        pairs = [
            ("E6", (f"distilled, {data}", f"{baseline}, {data}"), FINAL_SEEDS, final)
            for data in ("all", "apart")
            for baseline in ("plain", "control")
        ]
        pairs += [("E4", (f"distilled, {block}", f"plain, {block}"), FEW_SEEDS, few) for block in BLOCKS]
    rows = []
    for pair in pairs:
        rows.append(row(*pair))
        print(rows[-1], flush=True)
    write(arguments.json, {**header("few labels" if arguments.few else "effect"), "rows": rows})


if __name__ == "__main__":
    run(main)
