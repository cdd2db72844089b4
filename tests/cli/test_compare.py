"""`kdcache compare` on runs that the command line has made."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kdcache.metrics import evaluate_model


@pytest.fixture(scope="module")
def students(made: Path, cli: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """none-0, none-1, kl-0, kl-1: the same student of two seeds, without and with the teacher."""
    root = tmp_path_factory.mktemp("students")
    for method in ("none", "kl"):
        for seed in (0, 1):
            words = f"train-student --cache {made}/store.zarr --model kdcache:tiny --val {made}/data --iterations 3"
            words += f" --batch-size 2 --val-every 3 --method {method} --seed {seed} --out {root}/runs/{method}-{seed}"
            ended = cli(*words.split())
            assert ended.code == 0, ended.err
    return root


@pytest.fixture
def place(students: Path, made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy, to be damaged; beside it the teacher and the data."""
    for name in ("teacher", "data"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copytree(students / "runs", tmp_path / "runs")
    return tmp_path


def test_help(cli) -> None:
    shown = cli("compare", "--help")
    assert shown.code == 0
    assert "kdcache compare runs/ --teacher teacher" in shown.out


def test_a_comparison(place, cli) -> None:
    words = ["compare", place / "runs", "--teacher", place / "teacher", "--repeats", "3"]
    for kind, name in (("markdown", "c.md"), ("csv", "c.csv"), ("json", "new/c.json"), ("text", "c.txt")):
        words += [f"--{kind}", place / name]
    told = cli(*words)
    assert told.code == 0, told.err
    found = json.loads((place / "new/c.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["kl", "none", "teacher"]
    assert [len(row["runs"]) for row in found["rows"]] == [2, 2, 1]
    difference = found["rows"][0]["difference"]
    assert (difference["baseline"], difference["paired"]) == ("none", True)
    assert f"{100 * difference['mean']:+.2f}" in told.out
    assert "Not shown. The best row" in told.out, "the answer of the report, before the tables"
    assert "**" not in told.out, "what is best is bold, not starred"
    for text in ("none (baseline)", "within noise", "IoU %", "GFLOPs", "batch size 1, 3 calls after 10", "pedestrian"):
        assert text in told.out
    assert "# Comparison on" in (place / "c.md").read_text()
    assert "Inference Speed (ms)" in (place / "c.txt").read_text()
    with (place / "c.csv").open() as file:
        assert [float(row["miou_mean"]) for row in csv.DictReader(file)] == [
            row["miou"]["mean"] for row in found["rows"]
        ]
    again = cli(*words)
    assert again.code == 0, again.err
    assert all(run["reused"] for row in json.loads((place / "new/c.json").read_text())["rows"] for run in row["runs"])


def test_no_time_is_taken(place, cli) -> None:
    told = cli("compare", place / "runs/kl-0", "--data", place / "data", "--repeats", "0")
    assert told.code == 0, told.err
    assert "calls after" not in told.out


def test_a_batch_that_does_not_fit(place, cli, monkeypatch) -> None:
    def starve(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    for verb, target in (("report", "visualise.score_images"), ("compare", "stored_evaluations.evaluate_tasks")):
        monkeypatch.setattr(f"kdcache.analysis.{target}", starve)
        words = ["--out", place / "new.html"] if verb == "report" else ["--fresh"]
        told = cli(verb, place / "runs/kl-0", "--batch-size", "6", "--repeats", "0", *words)
        assert told.code == 2
        assert "--batch-size 3" in told.err
    assert evaluate_model is not starve


REPORT = "report --out {p}/page.html "
CASES = {
    "no run": ("compare {p}/nowhere", "Run not found: {p}/nowhere"),
    "empty folder": ("compare {p}/empty", "nor has any folder below it"),
    "a file": ("compare {p}/data/classes.txt", "classes.txt is a file"),
    "no weights": ("compare {p}/runs --weights last", "kl-0 has no last.safetensors, only best"),
    "weights of no kind": ("compare {p}/runs --weights newest", "'newest'"),
    "a spec alone": ("compare kdcache:tiny --data {p}/data", "Missing weights of 'kdcache:tiny'"),
    "a spec without a file": ("compare kdcache:tiny@{p}/none.safetensors --data {p}/data --size 32x48", "none.safeten"),
    "an unknown baseline": ("compare {p}/runs --baseline nonne", "Did you mean none"),
    "no such split": ("compare {p}/runs --split vall", "vall"),
    "other classes": ("compare {p}/other", "heaven"),
    "no fold": ("compare {p}/runs --own-fold", "trained on all samples"),
    "no size": ("compare {p}/runs --size 32", "'32'"),
    "no teacher": ("compare {p}/runs --teacher {p}/nowhere", "Run not found: {p}/nowhere"),
    "the teacher alone": ("compare {p}/teacher --teacher {p}/teacher", "only the teacher was given"),
    "pictures of no run": (REPORT + "{p}/nowhere --draw {p}/new", "Run not found: {p}/nowhere"),
    "pictures over something": (REPORT + "{p}/runs/kl-0 --draw {p}/data", "data holds something else"),
    "pictures into a file": (REPORT + "{p}/runs/kl-0 --draw {p}/data/classes.txt", "classes.txt is not a folder"),
    "pictures without weights": (
        REPORT + "{p}/runs --draw {p}/new --weights last",
        "kl-0 has no last.safetensors, only best",
    ),
    "pictures of no layout": (REPORT + "{p}/runs/kl-0 --draw {p}/new --layout column", "Unknown --layout column"),
    "pictures of no format": (REPORT + "{p}/runs/kl-0 --draw {p}/new --format png,jpg", "Choose from: png,svg,pdf"),
    "a layout of no pictures": (REPORT + "{p}/runs/kl-0 --layout row", "Cannot use --layout without --draw"),
}


@pytest.mark.parametrize(("command", "received"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_wrong_input(place, cli, tree, command, received) -> None:
    (place / "empty").mkdir()
    (place / "runs/kl-0/last.safetensors").unlink()
    shutil.copytree(place / "runs/none-0", place / "other")
    path = place / "other/model.json"
    path.write_text(path.read_text().replace('"sky"', '"heaven"'))
    before = tree(place)
    ended = cli(*command.format(p=place).split())
    assert ended.code == 2, (ended.out, ended.err)
    assert received.format(p=place) in ended.err
    assert ended.err.count("fix: ") == 1
    assert "Traceback" not in ended.err
    assert "should not have happened" not in ended.err
    assert tree(place) == before
