"""Doing jobs: order, resumption, side by side; a folder of another sweep."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_plan import RECIPE

from kdcache.data import write_scenes
from kdcache.errors import MismatchError, RecipeError
from kdcache.run_folder import MODEL
from kdcache.sweep import Job, Sweep, Watcher, run_jobs
from kdcache.sweep.curve import write_curve
from kdcache.sweep.inputs import INPUTS
from kdcache.sweep.run import RECORD
from kdcache.sweep.summary import write_details


def sweep_of(out: Path, jobs: dict[str, tuple[str, ...]]) -> Sweep:
    """Jobs by what they need; a name with a capital leaves no file."""
    planned = [Job(name, ("verb", name), None if name.isupper() else out / name, needs) for name, needs in jobs.items()]
    return Sweep(RECIPE, out, tuple(planned), {})


class Doing:
    """Makes the file of a job; notes the order and how many ran at once."""

    def __init__(self, fail: str = "") -> None:
        self.done: list[str] = []
        self.most = self._now = 0
        self._fail, self._lock = fail, threading.Lock()
        self.both = threading.Barrier(2, timeout=20)

    def __call__(self, job: Job) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        if job.name.startswith("pair"):
            self.both.wait()
        with self._lock:
            self._now -= 1
            if job.name == self._fail:
                raise RuntimeError(job.name)
            self.done.append(job.name)
        if job.done is not None:
            job.done.write_text('{"iterations": 1}')


JOBS = {"teacher": (), "pair1": ("teacher",), "pair2": ("teacher",), "last": ("pair1", "pair2"), "TABLE": ("last",)}
ALONE = {name.replace("pair", "run"): tuple(n.replace("pair", "run") for n in needs) for name, needs in JOBS.items()}


def test_in_order_and_only_what_is_not_done(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "out", ALONE)
    with pytest.raises(RuntimeError):
        run_jobs(sweep, Doing("last"))
    second = Doing()
    run_jobs(sweep, second)
    assert second.done == ["last", "TABLE"]
    third = Doing()
    run_jobs(sweep, third)
    assert third.done == ["TABLE"]


@pytest.mark.parametrize("left", ["", '{"iterations": 1', "[]", "null", "{}", None])
def test_a_result_that_says_nothing_is_none(tmp_path: Path, left: str | None) -> None:
    """A crash, a full disk or a copy that broke off leave such files; a folder may lie there too."""
    sweep = sweep_of(tmp_path / "out", ALONE)
    run_jobs(sweep, Doing())
    result = tmp_path / "out" / "run1"
    result.unlink()
    if left is None:
        result.mkdir()
    else:
        result.write_text(left)
    if left is None:
        result.rmdir()
    again = Doing()
    run_jobs(sweep, again)
    assert again.done == ["run1", "TABLE"]


def test_what_needs_another_result_is_done_again(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "out", ALONE)
    run_jobs(sweep, Doing())
    (tmp_path / "out" / "teacher").write_text('{"iterations": 2}')
    again = Doing()
    run_jobs(sweep, again)
    assert again.done == ["run1", "run2", "TABLE"]  # their files are the same again, so "last" is done


def test_a_cache_is_always_checked_again(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "out", {"store": (), "run": ("store",)})
    sweep = replace(sweep, jobs=(replace(sweep.jobs[0], words=("build-teacher-cache",)), sweep.jobs[1]))
    run_jobs(sweep, Doing())
    again = Doing()
    run_jobs(sweep, again)
    assert again.done == ["store"]


def test_a_file_is_no_proof_that_a_job_was_done(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "out", {"run": ()})
    run_jobs(sweep, Doing())
    (tmp_path / "out" / INPUTS).unlink()
    again = Doing()
    run_jobs(sweep, again)
    assert again.done == ["run"]


def test_a_training_that_lost_its_model_is_done_again(tmp_path: Path) -> None:
    run = tmp_path / "out" / "runs" / "kl"
    run.mkdir(parents=True)
    sweep = Sweep(RECIPE, tmp_path / "out", (Job("kl", ("train-student",), run / "result.json"),), {})
    (tmp_path / "out" / INPUTS).write_text("{}")
    (run / MODEL).write_text("{}")
    run_jobs(sweep, Doing())
    kept = Doing()
    run_jobs(sweep, kept)
    (run / MODEL).unlink()
    again = Doing()
    run_jobs(sweep, again)
    assert (kept.done, again.done) == ([], ["kl"])


def test_changed_data_is_named_with_its_samples(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", "scenes:32x32,train=4,val=2")
    job = Job("run", ("verb", "--data", str(data), "--val", str(data)), tmp_path / "out" / "run")
    sweep = Sweep(RECIPE, tmp_path / "out", (job,), {})
    run_jobs(sweep, Doing())
    label = sorted((data / "labels" / "val").rglob("*.png"))[0]
    before = label.read_bytes()
    Image.fromarray((np.array(Image.open(label)) + 1) % 3).save(label)
    with pytest.raises(MismatchError, match="1 label differs") as caught:
        run_jobs(sweep, Doing())
    assert label.stem in caught.value.problem
    label.write_bytes(before)
    again = Doing()
    run_jobs(sweep, again)
    assert again.done == []


def test_side_by_side_after_what_they_need(tmp_path: Path) -> None:
    doing = Doing()
    run_jobs(sweep_of(tmp_path / "out", JOBS), doing, parallel=2)
    assert doing.most == 2
    assert doing.done[0] == "teacher"
    assert doing.done[3:] == ["last", "TABLE"]


def test_a_job_that_fails_lets_the_other_end_and_begins_no_more(tmp_path: Path) -> None:
    doing = Doing("pair1")
    with pytest.raises(RuntimeError, match="pair1"):
        run_jobs(sweep_of(tmp_path / "out", JOBS), doing, parallel=2)
    assert doing.done == ["teacher", "pair2"]


def test_another_sweep_s_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep = sweep_of(out, ALONE)
    run_jobs(sweep, Doing())
    before = (out / RECORD).read_bytes()
    changed = replace(sweep, jobs=(replace(sweep.jobs[0], words=("verb", "other")), *sweep.jobs[1:]))
    with pytest.raises(RecipeError, match="other"):
        run_jobs(changed, Doing())
    assert (out / RECORD).read_bytes() == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(RecipeError, match="something else"):
        run_jobs(sweep_of(mine, ALONE), Doing())


@pytest.mark.parametrize("content", ["", "[jobs", "jobs = 3", "[jobs]\nx = 'a \"b'", "a" + ".a" * 50 + " = 1", None])
def test_a_damaged_record_is_named_and_written_again(tmp_path: Path, content: str | None) -> None:
    """Also one that nobody writes to, which a plain read would wait for."""
    sweep = sweep_of(tmp_path / "out", ALONE)
    run_jobs(sweep, Doing())
    record = tmp_path / "out" / RECORD
    before = record.read_bytes()
    record.unlink()
    if content is None:
        os.mkfifo(record)
    else:
        record.write_text(content)
    with pytest.raises(RecipeError, match="Cannot read") as caught:
        run_jobs(sweep, Doing())
    words = shlex.split(caught.value.fix.rpartition(": ")[2])
    assert words == ["rm", str(record)]
    subprocess.run(words, check=True)
    again = Doing()
    run_jobs(sweep, again)
    assert again.done == ["TABLE"]
    assert record.read_bytes() == before


def test_what_a_kill_left_of_a_new_record_is_no_other_sweep(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{RECORD}.partial").write_text("[jo")
    run_jobs(sweep_of(tmp_path / "out", ALONE), Doing())
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("kind", ["cut", "pipe", "endless"])
def test_a_damaged_comparison_is_read_in_bounded_time_and_memory(tmp_path: Path, kind: str) -> None:
    comparison = tmp_path / "comparison.json"
    if kind == "pipe":
        os.mkfifo(comparison)
    elif kind == "endless":
        comparison.symlink_to("/dev/zero")
    else:
        comparison.write_text('{"rows": [')
    sweep = Sweep(replace(RECIPE, show={"curve": "limit-labels"}), tmp_path, (), {})
    write_details(sweep)
    write_curve(sweep.recipe, sweep.out)
    assert sorted(tmp_path.iterdir()) == [comparison]


def test_watchers_hear_what_begins_ends_and_is_kept(tmp_path: Path) -> None:
    events: list[str] = []

    class Noting(Watcher):
        def started(self, job: Job, number: int, total: int) -> None:
            events.append(f"{number}/{total} {job.name}")

        def kept(self, job: Job, number: int, total: int) -> None:
            events.append(f"kept {job.name}")

    sweep = sweep_of(tmp_path / "out", {"a": (), "b": ()})
    run_jobs(sweep, Doing(), watcher=Noting())
    run_jobs(sweep, Doing(), watcher=Noting())
    assert events == ["1/2 a", "2/2 b", "kept a", "kept b"]


@pytest.mark.parametrize("content", ['{"data": [1]}', '{"jobs": 3}', '{"jobs": {"run": "0"}}'])
def test_damaged_inputs_are_named(tmp_path: Path, content: str) -> None:
    data = write_scenes(tmp_path / "data", "scenes:32x32,train=2,val=1")
    job = Job("run", ("verb", "--data", str(data)), tmp_path / "out" / "run")
    sweep = Sweep(RECIPE, tmp_path / "out", (job,), {})
    run_jobs(sweep, Doing())
    (tmp_path / "out" / INPUTS).write_text(content)
    with pytest.raises(RecipeError, match="Cannot read") as caught:
        run_jobs(sweep, Doing())
    assert INPUTS in caught.value.problem
    subprocess.run(shlex.split(caught.value.fix.rpartition(": ")[2]), check=True)
    again = Doing()
    run_jobs(sweep, again)
    assert again.done == ["run"]
