"""A teacher of one's own, as the README says it: `my_models:build@weights.pth`, called with `num_classes`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from kdcache.store import open_cache

SOURCE = """
from dataclasses import dataclass
from torch import nn
from transformers.modeling_outputs import SemanticSegmenterOutput

class Net(nn.Module):
    def __init__(self, num_classes, answer):
        super().__init__()
        self.answer = answer
        self.body = nn.Conv2d(3, num_classes, 3, 4, 1)

    def forward(self, x):
        y = self.body(x)
        return {
            "tensor": y,
            "out": {"out": y, "aux": y[:, :1]},
            "logits": {"logits": y},
            "tuple": (y, y[:, :1]),
            "list": [y],
            "hugging_face": SemanticSegmenterOutput(logits=y),
        }[self.answer]

def tensor(num_classes): return Net(num_classes, "tensor")
def out(num_classes): return Net(num_classes, "out")
def logits(num_classes): return Net(num_classes, "logits")
def tuple_(num_classes): return Net(num_classes, "tuple")
def list_(num_classes): return Net(num_classes, "list")
def hugging_face(num_classes): return Net(num_classes, "hugging_face")
def by_position(classes): return Net(classes, "tensor")
def of_its_own(): return Net(7, "tensor")
def of_nine(num_classes=9): return Net(num_classes, "tensor")
"""
FORMS = ("tensor", "out", "logits", "tuple_", "list_", "hugging_face", "of_its_own", "of_nine")
BUILD = "build-teacher-cache --data {w}/data --teacher own_models:{form}@weights.pth --size 32x48 --views 1"


def save(path: Path, classes: int) -> None:
    torch.manual_seed(classes)
    torch.save(torch.nn.ModuleDict({"body": torch.nn.Conv2d(3, classes, 3, 4, 1)}).state_dict(), path)


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world, and we stand in it, beside own_models.py and weights of the data's seven classes."""
    (world / "own_models.py").write_text(SOURCE)
    save(world / "weights.pth", 7)
    monkeypatch.chdir(world)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return world


def test_the_page_of_teachers_says_so() -> None:
    text = (Path(__file__).parents[2] / "docs/teachers.md").read_text(encoding="utf-8")
    assert re.search(r"`my_models:build@weights\.pth` \| your function\. It takes `num_classes`", text)


@pytest.mark.parametrize("form", FORMS)
def test_a_function_teaches_whatever_it_returns(here, cli, form) -> None:
    ended = cli(*f"{BUILD} --out {{w}}/new".format(w=here, form=form).split())
    assert ended.code == 0, ended.err
    cache = open_cache(here / "new")
    network = torch.nn.Conv2d(3, 7, 3, 4, 1)
    network.load_state_dict({k.removeprefix("body."): v for k, v in torch.load(here / "weights.pth").items()})
    rows = cache.read(0, ["pixels/image", "targets/segmentation/values"])
    x = torch.from_numpy(rows["pixels/image"])[None].permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(cache.manifest.teacher.model_dump()[name])[:, None, None] for name in ("mean", "std"))
    with torch.inference_mode():
        y = network((x - mean) / std)[0]
    stored = torch.from_numpy(rows["targets/segmentation/values"]).float()
    assert torch.allclose(stored, y - y.amax(0), atol=2e-3)


@pytest.mark.parametrize("form", ["tensor", "of_nine"])
def test_a_class_map_says_how_many_the_function_is_called_with(here, cli, form) -> None:
    save(here / "weights.pth", 9)
    names = [line.rsplit(maxsplit=3)[0] for line in (here / "data/classes.txt").read_text().splitlines()]
    (here / "map.txt").write_text("".join(f"{i} {names[min(i, 6)]}\n" for i in range(9)))
    build = BUILD.format(w=here, form=form)
    ended = cli(*f"{build} --class-map map.txt --out {here}/new".split())
    assert ended.code == 0, ended.err
    assert open_cache(here / "new").num_classes == 7
    judged = f"evaluate own_models:{form}@weights.pth --data data --size 32x48 --class-map map.txt --json e.json"
    ended = cli(*f"{judged} --markdown e.md".split())
    assert ended.code == 0, ended.err
    ended = cli(*build.split(), "--out", here / "more")
    assert (ended.code, "The weights have 9 classes, and the data or their class map 7" in ended.err) == (2, True)
    assert "--class-map" in ended.err


@pytest.mark.parametrize(
    ("form", "said"),
    [("by_position", "missing a required argument: 'classes'"), ("absent", "absent is no such name")],
)
def test_a_function_that_cannot_be_called_so_is_named(here, cli, form, said) -> None:
    ended = cli(*f"{BUILD} --out {{w}}/new".format(w=here, form=form).split())
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("fix: ") == 1
    assert not (here / "new").exists()


def test_a_class_map_without_ids_is_refused(here, cli) -> None:
    (here / "map.txt").write_text("# nothing\n")
    ended = cli(*f"{BUILD} --class-map map.txt --out {{w}}/new".format(w=here, form="tensor").split())
    assert (ended.code, "No teacher class in map.txt" in ended.err) == (2, True)
    assert "should not" not in ended.err


def test_an_exported_model_knows_its_classes(here, cli, monkeypatch) -> None:
    """Without any data: the file says how many there are."""
    train = "train-teacher --data data --model own_models:out --size 32x48 --iterations 1 --batch-size 2 --out run"
    for command in (
        train,
        "export run --out own.safetensors --trust",
        "predict own_models:out@own.safetensors data/images/val --out predicted",
    ):
        ended = cli(*command.split())
        assert ended.code == 0, (command, ended.err)
