"""Loggers: what reaches TensorBoard and W&B, as their own readers see it; none can end a training."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.metrics import Metrics
from kdcache.metrics.figures import colour_ids
from kdcache.tasks import SEGMENTATION
from kdcache.training import Observer, make_config, train
from kdcache.training.run import trackers
from kdcache.training.run.metrics_log import Observers
from kdcache.training.run.trackers import Beginning, Loggers

Read = Callable[..., list[dict[str, Any]]]


class Notes(Observer):
    """Keeps what is told about loggers; stops the run after a step, as an error would."""

    def __init__(self, stop_after: int = 0) -> None:
        self.texts: list[str] = []
        self._stop_after = stop_after

    def note(self, text: str) -> None:
        if "--log" in text or text.startswith("wandb"):
            self.texts.append(text)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        if step == self._stop_after:
            raise StopError


class StopError(Exception):
    """As a power cut would."""


class Memory:
    """A logger that remembers, or breaks at a step."""

    def __init__(self, beginning: Beginning, breaks_at: int = 99) -> None:
        self.beginning = beginning
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, dict[str, Any]]] = []
        self.ended: bool | None = None
        self.breaks_at = breaks_at

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self.breaks_at:
            raise ConnectionError("no route to host\nand more")
        self.rows.append((step, dict(values)))

    def draw(self, step: int, pictures: Mapping[str, Any]) -> None:
        self.pictures.append((step, dict(pictures)))

    def close(self, completed: bool) -> None:
        self.ended = completed


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[Memory]:
    """What W&B would be told, and at `tensorboard` a logger that breaks at the fourth step."""
    made: list[Memory] = []

    def keep(beginning: Beginning, breaks_at: int = 99) -> Memory:
        made.append(Memory(beginning, breaks_at))
        return made[-1]

    monkeypatch.setitem(trackers.SINKS, "wandb", keep)
    monkeypatch.setitem(trackers.SINKS, "tensorboard", lambda beginning: keep(beginning, 4))
    monkeypatch.setattr(trackers, "check_loggers", lambda names: None)
    return made


def go(settings: dict[str, Any], run: Path, observer: Observer | None = None, *, resume: bool = False) -> list[str]:
    observer = observer or Notes()
    train(make_config(**settings), run, observer=observer, resume=resume)
    return observer.texts if isinstance(observer, Notes) else []


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def images(run: Path) -> dict[str, list[int]]:
    """The pictures of a run folder, and at which steps TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    return {tag: [event.step for event in shown.Images(tag)] for tag in shown.Tags()["images"]}


OF_TWO_TASKS = {"val/miou", "val/acc", "val/seg_miou", "val/depth_rmse"} | {
    f"train/{room}/{task}" for room in ("balance", "gradients") for task in ("segmentation", "depth")
}
"""Names under which a training of two tasks is looked for."""


@pytest.fixture
def two_tasks(settings: dict[str, Any]) -> dict[str, Any]:
    """A training of segmentation and depth, validated on both."""
    data = "scenes:32x48,train=6,val=3,depth=exact"
    return settings | {
        "verb": "train-student",
        "model": "kdcache:tiny+depth",
        "data": data,
        "val": data,
        "method": "depth-silog",
    }


# --- what is sent ------------------------------------------------------------------------------------------


