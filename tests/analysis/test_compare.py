"""Comparisons of real runs: their numbers, what is kept, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kdcache.analysis.compare import CompareOptions, adjust_rows, choose_baseline, comparable_split, compare
from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.groups import CONTROL, Group
from kdcache.analysis.report.summary import headline
from kdcache.analysis.runs import Entry
from kdcache.analysis.statistics import Difference, Spread
from kdcache.analysis.stored_evaluations import EvalSettings, data_digest, memory_errors
from kdcache.analysis.tables import legend, to_markdown
from kdcache.data import fold_alone, open_split
from kdcache.errors import DataError, KDCacheError, MismatchError, ModelError, RecipeError
from kdcache.metrics import evaluate_model, evaluate_tasks
from kdcache.metrics.cost import Cost
from kdcache.models.run import load_run
from kdcache.tasks import SEGMENTATION

QUICK = CompareOptions(repeats=0)


def options(judging: EvalSettings | None = None, **settings: object) -> CompareOptions:
    return CompareOptions(judging=judging or EvalSettings(), repeats=0, **settings)


def rows(comparison: Comparison) -> dict[str, Row]:
    return {row.name: row for row in comparison.rows}


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, what is not kept cannot be had."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr("kdcache.analysis.stored_evaluations.evaluate_tasks", refuse)


def test_the_numbers_are_those_of_the_runs(world: Path, derive: Callable[..., Path]) -> None:
    for seed in (0, 1):
        derive(f"kl-{seed}", of=f"none-{seed}", method="kl", noise=0.05)
    found = compare([world / "runs"], options=QUICK)
    split = open_split(world / "data", "val")
    expected = {}
    for run in sorted((world / "runs").iterdir()):
        model, about = load_run(run)
        expected[run.name] = evaluate_model(model, split, about.size)
    assert list(rows(found)) == ["kl", "none"]
    assert found.images == 6
    for name, row in rows(found).items():
        runs = [expected[f"{name}-{seed}"] for seed in (0, 1)]
        assert [score.metrics.miou for score in row.runs] == [one.miou for one in runs]
        assert row.miou.mean == pytest.approx(np.mean([one.miou for one in runs]))
        assert row.miou.std == pytest.approx(np.std([one.miou for one in runs], ddof=1))
        assert [iou.mean for iou in row.iou] == pytest.approx(np.nanmean([one.iou for one in runs], 0), nan_ok=True)
    kl, none = rows(found)["kl"], rows(found)["none"]
    assert (kl.baseline, none.baseline, none.difference) == (False, True, None)
    assert kl.difference is not None
    assert (kl.difference.baseline, kl.difference.paired, kl.difference.runs) == ("none", True, 2)
    assert kl.difference.mean == pytest.approx(kl.miou.mean - none.miou.mean)
    assert [gap.mean for gap in kl.class_differences] == pytest.approx(
        [a.mean - b.mean for a, b in zip(kl.iou, none.iou, strict=True)], nan_ok=True
    )
    tested = [gap for gap in kl.class_differences if not math.isnan(gap.p)]
    assert {gap.comparisons for gap in tested} == {len(tested)}
    assert kl.cost.parameters == none.cost.parameters == sum(p.numel() for p in model.parameters())


def test_a_network_is_measured_once(world: Path, derive: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What taught it costs nothing when it runs: equal rows show the same figures."""
    derive("kl-0", method="kl")
    measured = []
    monkeypatch.setattr(
        "kdcache.analysis.compare.measure_cost",
        lambda *words, **more: measured.append(words) or Cost((1, 1), 1, 2, None),
    )
    found = compare([world / "runs"], options=QUICK)
    assert len(measured) == 1
    assert found.rows[0].cost is found.rows[1].cost


def test_a_comparison_is_plain_json(world: Path) -> None:
    found = compare([world / "runs"], options=QUICK)
    text = json.dumps(found.to_json(), allow_nan=False)
    (row,) = json.loads(text)["rows"]
    assert [one["seed"] for one in row["runs"]] == [0, 1]
    assert row["classes"][0]["iou"]["mean"] == found.rows[0].iou[0].mean
    assert [one["name"] for one in row["classes"]] == list(found.class_names)


