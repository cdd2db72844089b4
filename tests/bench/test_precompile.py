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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import triton

from kdcache.errors import RecipeError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "precompile.py"
PACKAGES = (ROOT / "cli", ROOT, ROOT / "kernels")
SMALL = "--arch sm_90 --shapes 2x3x16x16/4 --case dist --dtype fp32"  # without tiles, which takes 20 s


def environment() -> dict[str, str]:
    """The environment of a process that compiles."""
    path = os.pathsep.join(map(str, PACKAGES))
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def run(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that runs the program in this process. What is compiled is compiled in one other process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    for package in PACKAGES:
        monkeypatch.syspath_prepend(package)

    def program(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        script("precompile").main()

    with mock.patch.dict(os.environ, environment(), clear=True):
        yield program


def alive(group: int) -> bool:
    """Whether a group of processes has one left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def interrupt(folder: Path) -> None:
    """Start the program by itself, and send it SIGINT once it has compiled a kernel. It leaves no process."""
    # A shell's background ignores SIGINT, and its children would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, SCRIPT, *SMALL.split(), "--folder", folder]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while not list(folder.glob("*/__grp__*")):
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    for _ in range(200):  # the last of multiprocessing's own processes ends after its parent
        if not alive(process.pid):
            break
        time.sleep(0.1)
    assert not alive(process.pid)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_are_found_again_and_what_changed_is_not(
    run: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an interruption, in the folder, and in an archive of it."""
    folder, archive = tmp_path / "kernels-of-a-gpu", tmp_path / "kernels.tar.xz"

    def compiled(*words: object) -> tuple[int, int]:
        """Variants of a small case, and how many of them were compiled anew."""
        run(*SMALL.split(), "--folder", folder, *words)
        of, anew = re.findall(r"of (\d+) variants, (\d+) compiled", capsys.readouterr().out)[-1]
        return int(of), int(anew)

    interrupt(folder)
    there = len(list(folder.glob("*/__grp__*")))
    variants, anew = compiled("--out", archive)
    assert variants >= 6
    assert 0 < there <= variants - anew
    assert archive.stat().st_size < 2**21

    shutil.rmtree(folder)
    run("--use", archive)
    assert capsys.readouterr().out.strip() == str(folder)
    assert compiled() == (variants, 0)

    kernels = shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    source = kernels / "kdcache_kernels" / "gpu" / "on_cells" / "relations.py"
    before = source.read_text(encoding="utf-8")
    changed = before.replace("(temperature * temperature * loss)", "(loss * temperature * temperature)")
    assert changed != before
    source.write_text(changed, encoding="utf-8")
    monkeypatch.syspath_prepend(kernels)
    assert compiled() == (variants, 1), "the kernel of the totals alone"


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


def failure(run: Callable[..., None], *words: object) -> str:
    """What the program says on its way out."""
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert isinstance(caught.value.code, str), "Python prints it and exits with 1"
    return caught.value.code


def test_a_folder_of_another_triton_fails(run: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "versions.json").write_text(json.dumps({"Triton": "1.0.0"}))
    problem = failure(run, *SMALL.split(), "--folder", tmp_path)
    assert problem.startswith(f"Cannot add to {tmp_path}: its kernels are for Triton 1.0.0, not {triton.__version__}")
    assert "Fix: " in problem


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
    change: dict[str, str],
    difference: str,
    tmp_path: Path,
    script: Callable[[str], ModuleType],
    run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, archive = tmp_path / "kernels", tmp_path / "kernels.tar.xz"
    folder.mkdir()
    made = script("precompile").versions(None) | change
    (folder / "versions.json").write_text(json.dumps(made))
    (folder / "kernel").write_text("code")
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(folder)
    shutil.rmtree(folder)
    if not change:
        run("--use", archive)
        assert capsys.readouterr().out.strip() == str(folder)
        assert (folder / "kernel").read_text() == "code"
        return
    problem = failure(run, "--use", archive)
    assert problem.startswith(f"Cannot use {archive}: its kernels are for {difference}")
    assert "Fix: make it again" in problem
    assert not folder.exists()


@pytest.mark.parametrize("content", ["missing", "empty", "elsewhere"])
def test_what_is_no_archive_of_kernels_fails(content: str, run: Callable[..., None], tmp_path: Path) -> None:
    archive, stranger = tmp_path / "a.tar.xz", tmp_path / "stranger"
    stranger.write_text("x")
    if content != "missing":
        with tarfile.open(archive, "w:xz") as packed:
            if content == "elsewhere":
                packed.add(stranger, "tmp/kernels/versions.json")
                packed.add(stranger, "etc/stranger")
    problem = failure(run, "--use", archive)
    assert problem.startswith(f"{'Archive not found' if content == 'missing' else 'Not an archive of kernels'}: ")
    assert "Fix: " in problem


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "problem"), [("", "Missing --arch"), ("--arch sm_90 --case gated", r"Did you mean gate\?")]
)
def test_wrong_input(words: str, problem: str, run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises((SystemExit, RecipeError), match=problem):
        run(*words.split(), "--folder", tmp_path / "kernels")
    assert not (tmp_path / "kernels").exists()
