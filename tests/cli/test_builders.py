"""Several real builds started together on one --out share the work: the store is a single build's, byte for byte."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_builds_started_together(build, fork, tree, unstamped, tmp_path: Path, count: int) -> None:
    words, alone = build
    builders = [fork(*words, "--out", tmp_path / "s.zarr") for _ in range(count)]
    said = [builder.communicate(timeout=280) for builder in builders]
    assert [builder.returncode for builder in builders] == [0] * count, said
    assert unstamped(tree(tmp_path / "s.zarr")) == alone
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


@pytest.mark.slow
def test_torchrun(build, forks, tree, unstamped, tmp_path: Path) -> None:
    words, alone = build
    command = [forks.torchrun, "--nproc-per-node", 2, "--master-port", 0]
    command += ["-m", "kdcache_cli", *words, "--out", tmp_path / "s.zarr"]
    done = subprocess.run(
        [str(word) for word in command],
        env=forks.environment(os.environ | {"OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert unstamped(tree(tmp_path / "s.zarr")) == alone
