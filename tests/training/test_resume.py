"""Runs that are killed, interrupted or spoilt, and go on to the very same weights."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache import files
from kdcache.errors import ModelError, RecipeError, StoreError
from kdcache.training import Observer, api, make_config, train
from kdcache.training.run import folder
from kdcache.training.run.lock import RunLock
from kdcache.training.run.metrics_log import MetricsLog

ITERATIONS, VAL_EVERY = 60, 10
WEIGHTS = ("last.safetensors", "best.safetensors")
AVERAGES = ("last-ema.safetensors", "best-ema.safetensors")


@pytest.fixture
def long(student: dict[str, Any]) -> dict[str, Any]:
    """Long enough to be stopped in the middle."""
    return student | {"iterations": ITERATIONS, "val_every": VAL_EVERY, "gradients_every": 7, "ema": 0.95}


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
    for name in WEIGHTS + AVERAGES:
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
        with contextlib.suppress(ProcessLookupError):  # it may have been quicker than we were
            os.kill(pid, signal.SIGKILL)
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

    for module, name in ((folder, "write_run_model"), (folder, "write_json"), (api, "Trainer")):
        run = tmp_path / f"died-at-{name}"
        with monkeypatch.context() as patch:
            patch.setattr(module, name, die)
            with pytest.raises(KeyboardInterrupt):
                go(settings, run)
        go(settings, run, resume=True)
        assert (run / WEIGHTS[0]).read_bytes() == (whole / WEIGHTS[0]).read_bytes()


def test_resume_of_a_run_that_is_not_there_is_refused(finished: tuple[dict[str, Any], Path]) -> None:
    settings, run = finished
    for name, near in (("rnu", f"there is {run}"), ("elsewhere", "does not exist")):
        with pytest.raises(RecipeError) as caught:
            go(settings, run.parent / name, resume=True)
        assert str(run.parent / name) in caught.value.problem
        assert near in caught.value.problem
        assert not (run.parent / name).exists()


def test_resume_in_an_empty_folder_is_a_beginning_and_says_so(
    finished: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    settings, whole = finished
    (tmp_path / "new").mkdir()
    notes: list[str] = []

    class Watcher(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    train(make_config(**settings), tmp_path / "new", resume=True, observer=Watcher())
    assert (tmp_path / "new" / WEIGHTS[0]).read_bytes() == (whole / WEIGHTS[0]).read_bytes()
    assert [text for text in notes if "no checkpoint" in text]
    notes.clear()
    train(make_config(**settings), tmp_path / "new", resume=True, observer=Watcher())
    assert not [text for text in notes if "no checkpoint" in text]


def test_a_training_that_fails_at_once_does_not_block_its_repetition(
    settings: dict[str, Any], model_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMIT", "1")
    monkeypatch.setenv("LIMIT_EVAL", "99")
    run, broken = tmp_path / "run", settings | {"model": model_file("hungry", "other"), "log": ("tensorboard",)}
    with pytest.raises(ModelError, match="own"):
        go(broken, run)
    with pytest.raises(RecipeError, match="nothing was learnt yet"):
        go(settings, run, resume=True)
    go(settings, run)
    result = json.loads((run / "result.json").read_bytes())
    assert result["iterations"] == 6
    assert "kdcache:tiny" in (run / "model.json").read_text()
    with pytest.raises(RecipeError, match="holds a run already"):
        go(settings, run)


@pytest.mark.parametrize("kept", ["checkpoint.pt", "last.safetensors", "notes.txt", "result.json"])
def test_what_has_learnt_or_holds_more_is_not_begun_anew(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, kept: str
) -> None:
    settings, run = finished
    for path in list(run.iterdir()):
        if path.name not in (kept, "recipe.toml", "model.json", "environment.json", "metrics.jsonl"):
            path.unlink()
    (run / kept).touch()
    before = content(run)
    with pytest.raises(RecipeError, match="holds a run already"):
        go(settings, run)
    assert content(run) == before


def test_a_recipe_alone_is_not_written_over(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('model = "kdcache:tiny"')
    with pytest.raises(RecipeError, match="holds a run already"):
        go(settings, tmp_path)
    assert content(tmp_path) == {"recipe.toml": b'model = "kdcache:tiny"'}


@pytest.mark.parametrize("resume", [True, False])
def test_one_command_trains_a_run_at_a_time(
    finished: tuple[dict[str, Any], Path], resume: bool, tmp_path: Path
) -> None:
    settings, run = finished
    if not resume:
        run = tmp_path / "begun"
        run.mkdir()
    before = content(run)
    with RunLock(run) as lock:
        lock.take()
        with pytest.raises(RecipeError, match="it is being trained by process") as caught:
            go(settings, run, resume=resume)
        assert f"process {os.getpid()} on" in caught.value.problem
    assert content(run) == before
    go(settings, run, resume=resume)
    assert not list(run.glob(".*"))


def test_two_commands_that_begin_at_once_do_not_share_a_folder(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has been quicker: it is at work, or done, when this one comes to write."""
    settings, whole = finished
    run = tmp_path / "new"
    own = api.make_criterion

    def slow(*arguments: Any) -> Any:
        shutil.copytree(whole, run)
        return own(*arguments)

    monkeypatch.setattr(api, "make_criterion", slow)
    with pytest.raises(RecipeError, match="holds a run already"):
        go(settings, run)
    assert content(run) == content(whole)


