"""benchmarks/precompile.py: kernels compiled ahead are found again, and not where anything changed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "precompile.py"
SMALL = "--arch sm_90 --shapes 2x3x16x16/4 --case trained --dtype fp32"


def environment(kernels: Path = ROOT / "kernels") -> dict[str, str]:
    """The environment of a process that compiles, which may take the kernels from another place."""
    path = os.pathsep.join(map(str, (kernels, ROOT, ROOT / "cli")))
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def run(*words: object, kernels: Path = ROOT / "kernels") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, env=environment(kernels), capture_output=True, text=True, check=False)


def compiled(folder: Path, *words: object, kernels: Path = ROOT / "kernels") -> tuple[int, int]:
    """Variants of a small case, and how many of them were compiled anew."""
    done = run(*SMALL.split(), "--folder", folder, *words, kernels=kernels)
    assert done.returncode == 0, done.stderr[-3000:]
    of, anew = re.findall(r"of (\d+) variants, (\d+) compiled", done.stdout)[-1]
    return int(of), int(anew)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_archive_is_found_again_and_what_changed_is_not(tmp_path: Path) -> None:
    folder, archive = tmp_path / "kernels-of-a-gpu", tmp_path / "kernels.tar.xz"
    variants, anew = compiled(folder, "--out", archive)
    assert anew == variants >= 7
    assert archive.stat().st_size < 2**21

    shutil.rmtree(folder)
    subprocess.run(["tar", "-xf", archive, "-C", "/"], check=True)
    assert compiled(folder) == (variants, 0)

    kernels = shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    source = kernels / "kdcache_kernels" / "gpu" / "loss.py"
    before = source.read_text(encoding="utf-8")
    changed = before.replace("ce *= tl.load(factors_ptr + 2)", "ce = ce * tl.load(factors_ptr + 2)")
    assert changed != before
    source.write_text(changed, encoding="utf-8")
    assert compiled(folder, kernels=kernels) == (variants, 1), "the kernel of the totals alone"


def alive(group: int) -> bool:
    """Whether a group of processes has one left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interruption_leaves_a_usable_folder_and_no_process(tmp_path: Path) -> None:
    # A shell's background ignores SIGINT, and its children would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, SCRIPT, *SMALL.split(), "--folder", tmp_path]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while not list(tmp_path.glob("*/__grp__*")):
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    for _ in range(200):  # the last of multiprocessing's own processes ends after its parent
        if not alive(process.pid):
            break
        time.sleep(0.1)
    assert not alive(process.pid)
    there = len(list(tmp_path.glob("*/__grp__*")))
    variants, anew = compiled(tmp_path)
    assert 0 < there <= variants - anew


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_few_variants_serve_the_accuracy_check() -> None:
    code = "import precompile\nprecompile.start('sm_90', '', 'trained', 'bf16')\nprint(len(precompile.list_variants()))"
    folders = {"PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], str(SCRIPT.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | folders, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 100 < int(done.stdout) <= 293


def test_a_folder_of_another_triton_fails(tmp_path: Path) -> None:
    (tmp_path / "triton-key").write_text("another")
    done = run(*SMALL.split(), "--folder", tmp_path)
    assert done.returncode == 1
    assert f"Another Triton filled {tmp_path}. Fix: " in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "problem"), [("", "Missing --arch"), ("--arch sm_90 --case gated", "did you mean 'gate'")]
)
def test_wrong_input(words: str, problem: str, tmp_path: Path) -> None:
    done = run(*words.split(), "--folder", tmp_path / "kernels")
    assert done.returncode == 1
    assert problem in done.stderr
    assert not (tmp_path / "kernels").exists()
