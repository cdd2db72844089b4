"""Weights from elsewhere whose classes stand in another order, at every verb that loads them."""

from __future__ import annotations

import pytest
import torch

from kdcache.data import open_split

NET = """
from torch import nn
def build(num_classes): return nn.Sequential(nn.Conv2d(3, num_classes, 4, stride=4))
def sigmoid(num_classes): return nn.Sequential(nn.Conv2d(3, num_classes, 4, stride=4), nn.Sigmoid())
"""
COMMANDS = [
    "build-teacher-cache --data {w}/data --views 1 --size 32x48 --out {w}/new --teacher {m}",
    "plan --data {w}/data --views 1 --size 32x48 --teacher {m}",
    "verify {w}/store.zarr --teacher {m}",
    "evaluate {m} --data {w}/data --size 32x48 --json {w}/e.json --markdown {w}/e.md",
    "compare {m} {w}/teacher --data {w}/data --size 32x48",
    "predict {m} {w}/data/images/val --classes {w}/data --size 32x48 --out {w}/new",
    "export {m} --classes {w}/data --size 32x48 --out {w}/new.safetensors",
]


@pytest.fixture
def elsewhere(world):
    """The world with checkpoints of its classes: one with the first two swapped, one with averaged weights, too."""
    (world / "nets.py").write_text(NET)
    names = open_split(world / "data", "train").classes.names
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Conv2d(3, len(names), 4, stride=4)).state_dict()
    swapped = [names[1], names[0], *names[2:]]
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": swapped}}}, world / "mm.pth")
    torch.save({"state_dict": state, "ema_state_dict": state}, world / "two.pth")
    return world


@pytest.mark.parametrize("command", COMMANDS, ids=[command.partition(" ")[0] for command in COMMANDS])
def test_another_order_of_classes_is_an_error(elsewhere, cli, command) -> None:
    ended = cli(*command.format(w=elsewhere, m=f"{elsewhere}/nets.py:build@{elsewhere}/mm.pth").split())
    assert ended.code == 2, ended.out
    assert "Classes in another order: class 0 is" in ended.err
    assert "--class-map FILE" in ended.err
    assert not (elsewhere / "new").exists()


def test_a_training_that_begins_with_them_says_so(elsewhere, cli) -> None:
    ended = cli(
        *(
            f"train-teacher --data {elsewhere}/data --model {elsewhere}/nets.py:build --init {elsewhere}/mm.pth "
            f"--size 32x48 --iterations 1 --batch-size 2 --out {elsewhere}/run"
        ).split()
    )
    assert ended.code == 0, ended.err
    assert "the head begins with other classes than it learns" in ended.err


def test_what_a_file_holds_is_said_when_it_is_used(elsewhere, cli) -> None:
    model = f"{elsewhere}/nets.py:sigmoid@{elsewhere}/two.pth"
    predict = f"predict {{}} {elsewhere}/data/images/val --classes {elsewhere}/data --size 32x48 --out {elsewhere}/{{}}"
    said = cli(*predict.format(model, "p").split())
    assert said.code == 0, said.err
    assert "two.pth:ema takes ema_state_dict" in said.err
    assert "outputs=sigmoid" in said.err
    chosen = cli(*predict.format(f"{model}:ema,outputs=sigmoid", "q").split())
    assert chosen.code == 0, chosen.err
    assert "warning" not in chosen.err
