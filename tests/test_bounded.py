"""Files that may hold anything are read in bounded memory, and nothing waits for a pipe."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from kdcache.bounded import check_unpacked, parse_json, parse_toml, read_bytes, read_text
from kdcache.errors import RecipeError
from kdcache.files import read_object
from kdcache.run_folder import Run

MODEL = (
    '{"spec": "kdcache:tiny", "class_names": ["road"], "class_colours": [[1, 2, 3]], "size": [32, 48],'
    ' "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}'
)
DOTS = "a" + ".a" * 20_000 + " = 1\n"
DEEP = "[" * 100_000 + "]" * 100_000
MIB = 2**20
READ = """
import resource, sys
from pathlib import Path
from {module} import {name}
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    {call}
except Exception as error:
    print(type(error).__name__)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.json").write_text(MODEL)
    return tmp_path


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a\r\nb\xc3\xa9")
    assert read_bytes(path, 6) == b"a\r\nb\xc3\xa9"
    assert read_text(path) == "a\r\nbé"
    with pytest.raises(ValueError, match="6 bytes are more than the 5"):
        read_bytes(path, 5)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_nothing_but_a_file_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        read_bytes(path)


def test_texts_that_are_nested_too_deeply_are_wrong_values() -> None:
    for wrong in (DOTS, f"[{DOTS[:-5]}]", f"a = {{{DOTS[:-1]}}}", f"a = {DEEP}"):
        with pytest.raises(ValueError, match=r"parts|deeply"):
            parse_toml(wrong)
    with pytest.raises(ValueError, match="deeply"):
        parse_json(DEEP)
    weights = ", ".join(["0.25"] * 200)
    assert parse_toml(f"a.b.c = [{weights}]")["a"]["b"]["c"] == [0.25] * 200


@pytest.mark.parametrize("name", ["model.json", "recipe.toml", "metrics.jsonl"])
@pytest.mark.parametrize("what", ["pipe", "long", "deep", "dots"])
def test_a_run_says_which_of_its_files_is_wrong(folder: Path, name: str, what: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "long":
        path.touch()
        os.truncate(path, 2**34)
    else:
        path.write_text({"deep": f"a = {DEEP}\n", "dots": DOTS}[what] + "\n{}\n")
    part = {"model.json": "model", "recipe.toml": "recipe", "metrics.jsonl": "metrics"}[name]
    with pytest.raises(RecipeError, match=re.escape(name)):
        getattr(Run(folder), part)


@pytest.mark.parametrize("name", ["result.json", "environment.json"])
def test_a_result_that_cannot_be_read_is_none(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    assert (Run(folder).result, Run(folder).environment) == ({}, {})
    (folder / name).unlink()
    (folder / name).write_text(DEEP)
    assert read_object(folder / name) == {}
    (folder / name).write_text('{"best_miou": "x", "iterations": [1]}')
    assert "best mIoU" not in repr(Run(folder))


@pytest.mark.parametrize("step", ["1e999", "9" * 5000, DEEP, "null"])
def test_a_step_that_is_no_number(folder: Path, step: str) -> None:
    (folder / "metrics.jsonl").write_text(f'{{"kind": "train", "step": {step}}}\n{{"kind": "train", "step": 2}}\n')
    with pytest.raises(RecipeError, match="line 1 is"):
        _ = Run(folder).metrics


def test_archives_that_unpack_to_far_more(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for size, fits in ((60 * MIB, True), (80 * MIB, False)):
        pack(path, size)
        if fits:
            check_unpacked(path)
        else:
            with pytest.raises(ValueError, match="it unpacks to 8388"):
                check_unpacked(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="zip"):
        check_unpacked(path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 2**26) + b"{}")
    with pytest.raises(ValueError, match="its header has 67108864 bytes"):
        check_unpacked(path)


@pytest.mark.parametrize(
    ("name", "call", "module"),
    [
        ("weights.pth", "read_state_dict(path)", "kdcache.models.weights"),
        ("checkpoint.pt", "load_checkpoint(path.parent, 'cpu')", "kdcache.training.run.checkpoint_file"),
        ("recipe.toml", "Run(path.parent).recipe", "kdcache.run_folder"),
        ("metrics.jsonl", "Run(path.parent).metrics", "kdcache.run_folder"),
    ],
)
def test_bombs_take_little_memory(folder: Path, name: str, call: str, module: str) -> None:
    """What a child took at most for a file, beyond its imports: without bounds, half a GiB or more."""
    path = folder / name
    if name.endswith("toml"):
        path.write_text(DOTS)
    elif name.endswith("jsonl"):
        path.touch()
        os.truncate(path, 2**29)
    else:
        pack(path, 2**29)
    code = READ.format(module=module, name=call.partition("(")[0], call=call)
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    kind, taken_kib = ended.stdout.split()
    assert kind in ("ModelError", "RecipeError")
    assert int(taken_kib) < 100 * 1024


def pack(path: Path, size: int) -> None:
    """Write a checkpoint of torch whose one tensor is zeros that unpack to that many bytes, not to its own 16."""
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            with archive.open(name, "w") as member:
                if not name.endswith("/data/0"):
                    member.write(content)
                    continue
                for _ in range(size // MIB):
                    member.write(bytes(MIB))
