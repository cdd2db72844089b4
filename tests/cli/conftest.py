"""A small world that the command line itself has made, and ways to run the command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fork_server import ForkServer

from kdcache.data import write_scenes
from kdcache_cli.app import main
from kdcache_cli.console import ERRORS, OUT

WIDTH = 300  # of a line, so that no message is broken where a test looks


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def in_process(*words: object) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    widths = OUT.width, ERRORS.width
    OUT.width = ERRORS.width = WIDTH
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
    finally:
        OUT.width, ERRORS.width = widths
        torch.use_deterministic_algorithms(deterministic)
    for text in (out.getvalue(), err.getvalue()):
        assert "[bold]" not in text, "markup that was printed as it stands"
    return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ended]:
    """cli(word, ...): the command line in this process, errors and all."""
    return in_process


@pytest.fixture(scope="session")
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """spawn(word, ...): `python -m kdcache_cli` on its own."""

    def start(*words: object, cwd: Path | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": str(WIDTH)}
        command = [sys.executable, "-m", "kdcache_cli", *map(str, words)]
        # Tests that run in a shell's background inherit an ignored SIGINT, and their children would too.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd
            )
        finally:
            signal.signal(signal.SIGINT, before)

    return start


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A `kdcache` that imports nothing, as an import takes four seconds."""
    with ForkServer(tmp_path_factory.mktemp("forks"), OMP_NUM_THREADS="1", COLUMNS=str(WIDTH)) as server:
        yield server


@pytest.fixture(scope="session")
def fork(forks: ForkServer) -> Callable[..., subprocess.Popen[str]]:
    """fork(word, ...): as `spawn`, without the import. Not for the Hub, whose client reads variables when imported."""

    def start(*words: object) -> subprocess.Popen[str]:
        command = [str(forks.program), *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture
def forked_jobs(forks: ForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a sweep starts as `python -m kdcache_cli` is a fork."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1 $2" = "-m kdcache_cli" ] && shift 2 && exec {forks.program} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (a folder), teacher/ (a run), store.zarr, source.zarr (without pixels): made once, not to be touched."""
    root = tmp_path_factory.mktemp("made")
    write_scenes(root / "data", "scenes:36x52,train=6,val=2")
    teacher = f"train-teacher --data {root}/data --model kdcache:tiny --size 32x48 --iterations 4 --batch-size 2"
    build = f"build-teacher-cache --data {root}/data --teacher {root}/teacher --shard-records 4 --views full"
    for command in (
        f"{teacher} --val-every 4 --out {root}/teacher",
        f"{build} --out {root}/store.zarr",
        f"{build} --pixels source --out {root}/source.zarr",
    ):
        ended = in_process(*command.split())
        assert ended.code == 0, ended.err
    return root


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of all of it, to be damaged."""
    return shutil.copytree(made, tmp_path / "world")


def _unstamped(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files of a store without the time of its build, in the manifest, its spare and the seal's digests of them."""
    stamp = json.loads(files["zarr.json"])["attributes"]["kdcache"]["created"]
    seal = json.loads(files["complete.json"])
    del seal["metadata"]["zarr.json"], seal["metadata"]["manifest.json"]
    changed: dict[str, bytes] = {"manifest.json": b""}
    changed |= {
        "zarr.json": files["zarr.json"].replace(stamp.encode(), b""),
        "complete.json": json.dumps(seal).encode(),
    }
    return files | changed


@pytest.fixture(scope="session")
def unstamped() -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """The files of a store without the time of its build."""
    return _unstamped


@pytest.fixture(scope="module")
def build(
    made: Path, cli: Callable[..., Ended], tree: Callable[[Path], dict[str, bytes]]
) -> tuple[list[object], dict[str, bytes]]:
    """A command without its --out, and what one process makes of it."""
    words = ["build-teacher-cache", "--data", made / "data", "--teacher", made / "teacher", "--shard-records", 1]
    words += ["--threads", 1]
    ended = cli(*words, "--out", made / "alone.zarr")
    assert ended.code == 0, ended.err
    return words, _unstamped(tree(made / "alone.zarr"))
