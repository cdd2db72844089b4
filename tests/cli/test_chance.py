"""A model that has learnt nothing is named wherever it is made or judged."""

from __future__ import annotations

import pytest

COMMANDS = {
    "build": "build-teacher-cache --data {w}/data --teacher {w}/teacher --views 1 --out {w}/new",
    "evaluate": "evaluate {w}/teacher --data {w}/data",
    "training": "train-teacher --data {w}/data --model kdcache:tiny --size 32x48 --iterations 1 --batch-size 2 "
    "--lr 1e-9 --init {w}/teacher/best.safetensors --out {w}/run",
}


@pytest.fixture
def constant(world):
    """The world with a teacher that predicts the second class everywhere."""
    from safetensors.torch import load_file, save_file

    weights = load_file(world / "teacher/best.safetensors")
    weights["classifier.bias"][1] += 1000
    save_file(weights, world / "teacher/best.safetensors")
    return world


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_one_class_everywhere_is_said(constant, cli, command) -> None:
    second = (constant / "data/classes.txt").read_text().splitlines()[1].split()[0]
    ended = cli(*command.format(w=constant).split())
    assert ended.code == 0, ended.err
    assert ended.err.count(f"predicts {second} alone") == 1


def test_a_model_that_has_learnt_is_not_reproached(world, cli, monkeypatch) -> None:
    import kdcache.metrics.predictions as run

    monkeypatch.setattr(
        run, "predict_batch", lambda model, batch, *_: [run.Predicted(s.number, s.labels, s.labels) for s in batch]
    )
    ended = cli(*COMMANDS["evaluate"].format(w=world).split())
    assert ended.code == 0, ended.err
    assert "mIoU 100.00" in ended.out
    assert "alone" not in ended.err
    assert "chance" not in ended.err
