"""Builds, copies and trainings on a file system without flock, as Lustre and some NFS are."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.locks import Lock

Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture(params=["ENOSYS", "ENOLCK"])
def without_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        code = getattr(errno, request.param)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", without)


@pytest.mark.usefixtures("without_flock")
def test_a_build_and_its_copy_are_those_of_other_disks(
    cli: Callable[..., Any], build: tuple[list[object], dict[str, bytes]], tree: Tree, unstamped: Any, tmp_path: Path
) -> None:
    words, alone = build
    for times in (1, 2):  # the second finds it whole
        ended = cli(*words, "--out", tmp_path / "a.zarr")
        assert ended.code == 0, (times, ended.err)
        assert unstamped(tree(tmp_path / "a.zarr")) == alone
    ended = cli("copy", tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert ended.code == 0, ended.err
    assert tree(tmp_path / "b.zarr") == tree(tmp_path / "a.zarr")
    assert {path.name for path in tmp_path.iterdir()} == {"a.zarr", "b.zarr"}


@pytest.mark.usefixtures("without_flock")
def test_a_training_is_alone_with_its_folder(cli: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    words = ["train-student", "--cache", made / "store.zarr", "--val", made / "data", "--model", "kdcache:tiny"]
    words += ["--iterations", 2, "--batch-size", 2, "--threads", 1, "--out", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.locks.STALE_S", 0.5)
        with Lock(tmp_path / "run/.lock"):
            ended = cli(*words)
        assert ended.code == 2
        assert f"is being trained by process {os.getpid()} on " in " ".join(ended.err.split())
    assert cli(*words).code == 0
    assert not [path for path in (tmp_path / "run").iterdir() if ".lock" in path.name]
