"""benchmarks/gpu.sh: its order, its budget and what it leaves, with a program that stands for Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRETENDED = """#!{python}
import json, os, sys, time
words = sys.argv[1:]
name = next((word for word in words if word in os.environ["FAIL"].split()), None)
with open(os.environ["LOG"], "a") as log:
    print(json.dumps(words), file=log)
if "-c" in words:
    sys.exit(0)
if "--json" in words and os.environ.get("SLOW") not in words:
    open(words[words.index("--json") + 1], "w").write("{{}}")
if os.environ.get("SLOW") in words:
    time.sleep(600)
sys.exit(1 if name else 0)
"""
RESULTS = {
    "once": "correctness",
    "accuracy": "correctness",
    "ceilings": "kernels",
    "kernels": "kernels",
    "rows": "kernels",
    "rivals": "kernels",
    "kernels-cases": "kernels",
    "steps": "step",
    "step": "step",
    "build": "rest",
    "training": "rest",
    "gradients": "rest",
    "loader": "rest",
    "live": "rest",
}
"""Result files, in their order, and the part that writes each."""


@pytest.fixture
def script(tmp_path: Path):
    """A function that runs the script with a program in Python's place; returns (code, output)."""
    program = tmp_path / "python"
    program.write_text(PRETENDED.format(python=sys.executable))
    program.chmod(0o755)

    def run(*words: str, fail: str = "", slow: str = "", dry: bool = True) -> tuple[int, str]:
        own = {"PYTHON": str(program), "LOG": str(tmp_path / "log"), "FAIL": fail}
        own["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"  # without the tools of a GPU
        environment = {**os.environ, **own, "SLOW": slow or "-", "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        flags = ["--results", str(tmp_path / "results"), *(["--dry"] if dry else [])]
        command = [str(ROOT / "benchmarks" / "gpu.sh"), *flags, *words]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.returncode, done.stdout

    return run


def started(output: str) -> list[str]:
    return [line.split()[1] for line in output.splitlines() if line.startswith("==") and "at most" in line]


def written(tmp_path: Path) -> set[str]:
    return {path.name.removesuffix("-dry.json") for path in (tmp_path / "results").glob("*.json")}


def commands(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_correctness_comes_first_and_everything_leaves_a_file(script, tmp_path) -> None:
    code, output = script()
    assert code == 0, output
    order = started(output)
    assert order[:4] == ["compile", "once", "accuracy", "tests"]
    assert order.index("ceilings") < order.index("kernels") < order.index("rows") < order.index("rivals")
    assert order.index("rivals") < order.index("steps") < order.index("build")
    assert written(tmp_path) == set(RESULTS)
    lines = (tmp_path / "results" / "calls-dry.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == order
    assert {json.loads(line)["part"] for line in lines} == {"compile", *RESULTS.values()}
    (tests,) = [words for words in commands(tmp_path) if "pytest" in words]
    assert tests[tests.index("-m", 2) + 1] == "not slow"
    assert tests[tests.index("--ignore") + 1] == "tests/kernels/test_bad_arguments.py"


@pytest.mark.parametrize("part", ["correctness", "kernels", "step", "rest"])
def test_a_part_alone(part, script, tmp_path) -> None:
    code, output = script(part)
    assert code == 0, output
    assert written(tmp_path) == {name for name, own in RESULTS.items() if own == part}


@pytest.mark.parametrize("part", ["correctness", "kernels", "step", "rest"])
def test_a_gpu_gets_sizes_of_its_own(part, script, tmp_path) -> None:
    code, output = script("--kernels", "kernels.tar.xz", part, dry=False)
    assert code == 0, output
    devices = {words[words.index("--device") + 1] for words in commands(tmp_path) if "--device" in words}
    assert devices == {"cuda"}
    if part == "kernels":
        shapes = [words[words.index("--shapes") + 1] for words in commands(tmp_path) if "--shapes" in words]
        assert shapes.count("voc,ade,cityscapes,16x11x288x384/4") == 2


def test_tilings_are_measured_alone(script, tmp_path) -> None:
    code, output = script("tune")
    assert code == 0, output
    assert written(tmp_path) == {"rows"}


def test_the_checkers_of_a_gpu_are_used_where_they_are(script, tmp_path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        tool = folder / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/tools\n')
        tool.chmod(0o755)
    code, output = script("correctness", "kernels")
    assert code == 0, output
    assert {"memcheck", "racecheck", "profile", "ncu"} < set(started(output))
    lines = (tmp_path / "tools").read_text().splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("compute")] == [
        ["compute-sanitizer", "--tool", tool] for tool in ("memcheck", "racecheck")
    ]
    assert "--set full --clock-control none" in next(line for line in lines if line.startswith("ncu"))


def test_what_is_not_installed_is_named(script) -> None:
    code, output = script("correctness", "kernels")
    assert code == 0, output
    assert "== compute-sanitizer is not installed" in output
    assert "== ncu is not installed" in output


def test_what_fails_is_named_and_the_rest_is_run(script, tmp_path) -> None:
    code, output = script(fail="--check benchmarks/step.py")
    assert code == 1
    assert "failed: accuracy step" in output
    assert written(tmp_path) == set(RESULTS)


def test_an_archive_of_kernels_is_unpacked_and_nothing_is_compiled(script, tmp_path) -> None:
    code, output = script("--kernels", "kernels.tar.xz", "kernels")
    assert code == 0, output
    (words,) = [words for words in commands(tmp_path) if "benchmarks/precompile.py" in words]
    assert words[1:] == ["--use", "kernels.tar.xz"]


def test_an_archive_that_does_not_serve_ends_the_call(script, tmp_path) -> None:
    code, output = script("--kernels", "kernels.tar.xz", "kernels", fail="--use")
    assert code == 2
    assert started(output) == []


@pytest.mark.slow
def test_a_step_that_hangs_takes_no_more_than_its_time(script, tmp_path) -> None:
    """The budget of the call ends it, and names what it left out."""
    code, output = script("--minutes", "0.2", slow="--check")
    assert code == 1
    assert "failed: accuracy" in output
    assert "no time was left for: tests ceilings kernels" in output
    assert written(tmp_path) < set(RESULTS)


@pytest.mark.parametrize("words", [("kernel",), ("--minutes",), ("--budget", "3")])
def test_wrong_input(words, script) -> None:
    code, output = script(*words)
    assert code == 2
    assert words[0] in output
