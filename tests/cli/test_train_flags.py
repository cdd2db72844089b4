"""Flags of trainings on the command line: parts of a batch, kept states, loggers, memory."""

from __future__ import annotations

import tomllib

import pytest

HUNGRY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, num_classes, 3, 4, 1)

    def forward(self, x):
        if self.training and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 80 GiB")
        return self.body(x)

def build(num_classes=7):
    return Net(num_classes)
"""
STUDENT = "train-student --cache {w}/store.zarr --model kdcache:tiny --iterations 4 --batch-size 4"
TEACHER = "train-teacher --data {w}/data --model kdcache:tiny --size 32x48 --iterations 4 --batch-size 4"


@pytest.mark.parametrize("verb", [STUDENT, TEACHER], ids=["student", "teacher"])
def test_both_verbs_take_them_and_a_recipe_repeats_them(world, cli, verb) -> None:
    base = verb.format(w=world)
    flags = "--accumulate 2 --keep-every 1e --log tensorboard,tensorboard"
    ended = cli(*f"{base} {flags} --out {world}/one".split())
    assert ended.code == 0, ended.err
    resolved = tomllib.loads((world / "one" / "recipe.toml").read_text())
    assert (resolved["accumulate"], resolved["keep-every"], resolved["log"]) == (2, 2, ["tensorboard"])
    assert [path.name for path in sorted((world / "one" / "checkpoints").iterdir())] == [
        "step-000002.pt",
        "step-000004.pt",
    ]
    assert len(list((world / "one").glob("events.out.tfevents.*"))) == 1
    ended = cli(*f"{base} --recipe {world}/one/recipe.toml --out {world}/two".split())
    assert ended.code == 0, ended.err
    assert (world / "two" / "recipe.toml").read_bytes() == (world / "one" / "recipe.toml").read_bytes()
    one, two = ((world / name / "last.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_preset_gives_what_nobody_gave(world, cli) -> None:
    """A flag wins over a recipe, and a recipe over a preset, in any order. What a preset gives may have no effect."""
    recipe = world / "mine.toml"
    recipe.write_text("warmup = 1\nema = 0.9\n", encoding="utf-8")
    for number, order in enumerate(
        (f"--preset few-labels --recipe {recipe}", f"--recipe {recipe} --preset few-labels")
    ):
        out = world / f"run-{number}"
        ended = cli(*f"{STUDENT.format(w=world)} {order} --warmup 2 --method none --out {out}".split())
        assert ended.code == 0, ended.err
        resolved = tomllib.loads((out / "recipe.toml").read_text(encoding="utf-8"))
        assert (resolved["warmup"], resolved["ema"], resolved["iterations"]) == (2, 0.9, 4)
        assert (resolved["method"], resolved["augment"]) == ("none", "replay")


def test_a_setting_of_a_preset_is_not_taken_for_typed(world, cli) -> None:
    base = STUDENT.format(w=world)
    ended = cli(*f"{base} --preset few-labels --method none --class-weights none --ce-weight 1 --out {world}/a".split())
    assert ended.code == 0, ended.err
    refused = cli(*f"{base} --preset few-labels --temperature 3 --out {world}/b".split())
    assert refused.code == 2
    assert "--temperature 3.0 would have no effect" in refused.err
    assert not (world / "b").exists()


def test_another_preset(world, cli) -> None:
    ended = cli(*f"{STUDENT.format(w=world)} --preset few-label --out {world}/new".split())
    assert ended.code == 2
    assert "Did you mean few-labels?" in ended.err
    assert not (world / "new").exists()


def test_loggers_may_be_repeated(world, cli) -> None:
    ended = cli(*f"{STUDENT.format(w=world)} --log tensorboard --log tensorbord --out {world}/new".split())
    assert ended.code == 2
    assert "Did you mean tensorboard?" in ended.err
    assert not (world / "new").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--accumulate 0", "--accumulate"),
        ("--accumulate 3", "Use --batch-size 3 or 6"),
        ("--accumulate 2 --method dist", "--accumulate 2 with dist: it compares the whole batch"),
        ("--keep-every 0", "a number of iterations such as 500, or of epochs such as 5e"),
        ("--ema 1", "for example --ema 0.999"),
        ("--ema slow", "Give a decay above 0 and below 1"),
        ("--keep-every often", "a number of iterations such as 500, or of epochs such as 5e"),
    ],
)
def test_what_cannot_be_is_said(world, cli, flags, said) -> None:
    ended = cli(*f"{STUDENT.format(w=world)} {flags} --out {world}/new".split())
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not (world / "new").exists()


def test_out_of_memory_is_one_panel_with_the_batch_that_fits(world, cli) -> None:
    (world / "hungry.py").write_text(HUNGRY)
    base = STUDENT.format(w=world).replace("kdcache:tiny", f"{world}/hungry.py:build")
    ended = cli(*f"{base} --out {world}/new".split())
    assert ended.code == 2
    for words in ("Out of memory", "could not give 2.00 GiB", "--batch-size 2, or --accumulate 2"):
        assert words in ended.err
    ended = cli(*f"{base} --accumulate 2 --out {world}/parts".split())
    assert ended.code == 0, ended.err
