"""`kdcache evaluate` of models that predict depth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

from kdcache.models import build_model

DATA = "scenes:40x56,train=4,val=3,depth=exact"
FLAGS = ("--size", "24x40", "--threads", "1")


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.manual_seed(0)
    save_model(build_model("kdcache:tiny+depth", 7), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return "kdcache:tiny+depth@w.safetensors"


def test_tables_and_files_have_every_task(spec: str, cli, tmp_path: Path) -> None:
    ended = cli("evaluate", spec, "--data", DATA, *FLAGS)
    assert ended.code == 0, ended.err
    assert "mIoU" in ended.out
    assert "rmse m" in ended.out
    assert "labels of 0.001 to 80 m" in ended.out
    content = json.loads((tmp_path / "evaluation-val.json").read_text())
    assert content["depth"] == {"min_depth": 0.001, "max_depth": 80.0, "crop": "none"}
    assert set(content["tasks"]) == {"segmentation", "depth"}
    assert "miou" not in content
    with np.load(tmp_path / "evaluation-val.npz") as images:
        assert images["depth"].shape == (3, 8)
        assert images["hits"].shape == (3, 7)
        assert images["depth"][:, 0].mean() == pytest.approx(content["tasks"]["depth"]["rmse"])
    assert "| rmse m |" in (tmp_path / "evaluation-val.md").read_text()


def test_a_range_has_files_of_its_own(spec: str, cli, tmp_path: Path) -> None:
    ended = cli("evaluate", spec, "--data", DATA, "--max-depth", "30", "--depth-crop", "garg", *FLAGS)
    assert ended.code == 0, ended.err
    assert (tmp_path / "evaluation-val-depth-0.001-30-garg.json").is_file()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--min-depth", "0"), "Invalid value of --min-depth: 0"),
        (("--max-depth", "0.002"), "has depth from 0.001 to 0.002 m"),
        (("--depth-crop", "eigen"), "Give one of none, garg"),
    ],
)
def test_ranges_that_cannot_be(spec: str, cli, words: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    ended = cli("evaluate", spec, "--data", DATA, *words, *FLAGS)
    assert ended.code == 2
    assert problem in ended.err
    assert not list(tmp_path.glob("evaluation*"))


def test_a_range_of_depth_without_depth(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(build_model("kdcache:tiny", 7), tmp_path / "w.safetensors")
    ended = cli("evaluate", f"kdcache:tiny@{tmp_path}/w.safetensors", "--data", DATA, "--max-depth", "30", *FLAGS)
    assert ended.code == 2
    assert "Cannot use --min-depth" in ended.err
