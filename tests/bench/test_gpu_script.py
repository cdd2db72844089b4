"""benchmarks/gpu.sh: its order, its budget and what it leaves, with a program that stands for Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
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
    "accuracy": "correctness",
    "kernels": "kernels",
    "kernels-cases": "kernels",
    "kernels-on-cells": "kernels",
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

    def run(*words: str, fail: str = "", slow: str = "") -> tuple[int, str]:
        own = {"PYTHON": str(program), "LOG": str(tmp_path / "log"), "FAIL": fail}
        environment = {**os.environ, **own, "SLOW": slow or "-", "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [str(ROOT / "benchmarks" / "gpu.sh"), "--dry", "--results", str(tmp_path / "results"), *words]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.returncode, done.stdout

    return run


def started(output: str) -> list[str]:
    return [line.split()[1] for line in output.splitlines() if line.startswith("==") and "at most" in line]


def written(tmp_path: Path) -> set[str]:
    return {path.name.removesuffix("-dry.json") for path in (tmp_path / "results").iterdir()}


def commands(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_correctness_comes_first_and_everything_leaves_a_file(script, tmp_path) -> None:
    code, output = script()
    assert code == 0, output
    order = started(output)
    assert order[:3] == ["compile", "accuracy", "tests"]
    assert order.index("kernels") < order.index("steps") < order.index("build")
    assert written(tmp_path) == set(RESULTS)


@pytest.mark.parametrize("part", ["correctness", "kernels", "step", "rest"])
def test_a_part_alone(part, script, tmp_path) -> None:
    code, output = script(part)
    assert code == 0, output
    assert written(tmp_path) == {name for name, own in RESULTS.items() if own == part}


def test_the_loss_is_measured_at_several_limits_of_registers(script, tmp_path) -> None:
    code, output = script("tune")
    assert code == 0, output
    assert written(tmp_path) == {f"kernels-{limit}-registers" for limit in (128, 152, 168)}


def test_what_fails_is_named_and_the_rest_is_run(script, tmp_path) -> None:
    code, output = script(fail="--check benchmarks/step.py")
    assert code == 1
    assert "failed: accuracy step" in output
    assert written(tmp_path) == set(RESULTS)


def test_an_archive_of_kernels_is_unpacked_and_nothing_is_compiled(script, tmp_path) -> None:
    kernel, archive = tmp_path / "carried" / "kernel", tmp_path / "kernels.tar.xz"
    kernel.parent.mkdir()
    kernel.write_text("code")
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(kernel)
    kernel.unlink()
    code, output = script("--kernels", str(archive), "kernels")
    assert code == 0, output
    assert started(output)[0] == "unpack"
    assert kernel.read_text() == "code"
    assert "another Triton wrote" in output, "the pretended Python has none"
    assert not [words for words in commands(tmp_path) if "benchmarks/precompile.py" in words]


@pytest.mark.slow
def test_a_step_that_hangs_takes_no_more_than_its_time(script, tmp_path) -> None:
    """The budget of the call ends it, and names what it left out."""
    code, output = script("--minutes", "0.2", slow="--check")
    assert code == 1
    assert "failed: accuracy" in output
    assert "no time was left for: tests kernels" in output
    assert written(tmp_path) < set(RESULTS)


@pytest.mark.parametrize("words", [("kernel",), ("--minutes",), ("--budget", "3")])
def test_wrong_input(words, script) -> None:
    code, output = script(*words)
    assert code == 2
    assert words[0] in output
