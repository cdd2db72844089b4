"""Few labels, many images: is it the teacher, the pool, or ImageNet?

    F0  choices, on 46-a and 92-a only: four settings each of labels only, distilled and semi-supervised
    F1  label curve, 46 and 92 labels, three blocks and three seeds: labels only with and without ClassMix, distilled,
        control, and the teacher
    F2  questions (a) to (g), on 46-b and 46-c, two seeds
    F3  the ends of the curve: 23, 184 and all labels, one seed
    F4  another student and another size, on 46-b, two seeds
    F5  the last weights of F1 on val, once: the same drive as blocks b and c

`arms.py` has the blocks. Teacher and student have the labels of one block. The pool is all 266 images of train
without 0006R0, which judges F0 to F4. No training sees 0006R0. F0 runs only if it is named, and `CHOSEN` holds what
it chose. A row of other flags is another row. F5 is the final, and Holm counts its comparisons apart.

A finished run is a row of the JSON and is not repeated. An interrupted training resumes. The score is the mIoU of the
last iteration. `differences` has intervals over seeds within a block. Blocks of 92 share frames, so only blocks of
46 have an interval over blocks. `study_images.py --few` has intervals over images.

    python benchmarks/few_labels.py --data camvid --out few --minutes 115 --json benchmarks/results/few-labels-cpu.json
    python benchmarks/few_labels.py --json benchmarks/results/few-labels-cpu.json --out few --table \
        --plot docs/assets/few-labels.png --weights benchmarks/results/weights
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from arms import ALL, BLOCKS, FOUR, LENGTH, MORE_BLOCKS, PLAIN, STORES, STUDENT, Arm
from common import MIX as MIX_HELP
from common import header, run, write
from effect import Study, kdcache, percent, run_name, scores, summary
from features_first import FEATURE_STEPS, LABEL_STEPS, FeatureFolders, Row
from kdcache.analysis.statistics import Difference, adjust, difference
from kdcache.data import open_split
from kdcache.metrics import evaluate_model
from kdcache.run_folder import RESULT, Run
from kdcache.teacher import load_teacher
from study_results import DATA, write_halves

SIZE = (144, 192)
LRASPP = {"lraspp": LENGTH, "lraspp, 1500 iterations": 1500}
"""Iterations of another student, which takes five times as long as kdcache:tiny. The short training came first."""
EVERY = 266  # labels of train without 0006R0
MOST_BYTES = 12_000_000
STAGES = ("F1", "F2", "F3", "F4", "F5")
"""In their order, without F0."""
SEEDS, TWO = (0, 1, 2), (0, 1)
MIX = "--ema 0.99 --mix classmix:0.5 --jitter randaugment:2,9"
JITTER = "--ema 0.99 --jitter randaugment:2,9"
PLAIN_WEIGHTS = "--class-weights none"
TRIALS = {
    # Store and flags of what was tried, by family.
    "labels only": [
        ("pixels", f"{PLAIN} {ALL}"),
        ("pixels", f"{PLAIN} {FOUR}"),
        ("pixels", f"{PLAIN} {ALL} {PLAIN_WEIGHTS}"),
        ("pixels", f"{PLAIN} {ALL} --mix classmix:0.5"),
    ],
    "distilled": [
        ("few", f"--method dist {FOUR}"),
        ("few", f"--method none --term dist,weight=2 {FOUR}"),
        ("few", f"--method dist {PLAIN_WEIGHTS} {FOUR}"),
        ("few", f"--method kl {FOUR}"),
    ],
    "consistency": [
        ("few", f"{PLAIN} --term consistency,by=ema,threshold=0.968 {MIX} {FOUR}"),
        ("few", f"{PLAIN} --term consistency,by=ema,threshold=0.9 {MIX} {FOUR}"),
        ("few", f"{PLAIN} --term consistency,by=ema,threshold=0.7 {MIX} {FOUR}"),
        ("few", f"{PLAIN} --term consistency,by=ema,quantile=0.5 {MIX} {FOUR}"),
    ],
}
CLASSMIX = "labels only with ClassMix"
"""The best labels only of 92-a in F0, which the mean of both blocks did not choose."""
CHOSEN = {
    # Of each family the settings with the highest mean of 46-a and 92-a in F0: 28.2, 34.1 and 31.2.
    "labels only": TRIALS["labels only"][0],
    "distilled": TRIALS["distilled"][2],
    "consistency": TRIALS["consistency"][0],
    # Families without a choice.
    CLASSMIX: TRIALS["labels only"][3],
    "control": ("pixels", f"--method dist --teacher labels {PLAIN_WEIGHTS} {FOUR}"),
}
FAMILIES, BASELINES = ("labels only", "control", "distilled"), ("labels only", "control", CLASSMIX)
Rows = list[dict[str, Any]]
NESTED = ("23-b", "46-b", "92-a", "184-a", "all")
"""Blocks in their order. Each has the frames of the one before."""
Pair = tuple[tuple[str, str], tuple[str, str]]


def arm(stage: str, family: str, block: str, seeds: tuple[int, ...], name: str = "", **changes: Any) -> Arm:
    """Return the arm of a family on a block.

    It uses the block's labelled images only, or all images if the family uses unlabelled ones.
    """
    store, flags = CHOSEN[family]
    pooled = family not in BASELINES
    data = f"{'few' if pooled else 'only'}-{block}"
    built = Arm(
        stage, f"{name or family}, {block}", store, flags, LENGTH, seeds, data, f"only-{block}" if pooled else ""
    )
    return replace(built, **changes)


def trials() -> Iterator[Arm]:
    """Yield the arms of stage F0."""
    for block in ("46-a", "92-a"):
        for family, settings in TRIALS.items():
            for store, flags in settings:
                yield arm("F0", family, block, (0,), f"{family}: {flags}", store=store, flags=flags)


def questions() -> Iterator[Arm]:
    """Yield the arms of stage F2, by the letters of its questions."""
    for block in ("46-b", "46-c"):
        yield arm("F2", "consistency", block, TWO, "(a) semi-supervised without a teacher")
        yield arm("F2", "distilled", block, TWO, "(b) distilled on the labelled images", data=f"only-{block}")
        yield arm("F2", "distilled", block, TWO, "(c) a teacher from random weights", store="few-random")
        yield arm(
            "F2",
            "labels only",
            block,
            TWO,
            "(d) features of ImageNet first",
            flags=f"{PLAIN} {ALL} --init {{features}}",
        )
        together = f"--method dist --term consistency,by=ema,threshold=0.968 {PLAIN_WEIGHTS} {JITTER} {FOUR}"
        yield arm("F2", "distilled", block, TWO, "(e) distilled and consistent", flags=together)
        yield arm(
            "F2", "distilled", block, TWO, "(f) hard pseudo labels", flags=f"--method pseudo {PLAIN_WEIGHTS} {FOUR}"
        )
        yield arm("F2", "distilled", block, TWO, "(g) kl", flags=f"--method kl {PLAIN_WEIGHTS} {FOUR}")
        channels = f"--method cwd {PLAIN_WEIGHTS} {FOUR}"
        yield arm("F2", "distilled", block, TWO, "(g) cwd", store="few-raw", flags=channels)


def others() -> Iterator[Arm]:
    """Yield the arms of stage F4."""
    small = "--model torchvision:lraspp_mobilenet_v3_large --lr 1e-3"
    for family in FAMILIES:
        flags = CHOSEN[family][1]
        for name, iterations in LRASPP.items():
            yield arm("F4", family, "46-b", TWO, f"{name}, {family}", flags=f"{flags} {small}", iterations=iterations)
        large = "few-large" if family == "distilled" else "pixels-large"
        yield arm("F4", family, "46-b", TWO, f"288x384, {family}", store=large)


def everything() -> Iterator[Arm]:
    """Yield the arms of stage F3 with all labels. The pool then has no unlabelled image."""
    yield Arm("F3", "labels only, all", *CHOSEN["labels only"], LENGTH, (0,), "dev")
    yield Arm("F3", "control, all", *CHOSEN["control"], LENGTH, (0,), "dev")
    yield Arm("F3", "distilled, all", *CHOSEN["distilled"], LENGTH, (0,), "dev", "dev")


ARMS: dict[str, list[Arm]] = {
    "F0": list(trials()),
    "F1": [arm("F1", family, block, SEEDS) for block in BLOCKS for family in (*FAMILIES, CLASSMIX)],
    "F2": list(questions()),
    "F3": [*(arm("F3", family, block, (0,)) for block in MORE_BLOCKS for family in FAMILIES), *everything()],
    "F4": list(others()),
    "F5": [],
}


class FewLabels(Study):
    """The rows of the study, stage by stage. Every arm runs once before any arm runs twice."""

    theme = "few labels"

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        camvid, out = Path(arguments.data).resolve(), Path(arguments.out).resolve()
        self.features = FeatureFolders(camvid, out, (FEATURE_STEPS, LABEL_STEPS))
        self.folders = self.features
        self.folders.ends = self.ends
        self.most = arguments.rows

    def stage(self, name: str) -> None:
        """Train the rows that a stage lacks. Raises: TimeoutError if the time is up or enough rows are done."""
        for seed in SEEDS:
            for arm in ARMS[name]:
                if seed in arm.seeds:
                    self.run(arm, seed)
        if name == "F5":
            for arm in ARMS["F1"]:
                for seed in arm.seeds:
                    self.judge(arm, seed)

    def run(self, arm: Arm, seed: int) -> None:
        """Train an arm and add its row, with its teacher's score, unless a row with these flags exists."""
        key = {"stage": arm.stage, "arm": arm.name, "seed": seed, "iterations": arm.iterations, "flags": arm.flags}
        if self.has(key):
            return
        out = self.path(arm, seed)
        if not (out / RESULT).is_file():
            data, teacher_data = self.folders.data(arm.data), arm.teacher_data or arm.data
            flags = arm.flags
            if "{features}" in flags:
                first = self.features.run(Row("fp16", "none", seed)).folder
                flags = flags.format(features=f"{first}@last")
            store = self.folders.store(arm.store, arm.data, teacher_data)
            length = f"--seed {seed} --iterations {arm.iterations} --val-every {max(1, arm.iterations // 5)}"
            resume = "--resume" if out.exists() else ""
            words = f"train-student --cache {store} --val {data} --out {out} {length} {STUDENT} {flags} {resume}"
            kdcache(words, ends=self.ends)
        self.add({**key, "store": arm.store, "data": arm.data, **scores(Run.open(out)), **self.teacher(arm)})

    def teacher(self, arm: Arm) -> dict[str, float]:
        """Return the score and seconds of the teacher of an arm's cache, or {} for pixels only."""
        store = STORES[arm.store]
        if store.trained_on:
            return {}
        run = Run.open(self.folders.teacher(store.teachers[0], arm.teacher_data or arm.data))
        found = scores(run)
        return {"teacher_miou": found["miou"], "teacher_seconds": found["seconds"]}

    def judge(self, arm: Arm, seed: int) -> None:
        """Evaluate the last weights of a run on val and add the row, unless the row exists or the run does not."""
        key = {"stage": "F5", "arm": arm.name, "seed": seed, "flags": arm.flags}
        out = self.path(arm, seed)
        if self.has(key) or not (out / RESULT).is_file():
            return
        split = open_split(str(self.folders.camvid), "val")
        model = load_teacher(f"{out}@last", split.classes).model
        self.add(
            {
                **key,
                "data": "val: the drive of blocks b and c",
                **percent(evaluate_model(model, split, SIZE, threads=1)),
            }
        )

    def path(self, arm: Arm, seed: int) -> Path:
        """Return the folder of an arm's run. Runs with other flags or another length have other folders."""
        digest = hashlib.sha256(f"{arm.flags} {arm.iterations}".encode()).hexdigest()[:6]
        return self.folders.out / "runs" / arm.stage / f"{run_name(arm.name, seed)}-{digest}"

    def has(self, key: dict[str, Any]) -> bool:
        """Return whether a row exists. Raises: TimeoutError if it does not and no new row may begin."""
        if any(key.items() <= row.items() for row in self.rows):
            return True
        if time.monotonic() > self.ends or len(self.rows) >= self.most:
            raise TimeoutError(f"{key['arm']}, seed {key['seed']}")
        return False

    def add(self, row: dict[str, Any]) -> None:
        """Write all rows with this one, and their summary."""
        self.rows.append(row)
        write(self.json, {**header(self.theme, self.also), **conclusions(self.rows), "rows": self.rows})
        print(f"{row['stage']} {row['arm']}, seed {row['seed']}: {row['miou']:.2f}", flush=True)


