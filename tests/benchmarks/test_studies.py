"""The queues effect.py, tasks.py, features_first.py, few_labels.py: their commands, scores, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kdcache.bench.timing import Spread
from kdcache.errors import RecipeError

CLASSES = [{"name": "sky", "iou": 0.5}, {"name": "car", "iou": None}]


def validation(step: int, miou: float, **more: float) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "miou": miou, "classes": CLASSES, **more}


def finished(*lines: dict[str, Any], **result: Any) -> Any:
    return SimpleNamespace(metrics=list(lines), result={"seconds": 12.6, "iterations": 20, **result})


# effect.py


@pytest.fixture
def effect(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("effect")


def test_the_score_is_the_last_iteration_s_in_percent(effect) -> None:
    run = finished(validation(10, 0.9, ema_miou=0.1), {"kind": "train"}, validation(20, 0.5, ema_miou=0.25))
    assert effect.scores(run) == {
        "miou": 50,
        "ema_miou": 25,
        "by_iteration": {10: 90, 20: 50},
        "classes": {"sky": 50},
        "seconds": 13,
    }
    metrics = SimpleNamespace(class_names=("sky", "car"), iou=(0.25, 0.75), miou=0.5)
    assert effect.percent(metrics) == {"miou": 50, "classes": {"sky": 25, "car": 75}}


def test_an_interval_is_students(effect) -> None:
    assert effect.interval([50.0, 52.0, 54.0]) == {"mean": 52, "half": 4.97, "runs": 3}
    assert effect.interval([50.0]) == {"mean": 50, "half": None, "runs": 1}


@pytest.fixture
def study(effect, options, tmp_path, monkeypatch) -> Any:
    """A study whose commands are kept and not run, and whose data, teachers and stores are there."""
    study = effect.Study(options(data="camvid", out=tmp_path, json=tmp_path / "study.json", minutes=60, mix=False))
    commands: list[tuple[str, str]] = []
    monkeypatch.setattr(effect, "kdcache", lambda words, live="", ends=0.0: commands.append((words, live)))
    monkeypatch.setattr(effect.Run, "open", lambda out: finished(validation(20, 0.5)))
    monkeypatch.setattr(study.folders, "data", lambda name: Path("data", name))
    return SimpleNamespace(own=study, commands=commands)


def test_an_arm_is_trained_by_its_flags_from_its_store_or_live(effect, study) -> None:
    arm = effect.Arm("E1", "an arm", "lite", "--method dist --augment replay", 100, data="dev", live="final")
    study.own.run(arm, 3)
    teacher, build, live_teacher, training = study.commands
    assert "train-teacher --data data/dev" in teacher[0]
    assert "--iterations 2000" in teacher[0], "lite0-large"
    assert "--teacher-size 288x384" in build[0]
    assert "--views 4" in build[0]
    assert "--iterations 1000" in live_teacher[0], "final"
    words, live = training
    assert live.endswith("teachers/final-dev-0")
    assert words.startswith("train-student --cache ")
    assert "--val data/dev" in words
    assert "--seed 3 --iterations 100 --val-every 20" in words
    assert "--method dist --augment replay" in words
    assert effect.STUDENT in words
    (row,) = study.own.rows
    assert (row["arm"], row["seed"], row["iterations"], row["miou"]) == ("an arm", 3, 100, 50)
    study.own.run(arm, 3)
    assert len(study.commands) == 4, "a row is not repeated"
    study.own.ends = 0
    study.own.run(arm, 4)
    assert len(study.commands) == 4, "time is up"


def test_an_arm_without_a_store_trains_from_files(effect, study) -> None:
    study.own.run(effect.Arm("E1", "files", "", "", 50), 0)
    ((words, live),) = study.commands
    assert words.startswith("train-teacher --data data/dev --size 144x192")
    assert live == ""


def test_a_command_has_one_thread_and_its_failure_is_shown(effect, monkeypatch) -> None:
    seen: list[Any] = []

    class Process:
        def __init__(self, command: Any, env: Any, **_: Any) -> None:
            seen.append((command, env))
            self.returncode = 2

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def communicate(self, timeout: Any = None) -> tuple[str, str]:
            return "so far", "error: no such flag"

    monkeypatch.setattr(effect, "subprocess", SimpleNamespace(Popen=Process, PIPE=None, TimeoutExpired=TimeoutError))
    with pytest.raises(SystemExit, match="no such flag"):
        effect.kdcache("train-student --lr 1", live="runs/teacher")
    ((command, env),) = seen
    assert (env["OMP_NUM_THREADS"], env["NUMBA_NUM_THREADS"]) == ("1", "1")
    assert command[1].endswith("live_teacher.py")
    assert command[2:] == ["runs/teacher", "train-student", "--lr", "1", "--trust"]


def test_rows_of_another_commit_are_refused(effect, options, tmp_path) -> None:
    common = {"theme": "effect", "machine": {"cpu": "Z80"}, "rows": []}
    (tmp_path / "a.json").write_text(json.dumps({**common, "commit": "1234567"}))
    given = options(data="camvid", out=tmp_path, json=tmp_path / "a.json", minutes=60, mix=False)
    with pytest.raises(RecipeError, match="its commit is 1234567"):
        effect.Study(given)
    given.mix = True
    assert effect.Study(given).also == [{"commit": "1234567", "cpu": "Z80"}]


# tasks.py


@pytest.fixture
def tasks(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tasks")


def test_the_first_calls_of_a_network_do_not_count(tasks, clock, monkeypatch) -> None:
    monkeypatch.setattr(tasks, "time", clock)
    order: list[str] = []
    times = {"a": iter([*[500.0] * tasks.WARM_UP, 3.0, 1.0, 8.0]), "b": iter([*[900.0] * tasks.WARM_UP, 5.0, 6.0, 7.0])}

    def call(name: str) -> None:
        order.append(name)
        clock.work(next(times[name]))

    paces = tasks.time_calls({name: lambda name=name: call(name) for name in times}, 3)
    assert tasks.WARM_UP >= 3
    assert order == ["a", "b"] * (tasks.WARM_UP + 3)
    assert [(pace.best, pace.p50, pace.repeats) for pace in paces.values()] == [
        (pytest.approx(1), pytest.approx(3), 3),
        (pytest.approx(5), pytest.approx(6), 3),
    ]
    with pytest.raises(RecipeError, match="Too few repeats for a median: 2"):
        tasks.time_calls({}, 2)


def test_the_shared_network_is_over_the_two_together(tasks) -> None:
    paces = {"segmentation": (1.0, 4.0, 9.0), "depth": (3.0, 6.0, 9.0), "both": (2.0, 8.0, 99.0)}
    found = tasks.costs({"segmentation": 40, "depth": 60, "both": 60}, {k: Spread.of(v) for k, v in paces.items()})
    assert (found["macs_over_two"], found["best_ms_over_two"], found["median_ms_over_two"]) == (0.6, 0.5, 0.8)
    assert (found["best_ms"]["both"], found["median_ms"]["depth"]) == (2, 6)


def test_the_cost_is_of_whole_predictions_of_one_image(tasks, monkeypatch) -> None:
    predicted: list[str] = []

    def time_calls(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, Spread]:
        for name, call in calls.items():
            call()
            predicted.append(name)
        return {name: Spread.of([1.0] * repeats) for name in calls}

    monkeypatch.setattr(tasks, "time_calls", time_calls)
    found = tasks.cost(3)
    assert predicted == ["segmentation", "depth", "both"]
    assert (found["repeats"], found["best_ms_over_two"]) == (3, 0.5)
    assert 0.5 < found["macs_over_two"] < 0.6, "multiply-adds do not depend on a clock"
    assert found["macs"]["both"] < found["macs"]["segmentation"] + found["macs"]["depth"]


def test_a_score_of_tasks_is_the_last_one(tasks) -> None:
    run = finished(validation(10, 0.9, depth_rmse=1.0), validation(20, 0.5, depth_rmse=2.00004))
    assert tasks.scores(run) == {
        "miou": 50,
        "depth_rmse": 2,
        "by_iteration": {10: {"miou": 90, "depth_rmse": 1}, 20: {"miou": 50, "depth_rmse": 2}},
        "seconds": 13,
    }


def test_arms_see_as_many_labelled_rows_of_a_task(tasks) -> None:
    rows = {arm: flags.split()[flags.split().index("--batch-size") + 1] for arm, flags in tasks.ARMS.items()}
    assert rows == {"segmentation": "8", "depth": "8", "both": "16", "taught": "16"}
    assert tasks.ARMS["taught"].count("depth-silog,weight=0.1") == 2


# features_first.py


@pytest.fixture
def first(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("features_first")


def test_arms_have_equal_label_steps_and_the_long_one_equal_steps_in_all(first, monkeypatch, tmp_path) -> None:
    folders = first.FeatureFolders(Path("camvid"), tmp_path, (20, 10))
    monkeypatch.setattr(folders, "pixels", lambda labels: f"labels-{labels}.zarr")
    monkeypatch.setattr(folders, "features", lambda arm: f"{arm}.zarr")
    monkeypatch.setattr(folders, "data", lambda name: name)
    monkeypatch.setattr(folders, "run", lambda row: SimpleNamespace(folder=f"run-{row.arm}-{row.labels}-{row.seed}"))
    words = {arm: folders.training(first.Row(arm, "46", 3)) for arm in ("scratch", "scratch long", *first.TEACHERS)}
    steps = {arm: text.split()[text.split().index("--iterations") + 1] for arm, text in words.items()}
    assert steps == {**dict.fromkeys(words, "10"), "scratch long": "30"}
    for arm, text in words.items():
        assert ("--init" in text) == (arm in first.TEACHERS)
        assert "--cache labels-46.zarr --val only-46-b --method none" in text
    assert "--init run-fp16-none-3@last" in words["fp16"]
    phase = folders.training(first.Row("fp16", "none", 3))
    assert "--cache fp16.zarr --method none --ce-weight 0 --term cosine,standardise=channels" in phase
    assert "--iterations 20" in phase
    assert "--term similarity,student_tap" in folders.training(first.Row("similarity", "none", 3))


def test_a_row_keeps_the_last_feature_loss_or_the_last_score(first) -> None:
    losses = [{"kind": "train", "feature_loss": loss} for loss in (0.1, 0.5, 0.25)]
    assert first.measured(first.Row("fp16", "none", 1), finished(*losses)) == {
        "arm": "fp16",
        "labels": "none",
        "seed": 1,
        "iterations": 20,
        "feature_loss": 0.25,
        "seconds": 13,
    }
    assert first.measured(first.Row("fp16", "46", 1), finished(validation(20, 0.5)))["miou"] == 50


# few_labels.py


def test_a_curve_has_all_scores_by_number_of_labels(script) -> None:
    few = script("few_labels")
    rows = [
        {"stage": "F1", "arm": "distilled, 46-a", "miou": 10.0},
        {"stage": "F1", "arm": "distilled, 46-b", "miou": 30.0},
        {"stage": "F3", "arm": "distilled, all", "miou": 50.0},
        {"stage": "F2", "arm": "distilled, 46-c", "miou": 99.0},
        {"stage": "F1", "arm": "control, 46-a", "miou": 99.0},
    ]
    assert few.curve(rows, "distilled") == {46: [10, 30], 266: [50]}
    assert few.curve(rows, "distilled", few.NESTED) == {46: [30], 266: [50]}
    assert few.trials_of([{"stage": "F0", "arm": "distilled: x", "flags": flags} for flags in "aab"])["distilled"] == 2


# study_results.py


def test_a_plot_is_of_the_fastest_run_and_three_seeds(script) -> None:
    results = script("study_results")
    rows = [
        {"stage": "E6", "arm": "plain, all", "seconds": seconds, "by_iteration": {"5": 10.0, "10": miou}}
        for seconds, miou in ((100, 50.0), (80, 52.0), (90, 54.0))
    ]
    (curve,) = results.curves(rows).values()
    assert curve == {"seeds": 3, "seconds": [40, 80], "miou": [10, 52], "half": [0, 4.968]}
    (two,) = results.curves(rows[:2]).values()
    assert two["half"] is None
