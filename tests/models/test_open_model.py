"""A trained model from wherever it is: run folders, SPEC@FILE, SPEC@default; names, sizes, classes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kdcache.errors import MismatchError, ModelError, RecipeError
from kdcache.models import ClassMapped, build_model, state_digest
from kdcache.models.run import open_model, split_spec, write_run_model, write_weights
from kdcache.run_folder import Run, RunModel

NAMES, COLOURS = ("road", "car", "sky"), ((1, 2, 3), (40, 50, 60), (7, 8, 9))
DATA = SimpleNamespace(names=NAMES, colours=COLOURS)


def numbered(count: int) -> SimpleNamespace:
    return SimpleNamespace(names=tuple(f"class {i}" for i in range(count)), colours=((0, 0, 0),) * count)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three classes whose `last` is not its `best`."""
    folder = tmp_path / "run@home"
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", 3, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    write_run_model(
        folder,
        RunModel(
            spec=model.spec, class_names=NAMES, class_colours=COLOURS, size=(32, 48), mean=model.mean, std=model.std,
            trained_on="data x",
        ),
    )  # fmt: skip
    write_weights(folder, "best", model)
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(1)
    write_weights(folder, "last", model)
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_file(build_model("kdcache:tiny", 3).state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("segformer:b2@/a/b.safetensors", ("segformer:b2", "/a/b.safetensors")),
        ("torchvision:fcn_resnet50@default", ("torchvision:fcn_resnet50", "default")),
        ("my_models:build@a@b.pth", ("my_models:build", "a@b.pth")),
        ("/x@y/models.py:build@w.pth", ("/x@y/models.py:build", "w.pth")),
        ("runs/student", None),
    ],
)
def test_split_spec(text: str, parts: tuple[str, str] | None) -> None:
    assert split_spec(text) == parts


def test_a_spec_alone_is_no_trained_model() -> None:
    with pytest.raises(ModelError, match=r"Missing weights[\s\S]*kdcache:tiny@FILE"):
        split_spec("kdcache:tiny")


def test_a_run(run: Path) -> None:
    best, description = open_model(str(run), DATA)
    assert not best.training
    assert (description.class_names, description.size, description.trained_on) == (NAMES, (32, 48), "data x")
    assert best.mean == description.mean == (0.4, 0.5, 0.6)
    last, other = open_model(str(run), numbered, (64, 64), "last")
    assert state_digest(last) != state_digest(best)
    assert (other.size, other.class_names) == ((64, 64), NAMES)
    with pytest.raises(MismatchError, match="Cannot use the model on there: its classes"):
        open_model(str(run), numbered(3))[1].check_classes(("a", "b", "c"), "there")


def test_a_file_with_the_classes_of_the_data(weights: Path) -> None:
    model, description = open_model(f"kdcache:tiny@{weights}", DATA, (32, 48))
    assert not model.training
    assert description == RunModel(
        spec="kdcache:tiny", class_names=NAMES, class_colours=COLOURS, size=(32, 48), mean=model.mean, std=model.std
    )
    again, unnamed = open_model(f"kdcache:tiny@{weights}", numbered, (32, 48))
    assert unnamed.class_names == ("class 0", "class 1", "class 2")
    assert state_digest(again) == state_digest(model)


def test_what_does_not_fit_is_refused(weights: Path, tmp_path: Path) -> None:
    spec = f"kdcache:tiny@{weights}"
    with pytest.raises(RecipeError, match=r"Missing the size[\s\S]*--size 288x384"):
        open_model(spec, DATA)
    with pytest.raises(ModelError, match=r"weights have 3 classes, and the data[\s\S]*--class-map"):
        open_model(spec, numbered(5), (32, 48))
    with pytest.raises(ModelError, match="Weights not found"):
        open_model("kdcache:tiny@nowhere.safetensors", DATA, (32, 48))
    headless = {k: v for k, v in build_model("kdcache:tiny", 3).state_dict().items() if k.startswith("encoder.")}
    save_file(headless, tmp_path / "encoder.safetensors")
    with pytest.raises(ModelError, match="missing: context"):
        open_model(f"kdcache:tiny@{tmp_path}/encoder.safetensors", DATA, (32, 48))
    with pytest.raises(RecipeError, match=r"Run not found: .*none"):
        open_model(str(tmp_path / "none"), DATA)


def test_a_class_map(weights: Path, tmp_path: Path) -> None:
    table = tmp_path / "map.txt"
    table.write_text("0 ground\n1 void\n2 up\n")
    model, description = open_model(
        f"kdcache:tiny@{weights}",
        SimpleNamespace(names=("up", "ground"), colours=COLOURS[:2]),
        (32, 48),
        class_map=table,
    )
    assert isinstance(model, ClassMapped)
    assert not model.training
    assert (model.num_classes, description.class_names) == (2, ("up", "ground"))
    plain = build_model("kdcache:tiny", None, weights=weights).eval()
    x = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        assert torch.allclose(model(x).logits, plain(x).logits[:, [2, 0]])


def test_an_exported_file_says_what_it_is(run: Path, tmp_path: Path) -> None:
    from kdcache.models.export import export_model

    model, description = open_model(str(run), DATA)
    export_model(model, description, tmp_path / "e.safetensors")
    again, exported = open_model(f"kdcache:tiny@{tmp_path}/e.safetensors", numbered)
    assert exported == description.model_copy(update={"trained_on": ""})
    assert again.mean == (0.4, 0.5, 0.6)
    assert build_model("kdcache:tiny", 3, weights=tmp_path / "e.safetensors").std == (0.1, 0.2, 0.3)
    assert build_model("kdcache:tiny", 3, weights=tmp_path / "e.safetensors", std=(1, 1, 1)).std == (1, 1, 1)
    with pytest.raises(MismatchError, match="road, car, sky"):
        open_model(f"kdcache:tiny@{tmp_path}/e.safetensors", numbered(3))[1].check_classes(("x", "y", "z"), "data")
    with pytest.raises(ModelError, match=r"that file is of kdcache:tiny[\s\S]*Give kdcache:tiny@"):
        open_model(f"kdcache:base@{tmp_path}/e.safetensors", DATA)
    broken = {**description.metadata(), "size": json.dumps([0.5])}
    save_file(model.state_dict(), tmp_path / "broken.safetensors", broken)
    with pytest.raises(ModelError, match=r"broken\.safetensors[\s\S]*Export it again"):
        open_model(f"kdcache:tiny@{tmp_path}/broken.safetensors", DATA)


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", "", "b"], ["a", " ", "b"]])
def test_repeated_and_empty_class_names_of_a_run_are_refused(run: Path, names: list[str]) -> None:
    description = json.loads((run / "model.json").read_bytes()) | {"class_names": names}
    (run / "model.json").write_text(json.dumps(description))
    with pytest.raises(RecipeError, match=r"Damaged model\.json") as caught:
        Run.open(run)
    assert "class name" in caught.value.problem
    assert "Restore it from a copy" in caught.value.fix