def trials_of(rows: Rows) -> dict[str, int]:
    """Return how many settings of each family have a row in stage F0, or are used without one."""
    tried = {family: {row["flags"] for row in rows if row["stage"] == "F0" and row["arm"].startswith(family)}
             for family in TRIALS}  # fmt: skip
    return {family: max(1, len(flags)) for family, flags in tried.items()}


def pairs() -> Iterator[Pair]:
    """Yield the comparisons on 0006R0: (stage, name) of an arm, then (stage, name) of its baseline."""
    yield from main_pairs("F1")
    for arm in ARMS["F2"]:
        block = arm.name.rpartition(", ")[2]
        for baseline in ("distilled", "labels only"):
            yield ("F2", arm.name), ("F1", f"{baseline}, {block}")
    for kind in (*LRASPP, "288x384"):
        for baseline in BASELINES:
            yield ("F4", f"{kind}, distilled, 46-b"), ("F4", f"{kind}, {baseline}, 46-b")


def main_pairs(stage: str) -> Iterator[Pair]:
    """Yield distilled against each baseline, for each block. Stage F5 has the final's judge."""
    for block in BLOCKS:
        for baseline in BASELINES:
            yield (stage, f"distilled, {block}"), (stage, f"{baseline}, {block}")


def differences(rows: Rows, compared: Iterable[Pair]) -> dict[str, Difference]:
    """Return comparisons within a block, paired by seed, with Holm's p-value over all of them."""
    scored: dict[tuple[str, str], dict[tuple[Any, ...], float]] = {}
    for row in rows:
        scored.setdefault((row["stage"], row["arm"]), {})[(row["seed"],)] = row["miou"]
    found = {f"{ours[1]} - {theirs[1]}": difference(scored[ours], scored[theirs], theirs[1])
             for ours, theirs in compared if ours in scored and theirs in scored}  # fmt: skip
    return dict(zip(found, adjust(list(found.values())), strict=True))


