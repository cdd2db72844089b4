"""Comparisons of real runs: their numbers, what is kept, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kdcache.data import fold_alone, open_split
from kdcache.errors import KDCacheError, MismatchError, ModelError, RecipeError
from kdcache.evaluate import evaluate_model
from kdcache.evaluate.compare import CompareOptions, compare
from kdcache.evaluate.comparison import Comparison, Row
from kdcache.evaluate.cost import Cost
from kdcache.evaluate.evaluation import Judging, memory_errors
from kdcache.models.run import load_run

QUICK = CompareOptions(repeats=0)


def options(judging: Judging | None = None, **settings: object) -> CompareOptions:
    return CompareOptions(judging=judging or Judging(), repeats=0, **settings)


def rows(comparison: Comparison) -> dict[str, Row]:
    return {row.name: row for row in comparison.rows}


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, what is not kept cannot be had."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr("kdcache.evaluate.evaluation.evaluate_model", refuse)


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
    assert kl.cost.parameters == none.cost.parameters == sum(p.numel() for p in model.parameters())


def test_a_network_is_measured_once(world: Path, derive: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What taught it costs nothing when it runs: equal rows show the same figures."""
    derive("kl-0", method="kl")
    measured = []
    monkeypatch.setattr(
        "kdcache.evaluate.compare.measure_cost",
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
        context.setattr("kdcache.evaluate.evaluation.evaluate_model", evaluate_model)
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


@pytest.mark.parametrize("change", [retrained, relabelled, repainted, damaged, of_another_version])
def test_what_is_kept_of_something_else_is_not_used(world: Path, change: Callable[[Path, Path], None]) -> None:
    run = world / "runs/none-0"
    compare([run], options=QUICK)
    change(run, world / "data")
    found = compare([run], options=QUICK).rows[0].runs[0]
    model, about = load_run(run)
    assert not found.reused
    assert found.metrics.miou == evaluate_model(model, open_split(world / "data", "val"), about.size).miou


def test_another_size_other_weights_and_fresh_are_evaluated(world: Path) -> None:
    run = world / "runs/none-0"
    retrained(run, world / "data", "last")
    compare([run], options=QUICK)
    for judging in (Judging(size=(32, 48)), Judging(which="last"), Judging(fresh=True)):
        assert not compare([run], options=options(judging)).rows[0].runs[0].reused
    names = {path.name for path in run.glob("evaluation-*")}
    assert names == {"evaluation-val.json", "evaluation-val-32x48.json", "evaluation-val-last.json"}
    assert compare([run], options=options(Judging(size=(32, 48)))).rows[0].runs[0].reused
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
    with pytest.raises(MismatchError, match="same order"):
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


def test_a_model_that_no_run_has_trained(world: Path) -> None:
    spec = f"kdcache:tiny@{world}/runs/none-0/best.safetensors"
    found = compare([world / "runs/none-0", spec], options=options(Judging(size=(48, 64))))
    assert [row.name for row in found.rows] == ["none-0", spec]
    assert found.rows[0].iou == found.rows[1].iou
    assert found.rows[1].difference is None


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
        (no_weights, RecipeError, "other has last"),
        (no_model, RecipeError, "other has no model.json"),
        (no_data, RecipeError, "no --data"),
        (no_toml, RecipeError, "recipe.toml"),
        (empty, RecipeError, "nor has any folder below it"),
        (lambda world, derive: [world / "nowhere"], RecipeError, "does not exist"),
        (lambda world, derive: [world / "data/classes.txt"], RecipeError, "classes.txt is a file"),
        (lambda world, derive: ["kdcache:tiny"], ModelError, "without weights"),
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
    with pytest.raises(RecipeError, match="did you mean none-0"):
        compare([world / "runs/none-0"], options=options(baseline="none-O"))
    with pytest.raises(RecipeError, match="did you mean kl-weight"):
        compare([world / "runs"], options=options(ignore=("kl-wight",)))
    with pytest.raises(RecipeError, match="besides the teacher"):
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