@pytest.mark.usefixtures("no_evaluation")
def test_what_was_evaluated_is_kept(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr("kdcache.analysis.stored_evaluations.evaluate_tasks", evaluate_tasks)
        first = compare([world / "runs"], options=QUICK)
    again = compare([world / "runs"], options=QUICK)
    assert [one.reused for one in first.rows[0].runs] == [False, False]
    assert [one.reused for one in again.rows[0].runs] == [True, True]
    assert again.rows[0].iou == first.rows[0].iou
    elsewhere = Path(shutil.copytree(world / "data", world / "moved"))
    moved = compare([world / "runs"], str(elsewhere), "val", QUICK)
    assert moved.rows[0].runs[0].reused


def retrained(run: Path, data: Path, which: str = "best") -> None:
    weights = load_file(run / f"{which}.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"].flip(0)
    save_file(weights, run / f"{which}.safetensors")


def relabelled(run: Path, data: Path) -> None:
    path = next((data / "labels/val").glob("*.png"))
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)


def repainted(run: Path, data: Path) -> None:
    path = next((data / "images/val").glob("*.png"))
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def damaged(run: Path, data: Path) -> None:
    (run / "evaluation-val.json").write_text("{")


def of_another_version(run: Path, data: Path) -> None:
    """What `kdcache evaluate` alone writes names no digest."""
    path = run / "evaluation-val.json"
    found = json.loads(path.read_text())
    del found["data_sha256"]
    path.write_text(json.dumps(found))


def without_counts(run: Path, data: Path) -> None:
    (run / "evaluation-val.npz").unlink()


def counts_of_another(run: Path, data: Path) -> None:
    shutil.copy(run.with_name("none-1") / "evaluation-val.npz", run)


KEPT_OF_ANOTHER = [retrained, relabelled, repainted, damaged, of_another_version, without_counts, counts_of_another]


@pytest.mark.parametrize("change", KEPT_OF_ANOTHER)
def test_what_is_kept_of_something_else_is_not_used(world: Path, change: Callable[[Path, Path], None]) -> None:
    run = world / "runs/none-0"
    compare([world / "runs"], options=QUICK)
    change(run, world / "data")
    found = compare([run], options=QUICK).rows[0].runs[0]
    model, about = load_run(run)
    assert not found.reused
    assert found.metrics.miou == evaluate_model(model, open_split(world / "data", "val"), about.size).miou


def test_another_size_other_weights_and_fresh_are_evaluated(world: Path) -> None:
    run = world / "runs/none-0"
    retrained(run, world / "data", "last")
    compare([run], options=QUICK)
    for judging in (EvalSettings(size=(32, 48)), EvalSettings(which="last"), EvalSettings(fresh=True)):
        assert not compare([run], options=options(judging)).rows[0].runs[0].reused
    kinds = ("evaluation-val", "evaluation-val-32x48", "evaluation-val-last")
    assert {path.name for path in run.glob("evaluation-*")} == {f"{k}{end}" for k in kinds for end in (".json", ".npz")}
    assert compare([run], options=options(EvalSettings(size=(32, 48)))).rows[0].runs[0].reused
    assert compare([run], options=QUICK).rows[0].runs[0].reused