def over_blocks(rows: Rows, stage: str) -> dict[str, Difference]:
    """Return distilled against each baseline with 46 labels, paired by block. A block's score is a mean over seeds."""
    scored: dict[str, dict[tuple[str], list[float]]] = {family: {} for family in (*FAMILIES, CLASSMIX)}
    for row in rows:
        family, _, block = row["arm"].partition(", ")
        if row["stage"] == stage and block.startswith("46"):
            scored[family].setdefault((block,), []).append(row["miou"])
    scores = {family: {block: float(np.mean(of)) for block, of in by.items()} for family, by in scored.items()}
    found = {f"distilled - {baseline}": difference(scores["distilled"], scores[baseline], baseline)
             for baseline in BASELINES if scores[baseline] and scores["distilled"]}  # fmt: skip
    return {name: replace(gap, over="blocks") for name, gap in found.items()}


def gaps(rows: Rows) -> dict[str, dict[str, Difference]]:
    """Return all comparisons, by judge, within and over blocks. Holm counts a judge's comparisons within blocks."""
    return {
        "differences": differences(rows, pairs()),
        "over_blocks": over_blocks(rows, "F1"),
        "final": differences(rows, main_pairs("F5")),
        "final_over_blocks": over_blocks(rows, "F5"),
    }


def conclusions(rows: Rows) -> dict[str, Any]:
    """Return trials, means and comparisons as JSON values."""
    found = {name: {key: gap.to_json() for key, gap in of.items()} for name, of in gaps(rows).items()}
    return {"trials": trials_of(rows), "sentence": sentence(rows), "summary": summary(rows), **found}


