"""The figures of the pages: each is what its result file says, and a page that names result files has no others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FRONT = ("README.md", "docs/index.md")
BENCHMARKS, BOTTLENECK, CHOOSING = "docs/benchmarks.md", "docs/bottleneck.md", "docs/choosing.md"
KERNELS, MODELS, SCALE, STUDIES = "docs/kernels.md", "docs/models.md", "docs/scale.md", "docs/studies.md"
MINUS = "\N{MINUS SIGN}"
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*\.\d+(?:e-?\d+)?|(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\w.])")
"""What a page must have from a result: a number with a point or with thousands."""
CONSTANTS = {
    "README.md": {"3.11", "0.1", "2.0", "4,500", "36,000"},
    BENCHMARKS: {"0.14", "3.1", "3.11", "3.12", "3.2", "3.4", "4,500", "36,000"},
    "docs/index.md": {"4,500", "36,000"},
    "docs/environments.md": {"3.11", "3.12", "2.11", "2.14", "2.15"},
    KERNELS: {"2.3", "3.12", "3.6", "2.11", "3.6.0"},
    SCALE: {"2.60"},
    STUDIES: {"0.14", "0.3", "0.1", "6.7", "1,000", "1,500", "2,000", "3,000", "4,500", "18,000"},
}
"""Page -> its numbers that nothing measured: versions, settings, sizes of models and clips, and sums that
tests/docs/test_front.py checks."""


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


STUDY, ADAPT, TASKS = result("study-cpu.json"), result("adapt-cpu.json"), result("tasks-cpu.json")
FEW, FEW_IMAGES = result("few-labels-cpu.json"), result("few-labels-images-cpu.json")


def rival(row: int, name: str, what: str) -> Callable[[Any], float]:
    """A rival of the loss, in times of ours."""
    return lambda d: next(r for r in d["rows"][row]["rivals"] if r["name"] == name)["ratio"][what]  # type: ignore[no-any-return]


def pace(kind: str, name: str, over: str) -> Callable[[Any], float]:
    """The speed of a reader or a loader over another's."""
    return lambda d: next(r for t in d["tables"] if t["kind"] == kind for r in t["rows"] if r["name"] == name)["ratio"][
        over
    ]  # type: ignore[no-any-return]


def miou(stage: str, arm: str, end: str = "mean") -> Callable[[Any], float]:
    """A mean of the study, or the half of its interval."""
    return lambda d: d["summary"][stage][arm][end]  # type: ignore[no-any-return]


def gain(end: str, labels: int, family: str = "differences", over: str = "labels only") -> Callable[[Any], float]:
    """The size of the smallest or largest gain over a baseline, over the blocks of so many labels. On val: `final`."""
    return lambda d: abs(
        {"least": min, "most": max}[end](
            d[family][f"distilled, {labels}-{block} - {over}, {labels}-{block}"]["mean"] for block in "abc"
        )
    )


def over_blocks(end: str, family: str = "over_blocks") -> Callable[[Any], float]:
    """The gain of 46 labels over labels only, or an end of its interval over blocks."""
    return lambda d: abs(d[family]["distilled - labels only"][end])


def few_mean(arm: str, stage: str = "F1") -> Callable[[Any], float]:
    """The mean of the blocks a, b and c."""
    return lambda d: fmean(d["summary"][stage][f"{arm}-{block}"]["mean"] for block in "abc")


def few_gap(block: str) -> Callable[[Any], float]:
    """How many points distilled lost to labels only at an end of the curve."""
    return lambda d: (
        d["summary"]["F3"][f"labels only, {block}"]["mean"] - d["summary"]["F3"][f"distilled, {block}"]["mean"]
    )


def seconds(d: Any) -> float:
    """A run with a live teacher over one from the cache, the fastest of each."""
    live, cached = (
        min(row["seconds"] for row in d["rows"] if (row["stage"], row["arm"]) == ("E6", arm))
        for arm in ("live, all", "distilled, all")
    )
    return float(live / cached)


def of_test(arm: str, drive: str, labels: str) -> Callable[[Any], float]:
    """Mean mIoU of three weights on a drive of the test split."""
    pattern = rf"e\d-{arm}-{labels}-\w+(?:-0)?"
    return lambda d: fmean(v[drive] for name, v in d["weights"].items() if re.fullmatch(pattern, name))


