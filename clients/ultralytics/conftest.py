"""Data, teachers and students of the tests with the real package. Its settings and downloads lie in temporary folders.

A teacher is trained by Ultralytics itself, from its own yaml: no weights are downloaded.
"""

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import kdcache
from kdcache.data.scenes.generate import CLASSES, write_scenes
from kdcache.models import trusting

FOLDER = tempfile.TemporaryDirectory(prefix="ultralytics-")
# Before the package is imported, which the tests do.
os.environ |= {"YOLO_CONFIG_DIR": FOLDER.name, "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
torch.set_num_threads(1)


class Distilled(NamedTuple):
    """A data set, a teacher trained on it by Ultralytics, and the cache of that teacher.

    Attributes:
        data: the yaml. teacher: its checkpoint. named: the data set as kdcache takes it.
        size: (H, W) of the images, and of everything that sees them.
    """

    data: Path
    teacher: Path
    cache: Path
    named: str
    size: tuple[int, int]

    def validated(self, checkpoint: Path, **settings: Any) -> Any:
        """Return Ultralytics' own metrics of a checkpoint on the validation images."""
        from ultralytics import YOLO

        machine = {"batch": 4, "workers": 0, "device": "cpu", "plots": False, "project": FOLDER.name}
        return YOLO(checkpoint).val(data=str(self.data), imgsz=max(self.size), **machine, **settings)

    def student(self, out: Path, model: str, method: str, iterations: int, **settings: Any) -> Path:
        """Train a student from the cache into a run folder."""
        settings |= {"batch_size": 4, "threads": 1, "progress": False}
        kdcache.train(out, model=model, cache=str(self.cache), method=method, iterations=iterations, **settings)
        return out


def distilled(folder: Path, plan: str, size: tuple[int, int], spec: str, epochs: int) -> Distilled:
    """Train a teacher for a few steps, and build its cache."""
    from ultralytics import YOLO

    data = write_data(folder / "data", f"scenes:{size[0]}x{size[1]},{spec}")
    teacher = YOLO(f"{plan}.yaml")
    teacher.add_callback("on_pretrain_routine_end", _adapt_fast)
    settings = {"optimizer": "AdamW", "lr0": 2e-3, "warmup_epochs": 1, "nbs": 8, "mosaic": 0.0, "batch": 8, "seed": 0}
    machine = {"device": "cpu", "workers": 0, "plots": False, "val": False, "amp": False}
    teacher.train(data=str(data), epochs=epochs, imgsz=max(size), project=folder, name="teacher", **settings, **machine)
    checkpoint, named = folder / "teacher" / "weights" / "best.pt", f"ultralytics:{data}"
    cache = folder / "cache.zarr"
    with trusting():
        kdcache.build_cache(named, f"ultralytics:{checkpoint}", cache, size=size, views=2, progress=False)
    return Distilled(data, checkpoint, cache, named, size)


def write_data(folder: Path, spec: str) -> Path:
    """Write scenes into Ultralytics' folders, and their yaml."""
    write_scenes(folder, spec)
    lines = [f"path: {folder}", "train: images/train", "val: images/val", "names: [depth]"]
    if "depth=" not in spec:
        (folder / "labels").rename(folder / "masks")
        lines[-1:] = ["masks_dir: masks", "names:", *(f"  {i}: {name}" for i, name in enumerate(CLASSES.names))]
    yaml = folder / "data.yaml"
    yaml.write_text("\n".join(lines) + "\n")
    return yaml


def _adapt_fast(trainer: Any) -> None:
    """Let BatchNorm follow a training of a few steps."""
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.2


@pytest.fixture(scope="session")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    return distilled(tmp_path_factory.mktemp("semantic"), "yolo26s-sem", (96, 128), "train=24,val=8", epochs=6)


@pytest.fixture(scope="session")
def depth(tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    spec = "train=16,val=8,depth=exact,tasks=depth"
    return distilled(tmp_path_factory.mktemp("depth"), "yolo26n-depth", (128, 128), spec, epochs=2)