def test_names_follow_their_values_when_ids_are_permuted(world: Path) -> None:
    """The same pictures and the same model, its classes in another order: every name keeps its number."""
    order = [4, 2, 0, 6, 1, 5, 3]  # the old id in each new place
    plain = compare([world / "runs/none-0"], options=QUICK)
    new_ids = np.arange(256, dtype=np.uint8)
    new_ids[order] = np.arange(7)
    lines = (world / "data/classes.txt").read_text().splitlines()
    (world / "data/classes.txt").write_text("\n".join(lines[old] for old in order))
    for path in (world / "data/labels").rglob("*.png"):
        Image.fromarray(new_ids[np.asarray(Image.open(path))]).save(path)
    run = world / "runs/none-0"
    with pytest.raises(MismatchError, match="their order"):
        compare([run], options=QUICK)
    about = json.loads((run / "model.json").read_text())
    for key in ("class_names", "class_colours"):
        about[key] = [about[key][old] for old in order]
    (run / "model.json").write_text(json.dumps(about))
    weights = load_file(run / "best.safetensors")
    for key in ("classifier.weight", "classifier.bias"):
        weights[key] = weights[key][order]
    save_file(weights, run / "best.safetensors")
    moved = compare([run], options=QUICK)
    assert moved.class_names != plain.class_names
    before, after = (
        dict(zip(one.class_names, [iou.mean for iou in one.rows[0].iou], strict=True)) for one in (plain, moved)
    )
    assert len({value for value in before.values() if not math.isnan(value)}) >= 4
    assert {name: after[name] for name in before} == pytest.approx(before, nan_ok=True)
    assert moved.rows[0].miou.mean == pytest.approx(plain.rows[0].miou.mean)


def test_the_teacher_stands_apart(world: Path, derive: Callable[..., Path]) -> None:
    teacher = derive("big", method="none", lr=1.0)
    derive("kl-0", method="kl", noise=3.0)
    found = rows(compare([world / "runs"], options=options(teacher=str(teacher))))
    assert list(found) == ["kl", "none", "teacher"]
    assert [found[name].teacher for name in found] == [False, False, True]
    assert found["teacher"].difference is not None
    assert found["teacher"].difference.baseline == "none"
    comparison = compare([world / "runs/kl-0"], options=options(teacher=str(teacher)))
    assert comparison.best(lambda row: row.miou.mean) == comparison.rows[0].miou.mean < comparison.rows[1].miou.mean
    also_named = compare([world / "runs/kl-0", teacher], options=options(teacher=str(teacher)))
    assert [row.name for row in also_named.rows] == [row.name for row in comparison.rows]
    assert f"{teacher} has no row of its own: it is the --teacher" in also_named.notes


def test_verdicts_of_all_rows_are_adjusted_together() -> None:
    """Students among themselves, their classes among themselves; the teacher is no contestant."""

    def judged(name: str, *p: float, teacher: bool = False) -> Row:
        total, *classes = (Difference(0.1, 0.05, one, "none", 3, paired=True, adjusted=one) for one in p)
        row = Row(name, "m", {}, (), Cost((1, 1), 1, 2, None), teacher, False, class_differences=tuple(classes))
        return row.with_gaps(SEGMENTATION, baseline=total)

    none = judged("none", 1.0).with_gaps(SEGMENTATION, baseline=None)
    rows = (
        judged("a", 0.01, 0.01, 0.2),
        none,
        judged("t", 0.001, 0.3, 0.3, teacher=True),
        judged("b", 0.04, 0.3, 0.012),
    )
    a, same, teacher, b = adjust_rows(rows)
    assert (same, teacher) == (none, rows[2])
    assert [(one.difference.comparisons, one.difference.adjusted) for one in (a, b)] == [(2, 0.02), (2, 0.04)]
    assert [gap.comparisons for one in (a, b) for gap in one.class_differences] == [4] * 4
    assert [gap.adjusted for one in (a, b) for gap in one.class_differences] == pytest.approx([0.04, 0.4, 0.4, 0.04])