def kept(d: Any) -> float:
    """The score of the weights that the page names, seed 100 of the final."""
    rows = [row for row in d["rows"] if (row["stage"], row["arm"], row["seed"]) == ("E6", "distilled, all", 100)]
    return float(rows[0]["miou"])


def over_none(d: Any, what: str) -> float:
    """The median CPU time of a step over one on labels only."""
    steps = d["cpu_ms_per_step"]
    return float(steps[what]["p50"] / steps["none"]["p50"])


def withdrawn(d: Any) -> float:
    """The gain of the study before there was a control."""
    scores = d["final"]["1500"]
    return float(scores["dist, lr 0.006, 4 views of one"] - scores["plain lr 0.006, 4 views"])


FIGURES: list[tuple[str, Callable[[Any], float], str, tuple[str, ...]]] = [
    ("step-cpu.json", lambda d: d["kl_over_none"], "1.015", (*FRONT, BENCHMARKS, BOTTLENECK)),
    ("step-cpu.json", lambda d: d["live_over_none"], "7.5", (*FRONT, BENCHMARKS)),
    ("yolo-step-cpu.json", lambda d: d["kl_over_none"], "1.03", (BENCHMARKS,)),
    ("yolo-step-cpu.json", lambda d: d["kl_over_plain"], "0.55", (BENCHMARKS,)),
    ("yolo-step-cpu.json", lambda d: over_none(d, "live"), "1.94", (BENCHMARKS,)),
    ("gradients-cpu.json", lambda d: max(row["worst"] for row in d["rows"]), "1.3e-4", (BENCHMARKS,)),
    ("camvid-cpu.json", lambda d: d["store"]["target_bytes_per_record"] / 1024, "30.0 KiB", (*FRONT, BENCHMARKS)),
    ("camvid-cpu.json", lambda d: d["store"]["full_resolution_bytes"] / 1024, "594.0 KiB", (*FRONT, BENCHMARKS)),
    (
        "camvid-cpu.json",
        lambda d: 16 * d["store"]["records_written"],
        "5,872",
        (*FRONT, BENCHMARKS, "docs/when-not.md"),
    ),
    ("study-cpu.json", miou("E2", "lite0-large"), "49.3", (STUDIES,)),
    ("study-cpu.json", miou("E2", "lite0-large, EMA"), "49.2", (STUDIES,)),
    ("study-cpu.json", miou("E2", "lite0-large, flip"), "49.7", (STUDIES,)),
    ("study-cpu.json", miou("E2", "lite0-large and lite2-large, flip"), "49.7", (STUDIES,)),
    ("study-cpu.json", miou("E2", "lite0"), "41.2", (STUDIES,)),
    ("study-cpu.json", miou("E2", "lite0-slow"), "41.1", (STUDIES,)),
    ("study-cpu.json", miou("E2", "lite2-large"), "47.9", (STUDIES,)),
    ("study-cpu.json", miou("E3", "plain, 16 views, 18000 iterations"), "36.6", (STUDIES,)),
    ("study-cpu.json", miou("E4", "plain, all labels"), "36.8", (STUDIES,)),
    ("study-cpu.json", miou("E5", "kl trusted by class, a fold left out"), "34.88", (STUDIES,)),
    ("study-cpu.json", miou("E5", "kl trusted by class, a fold left out", "half"), "0.83", (STUDIES,)),
    ("study-cpu.json", miou("E5", "kl, a fold left out"), "33.92", (STUDIES,)),
    ("study-cpu.json", miou("E5", "kl, a fold left out", "half"), "0.97", (STUDIES,)),
    ("study-cpu.json", miou("E6", "live, all"), "56.9", (STUDIES,)),
    ("study-cpu.json", miou("E6", "live, all", "half"), "3.8", (STUDIES,)),
    ("few-labels-cpu.json", gain("least", 46), "1.1", (STUDIES,)),
    ("few-labels-cpu.json", gain("most", 46), "13.1", (STUDIES,)),
    ("few-labels-cpu.json", gain("least", 92, "final"), "0.6", (STUDIES,)),
    ("few-labels-cpu.json", gain("most", 46, "final"), "15.0", (STUDIES,)),
    *(
        ("few-labels-cpu.json", gain(end, labels, family, "labels only with ClassMix"), text, (STUDIES,))
        for labels, family, least, most in (
            (46, "differences", "0.4", "17.6"),
            (46, "final", "4.7", "12.5"),
            (92, "differences", "1.5", "1.2"),
            (92, "final", "2.8", "4.0"),
        )
        for end, text in (("least", least), ("most", most))
    ),
    (
        "few-labels-cpu.json",
        lambda d: d["differences"]["lraspp, distilled, 46-b - lraspp, labels only, 46-b"]["mean"],
        "4.3",
        (STUDIES,),
    ),
    ("few-labels-cpu.json", over_blocks("mean"), "8.2", (STUDIES,)),
    ("few-labels-cpu.json", over_blocks("low"), "7.5", (STUDIES,)),
    ("few-labels-cpu.json", over_blocks("high"), "23.9", (STUDIES,)),
    ("few-labels-cpu.json", over_blocks("mean", "final_over_blocks"), "11.3", (STUDIES,)),
    ("few-labels-cpu.json", over_blocks("low", "final_over_blocks"), "0.2", (STUDIES,)),
    ("few-labels-cpu.json", over_blocks("high", "final_over_blocks"), "22.4", (STUDIES,)),
    ("few-labels-cpu.json", few_mean("distilled, 46", "F5"), "45.1", (STUDIES,)),
    ("few-labels-cpu.json", few_mean("labels only, 92", "F5"), "43.3", (STUDIES,)),
    ("few-labels-cpu.json", few_mean("labels only with ClassMix, 92", "F5"), "48.9", (STUDIES,)),
    ("few-labels-cpu.json", few_mean("distilled, 46"), "32.4", (BENCHMARKS,)),
    ("few-labels-cpu.json", few_mean("labels only, 92"), "32.3", (BENCHMARKS,)),
    ("few-labels-cpu.json", few_gap("184-a"), "1.4", (STUDIES,)),
    ("few-labels-cpu.json", few_gap("all"), "1.6", (STUDIES,)),
    ("study-cpu.json", seconds, "16.6", (STUDIES,)),
    ("study-cpu.json", kept, "57.17", (STUDIES,)),
    ("effect-cpu.json", withdrawn, "2.85", (STUDIES,)),
    ("test-split.json", of_test("distilled", "Seq05VD", "46"), "36.5", (*FRONT, BENCHMARKS, STUDIES)),
    ("test-split.json", of_test("plain", "Seq05VD", "92"), "36.7", (*FRONT, BENCHMARKS, STUDIES)),
    ("test-split.json", of_test("control", "Seq05VD", "all"), "40.6", ("README.md", STUDIES)),
    ("test-split.json", of_test("control", "0001TP", "all"), "43.6", (STUDIES,)),
    *(
        ("live-replay-cpu.json", lambda d, end=end: abs(d["cached_minus_live"][end]), text, (*FRONT, STUDIES))
        for end, text in (("mean", "0.03"), ("low", "1.13"), ("high", "1.19"))
    ),
    ("adapt-cpu.json", lambda d: d["cost"]["steps"]["round"]["over_plain_best"], "1.099", (STUDIES,)),
    ("adapt-cpu.json", lambda d: d["cost"]["steps"]["ema"]["over_plain_best"], "1.17", (STUDIES,)),
    ("tasks-cpu.json", lambda d: d["cost"]["macs_over_two"], "0.587", (STUDIES,)),
    ("tasks-cpu.json", lambda d: d["cost"]["best_ms_over_two"], "0.578", (STUDIES,)),
    ("kernels-cpu.json", rival(0, "eager", "best"), "6.5", (*FRONT, BENCHMARKS)),
    ("kernels-cpu.json", rival(0, "chunked", "best"), "5.0", (BENCHMARKS,)),
    ("kernels-cpu.json", rival(0, "compile", "best"), "8.3", (BENCHMARKS,)),
    ("kernels-cpu.json", rival(2, "eager", "memory"), "11.9", (BENCHMARKS,)),
    ("kernels-cpu.json", rival(2, "compile", "memory"), "5.6", (BENCHMARKS,)),
    ("kernels-cpu-cells.json", rival(3, "eager", "best"), "1.6", (KERNELS,)),
    ("kernels-cpu-cells.json", rival(6, "eager", "best"), "2.5", (KERNELS,)),
    ("kernels-cpu-cells.json", rival(9, "eager", "best"), "2.5", (KERNELS,)),
    ("equivalence-cpu.json", lambda d: d["largest_difference"], "9.5e-7", (KERNELS,)),
    ("build-cpu.json", lambda d: d["builds"][0]["ratio"]["p50"], "0.94", (BENCHMARKS, BOTTLENECK)),
    ("build-cpu.json", lambda d: d["builds"][1]["ratio"]["p50"], "0.2", (BENCHMARKS,)),
    ("build-engines-cpu.json", lambda d: d["ratio"], "0.92", (SCALE,)),
    ("loader-cpu.json", pace("readers", "direct", "zarr"), "46", (BENCHMARKS,)),
    ("loader-cpu-python312.json", pace("readers", "direct", "zarr"), "51", (BENCHMARKS,)),
    ("loader-cpu-python312.json", pace("readers", "direct", "zarrs"), "17", (BENCHMARKS,)),
    ("loader-cpu-python312.json", pace("readers", "direct", "fused"), "30", (BENCHMARKS,)),
    ("loader-cpu-288.json", pace("readers", "direct", "zarrs"), "6.1", (BOTTLENECK,)),
    ("loader-cpu.json", pace("loaders", "default", "inline"), "3.4", (BOTTLENECK,)),
    ("loader-cpu.json", pace("steps", "default", "memory"), "1.02", (BENCHMARKS, BOTTLENECK)),
    ("loader-cpu-288.json", pace("steps", "default", "memory"), "1.06", (BENCHMARKS, BOTTLENECK)),
    ("crash-cpu.json", lambda d: len(d["builds"]["kills"]), "50 kills", (BENCHMARKS, SCALE)),
    ("crash-cpu.json", lambda d: d["builds"]["finished"], "14 caches", (SCALE,)),
    ("crash-cpu.json", lambda d: len(d["trainings"]["kills"]), "6 kills", (BENCHMARKS, SCALE)),
    ("crash-ray-cpu.json", lambda d: len(d["builds"]["kills"]), "20 kills", (SCALE,)),
    ("crash-ray-bucket-cpu.json", lambda d: len(d["builds"]["kills"]), "20 kills", (SCALE,)),
    ("steps-cpu.json", lambda d: 100 * d["profile"][1]["loss_share"], "26 %", (BOTTLENECK,)),
    *(
        ("universal-cpu.json", lambda d, find=find: 100 * find(d["masks"]), text, (MODELS,))
        for text, find in (
            ("0.6 %", lambda m: m["smooth, untrained student"]["other_best_class"]),
            ("2.7 %", lambda m: m["smooth, untrained student"]["other_best_class_at_edges"]),
            ("3.5 %", lambda m: m["smooth, untrained student"]["gradient_error"]["T=1"]),
            ("31 %", lambda m: m["smooth, near student"]["gradient_error"]["T=1"]),
        )
    ),
]
"""Result file, where the figure is in it, how it is written, on which pages."""


