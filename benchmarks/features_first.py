"""Does a student that first learns features without labels end better?

Every student is `kdcache:tiny` at 144x192. It learns the labels of a block of CamVid, or of all 266 images of train
without 0006R0. The blocks are 46-b and 92-b of `arms.py`, where labels only did best: there a gain is hardest. The
sequence 0006R0 judges, and no training, labels or features have seen it. All trainings with labels take 16 views, the
same flags and the same seeds. None of the arms was tuned for this study.

    scratch        LABEL_STEPS steps of labels, from random weights
    scratch long   FEATURE_STEPS + LABEL_STEPS steps of labels, from random weights: equal total steps
    fp16           FEATURE_STEPS steps of `cosine` to features of EfficientNet-Lite0 (ImageNet's weights, stage 5,
                   288x384, float16) on all 266 images without labels, 8 views, then LABEL_STEPS steps of labels
    uint8          the same, the features kept in bytes
    similarity     the same, the term `similarity` and cosines between cells in place of features
    random         the control: as fp16, but Lite0 has random weights

Against `scratch` the iterations with labels are equal, against `scratch long` all iterations. The score is the mIoU
of the last iteration. A finished row is in the JSON and is not repeated. An interrupted training resumes. Seed 0 of
all arms comes first, then seed 1.

    python benchmarks/features_first.py --data camvid --out features-first --minutes 115 \
        --json benchmarks/results/features-first-cpu.json
    python benchmarks/features_first.py --table --json benchmarks/results/features-first-cpu.json
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from common import MIX, earlier, header, run, write
from effect import Folders, interval, kdcache, run_name, scores
from kdcache.analysis.statistics import Difference, adjust, difference
from kdcache.run_folder import RESULT, Run
from pretrained import imagenet_weights

THEME = "features first"
SEEDS = tuple(range(5))
FEATURE_STEPS, LABEL_STEPS = 2000, 1000
LABELS = {"46": "only-46-b", "all": "dev", "92": "only-92-b"}
"""Data sets of `arms.py` by how many labels they have."""
TEACHERS = {"fp16": "lite0", "uint8": "lite0", "similarity": "lite0", "random": "random"}
"""Weights of Lite0, by arm of features."""
STUDENT = "--model kdcache:tiny --batch-size 8 --lr 6e-3 --warmup 100 --augment replay --gradients-every 0 --threads 1"
SIZE = "--size 144x192 --view-scale 1:2 --threads 1"
TAPS = "student_tap=stage4,teacher_tap=stage5"


@dataclass(frozen=True)
class Row:
    """One training of the study. `labels` is "none" for the phase in which it learns features."""

    arm: str
    labels: str
    seed: int

    def key(self) -> dict[str, Any]:
        """Return the values that identify the row: arm, number of labels and seed."""
        return {"arm": self.arm, "labels": self.labels, "seed": self.seed}


def rows(seeds: tuple[int, ...] = SEEDS) -> Iterator[Row]:
    """Yield all rows, in an order in which the first ones already answer the question."""
    for seed in seeds:
        for labels in LABELS:
            for arm in ("scratch", "scratch long", "fp16", "random", "similarity", "uint8"):
                if arm in TEACHERS and labels == next(iter(LABELS)):
                    yield Row(arm, "none", seed)
                yield Row(arm, labels, seed)


class FeatureFolders(Folders):
    """Weights of Lite0, caches of features and of labels, and runs. Each is made when it is first asked for."""

    def __init__(self, camvid: Path, out: Path, steps: tuple[int, int]) -> None:
        super().__init__(camvid, out)
        self.feature_steps, self.label_steps = steps

    def weights(self, name: str) -> Path:
        """Return a file of Lite0's weights: `lite0` has ImageNet's weights, `random` has random ones of seed 0."""
        out = self.out / f"{name}.safetensors"
        if not out.is_file():
            torch.manual_seed(0)
            encoder = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
            if name == "lite0":
                encoder.load_state_dict(imagenet_weights("lite0"), strict=False)
            self.out.mkdir(parents=True, exist_ok=True)
            save_file(encoder.state_dict(), out)
        return out

    def features(self, arm: str) -> Path:
        """Return a cache of features of all images that are not used for validation or test, without labels."""
        teacher = TEACHERS[arm]
        images = f"images:{self.data('dev') / 'images' / 'train'}"
        stored = "--features stage5 --statistics similarity:stage5 --teacher-size 288x384 --views 8"
        built = self.cache(teacher, f"build-teacher-cache --data {images} {self.teacher_flags(teacher)} {stored} --out")
        copies = {"uint8": "--feature-dtype uint8", "similarity": "--features="}
        return self.cache(arm, f"copy {copies[arm]} {built}") if arm in copies else built

    def pixels(self, labels: str) -> Path:
        """Return a cache of labelled views. The targets of its teacher are never read."""
        teacher = f"{self.teacher_flags('random')} --features summary --views 16"
        data = self.data(LABELS[labels])
        return self.cache(f"labels-{labels}", f"build-teacher-cache --data {data} {teacher} --out")

    def teacher_flags(self, weights: str) -> str:
        """Return the flags that all builds with these weights share."""
        return f"--teacher timm:tf_efficientnet_lite0,weights={self.weights(weights)} --features-only {SIZE}"

    def cache(self, name: str, words: str) -> Path:
        """Return the cache with this name. If it is missing, the command `words` builds it."""
        out = self.out / f"{name}.zarr"
        if not (out / "complete.json").is_file():
            self.verb(f"{words} {out}")
        return out

    def run(self, row: Row) -> Run:
        """Return the finished training of a row."""
        out = self.out / "runs" / run_name(f"{row.arm}, {row.labels}", row.seed)
        if not (out / RESULT).is_file():
            resume = " --resume" if out.exists() else ""
            self.verb(f"{self.training(row)} {STUDENT} --seed {row.seed} --out {out}{resume}")
        return Run.open(out)

    def training(self, row: Row) -> str:
        """Return the flags of a row's training that differ between rows."""
        if row.labels == "none":
            term = "similarity" if row.arm == "similarity" else "cosine,standardise=channels"
            return (
                f"train-student --cache {self.features(row.arm)} --method none --ce-weight 0 --term {term},{TAPS} "
                f"--iterations {self.feature_steps} --val-share 0.05 --val-every {self.feature_steps // 4}"
            )
        steps = self.label_steps + (self.feature_steps if row.arm == "scratch long" else 0)
        init = f"--init {self.run(Row(row.arm, 'none', row.seed)).folder}@last" if row.arm in TEACHERS else ""
        return (
            f"train-student --cache {self.pixels(row.labels)} --val {self.data(LABELS[row.labels])} --method none "
            f"--class-weights sqrt --iterations {steps} --val-every {steps // 2} {init}"
        )

    def verb(self, words: str) -> None:
        """Run a command of kdcache until the time is up. Raises: TimeoutExpired then."""
        kdcache(words, ends=self.ends)