def curve(rows: Rows, family: str, blocks: tuple[str, ...] = ()) -> dict[int, list[float]]:
    """Return mIoU on 0006R0 by number of labels, of each seed of these blocks, or of all."""
    by_count: dict[int, list[float]] = {}
    for row in rows:
        name, _, block = row["arm"].rpartition(", ")
        if row["stage"] in ("F1", "F3") and name == family and (not blocks or block in blocks):
            by_count.setdefault(EVERY if block == "all" else int(block.partition("-")[0]), []).append(row["miou"])
    return dict(sorted(by_count.items()))


def reaches(plain: dict[int, list[float]], score: float) -> str:
    """Return how many labels reach a score without kdcache: between two points, the logarithm is interpolated."""
    counts, means = list(plain), [float(np.mean(of)) for of in plain.values()]
    if score > max(means):
        return f"more than {counts[-1]}"
    above = next(place for place, mean in enumerate(means) if mean >= score)
    if above == 0:
        return f"at most {counts[0]}"
    share = (score - means[above - 1]) / (means[above] - means[above - 1])
    return f"{counts[above - 1] * (counts[above] / counts[above - 1]) ** share:.0f}"


def sentence(rows: Rows) -> str:
    """Return how many labels without kdcache reach the score of 46 with it: all blocks, nested ones, with ClassMix."""
    said = []
    for blocks, family in (((), "labels only"), (NESTED, "labels only"), ((), CLASSMIX)):
        plain, distilled = (curve(rows, name, blocks) for name in (family, "distilled"))
        if 46 in distilled and len(plain) > 1:
            said.append(reaches(plain, float(np.mean(distilled[46]))))
        elif family != CLASSMIX:
            return "The curve lacks rows: nothing can be said of 46 labels."
    mixed = f" With ClassMix: {said[2]}." if said[2:] else ""
    return (
        f"46 labels with kdcache reach what {said[0]} labels reach without (mean of all blocks, judge 0006R0). "
        f"For nested blocks: {said[1]}.{mixed}"
    )


