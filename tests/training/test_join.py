"""Trainings from joined caches learn what they would from one cache with all arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.data import open_split
from kdcache.errors import MismatchError, RecipeError
from kdcache.models.foreign.processor import Processor
from kdcache.run_folder import Run
from kdcache.settings.methods import loss_term
from kdcache.store import open_cache, open_caches
from kdcache.teacher import load_teacher
from kdcache.training import CacheDataset, make_config, train
from tests.training.test_tokens import Backbone, Losses

TAPS = {"features": ("blocks", "pool"), "feature_dtype": "uint8", "statistics": ("similarity:blocks", "at:blocks")}


@pytest.fixture(scope="module")
def caches(make_cache: Callable[..., Path], scenes: str) -> dict[str, Path]:
    """Two views of each image by one teacher: everything, logits only, features only in other shards, other views."""
    model = load_teacher(Backbone(), open_split(scenes, "train")).model
    apart = {"features_only": True, "pixels": "source", "shard_records": 5, **TAPS}
    return {
        "both": make_cache(model=model, views=2, **TAPS),
        "logits": make_cache(model=model, views=2),
        "taps": make_cache(model=model, views=2, **apart),
        "others": make_cache(model=model, views=2, view_seed=1, **apart),
    }


@pytest.fixture
def short(student: dict[str, Any]) -> dict[str, Any]:
    return student | {"val": None, "iterations": 6, "val_every": 3, "batch_size": 2, "gradients_every": 0}


def of_one(caches: dict[str, Path], *terms: str) -> dict[str, Any]:
    return {"cache": str(caches["both"]), "term": tuple(term.format("") for term in terms)}


def of_join(caches: dict[str, Path], *terms: str) -> dict[str, Any]:
    places = [str(caches["logits"]), f"sam={caches['taps']}"]
    return {"cache": places, "term": tuple(term.format("sam:") for term in terms)}


WAYS = {
    "replay": (("cosine,teacher_tap={}blocks", "similarity,teacher_tap={}blocks", "queue,teacher_tap={}pool"), {}),
    "warp": (("hint,teacher_tap={}blocks", "at,teacher_tap={}blocks"), {"augment": "warp", "flip": False}),
    "memory": (("cosine,teacher_tap={}blocks,standardise=channels",), {"resident": "ram", "workers": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_join_is_one_cache_with_all_arrays(
    caches: dict[str, Path], short: dict[str, Any], tmp_path: Path, way: str
) -> None:
    terms, changes = WAYS[way]
    seen = [Losses(), Losses()]
    for name, cache, watching in (("one", of_one, seen[0]), ("join", of_join, seen[1])):
        train(make_config(**short | changes | cache(caches, *terms)), tmp_path / name, observer=watching)
    assert (tmp_path / "one/last.safetensors").read_bytes() == (tmp_path / "join/last.safetensors").read_bytes()
    kinds = [term.partition(",")[0] for term in terms]
    assert all(seen[0].values[-1][kind] == seen[1].values[-1][kind] > 0 for kind in kinds)
    begun = Run.open(tmp_path / "join")
    digests = [open_cache(caches[name]).ledger.completion.digest for name in ("logits", "taps")]  # type: ignore[union-attr]
    assert list(begun.model.stores) == digests
    assert begun.recipe is not None
    assert begun.recipe["cache"] == [str(caches["logits"]), f"sam={caches['taps']}"]
    assert str(tmp_path) not in (tmp_path / "join/recipe.toml").read_text()


def test_a_join_resumes_with_its_own_caches(
    nursery: Any, caches: dict[str, Path], short: dict[str, Any], tmp_path: Path, make_cache: Callable[..., Path]
) -> None:
    terms = ("queue,teacher_tap={}pool", "cosine,teacher_tap={}blocks")
    long = short | {"iterations": 40, "val_every": 5} | of_join(caches, *terms)
    nursery.kill_at_checkpoint(long, tmp_path / "killed")
    model = load_teacher(Backbone(), open_split("scenes:32x48,train=6,val=3", "train")).model
    again = make_cache(model=model, views=2, features_only=True, pixels="source", shard_records=2, **TAPS)
    with pytest.raises(RecipeError) as caught:
        train(make_config(**long | {"cache": [long["cache"][0], f"sam={again}"]}), tmp_path / "killed", resume=True)
    assert "another cache or data set than it was begun with" in str(caught.value)
    train(make_config(**long), tmp_path / "killed", resume=True)
    nursery.start(long, tmp_path / "whole")
    assert nursery.wait() == 0
    assert (tmp_path / "whole/last.safetensors").read_bytes() == (tmp_path / "killed/last.safetensors").read_bytes()


def test_a_stream_joins_caches(caches: dict[str, Path], short: dict[str, Any], tmp_path: Path) -> None:
    streams = {}
    for name, cache, tap in (
        ("one", f"cache={caches['both']}", "blocks"),
        ("join", f"cache={caches['logits']},cache=sam={caches['taps']}", "sam:blocks"),
    ):
        lines = [f'a,{cache},method=kl,"term=cosine,teacher_tap={tap}"', "b,data=scenes:32x48"]
        settings = short | {"cache": None, "stream": lines, "method": "auto", "batch_size": 4, "size": "32x48"}
        train(make_config(**settings), tmp_path / name)
        streams[name] = Run.open(tmp_path / name).recipe["stream"][0]["cache"]  # type: ignore[index]
    assert (tmp_path / "one/last.safetensors").read_bytes() == (tmp_path / "join/last.safetensors").read_bytes()
    assert streams == {"one": str(caches["both"]), "join": [str(caches["logits"]), f"sam={caches['taps']}"]}


def test_a_term_takes_a_tap_of_a_joined_cache_by_default(caches: dict[str, Path]) -> None:
    taps = ["head", "blocks"]
    joined = open_caches([caches["logits"], f"sam={caches['taps']}"]).manifest
    cosine = loss_term("cosine").resolved(joined, taps)
    assert (cosine.teacher_tap, cosine.student_tap) == ("sam:blocks", "blocks")  # type: ignore[attr-defined]
    assert loss_term("queue").resolved(joined, taps).teacher_tap == "sam:pool"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("term", "problem", "fix"),
    [
        ("cosine,teacher_tap=sma:blocks", "Unknown cache sma in teacher_tap=sma:blocks", "Did you mean sam?"),
        ("cosine,teacher_tap=main:blocks", "Cannot name the first cache", "Write teacher_tap=blocks."),
        ("at,teacher_tap=x:blocks", "Unknown cache x", "Join it: --cache x=CACHE."),
    ],
)
def test_unknown_names_are_found(
    caches: dict[str, Path], short: dict[str, Any], tmp_path: Path, term: str, problem: str, fix: str
) -> None:
    places = [f"main={caches['logits']}", f"sam={caches['taps']}"]
    with pytest.raises(RecipeError, match=problem) as caught:
        train(make_config(**short | {"cache": places, "term": (term,)}), tmp_path / "run")
    assert caught.value.fix == fix
    assert not (tmp_path / "run").exists()


def test_an_array_that_a_joined_cache_lacks_is_named(caches: dict[str, Path], short: dict[str, Any]) -> None:
    settings = short | {
        "cache": [str(caches["logits"]), f"sam={caches['taps']}"],
        "term": ("cosine,teacher_tap=sam:x",),
    }
    with pytest.raises(RecipeError) as caught:
        train(make_config(**settings), "never")
    assert "cosine needs features/x, but sam has pool, blocks" in str(caught.value)
    with pytest.raises(RecipeError) as single:
        train(make_config(**short | {"cache": str(caches["both"]), "term": ("hint,teacher_tap=sam:x",)}), "never")
    assert "the training has one cache" in single.value.problem


def test_other_views_are_refused_before_anything_is_written(
    caches: dict[str, Path], short: dict[str, Any], tmp_path: Path
) -> None:
    places = [str(caches["logits"]), f"sam={caches['others']}"]
    with pytest.raises(MismatchError, match="The views of") as caught:
        train(make_config(**short | {"cache": places}), tmp_path / "run")
    assert (
        "view 1 of sample '32x48-seed0/train-000000' shows other pixels; view.drawn: seed 1 against 0"
        in caught.value.problem
    )
    assert not (tmp_path / "run").exists()


def test_features_of_position_embeddings_are_not_mirrored(
    caches: dict[str, Path], short: dict[str, Any], tmp_path: Path, make_cache: Callable[..., Path], scenes: str
) -> None:
    """Also if the teacher with them is the second one's."""
    model = load_teacher(Backbone(), open_split(scenes, "train")).model
    model.processor = Processor(positions=True)
    tokens = make_cache(model=model, views=2, features_only=True, pixels="source", features=("blocks",))
    settings = short | {"cache": [str(caches["logits"]), f"sam={tokens}"], "term": ("hint,teacher_tap=sam:blocks",)}
    with pytest.raises(RecipeError, match="the teacher has position embeddings"):
        train(make_config(**settings | {"augment": "warp", "flip": True}), tmp_path / "run")


def test_a_joined_cache_that_no_term_reads_is_noted(
    caches: dict[str, Path], short: dict[str, Any], tmp_path: Path
) -> None:
    seen = Losses()
    settings = short | {"cache": [str(caches["logits"]), f"sam={caches['taps']}"], "iterations": 1}
    train(make_config(**settings), tmp_path / "run", observer=seen)
    assert "no term reads the joined cache sam" in seen.notes


def test_a_loop_of_one_s_own_reads_a_join(caches: dict[str, Path]) -> None:
    joined, one = open_caches([caches["logits"], f"sam={caches['taps']}"]), open_cache(caches["both"])
    extras = ("features/{}blocks", "scales/{}blocks")
    ours = CacheDataset(joined, augment="replay", extras=[path.format("sam:") for path in extras])
    theirs = CacheDataset(one, augment="replay", extras=[path.format("") for path in extras])
    for index in range(len(one.ids)):
        a, b = (own.draw(index, 1, np.random.default_rng(index)) for own in (ours, theirs))
        assert torch.equal(a.pixels, b.pixels)  # type: ignore[arg-type]
        for path in extras:
            assert torch.equal(a.arrays[path.format("sam:")], b.arrays[path.format("")])
