"""Several real builds started together on one --out share the work: the store is a single build's, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def unstamped(files: dict[str, bytes]) -> dict[str, bytes]:
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


@pytest.fixture(scope="module")
def build(made, cli, tree) -> tuple[list[object], dict[str, bytes]]:
    """A command without its --out, and what one process makes of it."""
    words = ["build-teacher-cache", "--data", made / "data", "--teacher", made / "teacher", "--shard-records", 1]
    words += ["--threads", 1]
    ended = cli(*words, "--out", made / "alone.zarr")
    assert ended.code == 0, ended.err
    return words, unstamped(tree(made / "alone.zarr"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_builds_started_together(build, spawn, tree, tmp_path: Path, count: int) -> None:
    words, alone = build
    builders = [spawn(*words, "--out", tmp_path / "s.zarr") for _ in range(count)]
    said = [builder.communicate(timeout=280) for builder in builders]
    assert [builder.returncode for builder in builders] == [0] * count, said
    assert unstamped(tree(tmp_path / "s.zarr")) == alone
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


@pytest.mark.slow
def test_torchrun(build, tree, tmp_path: Path) -> None:
    words, alone = build
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 0]
    command += ["-m", "kdcache_cli", *words, "--out", tmp_path / "s.zarr"]
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert unstamped(tree(tmp_path / "s.zarr")) == alone
