"""Foreign networks: module:function and path/to/file.py:function."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcache.errors import ModelError
from kdcache.models import build_model, load_weights

SOURCE = """
import types
import torch
from torch import nn
from kdcache.models import build_model

class Net(nn.Module):
    def __init__(self, num_classes, answer="tensor", stride=4):
        super().__init__()
        self.answer = answer
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Conv2d(6, num_classes, 1)

    def forward(self, x):
        y = self.classifier(self.stem(x))
        if self.answer == "dict":
            return {"out": y, "aux": None}
        if self.answer == "object":
            return types.SimpleNamespace(logits=y)
        if self.answer == "logits":
            return {"logits": y, "aux": None}
        if self.answer == "features first":
            return self.pool(y).flatten(1), y
        nested = {"list": [y, y[:, :2]], "tuple": (y, None), "dict in a tuple": ({"out": y}, y[:, :2]), "nothing": ()}
        return nested.get(self.answer, y)

def build(num_classes): return Net(num_classes)
def build_dict(num_classes): return Net(num_classes, "dict")
def build_object(num_classes): return Net(num_classes, "object")
def build_list(num_classes): return Net(num_classes, "list")
def build_logits(num_classes): return Net(num_classes, "logits")
def build_tuple(num_classes): return Net(num_classes, "tuple")
def build_nested(num_classes): return Net(num_classes, "dict in a tuple")
def features_first(num_classes): return Net(num_classes, "features first")
def nothing(num_classes): return Net(num_classes, "nothing")
def two_arguments(num_classes, width): return Net(num_classes)
def full_size(num_classes): return Net(num_classes, stride=1)
def own_count(num_classes=9): return Net(num_classes)
def fixed(num_classes): return Net(4)
def native(num_classes): return build_model("kdcache:tiny", num_classes)
def native_fixed(num_classes): return build_model("kdcache:tiny", 4)
def no_arguments(): return Net(3)
def no_module(num_classes): return 3
def breaks(num_classes): return nn.Linear(5, num_classes)
number = 3

def attributes(num_classes):
    net = Net(num_classes)
    net.align_corners = True
    net.mean, net.std = torch.tensor([0.1, 0.2, 0.3]), (1, 1, 1)
    return net