@pytest.mark.parametrize(("file", "find", "text", "pages"), FIGURES, ids=[f"{f}-{t}" for f, _, t, _ in FIGURES])
def test_figures_are_the_results(file: str, find: Callable[[Any], float], text: str, pages: tuple[str, ...]) -> None:
    value = find(result(file))
    written = float(re.match(r"[\d.,e-]+", text)[0].replace(",", ""))  # type: ignore[index]
    digits = len(re.sub(r"e.*|\D", "", text.split()[0]).lstrip("0"))
    assert float(f"{value:.{digits}g}") == written, f"{file} says {value}"
    for page in pages:
        assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d.]*\d)", PAGES[page]), f"{page} does not say {text}"


def within(value: dict[str, Any] | None, digits: int = 1) -> str:
    """A mean with the half of its interval, if it has one of several runs."""
    if value is None:
        return ""
    return f"{value['mean']:.{digits}f} ± {value['half']:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def difference(arm: str, over: str, digits: int = 1) -> str:
    found = STUDY["differences"][f"{arm} - {over}"]
    mean, low, high = (signed(found[key], digits) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def compared(stage: str, what: str, digits: int = 1) -> list[str]:
    """A row of labels only, control and distilled, and both differences."""
    arms = [f"{arm}, {what}" for arm in ("plain", "control", "distilled")]
    scores = [within(STUDY["summary"][stage][arm], digits) for arm in arms]
    return scores + [difference(f"{stage} {arms[2]}", f"{stage} {arm}", digits) for arm in arms[:2]]


def paired(name: str) -> list[str]:
    """Cached and live teachers: means over pairs, the difference, and the seconds."""
    found = result(name)
    means = [f"{fmean(pair[arm]['miou'] for pair in found['pairs']):.1f}" for arm in ("cached", "live")]
    mean, low, high = (signed(found["cached_minus_live"][key], 2) for key in ("mean", "low", "high"))
    return [*means, f"{mean} ({low} to {high})", f"{found['live_over_cached_seconds']:.1f}"]


def resampled(what: str) -> list[str]:
    """A gain, its interval over images, and over stretches of ten."""
    (row,) = (
        row
        for row in result("study-images-cpu.json")["rows"]
        if (row["arm"], row["to"]) == (f"distilled, {what}", f"plain, {what}")
    )
    ends = [row[over] for over in ("images", "stretches of 10 images")]
    return [signed(row["points"]), *(f"{signed(end['low'])} to {signed(end['high'])}" for end in ends)]


def few_scores(block: str, stage: str, digits: int = 1) -> list[str]:
    """Means of labels only, control and distilled, with intervals over seeds, and the gain over labels only."""
    family = {"F1": "differences", "F5": "final"}[stage]
    arms = [f"{arm}, {block}" for arm in ("labels only", "control", "distilled")]
    found = FEW[family][f"{arms[2]} - {arms[0]}"]
    mean, low, high = (signed(found[key], digits) for key in ("mean", "low", "high"))
    return [*(within(FEW["summary"][stage][arm]) for arm in arms), f"{mean} ({low} to {high})"]


def few_on_0006r0(block: str) -> list[str]:
    """The teacher's score in front of the students', and the gain over the control behind them."""
    (teacher,) = {row["teacher_miou"] for row in FEW["rows"]
                  if (row["stage"], row["arm"]) == ("F1", f"distilled, {block}")}  # fmt: skip
    found = FEW["differences"][f"distilled, {block} - control, {block}"]
    mean, low, high = (signed(found[key]) for key in ("mean", "low", "high"))
    return [f"{teacher:.1f}", *few_scores(block, "F1"), f"{mean} ({low} to {high})"]


def few_classmix(block: str) -> list[str]:
    """Labels only with ClassMix on 0006R0 and on val, each with distilled over it."""
    cells = []
    for stage, family in (("F1", "differences"), ("F5", "final")):
        arm = f"labels only with ClassMix, {block}"
        found = FEW[family][f"distilled, {block} - {arm}"]
        mean, low, high = (signed(found[key]) for key in ("mean", "low", "high"))
        cells += [within(FEW["summary"][stage][arm]), f"{mean} ({low} to {high})"]
    return cells


def few_ends(block: str) -> list[str]:
    """The scores of one seed at an end of the curve, and both gains."""
    arms = ("labels only", "control", "distilled")
    found = {row["arm"]: row for row in FEW["rows"] if row["stage"] == "F3" and row["arm"].endswith(f", {block}")}
    plain, control, ours = (found[f"{arm}, {block}"]["miou"] for arm in arms)
    scores = (found[f"distilled, {block}"]["teacher_miou"], plain, control, ours)
    return [*(f"{score:.1f}" for score in scores), signed(ours - plain), signed(ours - control)]


def few_on_val(block: str) -> list[str]:
    """Behind the students' scores, the gain's interval over stretches of ten images."""
    (images,) = (row for row in FEW_IMAGES["rows"] if row["arm"] == f"distilled, {block}")
    ends = images["stretches of 10 images"]
    return [*few_scores(block, "F5"), f"{signed(ends['low'])} to {signed(ends['high'])}"]


def seeds(arm: str, stage: str, count: int = 2) -> list[str]:
    """The scores of an arm's first seeds."""
    rows = sorted((row["seed"], row["miou"]) for row in FEW["rows"] if (row["stage"], row["arm"]) == (stage, arm))
    return [", ".join(f"{miou:.1f}" for _, miou in rows[:count])]


def question(arm: str, stage: str = "F2") -> list[str]:
    """The scores of two seeds on 46-b and 46-c, and the seconds of the fastest run of this stage."""
    took = min(row["seconds"] for row in FEW["rows"] if row["stage"] == stage and row["arm"].startswith(f"{arm}, "))
    return [*seeds(f"{arm}, 46-b", stage), *seeds(f"{arm}, 46-c", stage), str(took)]


def other(name: str) -> list[str]:
    return [cell for arm in ("labels only", "control", "distilled") for cell in seeds(f"{name}, {arm}, 46-b", "F4")]


def means(stage: str, *arms: str | None) -> list[str]:
    """Means of arms of the study; with intervals if there are many runs."""
    found = [STUDY["summary"][stage].get(arm) for arm in arms]
    return ["" if value is None else within(value) if value["runs"] > 2 else f"{value['mean']:.1f}" for value in found]


def loss_row(row: dict[str, Any]) -> list[str]:
    """Milliseconds of the loss, its rivals' times over it, and peaks of memory."""
    rivals = [
        rival["ratio"] for name in ("eager", "chunked", "compile") for rival in row["rivals"] if rival["name"] == name
    ]
    peaks = ", ".join(f"{ratio['memory']:.1f}x" for ratio in rivals)
    times = [f"{row['ours']['time']['best']:.1f}", *(f"{ratio['best']:.1f}" for ratio in rivals)]
    return [*times, f"{row['ours']['peak_mib']:.1f} MiB, {peaks}"]


def small(case: str, digits: int) -> list[str]:
    times = result("kernels-cpu-small.json")["microseconds"]
    (found,) = (value for name, value in times.items() if name.startswith(case))
    return [f"{found['eager_over_after']:.{digits}f}"]


def features_first() -> dict[tuple[str, str], dict[int, float]]:
    """mIoU by arm and labels, then by seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in result("features-first-cpu.json")["rows"]:
        if "miou" in row:
            found.setdefault((row["arm"], row["labels"]), {})[row["seed"]] = row["miou"]
    return found


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """The mean of five values, and half of its 95 % interval: Student's t with 4 degrees of freedom."""
    assert len(values) == 5
    return fmean(values), 2.7764 * stdev(values) / math.sqrt(5)


def first_scores(labels: str) -> list[str]:
    arms = ("scratch", "scratch long", "fp16", "uint8", "similarity", "random")
    found = [mean_and_half(list(features_first()[arm, labels].values())) for arm in arms]
    return [f"{mean:.1f} ± {half:.1f}" for mean, half in found]


def first_gains(arm: str, labels: str) -> list[str]:
    scores, cells = features_first(), []
    for baseline in ("scratch", "scratch long", "random"):
        pairs = [score - scores[baseline, labels][seed] for seed, score in scores[arm, labels].items()]
        mean, half = mean_and_half(pairs)
        cells.append(f"{signed(mean)} ({signed(mean - half)} to {signed(mean + half)})")
    return cells


def codec_row(codec: dict[str, Any]) -> list[str]:
    exponent = math.floor(math.log10(kl := codec["fidelity"]["kl_t1"]))
    agreement = 100 * codec["fidelity"]["argmax_agreement"]
    same = f"{agreement:.3f} %" if agreement > 99.99 else f"{agreement:.2f} %"
    bytes_ = [f"{codec[key]:,}" for key in ("target_bytes_per_record", "bytes_per_record")]
    return [*bytes_, f"{kl / 10**exponent:.1f}e{exponent}", same]


def task_row(arm: str, depth: str | None = None) -> list[str]:
    found = TASKS["summary"]["means"]
    return [within(found[arm]["miou"], 2), within(found[depth or arm]["depth_rmse"], 2)]


def adapted(row: dict[str, Any]) -> list[str]:
    return [within(row), f"{row['cpu_seconds']:.0f}", f"{row['chain_seconds']:.0f}"]


SMALL = {
    "1 x 3 x 32², 4": ("plain 1x3x32x32/4", 2),
    "1 x 11 x 24², 4": ("plain 1x11x24x24/4", 2),
    "1 x 11 x 96², 4": ("plain 1x11x96x96/4", 1),
    "1 x 1000 x 16², 1": ("plain 1x1000x16x16/1", 1),
    "4 x 1000 x 7², 1": ("plain 4x1000x7x7/1", 1),
    "256 x 1000 rows, k = 16": ("plain 256x1000x1x1/1", 1),
    "32 x 10 rows": ("plain 32x10x1x1/1", 2),
    "`dist`, 1 x 3 x 32², 4": ("dist 1x3x32x32/4", 1),
    "`dist`, 1 x 11 x 96², 4": ("dist 1x11x96x96/4", 1),
}
FIRST = {"46": "46 frames, block b", "92": "92 frames, block b", "all": "all but 0006R0"}
"""Labels of features-first-cpu.json, as the page names them."""
TABLES: dict[tuple[str, str], dict[str, list[str]]] = {
    (STUDIES, "labels of"): {
        "23 frames, one seed": few_ends("23-b"),
        **{
            f"{count} frames, block {block}": few_on_0006r0(f"{count}-{block}") for count in (46, 92) for block in "abc"
        },
        "184 frames, one seed": few_ends("184-a"),
        "all 266 frames, one seed": few_ends("all"),
    },
    (STUDIES, "on val, labels of"): {
        f"{count} frames, block {block}": few_on_val(f"{count}-{block}") for count in (46, 92) for block in "abc"
    },
    (STUDIES, "with ClassMix, labels of"): {
        f"{count} frames, block {block}": few_classmix(f"{count}-{block}") for count in (46, 92) for block in "abc"
    },
    (STUDIES, "46 labels"): {
        "labels only": question("labels only", "F1"),
        "distilled (`dist`)": question("distilled", "F1"),
        "(a) semi-supervised, no teacher": question("(a) semi-supervised without a teacher"),
        "(b) distilled on the labelled images only": question("(b) distilled on the labelled images"),
        "(c) teacher from random weights": question("(c) a teacher from random weights"),
        "(d) features of ImageNet first, then labels": question("(d) features of ImageNet first"),
        "(e) distilled, with consistency": question("(e) distilled and consistent"),
        "(f) hard pseudo labels": question("(f) hard pseudo labels"),
        "(g) `kl`": question("(g) kl"),
        "(g) `cwd`": question("(g) cwd"),
    },
    (STUDIES, "46 labels, block b"): {
        "another student": other("lraspp"),
        "another student, 1,500 iterations": other("lraspp, 1500 iterations"),
        "another size": other("288x384"),
    },
    (STUDIES, "trained on"): {
        "all of train": compared("E6", "all", 2),
        "all but the sequence of val": compared("E6", "apart", 2),
    },
    (STUDIES, "distilled over labels only"): {
        "all of train": resampled("all"),
        "all but the sequence of val": resampled("apart"),
    },
    (STUDIES, "short trainings"): {
        "labels only": means("E1", "plain, 4 views", "plain, 16 views"),
        "`dist`, control": means("E1", "dist of labels, 4 views", "dist of labels, 16 views"),
        "`dist`, distilled": means("E1", "dist of the teacher, 4 views", "dist of the teacher, 16 views"),
        "labels only, with `dice`": means("E1", "dice, 4 views", None),
        "labels only, with `lovasz`": means("E1", "lovasz, 4 views", None),
        "labels only, labels smoothed by 0.1": means("E1", "label smoothing 0.1, 4 views", None),
    },
    (STUDIES, "long trainings"): {
        "labels only": ["", *means("E3", "plain, 16 views, 4500 iterations")],
        "`dist`": means("E5", "dist", "dist, 16 views"),
        "`dist`, control": means("E5", None, "dist of labels, 16 views"),
        "`cwd`": means("E5", "cwd", "cwd, 16 views"),
        "`cwd`, control": means("E5", None, "cwd of labels, 16 views"),
        "`hint` and `dist`": means("E5", "hint and dist", None),
        "`cosine`": means("E5", "cosine", None),
        "`hint`": means("E5", "hint", None),
        "`pseudo`": means("E5", "pseudo", None),
        "`kl`, T = 1, CE 0.3": means("E5", "kl, T = 1, CE 0.3", None),
    },
    (STUDIES, "the cache holds"): {
        "whole images, warped (`live-cpu.json`)": paired("live-cpu.json"),
        "16 views, replayed (`live-replay-cpu.json`)": paired("live-replay-cpu.json"),
    },
    (STUDIES, "method"): {name: adapted(row) for name, row in ADAPT["summary"]["final"].items()},
    (STUDIES, "labels of CamVid"): {name: first_scores(labels) for labels, name in FIRST.items()},
    (STUDIES, "features first"): {
        f"{kind}, {name}": first_gains(arm, labels)
        for labels, name in FIRST.items()
        for arm, kind in (("fp16", "float16"), ("uint8", "8 bits"), ("similarity", "similarities"))
    },
    (STUDIES, "student"): {
        "one network for each task": task_row("segmentation", "depth"),
        "`kdcache:hydra` for both, from labels": task_row("both"),
        "`kdcache:hydra` for both, and a cached teacher": task_row("taught"),
    },
    (CHOOSING, "`--codec`"): {f"`{row['codec']}`": codec_row(row) for row in result("codecs-cpu.json")["codecs"]},
    (CHOOSING, "ViT-S, 14x14 tokens of 384 channels"): {
        flags: [f"{result('feature-bytes-cpu.json')['jobs'][job]['bytes_per_record']:,}"]
        for flags, job in (
            ("`--features last`", "fp16"),
            ("`--features last --feature-dtype uint8`", "uint8"),
            ("`--statistics similarity:last`", "similarity"),
        )
    },
    (CHOOSING, "array"): {
        name: [what, f"{size:,} B"]
        for name, what, size in (
            ("targets, all classes", "C h w", 2 * 11 * 72 * 96),
            ("pixels", "3 H W, of 1 byte", 3 * 288 * 384),
            ("labels", "H W, of 1 byte", 288 * 384),
            ("`--raw-logits`", "h w, of 4 bytes", 4 * 72 * 96),
            ("`--features head` of `kdcache:base`", "64 channels at stride 4", 2 * 64 * 72 * 96),
            ("`--features stage4` of `kdcache:base`", "256 channels at stride 32", 2 * 256 * 9 * 12),
            ("`--statistics at:stage4`", "one channel at stride 32", 2 * 9 * 12),
            ("full-resolution logits, never stored", "C H W", 2 * 11 * 288 * 384),
        )
    }
    | {
        "targets, top-k": [
            "k h w, one more byte per index, and h w for the tail",
            f"{(2 * 8 + 8 + 2) * 72 * 96:,} B (k = 8 of 150 classes)",
        ]
    },
    (KERNELS, "batch x classes x size, stride 4"): dict(
        zip(
            ("4 x 11 x 288²", "2 x 21 x 512²", "4 x 21 x 512²", "1 x 150 x 512², k = 8"),
            map(loss_row, result("kernels-cpu.json")["rows"]),
            strict=True,
        )
    ),
    (KERNELS, "labels, stride"): {name: small(*case) for name, case in SMALL.items()},
}
"""Page and first heading of a table -> first cell of a row -> its other cells, as the results give them."""


def test_the_sentence_on_46_labels_is_the_result_s() -> None:
    first, nested, mixed = re.findall(r"(?:what|blocks:|ClassMix:) (\d+)", FEW["sentence"])
    words = " ".join(PAGES[STUDIES].split())
    assert f"46 labels with kdcache reach what {first} labels reach without." in words
    assert f"If labels only uses ClassMix, they reach what {mixed} labels reach." in words
    assert f"{first} labels reach without" in PAGES[BENCHMARKS]
    assert f"{nested} for nested blocks, {mixed} with ClassMix" in PAGES[BENCHMARKS]
    assert f"If only nested blocks count, they reach what {nested} labels reach." in words


def table(page: str, heading: str) -> str:
    found = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[ |:-]*\n((?:\|.*\n?)*)", PAGES[page], re.MULTILINE)
    assert found is not None, f"{page} has no table of {heading}"
    return found[1]


@pytest.mark.parametrize(("page", "heading"), TABLES, ids=str)
def test_tables_are_the_results(page: str, heading: str) -> None:
    rows = [re.split(r" ?\| ?", line.strip("|").strip(" ")) for line in table(page, heading).splitlines()]
    expected = TABLES[page, heading]
    assert {
        cells[0]: (cells[1:] + len(expected[cells[0]]) * [""])[: len(expected[cells[0]])] for cells in rows
    } == expected


def plain(page: str) -> str:
    """A page without code, links and the tables that are checked."""
    text = PAGES[page]
    for checked, heading in TABLES:
        text = text.replace(table(checked, heading), "") if checked == page else text
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)|`[^`\n]*`|arXiv [\d.]+", "", text)
    return text.replace(MINUS, "-")


def citing() -> Iterator[str]:
    names = {path.name for path in RESULTS.glob("*.json")}
    for page, text in PAGES.items():
        if page in FRONT or names & set(re.findall(r"[\w-]+\.json", text)):
            yield page


@pytest.mark.parametrize("page", list(citing()))
def test_a_page_has_no_other_figures(page: str) -> None:
    known = {text.split()[0] for _, _, text, pages in FIGURES if page in pages} | CONSTANTS.get(page, set())
    known |= {number.lstrip("+-") for number in NUMBER.findall(judged(page))}
    found = {number.lstrip("+-") for number in NUMBER.findall(plain(page))}
    assert sorted(found - known) == []


def judged(page: str) -> str:
    """The table of the test split, which tests/docs/test_front.py compares."""
    heading = "| labels | labels only, Seq05VD |" if page == STUDIES else "| mIoU on Seq05VD"
    return PAGES[page].partition(heading)[2].partition("\n\n")[0].replace(MINUS, "-")
