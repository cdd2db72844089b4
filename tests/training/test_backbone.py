"""Networks without heads that learn features alone, from pictures without labels, judged by records held out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdcache.data import open_split
from kdcache.errors import KDCacheError, RecipeError
from kdcache.models import build_model
from kdcache.run_folder import Run
from kdcache.store import open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache
from kdcache.training import CacheDataset, Observer, make_config, train
from kdcache.training.input.subset import Part, held_out

NETS = """
import torch
from torch import nn

class Tokens(nn.Module):
    kdcache_heads = {}
    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 8, 8), nn.LayerNorm(12)
        self.cls = nn.Parameter(torch.ones(1, 2, 12))
    def forward(self, x):
        tokens = self.patch(x).flatten(2).mT
        return self.norm(torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1))

class Backbone(nn.Module):
    kdcache_heads = {}
    def __init__(self):
        super().__init__()
        self.s4, self.s8, self.s16 = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)
        self.norm = nn.BatchNorm2d(8)
    def forward(self, x):
        return self.s16(self.norm(self.s8(self.s4(x))).relu())

def tokens():
    torch.manual_seed(5)
    return Tokens()

def backbone():
    return Backbone()
"""
SIZE = (32, 48)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 32)).save(root / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def features(nets: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tokens of twelve pictures."""
    teacher = Teacher(build_model(f"{nets}:tokens", 0).eval(), "tokens")
    out = tmp_path_factory.mktemp("cache") / "features.zarr"
    options = BuildOptions(size=SIZE, views=1, features_only=True, features=("last",), batch_size=4)
    build_cache(open_split(photos, "train"), teacher, out, options)
    return out


@pytest.fixture
def settings(features: Path, nets: Path) -> dict[str, Any]:
    given = {"verb": "train-student", "cache": str(features), "model": f"{nets}:backbone", "method": "cosine"}
    given |= {"ce_weight": 0.0, "val_share": 0.25, "iterations": 8, "val_every": 2, "batch_size": 4, "augment": "none"}
    return given | {"device": "cpu", "log_every": 1, "workers": 0, "jitter": 0.0}


def test_tokens_are_stored_as_a_grid_without_class_tokens(features: Path, nets: Path, photos: Path) -> None:
    cache = open_cache(features)
    assert cache.manifest.features["last"].size == (4, 6)
    network = build_model(f"{nets}:tokens", 0).eval()
    pixels = torch.from_numpy(open_split(photos, "train").image(3)[None])
    with torch.no_grad():
        tokens = network.network(network.normalise(pixels))
    expected = tokens[:, 2:].mT.reshape(12, 4, 6).half().numpy()
    assert np.array_equal(cache.read(3, ["features/last"])["features/last"], expected)


def test_a_backbone_learns_and_its_best_weights_have_the_least_loss(settings, tmp_path, read_metrics) -> None:
    result = train(make_config(**settings), tmp_path / "run")
    rows = read_metrics(tmp_path / "run", "validation")
    losses = {row["step"]: row["feature_loss"] for row in rows}
    assert list(losses) == [2, 4, 6, 8]
    assert result["best_feature_loss"] == min(losses.values()) == losses[result["best_step"]]
    assert losses[8] < losses[2]
    assert result["best_miou"] is None
    assert all(row["feature_terms"] == {"cosine": row["feature_loss"]} and row["feature_samples"] > 0 for row in rows)
    assert Run.open(tmp_path / "run").model.class_names == ()
    expected = set(build_model(settings["model"], 0).state_dict())
    assert set(load_file(tmp_path / "run" / "best.safetensors")) == expected  # and no projector


def test_the_loss_of_held_out_records_is_the_formula_on_them(settings, features, tmp_path, read_metrics) -> None:
    train(make_config(**settings), tmp_path / "run")
    model = build_model(settings["model"], 0, weights=tmp_path / "run" / "last.safetensors", strict_head=True)
    state = torch.load(tmp_path / "run" / "checkpoint.pt")["criterion"]
    projector = torch.nn.Conv2d(8, 12, 1)
    projector.load_state_dict({name.rpartition(".")[2]: value for name, value in state.items()})
    cache = open_cache(features)
    held = [number for number, judge in enumerate(held_out(cache.ids, 0.25)) if judge]
    total = 0.0
    for number in held:
        pixels = torch.from_numpy(cache.read(number, ["pixels/image"])["pixels/image"][None])
        with torch.no_grad():
            student = projector(model.eval()(model.normalise(pixels), ["norm"]).features["norm"])
        teacher = torch.from_numpy(cache.read(number, ["features/last"])["features/last"][None]).float()
        total += 2 * float(1 - torch.cosine_similarity(student, teacher).mean())
    (row,) = read_metrics(tmp_path / "run", "validation")[-1:]
    assert row["feature_samples"] == len(held)
    assert row["feature_loss"] == pytest.approx(total / len(held), rel=1e-5)


def test_a_stopped_backbone_goes_on_to_the_same_weights(settings, tmp_path) -> None:
    class Stop(Observer):
        def advanced(self, step: int) -> None:
            if step == 5:
                raise RuntimeError("stop")

    train(make_config(**settings), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stop"):
        train(make_config(**settings), tmp_path / "stopped", observer=Stop())
    train(make_config(**settings), tmp_path / "stopped", resume=True)
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    with pytest.raises(RecipeError, match="resumes with the settings"):
        train(make_config(**settings | {"val_share": 0.5}), tmp_path / "stopped", resume=True)


def test_held_out_samples_depend_on_their_ids_alone_and_teach_nothing(features: Path) -> None:
    ids = [f"image {number}" for number in range(4000)]
    judges = held_out(ids, 0.1)
    assert 320 < sum(judges) < 480
    assert held_out(ids[::-1], 0.1) == judges[::-1]
    assert held_out(ids[:500], 0.1) == judges[:500]
    assert sum(held_out(ids[:5], 0.02)) == 1  # of few samples at least one
    cache = open_cache(features)
    learns = CacheDataset(cache, part=Part(held_out=0.25))
    judged = CacheDataset(cache, part=Part(held_out=0.25, judging=True))
    assert sorted([*learns.indices, *judged.indices]) == list(range(12))
    assert {*CacheDataset(cache, part=Part(held_out=0.25, samples=4)).indices} <= {*learns.indices}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kl on features": (
        {"method": "kl", "val_share": None},
        r"has no heads, features alone.*--method none with --term hint",
    ),
    "no tap of that name": ({"method": "none", "term": ("cosine,student_tap=s9",)}, "s4, s8, norm, s16"),
    "cross-entropy": ({"ce_weight": 1.0}, r"ce compares a head segmentation.*--ce-weight 0"),
    "no term": ({"method": "none", "ce_weight": 1.0}, r"--val-share 0.25 has no feature loss.*--term cosine"),
    "labels judge": ({"val_share": None, "val": "scenes:32x48,train=6,val=3"}, r"has no head.*--val-share 0.02"),
    "two judges": ({"val": "scenes"}, r"Cannot use --val-share 0.25 with --val scenes"),
    "a share of 0": ({"val_share": 0.0}, "--val-share is"),
    "a share of 1": ({"val_share": 1.0}, "--val-share is"),
    "all held out": ({"val_share": 0.999999}, "No sample is left"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_written(case, settings, tmp_path) -> None:
    changes, text = WRONG[case]
    with pytest.raises(KDCacheError) as caught:
        train(make_config(**settings | changes), tmp_path / "run")
    shown = f"{caught.value.rule} {caught.value.received} {caught.value.remedy}"
    assert re.search(text, shown), shown
    assert not (tmp_path / "run").exists()