def test_a_kill_ends_the_lock_and_the_next_run_clears_what_it_left(
    nursery: Any, long: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pid = nursery.start(long | {"iterations": 5000, "val_every": 5000, "val": None}, run)
    wait_until(lambda: lines_of(run) >= 3)
    with pytest.raises(RecipeError, match="it is being trained by process") as caught:
        go(long | {"iterations": 5000, "val_every": 5000, "val": None}, run, resume=True)
    assert f"process {pid} on" in caught.value.problem
    os.kill(pid, signal.SIGKILL)
    assert nursery.wait() == -signal.SIGKILL
    for name in (".checkpoint.pt.partial", ".result.json.partial", ".best.safetensors.partial"):
        (run / name).write_bytes(b"half")
    go(long | {"iterations": 3, "val_every": 3}, run)  # no checkpoint: nothing is lost
    assert not list(run.glob(".*"))


def started_by(pid: int) -> set[int]:
    """Processes that a process has started, and those that these have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":  # ended: nobody has asked how
                parents[int(path.parent.name)] = int(parent)
    descendants, more = set[int](), {pid}
    while more := {one for one, parent in parents.items() if parent in more}:
        descendants |= more
    return descendants


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_the_workers_of_a_killed_training_end_with_it(nursery: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    pid = nursery.start(settings | {"workers": 2, "iterations": 10**6, "val_every": 10**6, "val": None}, run)
    try:
        wait_until(lambda: lines_of(run) >= 5)
        started = started_by(pid)
        assert len(started) >= 3  # two workers, and who forks them
    finally:
        os.kill(pid, signal.SIGKILL)
    assert nursery.wait() == -signal.SIGKILL
    wait_until(lambda: not any(map(alive, started)))


class _Full(io.FileIO):
    """Takes so many bytes more, as a disk that fills up."""

    room = 0

    def write(self, content: Any) -> int:
        taken = bytes(content)[: _Full.room]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        _Full.room -= len(taken)
        return super().write(taken)


@pytest.mark.parametrize("room", [0, 40, 700])
def test_a_full_disk_at_the_log_leaves_a_run_that_goes_on(
    student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    settings = student | {"val_every": 2}
    whole, run = tmp_path / "whole", tmp_path / "run"
    go(settings, whole)
    own = MetricsLog.__init__

    def small(self: MetricsLog, folder: Path, step: int) -> None:
        own(self, folder, step)
        self.file.close()
        _Full.room = room
        self.file = _Full(folder / "metrics.jsonl", "ab")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "__init__", small)
        with pytest.raises(StoreError, match="No space left"):
            go(settings, run)
    assert not (run / "result.json").exists()
    go(settings, run, resume=True)
    assert (run / WEIGHTS[0]).read_bytes() == (whole / WEIGHTS[0]).read_bytes()


@pytest.mark.parametrize(
    "name",
    ["recipe.toml", "model.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "best.safetensors",
     "last.safetensors", "result.json"],
)  # fmt: skip
def test_a_full_disk_at_any_file_leaves_a_run_that_goes_on(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every file of a run is synced under another name before it gets its own: there the disk is full."""
    settings, whole = finished
    run = tmp_path / "new"
    own = files.sync

    def full(path: Path) -> None:
        if path.name == f".{name}.partial":
            path.write_bytes(path.read_bytes()[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        own(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        with pytest.raises(StoreError, match="No space left"):
            go(settings, run)
    assert not list(run.glob(".*"))
    assert not (run / name).exists()
    go(settings, run, resume=True)
    assert (run / WEIGHTS[0]).read_bytes() == (whole / WEIGHTS[0]).read_bytes()
    assert json.loads((run / "result.json").read_bytes())["iterations"] == 6


@pytest.mark.parametrize("name", ["recipe.toml", "model.json"])
def test_an_empty_file_of_a_run_is_named(finished: tuple[dict[str, Any], Path], name: str) -> None:
    settings, run = finished
    (run / name).write_bytes(b"")
    with pytest.raises(RecipeError) as caught:
        go(settings, run, resume=True)
    assert f"{run / name} is empty" in str(caught.value)
    if name == "model.json":  # the fix
        (run / name).unlink()
        go(settings, run, resume=True)
        assert (run / name).stat().st_size


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
    assert flag in caught.value.problem
    assert content(run) == before


def test_another_store_or_a_dropped_validation_is_refused(
    finished: tuple[dict[str, Any], Path], make_cache: Callable[..., Path]
) -> None:
    settings, run = finished
    before = content(run)
    for changes, what in (({"cache": str(make_cache(top_k=3))}, "another cache"), ({"val": None}, "--val None")):
        with pytest.raises(RecipeError) as caught:
            go(settings | changes, run, resume=True)
        assert what in caught.value.problem
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


@pytest.mark.parametrize("step", ["1e999", "9" * 5000, "[" * 100_000 + "]" * 100_000, "null"])
def test_a_line_whose_step_is_no_number_is_left_out(tmp_path: Path, step: str) -> None:
    good = '{"kind": "train", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "train", "step": {step}}}\n{good}')
    MetricsLog(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == good


def test_no_endless_log_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    os.truncate(tmp_path / "metrics.jsonl", 2**34)
    with pytest.raises(RecipeError, match=r"metrics\.jsonl: 17179869184 bytes"):
        MetricsLog(tmp_path, 2)