"""


FORMS = ["build", "build_dict", "build_logits", "build_object", "build_list", "build_tuple", "build_nested"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with foreign_nets.py that no import path knows of."""
    (tmp_path / "foreign_nets.py").write_text(SOURCE)
    (tmp_path / "broken_nets.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    for name in [n for n in sys.modules if "foreign_nets" in n or "broken_nets" in n]:
        monkeypatch.delitem(sys.modules, name)
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("place", ["foreign_nets", "foreign_nets.py", "./foreign_nets.py", "ABSOLUTE"])
@pytest.mark.parametrize("function", FORMS)
def test_forms_and_answers(here: Path, place: str, function: str) -> None:
    path = list(sys.path)
    place = place.replace("ABSOLUTE", str(here / "foreign_nets.py"))
    model = build_model(f"{place}:{function}", 5)
    assert sys.path == path
    heads, features = model(torch.zeros(2, 3, 40, 48))
    logits = heads["segmentation"]
    assert logits.shape == (2, 5, 10, 12)
    assert features == {}
    assert (model.stride, model.num_classes, model.align_corners) == (4, 5, False)


def test_attributes_are_honoured(here: Path) -> None:
    model = build_model("foreign_nets:attributes", 5)
    assert model.align_corners
    assert model.mean == pytest.approx((0.1, 0.2, 0.3))
    assert model.std == (1.0, 1.0, 1.0)
    assert build_model("foreign_nets:attributes", 5, mean=(0, 0, 0)).mean == (0.0, 0.0, 0.0)


def test_full_size_logits_have_stride_1(here: Path) -> None:
    assert build_model("foreign_nets:full_size", 2).stride == 1


def test_a_segmentation_model_is_used_as_it_is(here: Path) -> None:
    model = build_model("foreign_nets:native", 3)
    assert model.taps == ("stage1", "stage2", "stage3", "stage4", "head")
    assert model.spec == "foreign_nets:native"


def test_without_num_classes(here: Path) -> None:
    assert build_model("foreign_nets:own_count", None).num_classes == 9
    with pytest.raises(ModelError, match="no num_classes is known"):
        build_model("foreign_nets:build", None)


def test_probe_leaves_no_trace(here: Path) -> None:
    model = build_model("foreign_nets:build", 5)
    assert all(module.training for module in model.modules())
    assert model.state_dict()["stem.1.num_batches_tracked"] == 0


def test_taps_are_those_of_a_trained_network(here: Path) -> None:
    """What runs while training alone, such as an auxiliary head, is nothing to tap, and drops nothing at random."""
    (here / "foreign_nets.py").write_text(
        SOURCE.replace(
            "        y = self.classifier(self.stem(x))",
            "        y = self.classifier(nn.functional.dropout(self.stem(x), 0.5, self.training))\n"
            "        if self.training: self.auxiliary(y)",
        ).replace("        self.pool =", "        self.auxiliary = nn.Conv2d(num_classes, 2, 1)\n        self.pool =")
    )
    network = build_model("foreign_nets:build", 5)
    assert network.taps == ("stem", "classifier")
    assert network.state_dict()["stem.1.num_batches_tracked"] == 0
    assert network.get_submodule("network.auxiliary").training


def test_taps_are_module_names_and_hooks_go_away(here: Path) -> None:
    model = build_model("foreign_nets:build", 5).eval()
    assert model.taps == ("stem", "classifier")
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        heads, features = model(x, ["stem.1", "stem", "classifier"])
        logits = heads["segmentation"]
        network = model.get_submodule("network")
        norm = network.get_submodule("stem.1")(network.get_submodule("stem.0")(x))
    assert torch.equal(features["stem.1"], norm)  # not what the in-place ReLU made of it
    assert torch.equal(features["stem"], norm.relu())
    assert torch.equal(features["classifier"], logits)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ModelError, match="'pool' of foreign_nets:build"):
        model(x, ["pool"])
    with pytest.raises(ModelError, match="stem"):
        model(x, ["stm"])
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 4, 16, 16), ["stem"])
    assert not any(module._forward_hooks for module in model.modules())


def test_state_dict_keeps_the_networks_names(here: Path) -> None:
    model, other = build_model("foreign_nets:build", 5), build_model("foreign_nets:build", 5)
    assert set(model.state_dict()) == set(model.get_submodule("network").state_dict())
    wrapped = nn.ModuleDict({"module": other})
    assert "module.stem.0.weight" in wrapped.state_dict()
    wrapped.load_state_dict({f"module.{k}": v for k, v in model.state_dict().items()})
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    report = load_weights(build_model("foreign_nets:build", 7), model.state_dict(), strict_head=False)
    assert report.reinitialised == ("classifier.weight", "classifier.bias")
    with pytest.raises(ModelError, match="weights have 5 classes, and the data or their class map 7"):
        load_weights(build_model("foreign_nets:build", 7), model.state_dict(), strict_head=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("not_a_module_at_all:build", "ModuleNotFoundError"),
        ("broken_nets:build", "a_module_that_is_not_there"),
        ("absent.py:build", "File not found"),
        ("foreign_nets:absent", "absent is no such name"),
        ("foreign_nets:number", "number is of type int"),
        ("foreign_nets:no_arguments", "3 channels for 5 classes"),
        ("foreign_nets:no_module", r"no torch\.nn\.Module"),
        ("foreign_nets:fixed", "4 channels for 5 classes"),
        ("foreign_nets:native_fixed", "4 classes instead of 5"),
        ("foreign_nets:two_arguments", "num_classes=5"),
        ("foreign_nets:features_first", r"features_first returned Tensor of shape \(1, 5\)"),
        ("foreign_nets:nothing", "nothing returned tuple"),
        ("foreign_nets:breaks", "RuntimeError"),
    ],
)
def test_mistakes_are_named(here: Path, spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(spec, 5)


def test_default_weights_are_no_foreign_thing(here: Path) -> None:
    with pytest.raises(ModelError, match="your own function"):
        build_model("foreign_nets:build", 5, weights="default")