def test_a_row_is_measured_against_its_own_control(world: Path, derive: Callable[..., Path]) -> None:
    """The same terms with labels in the teacher's place; both against labels alone, all adjusted together."""
    for seed in (0, 1):
        derive(f"dist-{seed}", method="dist", seed=seed, noise=0.05)
        derive(f"control-{seed}", method="dist", seed=seed, teacher="labels", noise=0.1)
        derive(f"kl-{seed}", method="kl", seed=seed)
    names = [f"{kind}-{seed}" for kind in ("none", "kl", "dist", "control") for seed in (0, 1)]
    comparison = compare([world / "runs" / name for name in names], options=options())
    found = rows(comparison)
    control = f"dist, {CONTROL}"
    assert list(found) == ["none", "kl", "dist", control]
    assert found["dist"].control is not None
    assert found["dist"].control.baseline == control
    assert found["dist"].control.mean == pytest.approx(found["dist"].miou.mean - found[control].miou.mean)
    assert (found["kl"].control, found["none"].control, found[control].control) == (None, None, None)
    assert found[control].baseline
    assert found[control].difference is not None
    assert {gap.comparisons for gap in (found["dist"].control, found["dist"].difference) if gap is not None} == {4}
    assert found["dist"].to_json(comparison.class_names)["control"]["baseline"] == control
    table = to_markdown(comparison)
    assert table.count(f"| dist | {control} |") == 1
    assert "what the teacher adds" in table
    assert "(baseline)" not in next(line for line in table.splitlines() if line.startswith(f"| {control}"))
    best = replace(found["dist"], scores={SEGMENTATION: {"miou": Spread.of([0.9])}})
    _, _, reservations = headline(replace(comparison, rows=(found["none"], best, found[control])))
    assert any("its control, the same loss with labels in the teacher's place" in text for text in reservations)


def test_what_makes_numbers_worth_little_is_said(world: Path, derive: Callable[..., Path]) -> None:
    run = world / "runs/none-1"
    weights = load_file(run / "best.safetensors")
    weights["classifier.weight"].zero_()
    weights["classifier.bias"].zero_()
    weights["classifier.bias"][2] = 1
    save_file(weights, run / "best.safetensors")
    for seed in (0, 1):
        copy = derive(f"kl-{seed}", method="kl")
        (copy / "recipe.toml").write_text((copy / "recipe.toml").read_text().replace("seed = 0", f"seed = {seed}"))
    found = compare([world / "runs"], options=QUICK)
    alike, note = found.notes
    assert alike.startswith("the 2 runs of kl score exactly alike")
    assert note.startswith("1 of 2 runs of none collapsed: ")
    assert f"{run} predicts {found.class_names[2]} alone" in note
    assert note in legend(found)


def test_each_model_has_its_own_baseline(world: Path, derive: Callable[..., Path]) -> None:
    derive("kl-0", method="kl", lr=0.002)
    derive("other-0", method="none", lr=0.002)
    derive("big-0", model="kdcache:big", method="kl")
    found = rows(compare([world / "runs"], options=QUICK))
    base = {name: row.difference and row.difference.baseline for name, row in found.items()}
    kl, big, near, far = (next(name for name in found if all(word in name for word in words)) for words in (
        ("kdcache:tiny", "kl"), ("kdcache:big",), ("none", "lr 0.002"), ("none", "lr 0.004"),
    ))  # fmt: skip
    assert base == {kl: near, big: None, near: None, far: None}
    for name in ("none-0", far):
        named = rows(compare([world / "runs"], options=options(baseline=name)))
        assert {name for name, row in named.items() if row.difference is None} == {far}
        assert {name for name, row in named.items() if row.baseline} == {far}


def test_a_teacher_is_measured_against_the_only_baseline_there_is() -> None:
    def group(name: str, method: str, **about: bool) -> Group:
        return Group(name, (Entry(name, None, {"method": method, "model": "m"}),), {}, **about)

    teacher, one, two = group("t", "none", teacher=True), group("a", "none"), group("b", "none")
    student = group("kl", "kl")
    assert choose_baseline(teacher, [one, student, teacher]) is one
    assert choose_baseline(teacher, [one, two, student, teacher]) is None
    assert choose_baseline(teacher, [student, teacher]) is None
    assert choose_baseline(student, [student, teacher]) is None
    assert choose_baseline(one, [one, two], "a") is None
    assert choose_baseline(two, [one, two], "a") is one


