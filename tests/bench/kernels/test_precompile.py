"""Kernels compiled ahead: for what is launched later, found again in another place, and not where anything changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdcache.bench.kernels import EVERY, META, CheckSettings
from kdcache.bench.kernels.cache_folder import NOTE, adopt, folder_bytes, read_note, write_note
from kdcache.errors import RecipeError

ROOT = Path(__file__).parents[3]
COMPILE = [sys.executable, "-m", "kdcache_cli", "kernels", "compile", "--arch", "sm_90", "--processes", "1"]
SMALL = ["--shapes", "2x3x16x16/4", "--case", "trained", "--dtype", "fp32"]


def environment(kernels: Path = ROOT / "kernels") -> dict[str, str]:
    """The environment of a process that compiles, which may take the kernels from another place."""
    path = os.pathsep.join(map(str, (kernels, ROOT, ROOT / "cli")))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def compiled(folder: Path, kernels: Path = ROOT / "kernels") -> tuple[int, int]:
    """Variants of a small case, and how many of them were compiled anew."""
    command = [*COMPILE, *SMALL, "--out", str(folder)]
    done = subprocess.run(command, env=environment(kernels), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    return int(words[0]), int(words[words.index("compiled,") - 1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_was_compiled_is_found_again_and_what_changed_is_not(tmp_path: Path) -> None:
    variants, anew = compiled(tmp_path / "made")
    assert anew == variants >= 8
    assert compiled(tmp_path / "made") == (variants, 0)
    assert folder_bytes(tmp_path / "made") < 4 * 2**20

    carried = shutil.move(tmp_path / "made", tmp_path / "carried")
    assert adopt(carried) == variants
    assert compiled(carried) == (variants, 0)

    kernels = shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    source = kernels / "kdcache_kernels" / "gpu" / "loss.py"
    before = source.read_text(encoding="utf-8")
    changed = before.replace("ce *= tl.load(factors_ptr + 2)", "ce = ce * tl.load(factors_ptr + 2)")
    assert changed != before
    source.write_text(changed, encoding="utf-8")
    assert compiled(carried, kernels) == (variants, 1), "the kernel of the totals alone"


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
        command = [*COMPILE, *SMALL, "--out", str(tmp_path)]
        process = subprocess.Popen(
            command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    while not list(tmp_path.glob("*/__grp__*")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    for _ in range(200):  # the last of multiprocessing's own processes ends after its parent
        if not alive(process.pid):
            break
        time.sleep(0.1)
    assert not alive(process.pid)
    there = adopt(tmp_path)
    variants, anew = compiled(tmp_path)
    assert 0 < there <= variants - anew


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_few_variants_serve_the_accuracy_check() -> None:
    """428 of the fused KL before sizes and strides were left out of them, 293 with the losses on cells."""
    code = (
        "from kdcache.bench.kernels import *\nfrom kdcache.bench.kernels import precompile\n"
        f"precompile._start(Request('sm_90', None, CheckSettings(META, every={EVERY})))\n"
        "print(len(precompile._list_variants()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(CheckSettings(META, every=EVERY).points())) > 3200
    assert 100 < int(done.stdout) <= 293


def made(folder: Path) -> Path:
    """A folder as Triton leaves it, made elsewhere."""
    write_note(folder, "sm_90")
    entry = folder / "ABC"
    entry.mkdir()
    (entry / "one.cubin").write_bytes(b"code")
    (entry / "one.json").write_text("{}")
    there = {name: f"/elsewhere/ABC/{name}" for name in ("one.cubin", "one.json")}
    (entry / "__grp__one.json").write_text(json.dumps({"child_paths": there}))
    return folder


def test_an_adopted_folder_names_its_files_where_they_are(tmp_path: Path) -> None:
    folder = made(tmp_path)
    assert adopt(folder) == 1
    paths = json.loads((folder / "ABC" / "__grp__one.json").read_text())["child_paths"]
    assert set(paths) == {"one.cubin", "one.json"}
    assert all(Path(path).is_file() for path in paths.values())


@pytest.mark.parametrize(("name", "value"), [("triton", "3.1.0"), ("python", "3.99"), ("digest", "0123456789")])
def test_a_folder_of_another_triton_is_refused(name: str, value: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    note = json.loads((folder / NOTE).read_text()) | {name: value}
    (folder / NOTE).write_text(json.dumps(note))
    for refused in (lambda: adopt(folder), lambda: write_note(folder, "sm_90")):
        with pytest.raises(RecipeError, match="virtual environment") as caught:
            refused()
        assert value[:8] in caught.value.received


def test_a_folder_keeps_note_of_all_that_it_is_for(tmp_path: Path) -> None:
    for arch in ("sm_90", "sm_80", "sm_90"):
        write_note(tmp_path, arch)
    note = read_note(tmp_path)
    assert note is not None
    assert note["arch"] == "sm_90 sm_80"


def test_a_folder_without_a_note_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="note"):
        adopt(tmp_path)
