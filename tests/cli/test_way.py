"""The whole way through the command line, as a user goes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from safetensors.torch import load_file

from kdcache.training.run.training_progress import TrainingProgress

STUDENT = "--model kdcache:tiny --iterations 3 --batch-size 2 --val-every 3 --log-every 1"


def test_the_whole_way(world, cli, tree) -> None:
    """Look, build, verify; then, with the teacher gone, train, evaluate and repeat from a recipe."""
    data, teacher, store = world / "data", world / "teacher", world / "store.zarr"

    looked = cli("data", "check", data, "--json", world / "check.json")
    assert looked.code == 0
    assert "nothing wrong" in looked.out
    assert set(json.loads((world / "check.json").read_text())["splits"]) == {"train", "val"}

    before = tree(store)
    build = f"build-teacher-cache --data {data} --teacher {teacher} --out {store} --shard-records 4 --views full"
    again = cli(*build.split())
    assert again.code == 0
    assert "(6 from before)" in again.out
    assert "mIoU" in again.out
    assert tree(store) == before

    checked = cli("verify", store, "--teacher", teacher, "--data", data)
    assert checked.code == 0, checked.out
    assert "as written" in checked.out
    assert "the cache holds the targets of this teacher" in checked.out

    inspected = cli("inspect", store, "--json")
    assert inspected.code == 0
    about = json.loads(inspected.out)
    assert (about["complete"], about["records_written"]) == (True, 6)
    assert about["manifest"]["view"]["size"] == [32, 48]
    assert "targets/segmentation/values" in cli("inspect", store).out

    shutil.rmtree(teacher)
    runs = {}
    for method in ("none", "kl"):
        runs[method] = world / f"student-{method}"
        words = f"train-student --cache {store} --method {method} --val {data} --out {runs[method]} {STUDENT}"
        trained = cli(*words.split())
        assert trained.code == 0, trained.err
        assert "best mIoU" in trained.out
        kl = [
            row["kl"]
            for row in map(json.loads, (runs[method] / "metrics.jsonl").read_text().splitlines())
            if "lr" in row
        ]
        assert len(kl) == 3
        assert all(value > 0 for value in kl) == (method == "kl")

    evaluated = cli("evaluate", runs["kl"], "--data", data)
    assert evaluated.code == 0
    numbers = json.loads((runs["kl"] / "evaluation-val.json").read_text())
    assert [c["name"] for c in numbers["classes"]] == json.loads((runs["kl"] / "model.json").read_text())["class_names"]
    assert f"{100 * numbers['miou']:.2f}" in evaluated.out
    assert f"{100 * numbers['miou']:.2f}" in (runs["kl"] / "evaluation-val.md").read_text()

    recipe = runs["kl"] / "recipe.toml"
    for name, extra in (("same", []), ("other", ["--iterations", "2", "--temperature", "4"])):
        repeated = cli("train-student", "--recipe", recipe, "--out", world / name, *extra)
        assert repeated.code == 0, repeated.err
    first, same, other = (
        tomllib.loads((world / r / "recipe.toml").read_text()) for r in ("student-kl", "same", "other")
    )
    assert same == first
    assert {key for key in first if first[key] != other[key]} == {"iterations", "temperature"}
    assert (other["iterations"], other["temperature"]) == (2, 4.0)
    ours, theirs = (load_file(world / run / "last.safetensors") for run in ("student-kl", "same"))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_teacher_s_own_recipe_repeats_it(world, cli) -> None:
    repeated = cli("train-teacher", "--recipe", world / "teacher" / "recipe.toml", "--out", world / "again")
    assert repeated.code == 0, repeated.err
    ours, theirs = (load_file(world / run / "last.safetensors") for run in ("teacher", "again"))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_store_without_pixels_trains_with_its_data(world, cli) -> None:
    words = f"train-student --cache {world}/source.zarr --data {world}/data --out {world}/run {STUDENT}"
    assert cli(*words.split()).code == 0


def test_codecs(world, cli) -> None:
    """The build measures what storing loses; inspect says it again, also for machines."""
    figures = {}
    build = f"build-teacher-cache --data {world}/data --teacher {world}/teacher"
    for codec in ("default", "small", "none"):
        words = f"{build} --codec {codec} --out {world}/{codec}"
        built = cli(*words.split())
        assert built.code == 0, built.err
        about = json.loads(cli("inspect", world / codec, "--json").out)
        assert about["manifest"]["codec"] == codec
        figures[codec] = about["manifest"]["fidelity"]
        told = f"KL {figures[codec]['kl_t1']:.1e} nats at T = 1"
        assert told in built.out
        assert told in cli("inspect", world / codec).out
        checked = cli("verify", world / codec, "--teacher", world / "teacher", "--data", world / "data")
        assert checked.code == 0, checked.out
    assert figures["default"] == figures["none"]
    assert 100 * figures["default"]["kl_t1"] < figures["small"]["kl_t1"] < 1e-3
    assert figures["small"]["records"] == 6
    other = cli(*words.replace("--codec none", "--codec small").split())
    assert other.code == 2
    assert "codec: none against small" in other.err


def test_models(cli) -> None:
    listed = cli("models", "--json")
    assert listed.code == 0
    rows = {row["spec"]: row for row in json.loads(listed.out)}
    assert rows["kdcache:tiny"]["stride"] == 4
    assert "head" in rows["kdcache:tiny"]["taps"]


@pytest.mark.parametrize(
    "verb",
    ["", "data", "data check", "models", "train-teacher", "build-teacher-cache", "train-student", "evaluate",
     "inspect", "verify", "demo"],
)  # fmt: skip
def test_help(cli, verb) -> None:
    shown = cli(*verb.split(), "--help")
    assert shown.code == 0
    assert "Usage" in shown.out
    assert shown.err == ""


def test_a_student_never_meets_its_teacher(world, tmp_path) -> None:
    """In a process of its own: no module of the teacher's room is imported, and its folder is gone."""
    shutil.rmtree(world / "teacher")
    code = """
import sys
from kdcache_cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
print(sorted(name for name in sys.modules if name.startswith("kdcache")))
assert not any(name.startswith("kdcache.teacher") for name in sys.modules)
"""
    words = f"train-student --cache {world}/store.zarr --val {world}/data --out {tmp_path}/run {STUDENT}"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kdcache.training" in done.stdout


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from kdcache_cli.app import main
try:
    main(["train-student", "--help"])