def test_each_run_on_the_fold_that_it_left_out(world: Path, derive: Callable[..., Path]) -> None:
    runs = [derive(f"cv-{fold}", fold=f"{fold}/2", noise=0.1) for fold in (0, 1)]
    found = compare(runs, str(world / "data"), "train", options(own_fold=True))
    (row,) = found.rows
    for fold, (run, score) in enumerate(zip(runs, row.runs, strict=True)):
        model, about = load_run(run)
        part = fold_alone(open_split(world / "data", "train"), fold, 2)
        assert score.metrics.miou == evaluate_model(model, part, about.size).miou
        assert (run / f"evaluation-train-fold-{fold}-of-2.json").is_file()
    assert row.miou.runs == 2
    # A teacher that was trained elsewhere left out no fold: it is judged on all of the split.
    _, apart = compare(
        runs, str(world / "data"), "train", options(own_fold=True, teacher=str(world / "runs/none-0"))
    ).rows
    model, about = load_run(world / "runs/none-0")
    assert apart.teacher
    assert apart.miou.mean == evaluate_model(model, open_split(world / "data", "train"), about.size).miou
    with pytest.raises(RecipeError, match="all samples"):
        compare([world / "runs/none-0"], str(world / "data"), "train", options(own_fold=True))


def test_each_run_on_the_sequences_that_it_left_out(world: Path, derive: Callable[..., Path]) -> None:
    settings = {"folds_by": "(.)$", "noise": 0.1}
    runs = [derive(f"cv-{fold}", fold=f"{fold}/2", **settings) for fold in (0, 1)]
    (row,) = compare(runs, str(world / "data"), "train", options(own_fold=True)).rows
    for fold, (run, score) in enumerate(zip(runs, row.runs, strict=True)):
        model, about = load_run(run)
        part = fold_alone(open_split(world / "data", "train"), fold, 2, "(.)$")
        assert score.metrics.miou == evaluate_model(model, part, about.size).miou
        assert score.fold == f"{fold}/2 by (.)$"


def test_a_folds_teacher_is_judged_on_its_fold_alone(world: Path, derive: Callable[..., Path]) -> None:
    """Its training part would flatter it."""
    students = [derive(f"cv-{fold}", fold=f"{fold}/2", noise=0.1) for fold in (0, 1)]
    teacher = Path(shutil.move(derive("big", fold="1/2", method="kl", noise=0.2), world / "teacher"))
    found = compare(students, str(world / "data"), "train", options(own_fold=True, teacher=str(teacher)))
    (score,) = found.rows[1].runs
    split = open_split(world / "data", "train")
    model, about = load_run(teacher)
    own, others, whole = (
        evaluate_model(model, part, about.size) for part in (fold_alone(split, 1, 2), fold_alone(split, 0, 2), split)
    )
    assert found.rows[1].teacher
    assert score.metrics == own
    assert len({own.miou, others.miou, whole.miou}) == 3


def test_each_fold_has_data_of_its_own(world: Path, derive: Callable[..., Path]) -> None:
    """An evaluation on one fold is no evaluation on another, whoever trained the weights."""
    runs = [derive(f"cv-{fold}", fold=f"{fold}/2") for fold in (0, 1)]
    compare(runs, str(world / "data"), "train", options(own_fold=True))
    said = [json.loads((run / f"evaluation-train-fold-{fold}-of-2.json").read_text()) for fold, run in enumerate(runs)]
    split = open_split(world / "data", "train")
    assert [one["data_sha256"] for one in said] == [data_digest(fold_alone(split, fold, 2)) for fold in (0, 1)]
    assert said[0]["data_sha256"] != said[1]["data_sha256"] != data_digest(split)
    assert [one["fold"] for one in said] == ["0/2", "1/2"]
    # The weights are the same: what is kept of fold 0, brought to the run that left out fold 1, is not taken.
    (runs[1] / "evaluation-train-fold-1-of-2.json").unlink()
    shutil.copy(runs[0] / "evaluation-train-fold-0-of-2.json", runs[1] / "evaluation-train-fold-1-of-2.json")
    (row,) = compare(runs, str(world / "data"), "train", options(own_fold=True)).rows
    assert [one.reused for one in row.runs] == [True, False]