def measured(row: Row, run: Run) -> dict[str, Any]:
    """Return the values of a training that the result file keeps."""
    iterations, seconds = run.result["iterations"], round(run.result["seconds"])
    if row.labels == "none":
        lines = [line for line in run.metrics or () if "feature_loss" in line]
        return {**row.key(), "iterations": iterations, "feature_loss": lines[-1]["feature_loss"], "seconds": seconds}
    return {**row.key(), "iterations": iterations, **scores(run)}


def differences(done: list[dict[str, Any]]) -> dict[str, Difference]:
    """Return every comparison, paired by seed, with Holm's p-value over all of them."""
    by_arm: dict[tuple[str, str], dict[tuple[Any, ...], float]] = {}
    for row in done:
        if "miou" in row:
            by_arm.setdefault((row["arm"], row["labels"]), {})[(row["seed"],)] = row["miou"]
    found = {
        f"{arm} - {baseline}, {labels}": difference(by_arm[arm, labels], by_arm[baseline, labels], baseline)
        for labels in LABELS
        for arm in TEACHERS
        for baseline in ("scratch", "scratch long", "random")
        if arm != baseline and (arm, labels) in by_arm and (baseline, labels) in by_arm
    }
    return dict(zip(found, adjust(list(found.values())), strict=True))


def table(done: list[dict[str, Any]]) -> str:
    """Return the scores and the differences as Markdown."""
    lines = ["| labels | " + " | ".join(("scratch", "scratch long", *TEACHERS)) + " |", "| --- |" + " ---: |" * 6]
    for labels in LABELS:
        cells = []
        for arm in ("scratch", "scratch long", *TEACHERS):
            values = [row["miou"] for row in done if (row["arm"], row["labels"]) == (arm, labels)]
            of = interval(values) if values else None
            cells.append("" if of is None else f"{of['mean']:.1f}" + (f" ± {of['half']:.1f}" if of["half"] else ""))
        lines.append(f"| {labels} | " + " | ".join(cells) + " |")
    compared = differences(done)
    lines += [
        "",
        "| difference | points | 95 % interval over seeds, paired | pairs | Holm's p |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for name, of in compared.items():
        span = "one pair" if math.isnan(of.half_width) else f"{of.low:+.2f} to {of.high:+.2f}"
        p = "" if math.isnan(of.adjusted) else f"{of.adjusted:.3f}"
        lines.append(f"| {name} | {of.mean:+.2f} | {span} | {of.runs} | {p} |")
    return "\n".join([*lines, "", f"{len(compared)} comparisons, and Holm's p counts them all."])


def main() -> None:
    """Train the rows that are missing until the time is up, or print the table of the existing rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CamVid")
    parser.add_argument("--out", default="features-first", help="folder of data sets, caches and runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long")
    parser.add_argument("--steps", type=int, nargs=2, default=(FEATURE_STEPS, LABEL_STEPS), help="of each phase")
    parser.add_argument("--table", action="store_true", help="print what the rows say, and train nothing")
    parser.add_argument("--mix", action="store_true", help=MIX)
    arguments = parser.parse_args()
    content = earlier(arguments.json, THEME, mix=arguments.mix or arguments.table)
    done: list[dict[str, Any]] = content.get("rows", [])
    if arguments.table:
        print(table(done))
        return
    folders = FeatureFolders(Path(arguments.data).resolve(), Path(arguments.out).resolve(), tuple(arguments.steps))
    folders.ends = time.monotonic() + 60 * arguments.minutes
    for row in rows():
        if any(row.key().items() <= finished.items() for finished in done):
            continue
        try:
            done.append(measured(row, folders.run(row)))
        except TimeoutError:
            print(f"time is up in {row}: the same command goes on", flush=True)
            return
        write(arguments.json, {**header(THEME, content.get("also", [])), "rows": done})
        print(done[-1], flush=True)


if __name__ == "__main__":
    run(main)
