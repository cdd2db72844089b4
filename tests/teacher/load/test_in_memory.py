"""Teachers that the program holds: as any other, known by their weights and their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.data import open_split
from kdcache.errors import MismatchError, ModelError
from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.teacher import BuildOptions, build_cache, load_teacher
from kdcache.teacher.load.fingerprint import fingerprint

SPLIT = open_split("scenes:32x48,train=3,val=1,depth=exact", "train")
CPU = torch.device("cpu")


class Net(nn.Module):
    """Logits at a quarter of the size, as a mapping of two heads where it is asked for."""

    def __init__(self, classes: int = 7, *, two: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Conv2d(3, classes, 4, 4)
        self.far = nn.Conv2d(3, 1, 4, 4) if two else None
        self.bias = 0.0

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x) + self.bias
        return logits if self.far is None else {"segmentation": logits, "depth": self.far(x)}


def build(teacher: Any, out: Path) -> None:
    build_cache(SPLIT, teacher, out, BuildOptions(size=(32, 48), views=1, batch_size=2, view_scale=(1.0, 1.0)))


def test_a_module_teaches_what_it_says(tmp_path: Path) -> None:
    module = Net().train()
    teacher = load_teacher(module, SPLIT, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert not module.training
    assert teacher.notes == ()
    assert repr(teacher) == "<Teacher memory:Net: network WrappedModel, parameters 343>"
    assert "<th>parameters</th><td>343</td>" in teacher._repr_html_()
    build(teacher, tmp_path / "s.zarr")
    cache = open_cache(tmp_path / "s.zarr")
    assert cache.manifest.teacher.spec == "memory:Net"
    assert cache.manifest.teacher.mean == (0.5, 0.5, 0.5)
    with torch.inference_mode():
        x = (torch.from_numpy(SPLIT.image(1)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25
        expected = module(x)[0]
    stored = cache.read(1, ["targets/segmentation/values"])["targets/segmentation/values"]
    assert np.allclose(stored, (expected - expected.amax(0)).numpy(), rtol=2**-10, atol=1e-5)


def test_it_is_known_by_weights_and_by_answers(tmp_path: Path) -> None:
    one = fingerprint(load_teacher(Net(), SPLIT), "float32", CPU)
    assert fingerprint(load_teacher(Net(), SPLIT), "float32", CPU) == one
    other = Net()
    with torch.no_grad():
        other.body.weight[0, 0, 0, 0] += 1e-3
    assert fingerprint(load_teacher(other, SPLIT), "float32", CPU).weights != one.weights
    shifted = Net()  # code that changed under equal weights
    shifted.bias = 0.5
    changed = fingerprint(load_teacher(shifted, SPLIT), "float32", CPU)
    assert changed.weights == one.weights
    assert changed.probe != one.probe
    build(load_teacher(Net(), SPLIT), tmp_path / "s.zarr")
    build(load_teacher(Net(), SPLIT), tmp_path / "s.zarr")  # a finished store of the same teacher is left as it is
    with pytest.raises(MismatchError):
        build(load_teacher(other, SPLIT), tmp_path / "s.zarr")


def test_two_heads_by_their_kinds(tmp_path: Path) -> None:
    heads = {
        "segmentation": "categorical",
        "depth": {"kind": "regression", "parameterisation": "exp", "max_depth": 80.0},
    }
    teacher = load_teacher(Net(two=True), SPLIT, heads=heads)
    assert tuple(teacher.model.head_kinds) == ("segmentation", "depth")
    build(teacher, tmp_path / "s.zarr")
    assert set(open_cache(tmp_path / "s.zarr").manifest.heads) == {"segmentation", "depth"}
    with pytest.raises(ModelError, match="holds no logits"):
        load_teacher(Net(two=True), SPLIT)
    with pytest.raises(ModelError, match="no tensor 'normals'"):
        load_teacher(Net(two=True), SPLIT, heads={**heads, "normals": "categorical"})


def test_a_model_of_ours_and_class_names_alone() -> None:
    model = build_model("kdcache:tiny", 2)
    teacher = load_teacher(model, ["a", "b"], align_corners=True)
    assert teacher.model is model
    assert teacher.model.align_corners


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Net(5), {}, "has 5 classes, but the data set has 7"),
        (nn.Linear(3, 7), {}, "Cannot run memory:Linear on an image"),
        (nn.Flatten(), {}, "holds no logits"),
        ("runs/none", {"heads": {"segmentation": "categorical"}}, "Cannot use heads or align_corners with runs/none"),
    ],
)
def test_what_cannot_teach_is_refused(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_teacher(module, SPLIT, **options)
    assert message in str(caught.value)


def test_probabilities_are_refused_by_the_build(tmp_path: Path) -> None:
    teacher = load_teacher(nn.Sequential(Net(), nn.Softmax(1)), SPLIT)
    with pytest.raises(ModelError, match="what comes before the softmax"):
        build(teacher, tmp_path / "s.zarr")
