"""Joined caches as one types them: a build like another, a training from both, and what is wrong with either."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

LIKE = "build-teacher-cache --like {w}/store.zarr --teacher {w}/teacher --features-only --features stage2"
TRAIN = (
    "train-student --cache {w}/store.zarr --model kdcache:tiny --method kl --iterations 2 --batch-size 2 --out {w}/run"
)
TERM = "--term cosine,teacher_tap=sam:stage2 --augment replay"


@pytest.fixture
def typed(world: Path, cli: Any) -> Any:
    """typed(words): the command in a world, with {w} for its folder."""
    return lambda words: cli(*words.format(w=world).split())


def test_a_further_cache_is_built_and_joined(world: Path, typed: Any) -> None:
    built = typed(f"{LIKE} --out {{w}}/taps.zarr")
    assert built.code == 0, built.err
    assert "6 records" in built.out
    assert "6 records (6 from before)" in typed(f"{LIKE} --out {{w}}/taps.zarr").out
    ended = typed(f"{TRAIN} --cache sam={{w}}/taps.zarr {TERM}")
    assert ended.code == 0, ended.err
    recipe = world / "run/recipe.toml"
    assert tomllib.loads(recipe.read_text())["cache"] == ["store.zarr", "sam=taps.zarr"]
    assert typed(f"{TRAIN} --cache sam={{w}}/taps.zarr {TERM} --resume").code == 0
    again = typed(f"{TRAIN}-again --recipe {{w}}/run/recipe.toml --cache sam={{w}}/taps.zarr")
    assert again.code == 0, again.err
    assert (world / "run/last.safetensors").read_bytes() == (world / "run-again/last.safetensors").read_bytes()
    (world / "mine.toml").write_text(f'cache = "{world}/store.zarr"\nmodel = "kdcache:tiny"\niterations = 1\n')
    assert typed("train-student --recipe {w}/mine.toml --out {w}/mine").code == 0


def test_a_further_cache_may_be_in_an_object_store(world: Path, typed: Any, s3: Any, tmp_path: Path) -> None:
    """Its shards are fetched once, by their own numbers, and the weights are those of local caches in that order."""
    address = s3.address()
    for out in (address, f"{world}/taps.zarr"):
        built = typed(f"{LIKE} --out {out}")
        assert built.code == 0, built.err
    s3.reset()
    far = f"--cache sam={address} --cache-dir {tmp_path}/copies --cache-bytes 1MB"
    runs = {"near": "--cache sam={w}/taps.zarr --shuffle window", "far": far}
    for name, flags in runs.items():
        ended = typed(f"{TRAIN.removesuffix('run')}{name} {flags} {TERM}")
        assert ended.code == 0, ended.err
    assert (world / "near/last.safetensors").read_bytes() == (world / "far/last.safetensors").read_bytes()
    shards = [request.key for request in s3.requests if "features/stage2/c/" in request.key]
    assert len(shards) == len(set(shards)) > 0


def test_a_head_of_a_cache_without_data_is_judged_on_stored_labels(typed: Any) -> None:
    ended = typed("build-teacher-cache --like {w}/store.zarr --teacher {w}/teacher --out {w}/again.zarr")
    assert ended.code == 0, ended.err
    assert "the teacher on these labels, read back from the cache: mIoU" in ended.out


@pytest.mark.parametrize(
    ("words", "problem", "fix"),
    [
        (f"{LIKE} --size 64x96 --out {{w}}/new", "--size 64x96 (there 32x48)", "Leave these flags out"),
        (LIKE.replace("store.zarr", "nope.zarr") + " --out {w}/new", "Cache not found: ", "Check the path"),
        (LIKE.replace("store.zarr", "source.zarr") + " --out {w}/new", "source.zarr does not store pixels", "--data"),
        (f"{LIKE} --from {{w}}/store.zarr --out {{w}}/new", "Use either --from", "--like"),
        ("build-teacher-cache --teacher {w}/teacher --out {w}/new", "Missing --data", "--like CACHE"),
        (f"{LIKE} --teacher depth={{w}}/teacher --out {{w}}/new", "HEAD=TEACHER was removed", "--cache NAME=b.zarr"),
        (f"{TRAIN} --cache {{w}}/source.zarr", "Two joined caches have a segmentation head", "--features-only"),
        (f"{TRAIN} --cache store={{w}}/source.zarr", "Two joined caches have the name store", "--cache NAME="),
        (f"{TRAIN} {TERM}", "Unknown cache sam", "--cache sam=CACHE"),
    ],
)
def test_what_is_wrong_is_said_first(world: Path, typed: Any, words: str, problem: str, fix: str) -> None:
    ended = typed(words)
    assert ended.code == 2, ended
    assert problem in ended.err
    assert fix in ended.err
    assert ended.err.index(problem) < ended.err.rindex(fix)
    assert "Traceback" not in ended.err
    assert not any((world / name).exists() for name in ("new", "run"))
