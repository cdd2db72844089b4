"""A model that gives probabilities teaches nothing, and it is said wherever one appears."""

from __future__ import annotations

import json

import pytest

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
    return cli(*command.format(w=world).split())


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
        "extend {w}/store.zarr --data {w}/data --views 2 --teacher {w}/soft --out {w}/new",
    ],
)
def test_nothing_is_built_from_probabilities(soft, cli, command) -> None:
    ended = do(cli, soft, command)
    assert ended.code == 2, ended.out
    assert "returns probabilities" in ended.err
    assert "torch.log" in ended.err
    assert not (soft / "new").exists()


def test_the_remedy_works(soft, cli) -> None:
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
    monkeypatch.setattr("kdcache.teacher.build.manifest.returns_probabilities", lambda model: False)
    built = do(cli, soft, BUILD + " --teacher {w}/soft")
    assert built.code == 0, built.err
    ended = do(cli, soft, STUDENT)
    assert ended.code == 2
    assert "holds probabilities" in ended.err
    assert not (soft / "run").exists()
    labels = do(cli, soft, STUDENT + " --method none")
    assert labels.code == 0, labels.err
