"""`kdcache bench-kernels` as a user meets it; what its figures mean is tests/evaluate/test_bench*.py."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from kdcache.bench import kernels

SMALL = "bench-kernels --device cpu --shapes 1x3x16x16/4 --repeats 2 --no-memory --impl reference"


def test_a_table_and_a_file(cli, tmp_path) -> None:
    words = (
        f"{SMALL} --against eager,liger --dtype fp32,bf16 --temperature 1,2.5 --top-k 2,all --json {tmp_path}/k.json"
    )
    ended = cli(*words.split())
    assert ended.code == 0, ended.err
    assert "1x3x16x16/4 bf16 nchw T=2.5 k=2" in ended.out
    assert "kdcache (reference)" in ended.out
    assert ended.out.count("liger-kernel") >= 8, "a line for every case, and no crash"
    assert "eager: warm-up" in ended.err
    told = json.loads((tmp_path / "k.json").read_text())
    assert told["theme"] == "kernels"
    assert {"date", "commit", "command", "machine"} < set(told)
    assert told["command"].startswith("kdcache bench-kernels")
    assert told["machine"]["packages"]["torch"]
    assert len(told["rows"]) == 8
    assert {(row["case"]["temperature"], row["case"]["kept"]) for row in told["rows"]} == {
        (temperature, kept) for temperature in (1.0, 2.5) for kept in (2, 3)
    }
    eager = told["rows"][0]["rivals"][0]
    ours = told["rows"][0]["ours"]
    assert eager["ratio"]["best"] == pytest.approx(eager["time"]["best"] / ours["time"]["best"])
    assert {"best", "p20", "p50", "p80", "repeats"} == set(ours["time"])


@pytest.mark.slow
def test_memory_is_measured_by_default(cli) -> None:
    ended = cli(*SMALL.replace("--no-memory ", "").split(), "--against", "eager")
    assert ended.code == 0, ended.err
    assert "in a process of its own" in ended.err
    assert " - " not in ended.out


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(kernels.CheckSettings, strides=("2",), temperatures=(2.0,), classes=(3,), values=("normal",))
    monkeypatch.setattr(kernels, "CheckSettings", small)
    monkeypatch.setattr("kdcache_cli.verbs.bench_kernels.EVERY", 1)


def test_a_check_that_holds(cli, tmp_path, small_grid) -> None:
    ended = cli("bench-kernels", "--check", "--device", "cpu", "--impl", "reference", "--json", tmp_path / "c.json")
    assert ended.code == 0, ended.out + ended.err
    assert "15 points, 0 missed a bound" in ended.out
    assert "window crop" in ended.out
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["theme"] == "kernel accuracy"
    assert told["impl"] == "reference"
    assert len(told["rows"]) == 15
    assert all(row["passed"] for row in told["rows"])
    assert {row["factor"] for row in told["summary"]} == {"stride", "temperature", "num_classes", "window", "values"}


def test_a_check_that_fails(cli, small_grid, monkeypatch) -> None:
    monkeypatch.setitem(kernels.GRADIENT_BOUND, "fp32", -1.0)
    ended = cli("bench-kernels", "--check", "--device", "cpu", "--impl", "reference", "--dtype", "fp32")
    assert ended.code == 1
    assert "5 points, 5 missed a bound" in ended.out
    assert "window=crop" in ended.out


WRONG = {
    "shape": ("--shapes 16x21x512", "'16x21x512'"),
    "preset": ("--shapes camvit", "did you mean 'camvid'"),
    "rival": ("--against eagre", "did you mean 'eager'"),
    "dtype": ("--dtype fp8", "'fp8'"),
    "dtype of a check": ("--check --dtype fp8", "'fp8'"),
    "layout": ("--layout nhwc", "'nhwc'"),
    "temperature": ("--temperature 0", "'0'"),
    "temperatures": ("--temperature 1,warm", "'1,warm'"),
    "top-k": ("--top-k 0", "'0'"),
    "implementation": ("--impl cuda", "'cuda'"),
    "implementation of a check": ("--check --impl cuda", "'cuda'"),
    "folder": ("--json {tmp}/nowhere/k.json", "nowhere"),
}


@pytest.mark.parametrize(("words", "received"), WRONG.values(), ids=WRONG)
def test_wrong_input(cli, tmp_path, words, received) -> None:
    ended = cli("bench-kernels", "--device", "cpu", *words.format(tmp=tmp_path).split())
    assert ended.code == 2, ended.out
    assert received in ended.err
    assert ended.err.count("received") == 1
    assert ended.err.count("remedy") == 1
    assert "should not have happened" not in ended.err
    assert ended.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(cli) -> None:
    ended = cli("bench-kernels", "--device", "cuda")
    assert ended.code == 2
    assert "no usable GPU" in ended.err
