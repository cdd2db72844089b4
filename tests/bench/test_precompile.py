"""benchmarks/precompile.py: kernels compiled ahead are found again, and not where anything changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "precompile.py"
SMALL = "--arch sm_90 --shapes 2x3x16x16/4 --case dist --dtype fp32"  # without tiles, which takes 20 s


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
    assert anew == variants >= 6
    assert archive.stat().st_size < 2**21

    shutil.rmtree(folder)
    used = run("--use", archive)
    assert (used.returncode, used.stdout.strip()) == (0, str(folder)), used.stderr
    assert compiled(folder) == (variants, 0)

    kernels = shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    source = kernels / "kdcache_kernels" / "gpu" / "on_cells" / "relations.py"
    before = source.read_text(encoding="utf-8")
    changed = before.replace("(temperature * temperature * loss)", "(loss * temperature * temperature)")
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
    (tmp_path / "versions.json").write_text(json.dumps({"Triton": "1.0.0"}))
    done = run(*SMALL.split(), "--folder", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"Cannot add to {tmp_path}: its kernels are for Triton 1.0.0, not {triton.__version__}"
    )
    assert "Fix: " in done.stderr


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"Triton": "1.0.0"}, f"Triton 1.0.0, not {triton.__version__}"),
        ({"Python": "3.1"}, "Python 3.1, not 3."),
        ({"kernel sources": "0123"}, "kernel sources 0123, not "),
        ({}, ""),
    ],
)
def test_an_archive_of_other_versions_fails_with_the_fix(
    change: dict[str, str], difference: str, tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    folder, archive = tmp_path / "kernels", tmp_path / "kernels.tar.xz"
    folder.mkdir()
    made = script("precompile").versions(None) | change
    (folder / "versions.json").write_text(json.dumps(made))
    (folder / "kernel").write_text("code")
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(folder)
    shutil.rmtree(folder)
    done = run("--use", archive)
    if not change:
        assert (done.returncode, done.stdout.strip()) == (0, str(folder)), done.stderr
        assert (folder / "kernel").read_text() == "code"
        return
    assert done.returncode == 1
    assert done.stderr.startswith(f"Cannot use {archive}: its kernels are for {difference}")
    assert "Fix: make it again" in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize("content", ["missing", "empty", "elsewhere"])
def test_what_is_no_archive_of_kernels_fails(content: str, tmp_path: Path) -> None:
    archive, stranger = tmp_path / "a.tar.xz", tmp_path / "stranger"
    stranger.write_text("x")
    if content != "missing":
        with tarfile.open(archive, "w:xz") as packed:
            if content == "elsewhere":
                packed.add(stranger, "tmp/kernels/versions.json")
                packed.add(stranger, "etc/stranger")
    done = run("--use", archive)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{'Archive not found' if content == 'missing' else 'Not an archive of kernels'}: ")
    assert "Fix: " in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "problem"), [("", "Missing --arch"), ("--arch sm_90 --case gated", "Did you mean gate?")]
)
def test_wrong_input(words: str, problem: str, tmp_path: Path) -> None:
    done = run(*words.split(), "--folder", tmp_path / "kernels")
    assert done.returncode == 1
    assert problem in done.stderr
    assert not (tmp_path / "kernels").exists()
