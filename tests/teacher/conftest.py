"""Teachers that take a millisecond, on pictures of 32 x 48."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdcache.data import ClassList, Split, open_split, write_scenes
from kdcache.models import SegmentationModel, build_model
from kdcache.models.run import write_run_model, write_weights
from kdcache.run_folder import RunModel
from kdcache.teacher import BuildOptions, Teacher, load_teacher

SIZE = (32, 48)
SCENES = "scenes:36x52,train=7,val=2,unlabelled=3"


def make_model(classes: int, seed: int = 0) -> SegmentationModel:
    """`kdcache:tiny` whose answers differ from class to class, as a trained one's."""
    torch.manual_seed(seed)
    model = build_model("kdcache:tiny", classes)
    with torch.no_grad():
        for parameter in model.get_submodule("classifier").parameters():
            parameter.normal_(std=0.7)
    return model.eval()


@pytest.fixture(scope="session")
def split() -> Split:
    return open_split(SCENES, "train")


@pytest.fixture(scope="session")
def classes(split: Split) -> ClassList:
    return split.classes


@pytest.fixture(scope="session")
def model_of() -> Callable[..., SegmentationModel]:
    """model_of(classes, seed=0)."""
    return make_model


@pytest.fixture
def weights(tmp_path: Path, classes: ClassList) -> Path:
    """A weights file of the data's number of classes."""
    path = tmp_path / "w.safetensors"
    save_file(dict(make_model(len(classes)).state_dict()), path)
    return path


@pytest.fixture
def teacher(weights: Path, classes: ClassList) -> Teacher:
    return load_teacher(f"kdcache:tiny@{weights}", classes)


@pytest.fixture
def run_folder(tmp_path: Path, classes: ClassList) -> Path:
    """What train-teacher leaves behind, as far as a teacher is concerned."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = make_model(len(classes))
    about = RunModel(
        spec="kdcache:tiny",
        class_names=classes.names,
        class_colours=classes.colours,
        size=SIZE,
        mean=(0.4, 0.5, 0.6),
        std=(0.3, 0.3, 0.3),
    )
    write_run_model(folder, about)
    write_weights(folder, "best", model)
    return folder


@pytest.fixture
def folder_data(tmp_path: Path) -> Path:
    """The scenes as a data folder."""
    return write_scenes(tmp_path / "data", SCENES)


@pytest.fixture(scope="session")
def options() -> Callable[..., BuildOptions]:
    """Options of a small build; shards of 3, so that 7 records make 3 shards and the last is short.

    Nothing is measured unless a test asks for it: `test_fidelity.py` does.
    """

    def make(**changes: object) -> BuildOptions:
        settings = {
            "size": SIZE,
            "views": 1,
            "batch_size": 2,
            "shard_records": 3,
            "render_threads": 1,
            "fidelity": False,
        }
        settings |= changes
        return BuildOptions(**settings)

    return make
