"""Trainings of depth alone: no head, no labels of segmentation are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model

from kdcache.data import ClassList, open_split
from kdcache.errors import ModelError
from kdcache.models import build_model, trusting
from kdcache.models.export import export_model
from kdcache.models.run import load_run, open_model
from kdcache.run_folder import Run
from kdcache.teacher import load_teacher
from kdcache.training import make_config, train
from kdcache.training.run.folder import untrained_heads

ALONE = "scenes:32x48,train=6,val=3,depth=exact,tasks=depth"
Read = Callable[..., list[dict[str, Any]]]
NETWORK = """
from torch import nn

class Network(nn.Module):
    kdcache_heads = {"depth": {"kind": "regression"}}

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 1, 3, 1, 1))

    def forward(self, x):
        return {"depth": self.body(x)}

def build(num_classes):
    return Network()
"""


@pytest.fixture
def alone(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "depths.py").write_text(NETWORK)
    changes = {"verb": "train-student", "model": f"{tmp_path / 'depths.py'}:build", "data": ALONE, "val": ALONE}
    return settings | changes | {"method": "depth-silog", "ce_weight": 0, "lr": 0.01}


@pytest.mark.parametrize("model", ["own", "kdcache:tiny+depth"])
def test_depth_alone_is_trained_validated_and_its_best_is_the_smallest_rmse(
    model: str, alone: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    settings = alone | ({} if model == "own" else {"model": model})
    result = train(make_config(**settings | {"ema": 0.5, "iterations": 12}), tmp_path / "run")
    lines = read_metrics(tmp_path / "run", "validation")
    assert all("miou" not in line for line in lines)
    assert result["best_miou"] is None
    assert result["best_depth_rmse"] == min(line["depth_rmse"] for line in lines)
    assert result["ema_best_depth_rmse"] == min(line["ema_depth_rmse"] for line in lines)
    assert lines[-1]["depth_rmse"] < lines[0]["depth_rmse"]
    again = train(make_config(**settings | {"ema": 0.5, "iterations": 12}), tmp_path / "run", resume=True)
    assert again["best_depth_rmse"] == result["best_depth_rmse"]
    assert Run.open(tmp_path / "run").model.untrained == (() if model == "own" else ("segmentation",))


@pytest.mark.parametrize("model", ["own", "kdcache:hydra", "kdcache:tiny+depth"])
def test_data_without_classes_teach_depth(model: str, alone: dict[str, Any], tmp_path: Path) -> None:
    """As KITTI's and NYU's: the model has a head of depth alone, in the run, in what is exported, as a teacher."""
    root = write_nyu(tmp_path / "nyu")
    spec = alone["model"] if model == "own" else model
    data = {"data": root, "val": root, "val_split": "test", "size": "32x48"}
    train(make_config(**alone | data | {"model": spec, "iterations": 3}), tmp_path / "run")
    with trusting():
        trained, description = load_run(tmp_path / "run")
    assert (description.class_names, description.untrained, set(trained.head_kinds)) == ((), (), {"depth"})
    pixels = torch.from_numpy(open_split(root, "test").image(0))[None]
    expected = trained(trained.normalise(pixels)).heads
    assert set(expected) == {"depth"}
    export_model(trained, description, tmp_path / "depth.safetensors")
    with trusting(True):
        teacher = load_teacher(f"{spec}@{tmp_path / 'depth.safetensors'}", open_split(root, "train").classes)
        opened, _ = open_model(f"{spec}@{tmp_path / 'depth.safetensors'}", ClassList(()))
    for again in (teacher.model, opened):
        assert torch.equal(again(again.normalise(pixels)).heads["depth"], expected["depth"])
    train(
        make_config(**alone | {"model": spec, "val": root, "val_split": "test", "iterations": 1}), tmp_path / "judged"
    )
    assert Run.open(tmp_path / "judged").model.class_names


def test_data_without_classes_want_another_head(alone: dict[str, Any], tmp_path: Path) -> None:
    changes = {"model": "kdcache:tiny", "data": write_nyu(tmp_path / "nyu"), "val": None, "size": "32x48"}
    with pytest.raises(ModelError, match=r"--model kdcache:tiny\+depth. Or name classes in a classes.txt"):
        train(make_config(**alone | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def write_nyu(root: Path) -> str:
    """Scenes in the layout of NYU: photographs and millimetres, no classes."""
    for split, place in (("train", "sync/kitchen"), ("val", "official_splits/test/kitchen")):
        (root / place).mkdir(parents=True)
        scenes = open_split(ALONE, split)
        for number in range(len(scenes)):
            millimetres = np.nan_to_num(1000 * scenes.label(number, "depth")).clip(0, 65535).astype(np.uint16)
            Image.fromarray(scenes.image(number)).save(root / place / f"rgb_{number:05d}.jpg")
            Image.fromarray(millimetres).save(root / place / f"sync_depth_{number:05d}.png")
    return str(root)


def test_a_head_is_at_random_where_neither_weights_nor_the_training_gave_it_values(tmp_path: Path) -> None:
    fresh = build_model("kdcache:tiny+depth", 3)
    assert untrained_heads(fresh, ("depth",)) == ("segmentation",)
    assert untrained_heads(fresh, ("segmentation",)) == ("depth",)
    assert untrained_heads(fresh, ()) == ("segmentation", "depth")  # features alone
    save_model(build_model("kdcache:tiny", 3), tmp_path / "classes.safetensors")
    begun = build_model("kdcache:tiny+depth", 3, weights=tmp_path / "classes.safetensors", strict_head=False)
    assert untrained_heads(begun, ("depth",)) == ()
    assert untrained_heads(begun, ("segmentation",)) == ("depth",)
    other = build_model("kdcache:tiny+depth", 4, weights=tmp_path / "classes.safetensors", strict_head=False)
    assert untrained_heads(other, ("depth",)) == ("segmentation",)


def test_weights_of_a_run_that_learnt_nothing_of_a_head_leave_it_at_random(
    settings: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    """Also those exported from it. What is not learnt is not validated; what another run learns of it is."""
    data = "scenes:32x48,train=6,val=3,depth=exact"
    settings |= {"verb": "train-student", "model": "kdcache:tiny+depth", "data": data, "val": data, "iterations": 3}
    learning = {"segmentation": {"method": "none"}, "depth": {"method": "depth-silog", "ce_weight": 0}}
    first: dict[str, Path] = {}
    for task, how in learning.items():
        first[task] = tmp_path / task
        train(make_config(**settings | how), first[task])
        line = read_metrics(first[task], "validation")[-1]
        assert ("miou" in line, "depth_rmse" in line) == (task == "segmentation", task == "depth")
    export_model(*load_run(first["depth"]), tmp_path / "exported.safetensors")
    for name, (init, task, untrained) in {
        "same": (first["depth"] / "best.safetensors", "depth", ("segmentation",)),
        "exported": (tmp_path / "exported.safetensors", "depth", ("segmentation",)),
        "other": (first["depth"] / "last.safetensors", "segmentation", ()),
        "reverse": (first["segmentation"] / "last.safetensors", "segmentation", ("depth",)),
    }.items():
        run = tmp_path / name
        train(make_config(**settings | learning[task] | {"init": str(init), "iterations": 1, "val": None}), run)
        assert Run.open(run).model.untrained == untrained, name


def test_a_loss_that_is_not_finite_names_head_stream_and_remedies_in_order(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    streams = [
        {"name": "near", "data": ALONE},
        {"name": "far", "data": ALONE.replace("train=6", "train=5")},
    ]
    settings = alone | {"data": None, "stream": streams, "lr": 1e30, "schedule": "constant", "val": None}
    with pytest.raises(ModelError) as error:
        train(make_config(**settings | {"optimizer": "sgd", "iterations": 30}), tmp_path / "run")
    assert "term depth-silog of the head depth in the stream near" in error.value.problem
    assert "records near:" in error.value.problem
    words = ("--clip-grad", "--lr", "the depth of those records")
    assert sorted(words, key=error.value.fix.index) == list(words)