def test_every_scalar_has_its_name(
    student: dict[str, Any], tmp_path: Path, memory: list[Memory], read_metrics: Read
) -> None:
    assert go(student | {"log": "wandb", "gradients_every": 3, "log_every": 2}, tmp_path / "my-run") == []
    (calls,) = memory
    assert calls.beginning.name == "my-run"
    assert calls.beginning.step == 0
    recipe = calls.beginning.recipe
    assert (recipe["model"], recipe["lr"], recipe["size"], recipe["iterations"]) == ("kdcache:tiny", 0.006, "32x48", 6)
    assert json.loads(json.dumps(recipe)) == recipe
    assert calls.ended is True

    def sent(room: str) -> list[tuple[int, dict[str, float]]]:
        return [(step, row) for step, row in calls.rows if next(iter(row)).startswith(room)]

    assert [step for step, _ in sent("train/")] == [2, 4, 6]
    assert [step for step, _ in sent("gradients/")] == [1, 4]
    assert [step for step, _ in sent("val/")] == [3, 6]
    for (step, row), line in zip(sent("train/"), read_metrics(tmp_path / "my-run", "train"), strict=True):
        assert row == {f"train/{name}": value for name, value in line.items() if name not in ("kind", "step")}
        assert {"train/loss", "train/ce", "train/kl", "train/lr", "train/images_per_second"} <= row.keys()
        assert step == line["step"]
    assert sent("gradients/")[0][1].keys() == {"gradients/ce", "gradients/kl"}
    for (_, row), line in zip(sent("val/"), read_metrics(tmp_path / "my-run", "validation"), strict=True):
        assert (row["val/miou"], row["val/acc"], row["val/macc"]) == (line["miou"], line["aacc"], line["macc"])
        assert row["val/seg_miou"] == line["miou"]
        classes = {f"val/iou/{entry['name']}": entry["iou"] for entry in line["classes"] if entry["iou"] is not None}
        assert {name: value for name, value in row.items() if name.startswith("val/iou/")} == classes


def test_a_class_that_does_not_occur_is_not_plotted(memory: list[Memory], tmp_path: Path) -> None:
    logger = Loggers(["wandb"], tmp_path, {}, lambda text: None)
    logger.started(step=0, iterations=1, parameters=1)
    nan = float("nan")
    metrics = Metrics(("sky", "bus"), (0.5, nan), (0.5, nan), (10, 0), 0.5, 0.5, 0.6)
    for ema in (False, True):
        logger.validated(1, SEGMENTATION, metrics, best=True, ema=ema)
    scores = {"miou": 0.5, "seg_miou": 0.5, "acc": 0.6, "macc": 0.5, "iou/sky": 0.5}
    assert memory[0].rows == [
        (1, {f"{place}/{name}": score for name, score in scores.items()}) for place in ("val", "val_ema")
    ]


def test_logging_changes_nothing(student: dict[str, Any], tmp_path: Path) -> None:
    assert go(student | {"log": "tensorboard"}, tmp_path / "one") == []
    go(student, tmp_path / "two")
    one, two = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_same_samples_are_drawn_at_every_validation(
    two_tasks: dict[str, Any], tmp_path: Path, memory: list[Memory]
) -> None:
    """Image, ground truth, prediction and errors of classes; three pictures of depth; of the weights as they are."""
    go(two_tasks | {"log": "wandb"}, tmp_path / "run")
    (first, pictures), (last, later) = memory[0].pictures
    assert (first, last) == (3, 6)
    assert pictures.keys() == later.keys()
    split = open_split(two_tasks["val"], "val")
    wanted = {f"samples/{name}/{task}" for name in split.ids for task in ("segmentation", "depth")}
    assert pictures.keys() == wanted
    height, width = 32, 48
    for name, picture in pictures.items():
        count = 4 if name.endswith("segmentation") else 3
        assert (picture.shape, picture.dtype) == ((height, count * (width + 4) - 4, 3), np.uint8)
    name = f"samples/{split.ids[0]}/segmentation"
    assert (pictures[name][:, :width] == split.image(0)).all()  # an image of the size that is trained on
    truth = colour_ids(split.label(0), split.classes.colours)
    assert (pictures[name][:, width + 4 : 2 * width + 4] == truth).all()
    assert any((pictures[name] != later[name]).any() for name in wanted)


# --- what fails --------------------------------------------------------------------------------------------


def test_a_logger_that_fails_is_said_once_and_the_training_goes_on(
    student: dict[str, Any], tmp_path: Path, memory: list[Memory], read_metrics: Read
) -> None:
    notes = go(student | {"log": ["tensorboard", "wandb"]}, tmp_path)
    assert notes == [
        "--log tensorboard failed and is left out from now on; metrics.jsonl continues "
        "(ConnectionError: no route to host)"
    ]
    broken, whole = memory
    assert max(step for step, _ in broken.rows) == 3
    assert broken.ended is None
    assert max(step for step, _ in whole.rows) == 6
    assert whole.ended is True
    assert len(read_metrics(tmp_path, "train")) == 6