except SystemExit:
    pass
assert not {"torch", "zarr", "matplotlib", "numba"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_interrupted_at_the_keyboard(tmp_path, world, fork, cli) -> None:
    """130, a sentence, and finished shards that the same command keeps."""
    words = [
        *f"build-teacher-cache --data scenes:36x52,train=800 --teacher {world}/teacher --size 32x48".split(),
        *f"--batch-size 1 --shard-records 4 --views full --out {tmp_path}/s.zarr".split(),
    ]
    running = fork(*words)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("s.zarr/ledger/*.json")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "run the same command again" in err
    assert "Traceback" not in err
    ended = cli(*words)
    assert ended.code == 0
    assert "from before)" in ended.out
    assert os.listdir(tmp_path / "s.zarr" / "ledger")


def test_an_interrupted_training_is_no_success(tmp_path, world, cli, monkeypatch) -> None:
    """130, a sentence, and the same run with --resume."""
    words = f"train-student --cache {world}/store.zarr {STUDENT} --method kl --out {tmp_path}/run".split()
    advanced = TrainingProgress.advanced

    def interrupt(self: TrainingProgress, step: int) -> None:
        advanced(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "advanced", interrupt)
        stopped = cli(*words)
    assert stopped.code == 130, stopped.err
    assert "Stopped after 2 iterations" in stopped.err
    resumed = cli(*words, "--resume")
    assert resumed.code == 0, resumed.err
    assert "iterations 2 to 3" in resumed.out + resumed.err
