"""`kdcache plan`, `inspect --teacher-report` and `export-pseudo-labels`."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcache.data import open_split

PLAN = "plan --data {w}/data --teacher {w}/teacher"
REPORT = "inspect {w}/store.zarr --teacher-report --out {w}/new"
PSEUDO = "export-pseudo-labels {w}/store.zarr --out {w}/new"


@pytest.mark.parametrize(
    ("verb", "taught"),
    [
        ("plan", "kdcache plan --data camvid"),
        ("inspect", "kdcache inspect camvid.zarr --teacher-report"),
        ("export-pseudo-labels", "kdcache export-pseudo-labels camvid.zarr"),
    ],
)
def test_help(cli, verb, taught) -> None:
    shown = cli(verb, "--help")
    assert shown.code == 0
    assert taught in shown.out


@pytest.fixture
def sketched(monkeypatch) -> None:
    """Pictures are not drawn: that takes seconds, and tests/teacher looks at them."""
    monkeypatch.setattr("kdcache.teacher.audit.figures.save_figure", lambda _, path: sketch(path))


def sketch(path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")


@pytest.mark.usefixtures("sketched")
def test_a_report(world, cli) -> None:
    """On the terminal, as JSON and as pictures, which agree; beside the store unless told otherwise."""
    told = cli("inspect", world / "store.zarr", "--teacher-report")
    assert told.code == 0, told.err
    report = json.loads((world / "store-report/report.json").read_text())
    assert f"mIoU {100 * report['teacher']['miou']:.2f}" in told.out
    assert f"ECE {100 * report['calibration']['ece']:.2f}" in told.out
    for text in (
        "Most confused",
        "Pseudo labels over thresholds",
        "Error of the KL gradient",
        "6 labelled images of 6",
    ):
        assert text in told.out
    assert len(list((world / "store-report").rglob("*.png"))) == 11
    machine = cli("inspect", world / "store.zarr", "--teacher-report", "--json", "--out", world / "new")
    assert json.loads(machine.out)["teacher"] == report["teacher"]
    sizes = cli("inspect", world / "store.zarr")
    assert "full-resolution" in sizes.out


@pytest.mark.usefixtures("sketched")
def test_a_report_from_the_data_set(world, cli) -> None:
    found = []
    for store, more in (("store", ()), ("source", ("--data", world / "data"))):
        words = ("--teacher-report", "--json", "--out", world / f"{store}-new")
        told = cli("inspect", world / f"{store}.zarr", *words, *more)
        assert told.code == 0, told.err
        found.append({name: value for name, value in json.loads(told.out).items() if name != "store"})
    assert found[0] == found[1]


@pytest.mark.parametrize("rule", [("--threshold", "0.15"), ("--quantile", "0.5")])
def test_pseudo_labels(world, cli, tree, rule) -> None:
    words = (*PSEUDO.format(w=world).split(), *rule, "--images", "--json", world / "kept.json")
    told = cli(*words)
    assert told.code == 0, told.err
    assert "6 label files written" in told.out
    kept = json.loads((world / "kept.json").read_text())
    files = sorted((world / "new/labels/train").glob("*.png"))
    ids = np.stack([np.asarray(Image.open(path)) for path in files])
    assert kept["share"] == pytest.approx((ids != 255).mean())
    assert [row["kept"] for row in kept["classes"]] == [int((ids == c).sum()) for c in range(7)]
    assert kept[rule[0].removeprefix("--")] == float(rule[1])
    assert len(open_split(world / "new", "train")) == 6
    before = tree(world / "new")
    again = cli(*words)
    assert "0 label files written (6 from before)" in again.out
    assert tree(world / "new") == before


def test_a_plan(world, cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # in memory: small stores are synced
    words = f"{PLAN} --records 8 --student kdcache:tiny --epochs 3 --json {{w}}/plan.json --out {{w}}/new/deep"
    told = cli(*words.format(w=world).split(), "--shard-records", "4", "--views", "full")
    assert told.code == 0, told.err
    found = json.loads((world / "plan.json").read_text())
    real = json.loads(cli("inspect", world / "store.zarr", "--json").out)
    assert found["chosen"]["bytes"] == pytest.approx(real["bytes_on_disk"], rel=0.15)
    assert found["chosen"]["files"] == sum(path.is_file() for path in (world / "store.zarr").rglob("*"))
    assert found["training"]["epochs"] == 3
    assert found["free_bytes"] > 0
    assert "From 6 records" in told.out
    assert "--codec small" in told.out
    assert "are free where it would go" in told.out
    assert not (world / "new").exists()


def test_a_plan_that_does_not_fit_and_does_not_pay(world, cli, monkeypatch) -> None:
    """Said in so many words: no error, for it is but a plan."""
    module = import_module("kdcache.verbs.plan")

    def dear(*arguments: Any, **named: Any) -> Any:
        found = estimate(*arguments, **named)
        chosen = replace(found.chosen, sizes={"targets/segmentation/values": 2.0**60}, seconds=7200.0)
        return replace(found, chosen=chosen, seconds=replace(found.seconds, teach=0.2, read=0.2))

    estimate = module.estimate
    monkeypatch.setattr(module, "estimate", dear)
    told = cli(*PLAN.format(w=world).split())
    assert told.code == 0, told.err
    assert "2.0 h on this machine" in told.out
    assert "saves memory, but no time" in told.out
    assert "It will not fit" in told.err
    elsewhere = cli(*PLAN.format(w=world).split(), "--out", "s3://bucket/store.zarr")
    assert "The free space at s3:" in elsewhere.out


@pytest.mark.slow
def test_a_plan_that_is_stopped_leaves_nothing(world, tmp_path, fork, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running = fork(*PLAN.format(w=world).split())
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("kdcache-plan-*/*")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert not list(tmp_path.glob("kdcache-plan-*"))


CASES = {
    "report of nothing": (REPORT.replace("store.zarr", "none.zarr"), "Cache not found: {w}/none.zarr"),
    "report without labels": (REPORT.replace("store.zarr", "source.zarr"), "Missing --data"),
    "report over something": (REPORT.replace("new", "data"), "data holds something else"),
    "report into a file": (REPORT.replace("new", "data/classes.txt"), "classes.txt is not a folder"),
    "report of other data": (REPORT + " --data {w}/data --split val", "2 samples"),
    "flags of a report alone": ("inspect {w}/store.zarr --out {w}/new", "Cannot use --out without --teacher-report"),
    "pseudo without a rule": (PSEUDO, "Missing --threshold or --quantile"),
    "pseudo by two rules": (
        PSEUDO + " --threshold 0.5 --quantile 0.5",
        "either --threshold 0.5 or --quantile 0.5, not both",
    ),
    "pseudo --threshold 1": (PSEUDO + " --threshold 1", "--threshold: 1.0"),
    "pseudo --threshold 0": (PSEUDO + " --threshold 0", "--threshold: 0.0"),
    "pseudo --quantile nan": (PSEUDO + " --quantile nan", "--quantile: nan"),
    "pseudo over something": (PSEUDO.replace("new", "data") + " --threshold 0.5", "data holds something else"),
    "pseudo of nothing": (
        PSEUDO.replace("store.zarr", "none.zarr") + " --threshold 0.5",
        "Cache not found: {w}/none.zarr",
    ),
    "pseudo images of nowhere": (
        PSEUDO.replace("store.zarr", "source.zarr") + " --threshold 0.5 --images",
        "Missing --data",
    ),
    "plan of no data": (PLAN.replace("/data", "/nowhere"), "Data folder not found: "),
    "plan of no teacher": (PLAN.replace("/teacher", "/none"), "Run not found: {w}/none"),
    "plan --top-k 99": (PLAN + " --top-k 99", "99"),
    "plan --codec foo": (PLAN + " --codec foo", "'foo'"),
    "plan --features foo": (PLAN + " --features foo", "foo"),
    "plan --student foo": (PLAN + " --student kdcache:foo", "foo"),
    "plan of two teachers' features": (
        PLAN + " --teacher {w}/teacher --features stage4",
        "--features stage4 of 2 teachers in one cache",
    ),
    "plan --measure-disk s3": (
        PLAN + " --measure-disk --out s3://bucket/x",
        "Cannot measure the disk of s3://bucket/x",
    ),
    "plan --views 0": (PLAN + " --views 0", "0"),
}


@pytest.mark.parametrize(("command", "received"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_wrong_input(world, cli, tree, command, received) -> None:
    before = tree(world)
    ended = cli(*command.format(w=world).split())
    assert ended.code == 2, (ended.out, ended.err)
    assert received.format(w=world) in ended.err
    assert ended.err.count("fix: ") == 1
    assert "Traceback" not in ended.err
    assert "should not have happened" not in ended.err
    assert tree(world) == before
