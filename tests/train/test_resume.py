"""Runs that are killed, interrupted or spoilt, and go on to the very same weights."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.errors import RecipeError
from kdcache.train import folder, make_config, start, train

ITERATIONS, VAL_EVERY = 60, 10
WEIGHTS = ("last.safetensors", "best.safetensors")


@pytest.fixture
def long(student: dict[str, Any]) -> dict[str, Any]:
    """Long enough to be stopped in the middle."""
    return student | {"iterations": ITERATIONS, "val_every": VAL_EVERY, "gradients_every": 7}


@pytest.fixture
def finished(student: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """(settings, run) of a short training that ended."""
    train(make_config(**student), tmp_path / "run")
    return student, tmp_path / "run"


def go(settings: dict[str, Any], run: Path, *, resume: bool = False) -> dict[str, Any]:
    return train(make_config(**settings), run, resume=resume)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def same_run(one: Path, two: Path, read_metrics: Callable[..., list[dict[str, Any]]]) -> None:
    """Equal bytes of the weights, and the same history but for times."""
    for name in WEIGHTS:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    timing = ("images_per_second", "wait_share")
    histories = [[{k: v for k, v in row.items() if k not in timing} for row in read_metrics(run)] for run in (one, two)]
    assert histories[0] == histories[1]
    assert [row["step"] for row in read_metrics(one, "train")] == list(range(1, ITERATIONS + 1))


def test_a_killed_run_ends_as_if_nothing_had_happened(
    nursery: Any, long: dict[str, Any], tmp_path: Path, read_metrics: Callable[..., list[dict[str, Any]]]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pid = nursery.start(long, killed)
    wait_until((killed / "checkpoint.pt").exists)
    before = lines_of(killed)
    wait_until(lambda: lines_of(killed) > before + 3)
    os.kill(pid, signal.SIGKILL)
    assert nursery.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    # Uninterrupted in a process of its own, resumed in this one.
    nursery.start(long, whole)
    assert nursery.wait() == 0
    result = go(long, killed, resume=True)
    assert result["iterations"] == ITERATIONS
    same_run(whole, killed, read_metrics)
    assert not list(killed.glob(".*"))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_at_random_moments_keeps_its_random_numbers(
    seed: int,
    nursery: Any,
    model_file: Callable[[str], str],
    long: dict[str, Any],
    tmp_path: Path,
    read_metrics: Callable[..., list[dict[str, Any]]],
) -> None:
    settings = long | {"model": model_file("dropout"), "seed": seed}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    go(settings, whole)
    rng = random.Random(seed)
    for attempt in range(3):
        pid = nursery.start(settings, killed, resume=attempt > 0)
        wait_until((killed / "recipe.toml").exists)
        time.sleep(rng.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        # It may have been quicker than we were.
        assert nursery.wait() in (-signal.SIGKILL, 0)
    go(settings, killed, resume=True)
    same_run(whole, killed, read_metrics)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_its_step_and_goes_on(
    number: signal.Signals,
    nursery: Any,
    model_file: Callable[[str], str],
    long: dict[str, Any],
    tmp_path: Path,
    read_metrics: Callable[..., list[dict[str, Any]]],
) -> None:
    settings = long | {"model": model_file("dropout")}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    go(settings, whole)
    pid = nursery.start(settings, stopped)
    wait_until(lambda: lines_of(stopped) >= 13)
    os.kill(pid, number)
    assert nursery.wait() == 130
    step = torch.load(stopped / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert step == read_metrics(stopped, "train")[-1]["step"] < ITERATIONS
    go(settings, stopped, resume=True)
    same_run(whole, stopped, read_metrics)


def test_ctrl_c_reaches_the_workers_too_and_the_state_is_saved(
    nursery: Any, long: dict[str, Any], tmp_path: Path, read_metrics: Callable[..., list[dict[str, Any]]]
) -> None:
    run = tmp_path / "run"
    pid = nursery.start(long | {"workers": 2, "iterations": 5000, "val_every": 5000}, run)
    wait_until(lambda: lines_of(run) >= 10)
    os.killpg(pid, signal.SIGINT)  # as a terminal does
    assert nursery.wait() == 130
    step = torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert step == read_metrics(run, "train")[-1]["step"] < 5000


def test_a_finished_run_is_not_trained_further(finished: tuple[dict[str, Any], Path]) -> None:
    settings, run = finished
    before = content(run)
    result = go(settings, run, resume=True)
    after = content(run)
    assert result["iterations"] == 6
    for name in (*WEIGHTS, "checkpoint.pt", "metrics.jsonl", "recipe.toml", "model.json"):
        assert after[name] == before[name], name


def test_a_run_that_died_before_its_first_checkpoint_begins_again(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, whole = finished

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for module, name in ((folder, "write_run_model"), (folder, "write_json"), (start, "Trainer")):
        run = tmp_path / f"died-at-{name}"
        with monkeypatch.context() as patch:
            patch.setattr(module, name, die)
            with pytest.raises(KeyboardInterrupt):
                go(settings, run)
        go(settings, run, resume=True)
        assert (run / WEIGHTS[0]).read_bytes() == (whole / WEIGHTS[0]).read_bytes()


def test_resume_of_nothing_is_a_beginning(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    settings, whole = finished
    go(settings, tmp_path / "new", resume=True)
    assert (tmp_path / "new" / WEIGHTS[0]).read_bytes() == (whole / WEIGHTS[0]).read_bytes()


def test_a_run_is_not_overwritten(finished: tuple[dict[str, Any], Path]) -> None:
    settings, run = finished
    before = content(run)
    with pytest.raises(RecipeError, match="--resume"):
        go(settings, run)
    assert content(run) == before


def test_a_folder_with_something_else_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        for resume in (False, True):
            with pytest.raises(RecipeError, match="something else"):
                go(settings, out, resume=resume)
    assert content(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"lr": 0.5}, "--lr 0.5 (was 0.006)"),
        ({"seed": 3}, "--seed 3 (was 0)"),
        ({"iterations": 9}, "--iterations 9 (was 6)"),
        ({"batch_size": 4}, "--batch-size 4"),
        ({"model": "kdcache:base"}, "--model kdcache:base"),
        ({"method": "none"}, "--method none"),
        ({"kl_weight": 0.25, "temperature": 3.0}, "--kl-weight 0.25"),
        ({"size": "16x24"}, "--size (16, 24)"),
        ({"augment": "replay"}, "--augment replay"),
        ({"distill_schedule": "fade"}, "--distill-schedule fade"),
    ],
)
def test_changed_settings_are_refused_and_named(
    finished: tuple[dict[str, Any], Path], changes: dict[str, Any], flag: str
) -> None:
    settings, run = finished
    before = content(run)
    with pytest.raises(RecipeError) as caught:
        go(settings | changes, run, resume=True)
    assert flag in caught.value.received
    assert content(run) == before


def test_another_store_or_a_dropped_validation_is_refused(
    finished: tuple[dict[str, Any], Path], make_cache: Callable[..., Path]
) -> None:
    settings, run = finished
    before = content(run)
    for changes, what in (({"cache": str(make_cache(top_k=3))}, "another store"), ({"val": None}, "--val None")):
        with pytest.raises(RecipeError) as caught:
            go(settings | changes, run, resume=True)
        assert what in caught.value.received
    assert content(run) == before


def test_the_process_keeps_its_own_determinism_setting(finished: tuple[dict[str, Any], Path]) -> None:
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_changes_no_number_may_change_on_resume(finished: tuple[dict[str, Any], Path]) -> None:
    settings, run = finished
    weights = (run / WEIGHTS[0]).read_bytes()
    (run / "checkpoint.pt").unlink()
    go(settings | {"threads": 1, "log_every": 4, "size": "32x48"}, run, resume=True)
    assert (run / WEIGHTS[0]).read_bytes() == weights


def spoil(kind: str, path: Path) -> None:
    whole = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "other":
        torch.save([1, 2, 3], path)
    elif kind == "parts":
        torch.save({"model": {}}, path)
    elif kind == "code":
        torch.save({"model": Path("x")}, path)


@pytest.mark.parametrize("kind", ["empty", "noise", "cut", "other", "parts", "code"])
def test_a_corrupt_checkpoint_is_refused(finished: tuple[dict[str, Any], Path], kind: str) -> None:
    settings, run = finished
    spoil(kind, run / "checkpoint.pt")
    weights = load_file(run / WEIGHTS[0])
    with pytest.raises(RecipeError, match=r"checkpoint\.pt"):
        go(settings, run, resume=True)
    assert weights.keys() == load_file(run / WEIGHTS[0]).keys()


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', "\x00\x00\x00", "17", '{"kind": "train"}\n'])
def test_a_truncated_last_line_is_healed(
    finished: tuple[dict[str, Any], Path], read_metrics: Callable[..., list[dict[str, Any]]], tail: str
) -> None:
    settings, run = finished
    before = read_metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(tail)
    go(settings, run, resume=True)
    assert read_metrics(run) == before


def test_lines_after_the_checkpoint_are_forgotten(
    finished: tuple[dict[str, Any], Path], read_metrics: Callable[..., list[dict[str, Any]]]
) -> None:
    settings, run = finished
    before = read_metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 7, "loss": 1.0}\n')
    go(settings, run, resume=True)
    assert read_metrics(run) == before