def test_samples_that_cannot_be_drawn_end_no_training(tmp_path: Path, memory: list[Memory]) -> None:
    def fail() -> dict[str, Any]:
        raise MemoryError("no room\nfor it")

    notes: list[str] = []
    logger = Loggers(["wandb"], tmp_path, {}, notes.append, fail)
    logger.started(step=0, iterations=2, parameters=1)
    for step in (1, 2):
        metrics = Metrics(("sky",), (0.5,), (0.5,), (10,), 0.5, 0.5, 0.6)
        logger.validated(step, SEGMENTATION, metrics, best=True, ema=False)
    assert notes == ["no pictures of samples from now on: MemoryError: no room"]
    assert [step for step, _ in memory[0].rows] == [1, 2]


def test_one_that_cannot_begin_is_said_too(student: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(_: Beginning) -> Any:
        raise TimeoutError

    monkeypatch.setitem(trackers.SINKS, "tensorboard", refuse)
    (note,) = go(student | {"log": "tensorboard"}, tmp_path)
    assert "(TimeoutError: without a message)" in note


def test_a_training_that_breaks_off_is_told(student: dict[str, Any], tmp_path: Path, memory: list[Memory]) -> None:
    with pytest.raises(StopError):
        go(student | {"log": "wandb"}, tmp_path, Notes(stop_after=2))
    assert memory[0].ended is False


@pytest.mark.parametrize("name", trackers.SINKS)
def test_a_missing_package_is_named_before_anything_is_written(
    name: str, student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *rest: None if asked == name else found(asked, *rest)
    )
    with pytest.raises(RecipeError) as caught:
        go(student | {"log": name}, tmp_path / "run")
    assert f"pip install '.[{name}]'" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_two_tasks_reach_their_names_also_those_of_the_moving_average(
    two_tasks: dict[str, Any], tmp_path: Path, memory: list[Memory], read_metrics: Read
) -> None:
    go(two_tasks | {"log": "wandb", "gradients_every": 3, "ema": 0.5}, tmp_path / "run")
    sent: dict[str, list[float]] = {}
    for _, row in memory[0].rows:
        for name, value in row.items():
            sent.setdefault(name, []).append(value)
    lines = {kind: read_metrics(tmp_path / "run", kind) for kind in ("train", "gradients", "validation")}
    for room, name in (("val", "depth_rmse"), ("val_ema", "ema_depth_rmse")):
        assert sent[f"{room}/depth_rmse"] == [line[name] for line in lines["validation"]]
    assert sent["val_ema/seg_miou"] == [line["ema_miou"] for line in lines["validation"]]
    assert sent["val/depth_rmse"] != sent["val_ema/depth_rmse"]
    for task in ("segmentation", "depth"):
        assert sent[f"train/balance/{task}"] == [0.5] * 6
        assert sent[f"train/tasks/{task}"] == [line["tasks"][task]["loss"] for line in lines["train"]]
        for room, key in (("gradients", "norm"), ("ratio", "ratio")):
            assert sent[f"train/{room}/{task}"] == [line["tasks"][task][key] for line in lines["gradients"]]


def test_observers_are_told_in_their_order() -> None:
    calls: list[tuple[str, str, tuple[Any, ...]]] = []

    def make(name: str) -> Observer:
        methods = {
            event: lambda self, *args, event=event, **named: calls.append((name, event, (*args, *named.values())))
            for event in vars(Observer)
            if not event.startswith("_")
        }
        return type("Told", (Observer,), methods)()

    both = Observers([make("one"), make("two")])
    metrics = Metrics(("sky",), (1.0,), (1.0,), (1,), 1.0, 1.0, 1.0)
    both.started(step=1, iterations=2, parameters=3)
    both.note("text")
    both.advanced(1)
    both.stepped(1, {"loss": 2.0})
    both.gradients(1, {"ce": 1.0})
    both.balanced(1, {"depth": {"loss": 1.0, "weight": 0.5}})
    both.validating(1, 2)
    both.validated(1, SEGMENTATION, metrics, best=True, ema=False)
    both.ended(completed=True)
    events = [event for event in vars(Observer) if not event.startswith("_")]
    assert [(name, event) for name, event, _ in calls] == [(name, event) for event in events for name in ("one", "two")]
    assert calls[0][2] == (1, 2, 3)
    assert calls[-1][2] == (True,)


# --- the loggers themselves --------------------------------------------------------------------------------


def test_tensorboard_shows_a_run_under_its_name_and_goes_on_after_a_resume(
    student: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    run, settings = tmp_path / "run", student | {"log": "tensorboard"}
    with pytest.raises(StopError):
        go(settings, run, Notes(stop_after=5))  # two steps after its checkpoint
    go(settings, run, resume=True)
    shown = scalars(run)
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5, 6]
    lines = read_metrics(run, "train")
    assert [value for _, value in shown["train/kl"]] == pytest.approx([line["kl"] for line in lines], rel=1e-6)
    assert [step for step, _ in shown["val/miou"]] == [3, 6]
    assert shown["gradients/ce"][0][0] == 1
    assert any(tag.startswith("val/iou/") for tag in shown)
    assert all(steps == [3, 6] for steps in images(run).values())
    assert all(name.startswith("samples/") and name.endswith("/segmentation") for name in images(run))
    assert images(run)


def test_loggers_may_change_on_resume(student: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StopError):
        go(student, tmp_path, Notes(stop_after=4))
    go(student | {"log": "tensorboard"}, tmp_path, resume=True)
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [4, 5, 6]


def test_tensorboard_shows_two_tasks_under_their_names(two_tasks: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    go(two_tasks | {"log": "tensorboard"}, tmp_path / "run")
    assert scalars(tmp_path / "run").keys() >= OF_TWO_TASKS


@pytest.mark.slow
@pytest.mark.parametrize("configured", [True, False])
def test_wandb_goes_on_in_the_same_run_and_sends_nothing(
    configured: bool, student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where nobody has logged in
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if configured:
        monkeypatch.setenv("WANDB_MODE", "offline")
    run, settings = tmp_path / "run", student | {"log": "wandb"}
    first, second = Notes(stop_after=5), Notes()
    with pytest.raises(StopError):
        go(settings, run, first)
    go(settings, run, second, resume=True)
    for notes in (first, second):
        assert [text.split(",")[0] for text in notes.texts] == ([] if configured else ["wandb: nobody is logged in"])
    name = (run / "wandb-id.txt").read_text().strip()
    parts = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(parts) == 2, "one of each process"
    assert all(name in part for part in parts)
    written = b"".join(path.read_bytes() for path in (run / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    for word in (b"train/loss", b"val/miou", b"gradients/ce", b"kdcache:tiny", b"images_per_second"):
        assert word in written, word
    drawn = {path.name for path in (run / "wandb").glob("offline-run-*/files/media/images/samples/**/*.png")}
    assert {name.split("_")[0] for name in drawn} == {"segmentation"}


@pytest.mark.slow
def test_wandb_has_two_tasks_under_their_names(
    two_tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    go(two_tasks | {"log": "wandb"}, run)
    missing = sorted(OF_TWO_TASKS)
    for _ in range(300):  # W&B's own process may write on after the run on a busy machine
        written = b"".join(path.read_bytes() for path in (run / "wandb").glob("offline-run-*/run-*.wandb"))
        missing = [name for name in missing if name.encode() not in written]
        if not missing:
            break
        time.sleep(0.1)
    assert missing == []


def test_a_run_of_a_removed_logger_is_resumed_without_it(student: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StopError):
        go(student, tmp_path, Notes(stop_after=4))
    recipe = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(recipe.replace("log = []", 'log = ["trackio"]'))
    assert "trackio" in (tmp_path / "recipe.toml").read_text()
    go(student, tmp_path, resume=True)
    with pytest.raises(RecipeError, match="tensorboard, wandb"):
        make_config(**student | {"log": "trackio"})


def test_a_logger_is_sent_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B would publish its configuration."""
    sent: list[Any] = []
    monkeypatch.setitem(trackers.SINKS, "wandb", sent.append)  # type: ignore[arg-type]
    settings = {"data": "/home/ann/camvid", "stream": [{"cache": "/home/ann/c.zarr"}], "lr": 0.1}
    trackers.Loggers(["wandb"], tmp_path, settings, print).started(step=0, iterations=1, parameters=2)
    assert sent[0].recipe == {"data": "camvid", "stream": [{"cache": "c.zarr"}], "lr": 0.1, "parameters": 2}
