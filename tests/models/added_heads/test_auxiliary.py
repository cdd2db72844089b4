"""Models with an auxiliary head: its spelling, its place, and that training alone knows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import segmentation

from kdcache.errors import ModelError
from kdcache.heads import CategoricalHead
from kdcache.models import build_model, is_function, load_weights
from kdcache.models.added_heads import base_of, split_auxiliary
from kdcache.models.added_heads.auxiliary import AuxiliarySpec
from kdcache.models.run import open_model, split_spec, write_weights
from kdcache.tasks import AUXILIARY

_STAGES = """
from torch import nn

def build(num_classes=5):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, num_classes, 1))
"""


@pytest.mark.parametrize(
    ("spec", "model", "tap"),
    [
        ("kdcache:tiny+aux", "kdcache:tiny", None),
        ("kdcache:tiny+aux,tap=stage2", "kdcache:tiny", "stage2"),
        ("kdcache:tiny+depth,tap=stage2,max=10+aux,tap=stage3", "kdcache:tiny+depth,tap=stage2,max=10", "stage3"),
        ("a+aux,c/m.py:f+aux,tap=x.1", "a+aux,c/m.py:f", "x.1"),
    ],
)
def test_the_spelling(spec: str, model: str, tap: str | None) -> None:
    assert split_auxiliary(spec) == (model, AuxiliarySpec(tap))
    assert base_of(spec) in ("kdcache:tiny", "a+aux,c/m.py:f")
    assert is_function(spec) == spec.startswith("a+aux")


@pytest.mark.parametrize("spec", ["kdcache:tiny", "kdcache:tiny+depth", "a+aux,c/m.py:f", "x+aux/m.py:f"])
def test_a_spec_without_an_auxiliary_head_is_left_as_it_is(spec: str) -> None:
    assert split_auxiliary(spec) == (spec, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kdcache:tiny+aux,tp=head", "'tp=head'\n.*kdcache:tiny.aux,tap=stage3"),
        ("kdcache:tiny+aux,tap=", "'tap='"),
        ("kdcache:tiny+aux,tap=stage2,tap=stage3", "'tap=stage2,tap=stage3'"),
        ("kdcache:tiny+aux,tap=stge3", "Did you mean stage3"),
        ("kdcache:tiny+auxiliary", "For example kdcache:tiny.aux"),
        ("kdcache:tiny+aux+depth", "An auxiliary head of classes is .aux, at the end"),
    ],
)
def test_mistakes_are_named(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"(?s){message}"):
        build_model(spec, 3)


def test_a_model_without_stages_names_its_tap(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(_STAGES)
    spec = f"{tmp_path}/own.py:build"
    with pytest.raises(ModelError, match=r"its taps \(0, 1, 2(?s:.*)aux,tap=NAME"):
        build_model(f"{spec}+aux", 5)
    assert build_model(f"{spec}+aux,tap=1", 5)(torch.randn(2, 3, 8, 8)).heads[AUXILIARY].shape == (2, 5, 4, 4)


@pytest.mark.parametrize(
    ("spec", "grid"),
    [
        ("kdcache:tiny", (4, 6)),
        ("kdcache:hydra", (4, 6)),
        ("kdcache:tiny+depth", (4, 6)),
        ("torchvision:lraspp_mobilenet_v3_large", (4, 6)),
        ("torchvision:fcn_resnet50", (8, 12)),
    ],
)
def test_it_answers_in_training_alone(spec: str, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = build_model(spec, 5)
    torch.manual_seed(0)
    model = build_model(f"{spec}+aux", 5)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.manual_seed(1)
        outputs = model(x, ["stage1"] if "stage1" in model.taps else ["layer1"])
        torch.manual_seed(1)
        alone = plain(x)
    assert list(outputs.heads) == [*plain.head_kinds, AUXILIARY]
    assert outputs.heads[AUXILIARY].shape == (2, 5, *grid)
    assert len(outputs.features) == 1
    assert all(torch.equal(outputs.heads[name], alone.heads[name]) for name in plain.head_kinds)
    assert model.head_kinds == plain.head_kinds
    assert model.training_heads == {AUXILIARY: CategoricalHead(5)}
    assert plain.training_heads == {}
    assert plain.deployed is plain
    model.eval()
    with torch.inference_mode():
        assert list(model(x).heads) == list(plain.head_kinds)
    assert model.deployed.spec == spec
    model.mean = (0.1, 0.2, 0.3)
    assert model.deployed.mean == (0.1, 0.2, 0.3)
    head = [name for name in model.state_dict() if name.startswith("aux_classifier.")]
    assert set(model.state_dict()) == {*model.deployed.state_dict(), *head}
    assert set(model.deployed.state_dict()) == set(plain.state_dict())
    assert head
    again = build_model(f"{spec}+aux", 5)
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))


def test_its_weights_are_no_part_of_a_run_s(tmp_path: Path) -> None:
    model = build_model("kdcache:tiny+aux", 5)
    write_weights(tmp_path, "best", model)
    state = load_file(tmp_path / "best.safetensors")
    assert set(state) == set(build_model("kdcache:tiny", 5).state_dict())
    assert split_spec(f"kdcache:tiny@{tmp_path}/best.safetensors") is not None
    with pytest.raises(ModelError, match="Write kdcache:tiny@"):
        open_model(f"kdcache:tiny+aux@{tmp_path}/best.safetensors", lambda n: None, (32, 48))  # type: ignore[arg-type,return-value]
    report = load_weights(build_model("kdcache:tiny+aux", 5), state, strict_head=False)
    assert all(name.startswith("aux_classifier.") for name in report.reinitialised)
    assert report.reinitialised


def test_published_auxiliary_weights_fit_on_their_tap(tmp_path: Path) -> None:
    """torchvision's names and shapes, at layer3; with other classes the last layer alone is at random."""
    torch.manual_seed(0)
    published = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=6, aux_loss=True)
    save_file(published.state_dict(), tmp_path / "own.safetensors")
    model = build_model("torchvision:fcn_resnet50+aux", 6, weights=tmp_path / "own.safetensors")
    published.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        feature = model.eval()(x, ["layer3"]).features["layer3"]
        torch.testing.assert_close(
            nn.functional.interpolate(model.aux_classifier(feature), (64, 64), mode="bilinear"), published(x)["aux"]
        )
    other = build_model("torchvision:fcn_resnet50+aux", 4, weights=tmp_path / "own.safetensors")
    assert other.load_report is not None
    assert set(other.load_report.reinitialised) == {
        f"{name}.{kind}" for name in ("classifier.4", "aux_classifier.4") for kind in ("weight", "bias")
    }
    elsewhere = build_model("torchvision:fcn_resnet50+aux,tap=layer2", 6, weights=tmp_path / "own.safetensors")
    assert elsewhere.load_report is not None
    assert {name.partition(".")[0] for name in elsewhere.load_report.reinitialised} == {"aux_classifier"}
