"""Small labelled folders with images of different sizes, and a model that tells classes apart."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.data import Split, open_split
from kdcache.models import SegmentationModel, build_model

SIZES = ((40, 60), (32, 48), (51, 37), (64, 64), (33, 90))
CLASSES = ("road", "car", "sky", "tree", "never")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five labelled images of five sizes and one without a label; the class `never` does not occur."""
    root = tmp_path_factory.mktemp("data")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    rng = np.random.default_rng(2)
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    for number, size in enumerate((*SIZES, (30, 30))):
        coarse = rng.integers(0, 4, (4, 5), dtype=np.uint8)
        rows, columns = (np.arange(side) * cells // side for side, cells in zip(size, (4, 5), strict=True))
        label = coarse[rows][:, columns]
        image = np.clip(label[..., None] * 60 + rng.integers(0, 50, (*size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / "val" / f"{number}.png")
        label[rng.random(size) < 0.1] = 255
        if number < len(SIZES):
            Image.fromarray(label).save(root / "labels" / "val" / f"{number}.png")
    return root


@pytest.fixture
def split(folder: Path) -> Split:
    return open_split(str(folder), "val")


@pytest.fixture
def model() -> SegmentationModel:
    """Random, with scores far enough apart that rounding turns no pixel."""
    torch.manual_seed(4)
    model = build_model("kdcache:tiny", len(CLASSES))
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    return model


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (a folder) and runs/none-0, runs/none-1, trained on it with two seeds; not to be touched."""
    from kdcache.data import write_scenes
    from kdcache.train import make_config, train

    root = tmp_path_factory.mktemp("trained")
    write_scenes(root / "data", "scenes:48x64,train=12,val=6")
    for seed in (0, 1):
        settings = {"model": "kdcache:tiny", "size": (48, 64), "iterations": 30, "batch_size": 4, "lr": 4e-3}
        config = make_config(
            verb="train-teacher",
            data=str(root / "data"),
            val=str(root / "data"),
            seed=seed,
            val_every=10,
            log_every=10,
            threads=1,
            device="cpu",
            **settings,
        )
        deterministic = torch.are_deterministic_algorithms_enabled()
        train(config, root / "runs" / f"none-{seed}")
        torch.use_deterministic_algorithms(deterministic)
    return root


@pytest.fixture
def world(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed; its recipes name its own data."""
    copy = Path(shutil.copytree(trained, tmp_path / "world"))
    for path in copy.glob("runs/*/recipe.toml"):
        path.write_text(path.read_text().replace(str(trained), str(copy)))
    return copy


@pytest.fixture
def derive(world: Path) -> Callable[..., Path]:
    """derive("kl-0", of="none-0", method="kl", noise=0.1): a further run, with other settings and weights."""

    def make(name: str, of: str = "none-0", noise: float = 0.0, **settings: object) -> Path:
        import tomli_w
        from safetensors.torch import load_file, save_file

        run = Path(shutil.copytree(world / "runs" / of, world / "runs" / name))
        (run / "evaluation-val.json").unlink(missing_ok=True)
        recipe = tomllib.loads((run / "recipe.toml").read_text())
        recipe |= {key.replace("_", "-"): value for key, value in settings.items()}
        (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
        if noise:
            torch.manual_seed(len(name))
            weights = load_file(run / "best.safetensors")
            weights["classifier.weight"] += noise * torch.randn_like(weights["classifier.weight"])
            save_file(weights, run / "best.safetensors")
        return run

    return make
