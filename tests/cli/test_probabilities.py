"""A model that gives probabilities teaches nothing, and it is said wherever one appears."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Conv2d(3, classes, 3, 4, 1)
        nn.init.normal_(self.body.weight, std=4)

    def forward(self, x): return self.body(x).softmax(1)

def build(num_classes): return Net(num_classes)
"""
TRAIN = (
    "train-teacher --data {w}/data --model {w}/soft.py:build --size 32x48 --iterations 1 --batch-size 2 --out {w}/soft"
)
BUILD = "build-teacher-cache --data {w}/data --views 1 --out {w}/new"
STUDENT = "train-student --cache {w}/new --model kdcache:tiny --iterations 1 --batch-size 2 --out {w}/run"


def do(cli, world, command):
    return cli("--trust", *command.format(w=world).split())


@pytest.fixture
def soft(world, cli):
    """The world with a run in `soft` whose model ends in a softmax."""
    (world / "soft.py").write_text(CODE)
    trained = do(cli, world, TRAIN)
    assert trained.code == 0, trained.err
    assert trained.err.count("returns probabilities") == 1
    return world


@pytest.mark.parametrize(
    "command",
    [
        BUILD + " --teacher {w}/soft",
        BUILD + " --teacher {w}/soft.py:build@{w}/soft/best.safetensors --size 32x48",
        BUILD + " --teacher {w}/teacher --teacher {w}/soft",
        BUILD + " --teacher {w}/soft --tta flip",
        "plan --data {w}/data --views 1 --teacher {w}/soft",
        "build-teacher-cache --from {w}/store.zarr --data {w}/data --views 2 --teacher {w}/soft --out {w}/new",
    ],
)
def test_nothing_is_built_from_probabilities(soft, cli, command) -> None:
    ended = do(cli, soft, command)
    assert ended.code == 2, ended.out
    assert "returns probabilities" in ended.err
    assert "outputs=probabilities" in ended.err
    assert not (soft / "new").exists()


def test_the_remedies_work(soft, cli) -> None:
    """The logarithm in the network, or said of the model: the store then knows the teacher by it."""
    stated = do(cli, soft, BUILD + " --teacher {w}/soft,outputs=probabilities")
    assert stated.code == 0, stated.err
    assert do(cli, soft, "verify {w}/new --teacher {w}/soft,outputs=probabilities").code == 0
    forgotten = do(cli, soft, "verify {w}/new --teacher {w}/soft")
    assert forgotten.code == 1
    assert "outputs=probabilities" in forgotten.out
    shutil.rmtree(soft / "new")
    (soft / "soft.py").write_text(CODE.replace(".softmax(1)", ".softmax(1).clamp(min=1e-12).log()"))
    ended = do(cli, soft, BUILD + " --teacher {w}/soft")
    assert ended.code == 0, ended.err


def test_judging_says_it(soft, cli) -> None:
    assert "returns probabilities" in do(cli, soft, "evaluate {w}/soft --data {w}/data").err
    compared = do(cli, soft, "compare {w}/soft {w}/teacher --data {w}/data --json {w}/c.json")
    assert compared.code == 0, compared.err
    notes = json.loads((soft / "c.json").read_text())["notes"]
    assert [note for note in notes if "returns probabilities" in note and "soft" in note]
    assert not [note for note in notes if "returns probabilities" in note and "/teacher" in note]


def test_a_store_of_an_earlier_version_is_refused(soft, cli, monkeypatch) -> None:
    monkeypatch.setattr("kdcache.teacher.build.manifest.not_logits", lambda model, size: None)
    built = do(cli, soft, BUILD + " --teacher {w}/soft")
    assert built.code == 0, built.err
    ended = do(cli, soft, STUDENT)
    assert ended.code == 2
    assert "holds probabilities" in ended.err
    assert not (soft / "run").exists()
    labels = do(cli, soft, STUDENT + " --method none")
    assert labels.code == 0, labels.err


SIGMOID = """
from torch import nn
def build(num_classes): return nn.Sequential(nn.Conv2d(3, num_classes, 4, stride=4), nn.Sigmoid())
def relu(num_classes): return nn.Sequential(nn.Conv2d(3, num_classes, 4, stride=4), nn.ReLU())
"""


def test_sigmoids_are_refused_and_what_is_never_negative_is_noted(world, cli) -> None:
    """The second net is the mean top probability beside the mIoU."""
    (world / "nets.py").write_text(SIGMOID)
    classes = len((world / "data" / "classes.txt").read_text().splitlines())
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, classes, 4, stride=4))
    torch.save(network.state_dict(), world / "w.pth")
    build = BUILD + " --size 32x48 --teacher {w}/nets.py:"
    ended = do(cli, world, build + "build@{w}/w.pth")
    assert ended.code == 2
    assert "are not logits" in ended.err
    assert "outputs=sigmoid" in ended.err
    assert not (world / "new").exists()
    planned = do(cli, world, build.replace("build-teacher-cache", "plan") + "relu@{w}/w.pth")
    assert planned.code == 0, planned.err
    assert "warning: " in planned.err
    assert "none below 0" in planned.err
    stated = do(cli, world, build + "build,outputs=sigmoid@{w}/w.pth")
    assert stated.code == 0, stated.err
    assert "none below 0" not in stated.err
    assert "mean top probability 0." in stated.out
