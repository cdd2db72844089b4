"""What the tests of comparisons share: runs of a few steps."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from labelled import folder, model, split

__all__ = ["folder", "model", "split"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (a folder) and runs/none-0, runs/none-1, trained on it with two seeds; not to be touched."""
    from kdcache.data import write_scenes
    from kdcache.training import make_config, train

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
    for path in (*copy.glob("runs/*/recipe.toml"), *copy.glob("runs/*/local.json")):
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
