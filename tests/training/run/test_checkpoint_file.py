"""States that are kept on the way: each is a checkpoint that a run goes on from."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.errors import StoreError
from kdcache.training import make_config, read_config, train
from kdcache.training.run import checkpoint_file
from kdcache.training.run.checkpoint_file import keep_checkpoint


def go(settings: dict[str, Any], run: Path, *, resume: bool = False) -> dict[str, Any]:
    return train(make_config(**settings), run, resume=resume)


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def settings(student: dict[str, Any]) -> dict[str, Any]:
    return student | {"iterations": 8, "val_every": 3, "keep_every": 2}


def test_states_are_kept_and_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    go(settings, tmp_path / "kept")
    go(settings | {"keep_every": None}, tmp_path / "plain")
    assert kept(tmp_path / "kept") == [f"step-{step:06}.pt" for step in (2, 4, 6, 8)]
    for step in (2, 4, 6, 8):
        state = torch.load(tmp_path / "kept" / "checkpoints" / f"step-{step:06}.pt", weights_only=True)
        assert state["progress"]["step"] == step
        assert state.keys() == checkpoint_file.PARTS
    assert not (tmp_path / "plain" / "checkpoints").exists()
    one, two = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("kept", "plain"))
    assert one == two


@pytest.mark.parametrize("step", [2, 6])  # between validations, and at one: its score is part of the state
def test_a_kept_state_is_gone_on_from(step: int, settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = go(settings, run)
    before = {name: (run / name).read_bytes() for name in ("last.safetensors", "best.safetensors")}
    history = (run / "metrics.jsonl").read_text().count("\n")
    (run / "checkpoints" / f"step-{step:06}.pt").replace(run / "checkpoint.pt")
    again = go(settings, run, resume=True)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (again["best_miou"], again["best_step"]) == (result["best_miou"], result["best_step"])
    assert (run / "metrics.jsonl").read_text().count("\n") == history
    state = torch.load(run / "checkpoints" / "step-000008.pt", weights_only=True)
    assert state["progress"]["step"] == 8


def test_epochs_are_counted_in_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    go(settings | {"keep_every": "1e"}, tmp_path)  # 6 images in batches of 2
    assert kept(tmp_path) == ["step-000003.pt", "step-000006.pt"]
    assert read_config(tmp_path).run.keep_every == 3


def test_what_is_kept_may_change_on_resume(settings: dict[str, Any], tmp_path: Path) -> None:
    go(settings, tmp_path)
    (tmp_path / "checkpoints" / "step-000004.pt").replace(tmp_path / "checkpoint.pt")
    go(settings | {"keep_every": 5}, tmp_path, resume=True)
    assert "step-000005.pt" in kept(tmp_path)


def test_a_kept_state_takes_no_room_of_its_own_until_the_next(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"state")
    keep_checkpoint(tmp_path, 7)
    keep_checkpoint(tmp_path, 7)  # again, after a resume
    assert kept(tmp_path) == ["step-000007.pt"]
    path = tmp_path / "checkpoints" / "step-000007.pt"
    assert path.samefile(tmp_path / "checkpoint.pt")
    keep_checkpoint(tmp_path, 1234567)
    assert kept(tmp_path) == ["step-000007.pt", "step-1234567.pt"]


def test_a_file_system_without_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "checkpoint.pt").write_bytes(b"state")
    keep_checkpoint(tmp_path, 7)
    path = tmp_path / "checkpoints" / "step-000007.pt"
    assert path.read_bytes() == b"state"
    assert not path.samefile(tmp_path / "checkpoint.pt")
    assert kept(tmp_path) == [path.name]


def test_a_full_disk_leaves_no_half_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    monkeypatch.setattr(checkpoint_file.shutil, "copyfile", fill)
    (tmp_path / "checkpoint.pt").write_bytes(b"state")
    with pytest.raises(StoreError, match="No space left"):
        keep_checkpoint(tmp_path, 7)
    assert kept(tmp_path) == []
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"state"
