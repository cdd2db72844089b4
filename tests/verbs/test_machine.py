"""Flags of the machine and of judging arrive where they act, in every verb that has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import kdcache
from kdcache.data import open_split
from kdcache.errors import StoreError
from kdcache.metrics import Inference, evaluate_tasks
from kdcache.models.run import load_run

SCENES, SIZE = "scenes:32x48,train=3,val=2", (32, 48)
VALUES = ["targets/segmentation/values"]
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
TRAINING: dict[str, Any] = {"model": "kdcache:tiny", "iterations": 1, "batch_size": 2, "gradients_every": 0}


def build(out: Path, **settings: Any) -> object:
    split = open_split(SCENES, "train")
    torch.manual_seed(5)
    teacher = kdcache.build_model("kdcache:tiny", len(split.classes))
    return kdcache.build_cache(split, teacher, out, views=1, **settings, **QUIET)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a run of one step, and an image."""
    folder = tmp_path_factory.mktemp("machine")
    build(folder / "s.zarr", size=SIZE)
    kdcache.train(folder / "run", cache=folder / "s.zarr", val=SCENES, **TRAINING, **QUIET)
    Image.fromarray(open_split(SCENES, "train").image(0)).save(folder / "image.png")
    return folder


@pytest.fixture
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


THREADED: dict[str, Callable[..., object]] = {
    "build": lambda made, out, **machine: build(out / "s.zarr", size=SIZE, **machine),
    "build from another": lambda made, out, **machine: build(out / "s.zarr", reuse=made / "s.zarr", **machine),
    "train": lambda made, out, **machine: kdcache.train(
        out / "run", cache=made / "s.zarr", **TRAINING, **machine, **QUIET
    ),
    "evaluate": lambda made, out, **machine: kdcache.evaluate(made / "run", SCENES, **machine, **QUIET),
    "compare": lambda made, out, **machine: kdcache.compare([made / "run"], repeats=0, **machine, **QUIET),
    "predict": lambda made, out, **machine: kdcache.predict(
        made / "run", made / "image.png", out / "predicted", **machine, **QUIET
    ),
}


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("verb", THREADED)
def test_threads_arrive(verb: str, made: Path, tmp_path: Path) -> None:
    THREADED[verb](made, tmp_path, threads=3)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(2)


BOUNDED: dict[str, Callable[..., object]] = {
    "verify": lambda cache, out, **copies: kdcache.verify(cache, **copies, **QUIET),
    "audit": lambda cache, out, **copies: kdcache.audit(cache, out=out / "report", progress=False, **copies),
    "export": lambda cache, out, **copies: kdcache.export_pseudo_labels(
        cache, out / "labels", threshold=0.2, progress=False, **copies
    ),
    "open": lambda cache, out, **copies: kdcache.open_cache(cache, **copies).read(0, VALUES),
    "open several": lambda cache, out, **copies: kdcache.open_caches([cache], **copies).read(0, VALUES),
    "train": lambda cache, out, **copies: kdcache.train(out / "run", cache=cache, **TRAINING, **copies, **QUIET),
}


@pytest.mark.parametrize("verb", BOUNDED)
def test_the_bound_on_copies_of_a_remote_cache_arrives(verb: str, made: Path, s3: Any, tmp_path: Path) -> None:
    """A bound below the size of a shard is an error that names it."""
    address = s3.address()
    kdcache.copy(made / "s.zarr", address, progress=False)
    with pytest.raises(StoreError, match=r"does not fit into (--cache-bytes |cache_bytes=)10 in"):
        BOUNDED[verb](address, tmp_path, cache_dir=tmp_path / "copies", cache_bytes=10)


def test_an_evaluation_at_its_own_size_resizes_labels(made: Path) -> None:
    data = "scenes:64x96,train=1,val=2"
    model, _ = load_run(made / "run")
    split = open_split(data, "val")
    expected = [evaluate_tasks(model, split, Inference(SIZE, at_size=at_size)) for at_size in (False, True)]
    found = [kdcache.evaluate(made / "run", data, at_size=at_size, **QUIET) for at_size in (False, True)]
    assert [one.segmentation for one in found] == [one.segmentation for one in expected]
    pixels = [sum(one.segmentation.label_pixels) for one in found if one.segmentation is not None]
    assert pixels[0] > 3 * pixels[1]  # of the labels' 64x96, and of 32x48