def test_cost_is_that_of_each_rows_own_size(world: Path, derive: Callable[..., Path]) -> None:
    small = derive("kl-0", method="kl", size=[24, 32])
    about = json.loads((small / "model.json").read_text())
    (small / "model.json").write_text(json.dumps(about | {"size": [24, 32]}))
    found = rows(compare([world / "runs"], options=QUICK))
    large, half = found["none"].cost, found["kl"].cost
    assert (large.size, half.size) == ((48, 64), (24, 32))
    assert large.flops == pytest.approx(4 * half.flops, rel=0.05)
    (one, two) = compare([world / "runs"], options=options(EvalSettings(size=(32, 48)))).rows
    assert one.cost.size == two.cost.size == (32, 48)


def test_a_model_that_no_run_has_trained(world: Path) -> None:
    spec = f"kdcache:tiny@{world}/runs/none-0/best.safetensors"
    found = compare([world / "runs/none-0", spec], options=options(EvalSettings(size=(48, 64))))
    assert [row.name for row in found.rows] == ["none-0", spec]
    assert found.rows[0].iou == found.rows[1].iou
    assert found.rows[1].difference is None


@pytest.mark.parametrize("named", [False, True])
def test_weights_named_with_a_run_are_a_row_of_their_own(named: bool, world: Path, derive: Callable[..., Path]) -> None:
    runs = [derive(f"ema-{seed}", of=f"none-{seed}") for seed in (0, 1)]
    for run in runs:
        if named:
            (run / "recipe.toml").write_text('name = "Plain"\n' + (run / "recipe.toml").read_text())
        averages = {name: value / 2 for name, value in load_file(run / "last.safetensors").items()}
        save_file(averages, run / "best-ema.safetensors")
    texts = [*map(str, runs), *(f"{run}@best-ema" for run in runs)]
    found = rows(compare(texts, options=QUICK))
    assert list(found) == (["Plain", "Plain (best-ema)"] if named else ["weights best", "weights best-ema"])
    plain, averaged = found.values()
    assert [score.run for score in averaged.runs] == texts[2:]
    split = open_split(world / "data", "val")
    for run, score in zip(runs, averaged.runs, strict=True):
        model, description = load_run(f"{run}@best-ema")
        assert score.metrics == evaluate_model(model, split, description.size)
        assert json.loads((run / "evaluation-val-best-ema.json").read_text())["weights"] == "best-ema"
    assert plain.miou.mean != averaged.miou.mean
    again = compare(texts, options=QUICK)
    assert all(score.reused for row in again.rows for score in row.runs)


def test_the_difference_has_an_interval_over_images_or_sequences(world: Path, derive: Callable[..., Path]) -> None:
    for seed in (0, 1):
        derive(f"kl-{seed}", of=f"none-{seed}", method="kl", noise=0.3)
    over_images = rows(compare([world / "runs"], options=QUICK))["kl"].difference
    by_hundreds = rows(compare([world / "runs"], options=options(blocks_by=r"(\d)$")))["kl"].difference
    assert over_images is not None
    assert by_hundreds is not None
    images, sequences = over_images.resampled, by_hundreds.resampled
    assert images is not None
    assert sequences is not None
    assert (over_images.over, images.over, images.count) == ("seeds", "images", 6)
    assert (sequences.over, sequences.count) == ("sequences", 6)
    assert (images.low, images.high) == (sequences.low, sequences.high)
    assert images.low < over_images.mean < images.high
    with np.load(world / "runs/kl-0/evaluation-val.npz") as content:
        ious = content["hits"].sum(0) / content["unions"].sum(0)
        assert content["ids"].tolist() == list(open_split(world / "data", "val").ids)
    kept = json.loads((world / "runs/kl-0/evaluation-val.json").read_text())
    assert [row["iou"] for row in kept["classes"]] == pytest.approx(ious.tolist())


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "Invalid value of --blocks-by"),
        ("nothing", "--blocks-by .* names no sequence"),
        ("^.", "a single sequence in the 6 ids"),
    ],
)
def test_sequences_that_cannot_be(pattern: str, words: str, world: Path) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        compare([world / "runs"], options=options(blocks_by=pattern))
    assert pattern in str(caught.value)


