"""A training that prepares a process, so that its forks have everything imported and compiled already."""

import gc
import tempfile
from pathlib import Path

import torch

from kdcache.training import make_config, train


def warm_up() -> None:
    """Train two steps on one thread: forks inherit the modules, and the kernels that numba has loaded."""
    torch.set_num_threads(1)
    scenes = "scenes:32x48,train=2,val=1"
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            verb="train-teacher", model="kdcache:tiny", data=scenes, val=scenes, size="32x48", device="cpu",
            iterations=2, val_every=1, gradients_every=1, batch_size=2, class_weights="none", ema=0.5,
        )  # fmt: skip
        train(config, Path(folder) / "run")
    gc.collect()
    gc.freeze()
