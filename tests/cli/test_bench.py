"""`kdcache bench-kernels` as a user meets it; what its figures mean is tests/bench/kernels."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from kdcache.bench import kernels

SMALL = "bench-kernels --device cpu --shapes 1x3x16x16/4 --repeats 3 --no-memory"


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementation that needs no compiler."""
    monkeypatch.setattr(kernels, "Settings", partial(kernels.Settings, impl="reference"))


def test_a_table_and_a_file(cli, tmp_path) -> None:
    words = f"{SMALL} --against eager,liger --dtype fp32,bf16 --case plain,gate --json {tmp_path}/k.json"
    ended = cli(*words.split())
    assert ended.code == 0, ended.err
    assert "gate 1x3x16x16/4 bf16 T=2 k=3" in ended.out
    assert "kdcache (reference)" in ended.out
    assert ended.out.count("\n  liger: ") == 4, "a line for every case, and no crash"
    assert "eager: warm-up" in ended.err
    told = json.loads((tmp_path / "k.json").read_text())
    assert told["theme"] == "kernels"
    assert {"date", "commit", "command", "machine"} < set(told)
    assert told["command"].startswith("kdcache bench-kernels")
    assert told["machine"]["packages"]["torch"]
    assert len(told["rows"]) == 4
    assert told["complete"] is True
    cases = {(row["case"]["kind"], row["case"]["dtype"]) for row in told["rows"]}
    assert cases == {(kind, dtype) for kind in ("plain", "gate") for dtype in ("fp32", "bf16")}
    eager = told["rows"][0]["rivals"][0]
    ours = told["rows"][0]["ours"]
    assert eager["ratio"]["best"] == pytest.approx(eager["time"]["best"] / ours["time"]["best"])
    assert {"best", "p20", "p50", "p80", "repeats"} == set(ours["time"])


def test_every_case_of_a_training(cli) -> None:
    ended = cli(*SMALL.split(), "--case", "all", "--against", "none")
    assert ended.code == 0, ended.err
    assert [kind for kind in kernels.KINDS if f"{kind} 1x3x16x16/4" in ended.out] == list(kernels.KINDS)
    assert "eager" not in ended.out


def test_rows_are_shown_and_written_before_the_run_is_interrupted(cli, tmp_path, monkeypatch) -> None:
    measured = kernels.measure

    def interrupted(*arguments):
        rows = measured(*arguments)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "measure", interrupted)
    ended = cli(*SMALL.split(), "--dtype", "fp32,bf16", "--against", "none", "--json", tmp_path / "k.json")
    assert ended.code == 130
    assert "fp32" in ended.out
    assert "1 of 2 rows are measured" in ended.err
    told = json.loads((tmp_path / "k.json").read_text())
    assert told["complete"] is False
    assert [row["case"]["dtype"] for row in told["rows"]] == ["fp32"]


def test_the_file_is_whole_after_every_row(cli, tmp_path, monkeypatch) -> None:
    """Before the next one is measured, however the process ends."""
    measured, rows = kernels.measure, []

    def watched(*arguments):
        for row in measured(*arguments):
            rows.append(len(json.loads((tmp_path / "k.json").read_text())["rows"]))
            yield row

    monkeypatch.setattr(kernels, "measure", watched)
    monkeypatch.setattr("kdcache_cli.measuring.WRITE_EVERY_S", -1)
    ended = cli(*SMALL.split(), "--dtype", "fp32,fp16,bf16", "--against", "none", "--json", tmp_path / "k.json")
    assert ended.code == 0
    assert rows == [0, 1, 2]


@pytest.mark.slow
def test_memory_is_measured_by_default(cli) -> None:
    ended = cli(*SMALL.removesuffix("--no-memory").split(), "--against", "eager")
    assert ended.code == 0, ended.err
    assert "in a process of its own" in ended.err
    assert " - " not in ended.out


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(
        kernels.CheckSettings, impl="reference", strides=("2",), temperatures=(2.0,), classes=(3,), values=("normal",)
    )
    monkeypatch.setattr(kernels, "CheckSettings", small)
    monkeypatch.setattr(kernels, "EVERY", 1)


def test_a_check_that_holds(cli, tmp_path, small_grid) -> None:
    ended = cli("bench-kernels", "--check", "--device", "cpu", "--json", tmp_path / "c.json")
    assert ended.code == 0, ended.out + ended.err
    assert "15 points, 0 missed a bound" in ended.out
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["theme"] == "kernel accuracy"
    assert told["impl"] == "reference"
    assert len(told["rows"]) == 15
    assert all(row["passed"] for row in told["rows"])
    assert [row["dtype"] for row in told["summary"]] == ["fp32", "fp16", "bf16"]


def test_a_check_that_is_interrupted_leaves_what_it_judged(cli, tmp_path, small_grid, monkeypatch) -> None:
    judge = kernels.check

    def interrupted(settings):
        for number, point in enumerate(judge(settings)):
            if number == 4:
                raise KeyboardInterrupt
            yield point

    monkeypatch.setattr(kernels, "check", interrupted)
    ended = cli("bench-kernels", "--check", "--device", "cpu", "--json", tmp_path / "c.json")
    assert ended.code == 130
    told = json.loads((tmp_path / "c.json").read_text())
    assert (told["complete"], len(told["rows"])) == (False, 4)


def test_a_check_that_fails(cli, small_grid, monkeypatch) -> None:
    monkeypatch.setitem(kernels.GRADIENT_BOUND, "fp32", -1.0)
    ended = cli("bench-kernels", "--check", "--device", "cpu", "--dtype", "fp32")
    assert ended.code == 1
    assert "5 points, 5 missed a bound" in ended.out
    assert "window=crop" in ended.out


WRONG = {
    "flag": ("--layout nchw", "--layout"),
    "shape": ("--shapes 16x21x512", "'16x21x512'"),
    "preset": ("--shapes camvit", "Did you mean camvid?"),
    "rival": ("--against eagre", "Did you mean eager?"),
    "dtype": ("--dtype fp8", "'fp8'"),
    "dtype of a check": ("--check --dtype fp8", "'fp8'"),
    "case": ("--case trainde", "Did you mean trained?"),
    "folder": ("--json {tmp}/nowhere/k.json", "nowhere"),
    "repeats": ("--repeats 2", "Too few repeats for a median: 2"),
}


@pytest.mark.parametrize(("words", "received"), WRONG.values(), ids=WRONG)
def test_wrong_input(cli, tmp_path, words, received) -> None:
    ended = cli("bench-kernels", "--device", "cpu", *words.format(tmp=tmp_path).split())
    assert ended.code == 2, ended.out
    assert received in ended.err
    assert ended.err.count("fix: ") == 1
    assert "should not have happened" not in ended.err
    assert ended.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(cli) -> None:
    ended = cli("bench-kernels", "--device", "cuda")
    assert ended.code == 2
    assert "no usable GPU" in ended.err
