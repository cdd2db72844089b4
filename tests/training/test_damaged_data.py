"""Trainings that a damaged file of depth stops: what they had learnt is kept, and they end as if it had been whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.data import write_scenes
from kdcache.errors import DataError
from kdcache.models import read_state_dict
from kdcache.training import Observer, make_config, train
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World

DATA = "scenes:32x48,train=6,val=3,depth=exact"
Read = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_scenes(tmp_path / "data", DATA)


@pytest.fixture
def depth(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    changes = {"verb": "train-student", "model": "kdcache:tiny+depth", "data": str(folder), "val": str(folder)}
    return settings | changes | {"method": "depth-silog", "schedule": "plateau", "ema": 0.5}


def damaged(path: Path) -> bytes:
    """Give a label a depth below 0; returns the file as it was."""
    before, label = path.read_bytes(), np.load(path)
    label[0, 0] = -1
    np.save(path, label)
    return before


def drawn_last(settings: dict[str, Any], tmp_path: Path) -> str:
    """A sample that is drawn at the third step first; not the first one, which is read before any step."""
    trainer = make_trainer(make_config(**settings), tmp_path / "made", World(), Observer(), resume=False)
    return max(trainer.streams[0].sample_ids(2))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_sample_loses_no_step(
    split: str, depth: dict[str, Any], folder: Path, tmp_path: Path, read_metrics: Read
) -> None:
    whole = train(make_config(**depth), tmp_path / "whole")
    path = folder / "depth" / split / f"{drawn_last(depth, tmp_path) if split == 'train' else 'val-000002'}.npy"
    before = damaged(path)
    with pytest.raises(DataError, match=f"{path.name}"):
        train(make_config(**depth), tmp_path / "run")
    steps = [line["step"] for line in read_metrics(tmp_path / "run", "train")]
    assert steps == ([1, 2] if split == "train" else [1, 2, 3])
    path.write_bytes(before)
    result = train(make_config(**depth), tmp_path / "run", resume=True)
    for which in ("best", "last", "best-ema", "last-ema"):
        own, expected = (read_state_dict(tmp_path / run / f"{which}.safetensors") for run in ("run", "whole"))
        assert all(torch.equal(own[name], expected[name]) for name in expected), which
    assert (result["best_miou"], result["best_step"]) == (whole["best_miou"], whole["best_step"])
    assert read_metrics(tmp_path / "run", "validation") == read_metrics(tmp_path / "whole", "validation")


def test_a_unit_that_is_wrong_in_validation_is_refused_before_anything_is_written(
    depth: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    for path in folder.glob("depth/val/*.npy"):
        np.save(path, 256 * np.load(path))
    with pytest.raises(DataError, match="KITTI"):
        train(make_config(**depth), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(make_config(**depth | {"model": "kdcache:tiny", "method": "none", "iterations": 1}), tmp_path / "classes")
