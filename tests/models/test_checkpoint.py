"""Raw and averaged weights in one checkpoint, and what checkpoints of others hold beside tensors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.errors import ModelError
from kdcache.models.weights import read_metadata, read_weights, save_weights

RAW, EMA = {"c.weight": torch.zeros(2)}, {"c.weight": torch.ones(2)}
MMENGINE = {"meta": {"mmengine_version": "0.10"}}
LIGHTNING = {"pytorch-lightning_version": "2.5"}


def below(prefix: str, state: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    return {**{f"{prefix}.{name}": value for name, value in state.items()}, **more}


STEPS = torch.tensor(3)
CHECKPOINTS: dict[str, tuple[dict[str, Any], str, str]] = {
    # content, the name of what is taken without a choice, and its kind
    "mmcv": ({"state_dict": RAW, "ema_state_dict": EMA}, "state_dict", "raw"),
    "timm": ({"epoch": 1, "state_dict_ema": EMA, "state_dict": RAW}, "state_dict", "raw"),
    "deit": ({"model": RAW, "model_ema": EMA}, "model", "raw"),
    "settings beside": ({"model": RAW, "ema": {"module": EMA, "updates": 3}}, "model", "raw"),
    "shadow": ({"model_state_dict": RAW, "ema": {"decay": 0.9, "shadow": EMA}}, "model_state_dict", "raw"),
    "torch": ({"model": RAW, "swa_model": below("module", EMA, n_averaged=STEPS)}, "model", "raw"),
    "mean teacher": ({"student": below("module", RAW), "teacher": EMA}, "student", "raw"),
    "inside": ({"model": {"net": RAW, "ema": EMA}}, "model", "raw"),
    "mmengine, which swaps them": (
        {**MMENGINE, "state_dict": EMA, "ema_state_dict": below("module", RAW, steps=STEPS)}, "state_dict", "averaged",
    ),
    "lightning's callback, which swaps them": (
        {**LIGHTNING, "state_dict": below("model", EMA), "current_model_state": below("model", RAW)},
        "state_dict", "averaged",
    ),
    "lightning's attributes": (
        {**LIGHTNING, "state_dict": {**below("model", RAW), **below("model_ema.module", EMA)}}, "model", "raw",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_raw_and_averaged_weights(tmp_path: Path, name: str) -> None:
    """The kind that is taken is said, and FILE:ema and FILE:raw choose whatever they are called."""
    content, taken, kind = CHECKPOINTS[name]
    path = tmp_path / "w.pth"
    torch.save(content, path)
    expected = {"raw": RAW, "averaged": EMA}
    state, _, notes = read_weights(path)
    assert state.keys() == RAW.keys()
    assert torch.equal(state["c.weight"], expected[kind]["c.weight"])
    assert f"{taken} is taken, the {kind} ones" in notes[0]
    assert f"{path}:{'ema' if kind == 'raw' else 'raw'} takes" in notes[0]
    for choice, weights in (("raw", RAW), ("ema", EMA)):
        state, _, notes = read_weights(f"{path}:{choice}")
        assert state.keys() == weights.keys()
        assert torch.equal(state["c.weight"], weights["c.weight"])
        assert notes == ()


def test_averaged_weights_alone_are_taken(tmp_path: Path) -> None:
    torch.save({"model_ema": EMA, "epoch": 3}, tmp_path / "w.pth")
    state, _, notes = read_weights(tmp_path / "w.pth")
    assert torch.equal(state["c.weight"], EMA["c.weight"])
    assert "averaged weights alone: model_ema" in notes[0]
    with pytest.raises(ModelError, match=r"no raw weights, only model_ema[\s\S]*Leave out :raw"):
        read_weights(f"{tmp_path}/w.pth:raw")


def test_a_plain_file_has_no_choice(tmp_path: Path) -> None:
    torch.save(RAW, tmp_path / "w.pth")
    save_weights(torch.nn.Conv2d(1, 1, 1), tmp_path / "w.safetensors", {"by": "me"})
    assert read_weights(f"{tmp_path}/w.pth:raw").state.keys() == RAW.keys()
    assert read_metadata(f"{tmp_path}/w.safetensors:raw")["by"] == "me"
    for name in ("w.pth", "w.safetensors"):
        with pytest.raises(ModelError, match=r"no averaged weights[\s\S]*RUN@best-ema"):
            read_weights(f"{tmp_path}/{name}:ema")
    with pytest.raises(ModelError, match=r"Unknown weights 'average'[\s\S]*FILE:ema"):
        read_weights(f"{tmp_path}/w.pth:average")
    with pytest.raises(ModelError, match=r"nowhere\.pth:ema"):
        read_weights(f"{tmp_path}/nowhere.pth:ema")


def test_a_file_may_end_in_a_colon_and_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    torch.save({"model": EMA}, folder / "w:ema.pth")
    torch.save({"model": RAW, "model_ema": EMA}, folder / "w.pth")
    assert torch.equal(read_weights(folder / "w:ema.pth").state["c.weight"], EMA["c.weight"])
    assert torch.equal(read_weights(f"{folder}/w.pth:ema").state["c.weight"], EMA["c.weight"])
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf:ema").mkdir()  # a folder that is there is meant, whatever it is called
    for name, state in (("hf", RAW), ("hf:ema", EMA)):
        torch.save(state, tmp_path / name / "pytorch_model.bin")
    assert torch.equal(read_weights(tmp_path / "hf:ema").state["c.weight"], EMA["c.weight"])


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """mmengine's buffer of a log, pickled here by a module that is gone when it is read."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.values = np.arange(3.0)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    return HistoryBuffer


def test_what_others_put_beside_tensors_is_read(
    tmp_path: Path, history: Callable[[], object], monkeypatch: Any
) -> None:
    """Arguments of a training, arrays and numbers of numpy, a log of mmengine's: no code of the file runs."""
    palette = np.array([[1, 2, 3]], np.uint8)
    torch.save(
        {
            "state_dict": RAW,
            "args": argparse.Namespace(lr=np.float64(1)),
            "message_hub": {"log_scalars": {"loss": history()}},
            "meta": {"dataset_meta": {"classes": ("road", "car"), "palette": palette}},
        },
        tmp_path / "w.pth",
    )
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        monkeypatch.delitem(sys.modules, name)
    weights = read_weights(tmp_path / "w.pth")
    assert weights.state.keys() == RAW.keys()
    assert weights.class_names == ("road", "car")