def test_a_folder_that_may_not_be_written_to(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    found = compare([world / "runs/none-0"], options=QUICK)
    assert any("could not be kept" in note for note in found.notes)


def other_val(world: Path, derive: Callable[..., Path]) -> list[object]:
    return [derive("other", val="scenes:48x64,val=2"), world / "runs/none-1"]


def other_split(world: Path, derive: Callable[..., Path]) -> list[object]:
    return [derive("other", val_split="train"), world / "runs/none-1"]


def other_classes(world: Path, derive: Callable[..., Path]) -> list[object]:
    run = derive("other")
    about = json.loads((run / "model.json").read_text())
    about["class_names"][0] = "heaven"
    (run / "model.json").write_text(json.dumps(about))
    return [run]


def no_weights(world: Path, derive: Callable[..., Path]) -> list[object]:
    (derive("other") / "best.safetensors").unlink()
    return [world / "runs"]


def no_model(world: Path, derive: Callable[..., Path]) -> list[object]:
    (derive("other") / "model.json").unlink()
    return [world / "runs"]


def no_data(world: Path, derive: Callable[..., Path]) -> list[object]:
    run = derive("other")
    (run / "recipe.toml").unlink()
    return [run]


def no_toml(world: Path, derive: Callable[..., Path]) -> list[object]:
    run = derive("other")
    (run / "recipe.toml").write_text("a = ")
    return [run]


def empty(world: Path, derive: Callable[..., Path]) -> list[object]:
    (world / "empty").mkdir()
    return [world / "empty"]


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (other_val, MismatchError, "was validated on"),
        (other_split, MismatchError, "split 'train'"),
        (other_classes, MismatchError, "heaven"),
        (no_weights, RecipeError, "other has no best.safetensors, only last"),
        (no_model, RecipeError, "other has no model.json"),
        (no_data, RecipeError, "Missing --data"),
        (no_toml, RecipeError, "recipe.toml"),
        (empty, RecipeError, "nor has any folder below it"),
        (lambda world, derive: [world / "nowhere"], RecipeError, "Run not found: .*nowhere"),
        (lambda world, derive: [world / "data/classes.txt"], RecipeError, "classes.txt is a file"),
        (lambda world, derive: ["kdcache:tiny"], ModelError, "Missing weights"),
    ],
)
@pytest.mark.usefixtures("no_evaluation")
def test_what_cannot_be_compared(
    world: Path, derive: Callable[..., Path], make: Callable, kind: type[KDCacheError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        compare(make(world, derive), options=QUICK)


@pytest.mark.usefixtures("no_evaluation")
def test_names_that_are_unknown(world: Path) -> None:
    with pytest.raises(RecipeError, match=r"'none-O'[\s\S]*Did you mean none-0"):
        compare([world / "runs/none-0"], options=options(baseline="none-O"))
    with pytest.raises(RecipeError, match="only the teacher was given"):
        compare([world / "runs/none-0"], options=options(teacher=str(world / "runs/none-0")))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_too_large_a_batch_is_told_with_a_smaller_one(error: Exception) -> None:
    with pytest.raises(ModelError, match="--batch-size 4"), memory_errors("cpu", 8):
        raise error
    with pytest.raises(ModelError, match="smaller --size"), memory_errors("cuda", 1):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("cpu", 8):
        raise RuntimeError("shapes do not fit")


def test_data_that_is_elsewhere_is_named_with_its_recipe_and_the_flag(tmp_path: Path) -> None:
    """A recipe's paths begin in the folder that the run was trained in."""
    run: Any = SimpleNamespace(text=str(tmp_path / "runs/student"), settings={"val": "data/camvid"})
    with pytest.raises(DataError) as caught:
        comparable_split([run], None, None)
    assert f"'data/camvid' in {run.text}/recipe.toml" in caught.value.problem
    assert "--data" in caught.value.fix
    run.run = None
    assert comparable_split([run], "scenes:32x48,train=2,val=2", None).split == "val"  # the fix