def table(rows: Rows) -> str:
    """Return means and differences as Markdown."""
    lines = ["| stage | arm | mIoU, mean and 95 % interval over seeds |", "| --- | --- | ---: |"]
    for stage, arms in summary(rows).items():
        for name, of in arms.items():
            half = "" if of["half"] is None else f" ± {of['half']:.1f}"
            lines.append(f"| {stage} | {name} | {of['mean']:.1f}{half} |")
    found = gaps(rows)
    for judge, within, over in (
        ("0006R0", "differences", "over_blocks"),
        ("val", "final", "final_over_blocks"),
    ):
        lines += ["", f"| {judge} | points | 95 % interval | pairs | Holm's p |", "| --- | ---: | --- | ---: | ---: |"]
        for name, gap in [*found[within].items(), *found[over].items()]:
            span = "one pair" if math.isnan(gap.half_width) else f"{gap.low:+.2f} to {gap.high:+.2f}"
            p = "" if gap.over == "blocks" or math.isnan(gap.adjusted) else f"{gap.adjusted:.3f}"
            lines.append(f"| {name} | {gap.mean:+.2f} | {span} | {gap.runs} {gap.over} | {p} |")
        lines += ["", f"{len(found[within])} comparisons, and Holm's p counts them all."]
    words = ", ".join(f"{count} of {family}" for family, count in trials_of(rows).items())
    return "\n".join([*lines, "", f"Settings tried: {words}.", sentence(rows)])


def draw(rows: Rows, out: Path) -> None:
    """Draw mIoU against the number of labels: nested blocks as a line, each run as a dot, a band around all dots.

    The PNG also holds the numbers.
    """
    drawn = {}
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for family, colour in (("distilled", "#0072B2"), ("labels only", "#666666")):
        points, line = curve(rows, family), curve(rows, family, NESTED)
        low, high = ([of(scores) for scores in points.values()] for of in (min, max))
        dots = [(count, score) for count, scores in points.items() for score in scores]
        axes.plot(list(line), [float(np.mean(scores)) for scores in line.values()], color=colour, label=family)
        axes.fill_between(list(points), low, high, color=colour, alpha=0.15, linewidth=0)
        axes.scatter(*zip(*dots, strict=True), color=colour, s=9, linewidth=0)
        drawn[family] = points
    axes.set_xscale("log")
    axes.set_xticks(list(points), labels=map(str, points))
    axes.minorticks_off()
    axes.set(xlabel="labels (line: nested blocks of frames, dot: one run)", ylabel="mIoU on the sequence 0006R0, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata={DATA: json.dumps(drawn)})
    plt.close(figure)


def write_weights(study: FewLabels, out: Path) -> None:
    """Write the last weights of the runs with 46 and 92 labels, distilled or on labels only, as float16.

    Raises: SystemExit for more than MOST_BYTES.
    """
    out.mkdir(parents=True, exist_ok=True)
    size = 0
    for arm in ARMS["F1"]:
        for seed in arm.seeds:
            run = study.path(arm, seed)
            if arm.name.startswith(("labels only,", "distilled,")) and (run / RESULT).is_file():
                size += write_halves(Run.open(run), out / f"f1-{run_name(arm.name, seed)}.safetensors")
    print(f"{out}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        raise SystemExit(f"{size} bytes of weights are more than {MOST_BYTES}")


def main() -> None:
    """Train the missing rows of the chosen stages, and write the table, plot and weights that flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CamVid; without it nothing is trained")
    parser.add_argument("--out", default="few-labels", help="folder of data sets, teachers, stores and runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long")
    parser.add_argument("--rows", type=int, default=10**6, help="stop with so many rows in the JSON")
    parser.add_argument("--table", action="store_true", help="print what the rows say")
    parser.add_argument("--plot", type=Path, help="file for the label curve")
    parser.add_argument("--weights", type=Path, help="folder for the final weights")
    parser.add_argument("--mix", action="store_true", help=MIX_HELP)
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    if unknown := [name for name in stages if name not in ARMS]:
        parser.error(f"unknown stage {unknown[0]}: choose from {', '.join(ARMS)}")
    trains, arguments.data = arguments.data is not None, arguments.data or "."
    arguments.mix |= not trains  # nothing is added
    study = FewLabels(arguments)
    try:
        for name in stages if trains else ():
            study.stage(name)
    except TimeoutError as error:
        print(f"stopped in {error}: the same command goes on", flush=True)
    if arguments.table:
        print(table(study.rows))
    if arguments.plot is not None:
        draw(study.rows, arguments.plot)
    if arguments.weights is not None:
        write_weights(study, arguments.weights)


if __name__ == "__main__":
    run(main)
