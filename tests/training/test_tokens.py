"""Trainings from features in bytes, similarities between tokens and summaries: wiring, warp, resume, processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.store import CopyChanges, copy_store, open_cache
from kdcache.teacher import load_teacher
from kdcache.training import CacheDataset, Observer, make_config, train
from kdcache.training.criterion import channel_moments

STATISTICS = ("similarity:blocks",)


class Backbone(nn.Module):
    """Logits, a map of 8x12 cells and a summary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.Conv2d(3, 6, 4, stride=4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Conv2d(6, 7, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.blocks(image)
        self.pool(maps)
        return self.classify(maps)


@pytest.fixture(scope="module")
def tokens(make_cache: Callable[..., Path], scenes: str) -> Path:
    """Two views of each image, with a tap in bytes, its similarities and a summary."""
    model = load_teacher(Backbone(), open_split(scenes, "train")).model
    words = {"features": ("blocks", "pool"), "feature_dtype": "uint8", "statistics": STATISTICS}
    return make_cache(model=model, views=2, **words)


@pytest.fixture
def short(student: dict[str, Any], tokens: Path) -> dict[str, Any]:
    return student | {"cache": str(tokens), "method": "none", "val": None, "batch_size": 2}


class Losses(Observer):
    """Keeps what is logged, and stops a training after a step."""

    def __init__(self, last: int | None = None) -> None:
        self.values: list[dict[str, float]] = []
        self.notes: list[str] = []
        self._last = last

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        self.values.append(dict(values))
        if step == self._last:
            raise KeyboardInterrupt


def test_bytes_stay_bytes_until_the_step(tokens: Path) -> None:
    cache = open_cache(tokens)
    extras = ("features/blocks", "scales/blocks", "statistics/similarity.blocks")
    sample = CacheDataset(cache, augment="replay", extras=extras)[0]
    assert [sample.arrays[path].dtype for path in extras] == [torch.uint8, torch.float16, torch.uint8]
    mean, std = channel_moments(cache, "blocks", range(6))
    assert mean.shape == std.shape == (6,)


def test_a_step_from_bytes_is_the_step_from_their_numbers(short: dict[str, Any], tokens: Path, tmp_path: Path) -> None:
    copy_store(open_cache(tokens), tmp_path / "halves.zarr", CopyChanges(feature_dtype="fp16"))
    runs = []
    for name, cache in (("bytes", tokens), ("halves", tmp_path / "halves.zarr")):
        seen = Losses()
        terms = ("hint,teacher_tap=blocks", "cosine,teacher_tap=blocks,standardise=channels", "at,teacher_tap=blocks")
        train(make_config(**short | {"cache": str(cache), "term": terms}), tmp_path / name, observer=seen)
        runs.append(seen)
    for one, other in zip(runs[0].values, runs[1].values, strict=True):
        for part in ("hint", "cosine", "at"):
            assert one[part] == pytest.approx(other[part], rel=2e-2)
            assert one[part] > 0


@pytest.mark.parametrize("term", ["similarity", "queue"])
def test_a_window_cannot_move_what_is_of_a_whole_view(short: dict[str, Any], tmp_path: Path, term: str) -> None:
    with pytest.raises(RecipeError, match=f"Cannot move what {term} compares") as caught:
        train(make_config(**short | {"term": (term,), "augment": "warp"}), tmp_path / "run")
    assert "--augment replay" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_both_terms_are_learnt_and_a_run_resumes_with_its_ring(short: dict[str, Any], tmp_path: Path) -> None:
    settings = short | {"term": ("similarity", "queue,length=5"), "val_every": 2, "gradients_every": 3}
    whole, seen = tmp_path / "whole", Losses()
    train(make_config(**settings), whole, observer=seen)
    assert seen.values[0]["queue"] == 0
    assert all(values["queue"] > 0 for values in seen.values[1:])
    assert all(values["similarity"] > 0 for values in seen.values)
    assert any("queue: the mean of the student's" in note for note in seen.notes)
    died = tmp_path / "died"
    with pytest.raises(KeyboardInterrupt):
        train(make_config(**settings), died, observer=Losses(last=5))
    assert torch.load(died / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    train(make_config(**settings), died, resume=True)
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, died)]
    assert int(states[0]["criterion"]["streams.0.further.1.seen_images"]) == 12
    for name in states[0]["criterion"]:
        assert torch.equal(states[0]["criterion"][name], states[1]["criterion"][name]), name
    assert (whole / "last.safetensors").read_bytes() == (died / "last.safetensors").read_bytes()


def test_parts_of_a_batch_learn_as_the_whole(short: dict[str, Any], tmp_path: Path) -> None:
    """A batch that is accumulated fills the ring once, in its own order."""
    rings = []
    for name, changes in (("whole", {}), ("parts", {"accumulate": 2})):
        settings = short | {"term": ("queue,length=5",), "iterations": 3, "val_every": 3} | changes
        train(make_config(**settings), tmp_path / name)
        rings.append(
            torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["criterion"]["streams.0.further.0.ring"]
        )
    assert torch.equal(*rings)
