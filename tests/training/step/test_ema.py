"""The moving average of the weights: what it is, and that it changes nothing and survives everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.models import build_model
from kdcache.models.run import load_run
from kdcache.training import make_config, train
from kdcache.training.step.ema import ModelEma

Read = Callable[..., list[dict[str, Any]]]
EMA = {"ema": 0.9, "iterations": 8, "val_every": 3, "keep_every": 2}


def go(settings: dict[str, Any], run: Path, *, resume: bool = False) -> dict[str, Any]:
    return train(make_config(**settings), run, resume=resume)


def written(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("*.safetensors")}


def states(steps: int) -> list[dict[str, torch.Tensor]]:
    """The state dict of a model after each of some steps, all its tensors changed."""
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", 3)
    return [
        {
            name: torch.randn_like(value) if value.is_floating_point() else value + step + 1
            for name, value in model.state_dict().items()
        }
        for step in range(steps)
    ]


def test_the_average_is_its_formula_and_integers_are_copied() -> None:
    weights = states(12)
    model = build_model("kdcache:tiny", 3).to(memory_format=torch.channels_last)
    model.load_state_dict(weights[0])
    ema = ModelEma(model, 0.6)
    expected = {name: value.double() for name, value in weights[0].items()}
    for step, new in enumerate(weights[1:], 1):
        model.load_state_dict(new)
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        assert decay == ema.decay_at(step)
        expected = {name: decay * value + (1 - decay) * new[name].double() for name, value in expected.items()}
    assert ema.decay_at(11) < 0.6 == ema.decay_at(13)
    assert ema.decay_at(20) == 0.6
    for name, average in ema.state_dict().items():
        if average.is_floating_point():
            torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(average, weights[-1][name])
    assert any("running_var" in name for name in expected)


def test_after_a_short_training_nothing_of_the_beginning_is_left() -> None:
    line = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(line.weight, 1e6)
    ema = ModelEma(line, 0.9999)
    torch.nn.init.zeros_(line.weight)
    for step in range(1, 101):
        ema.update(step)
    assert 0 < float(ema.state_dict()["weight"]) < 1e-2


def test_in_place_ends_with_the_very_same_weights() -> None:
    before, model = states(2)[1], build_model("kdcache:tiny", 3)
    model.load_state_dict(states(1)[0])
    ema = ModelEma(model, 0.5)
    places = [value.data_ptr() for value in model.state_dict().values()]
    model.load_state_dict(before)
    with ema.in_place():
        assert all(torch.equal(value, ema.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [value.data_ptr() for value in model.state_dict().values()] == places


def test_a_training_is_the_same_with_and_without(student: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    settings = student | EMA | {"schedule": "plateau"}
    result, plain = go(settings, tmp_path / "ema"), go(settings | {"ema": None}, tmp_path / "plain")
    files, expected = written(tmp_path / "ema"), written(tmp_path / "plain")
    assert expected == {name: files[name] for name in ("best.safetensors", "last.safetensors")}
    assert files.keys() - expected.keys() == {"best-ema.safetensors", "last-ema.safetensors"}
    assert files["last-ema.safetensors"] != files["last.safetensors"]
    assert result.keys() - plain.keys() == {"ema_best_miou", "ema_best_step"}
    rows = [read_metrics(tmp_path / name, "validation") for name in ("ema", "plain")]
    for with_ema, without in zip(*rows, strict=True):
        assert {name: value for name, value in with_ema.items() if not name.startswith("ema_")} == without
        assert with_ema.keys() - without.keys() == {"ema_miou", "ema_macc", "ema_aacc", "ema_classes"}
    best = max(rows[0], key=lambda row: float(row["ema_miou"]))
    assert (result["ema_best_miou"], result["ema_best_step"]) == (best["ema_miou"], best["step"])
    checkpoint = torch.load(tmp_path / "plain" / "checkpoint.pt", weights_only=True)
    assert "ema" not in checkpoint


def test_best_and_last_are_the_averages_of_their_steps(student: dict[str, Any], tmp_path: Path) -> None:
    result = go(student | EMA | {"val_every": 2}, tmp_path)
    for which, step in (("best-ema", result["ema_best_step"]), ("last-ema", 8)):
        state = torch.load(tmp_path / "checkpoints" / f"step-{step:06}.pt", weights_only=True)
        weights = load_file(tmp_path / f"{which}.safetensors")
        assert all(torch.equal(weights[name], average) for name, average in state["ema"].items())
        model, _ = load_run(tmp_path, which)
        assert torch.equal(model.state_dict()["classifier.weight"], weights["classifier.weight"])


def test_nothing_validated_leaves_the_last_average_as_the_best(student: dict[str, Any], tmp_path: Path) -> None:
    result = go(student | EMA | {"val": None}, tmp_path)
    files = written(tmp_path)
    assert files["best-ema.safetensors"] == files["last-ema.safetensors"] != files["last.safetensors"]
    assert (result["ema_best_miou"], result["ema_best_step"]) == (None, 8)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"model": "tied"}, {"step": "compiled"}])
def test_a_resumed_average_is_the_same_to_the_bit(
    changes: dict[str, Any], student: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path
) -> None:
    if "model" in changes:
        changes = {"model": model_file(changes["model"])}
    settings = student | EMA | changes
    result = go(settings, tmp_path)
    files = written(tmp_path)
    (tmp_path / "checkpoints" / "step-000004.pt").replace(tmp_path / "checkpoint.pt")  # after a validation
    again = go(settings, tmp_path, resume=True)
    assert written(tmp_path) == files
    for name in ("ema_best_miou", "ema_best_step"):
        assert again[name] == result[name]


@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_updated_once_per_optimizer_step(
    parts: int, student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(ModelEma, "update", lambda _, step: steps.append(step))
    go(student | EMA | {"accumulate": parts, "val": None}, tmp_path)
    assert steps == list(range(1, 9))
