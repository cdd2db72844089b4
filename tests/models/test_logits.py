"""Outputs that are no logits, and one logit of two classes, as logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.models import AsLogits, WrappedModel, build_model, state_digest
from kdcache.models.export import export_model
from kdcache.models.logits import as_logits
from kdcache.models.run import open_model
from kdcache.run_folder import Run, split_outputs

CODE = """
from torch import nn
class Net(nn.Module):
    def __init__(self, channels, end):
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, channels, 4, stride=4), end
    def forward(self, x):
        return getattr(self.conv(x), self.end)(1) if self.end == "softmax" else getattr(self.conv(x), self.end)()
def plain(num_classes=1): return Net(num_classes, "clone")
def one(num_classes=1): return Net(1, "clone")
def softmax(num_classes=3): return Net(num_classes, "softmax")
def sigmoid(num_classes=3): return Net(num_classes, "sigmoid")
"""
X = torch.linspace(-2, 2, 2 * 3 * 16 * 24).view(2, 3, 16, 24)


class Classes:
    def __init__(self, *names: str) -> None:
        self.names, self.colours = names, ((0, 0, 0),) * len(names)


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(CODE)
    return f"{tmp_path}/nets.py"


@pytest.fixture
def weights_of(tmp_path: Path) -> Callable[[int], Path]:
    def make(channels: int) -> Path:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, channels, 4, stride=4)
        torch.save({f"conv.{name}": value for name, value in conv.state_dict().items()}, tmp_path / f"w{channels}.pth")
        return tmp_path / f"w{channels}.pth"

    return make


def wrapped(end: Callable[[Tensor], Tensor], channels: int = 3) -> WrappedModel:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return end(x[:, :channels, ::4, ::4])

    return WrappedModel("own:net", Net(), channels)


@pytest.mark.parametrize(("kind", "end"), [("probabilities", lambda x: x.softmax(1)), ("sigmoid", torch.sigmoid)])
def test_the_logits_before_come_back(kind: str, end: Callable[[Tensor], Tensor]) -> None:
    """Up to a constant of each pixel after a softmax; in float32 also from float16."""
    logits = as_logits(wrapped(end), kind)(X).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.softmax(1), X[..., ::4, ::4].softmax(1), rtol=1e-4, atol=1e-6)
    if kind == "sigmoid":
        torch.testing.assert_close(logits, X[..., ::4, ::4], rtol=1e-4, atol=1e-5)
    half = as_logits(wrapped(lambda x: end(x).half()), kind)(X).logits
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.softmax(1), X[..., ::4, ::4].softmax(1), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("kind", ["probabilities", "sigmoid"])
def test_certainty_stays_finite(kind: str) -> None:
    logits = as_logits(wrapped(lambda x: (x == x.amax(1, keepdim=True)).float()), kind)(X).logits
    assert logits.isfinite().all()
    assert logits.softmax(1).amax(1).min() > 0.999


@pytest.mark.parametrize("kind", ["probabilities", "sigmoid", None])
def test_one_logit_of_two_classes(kind: str | None) -> None:
    """(0, z): the sigmoid of z is the softmax's second probability, also where a network gives it itself."""
    network = wrapped(torch.sigmoid if kind else lambda x: x, 1)
    model = as_logits(network, kind, 2)
    logits = model(X).logits
    assert (model.num_classes, model.head_kinds["segmentation"].classes) == (2, 2)
    assert (logits[:, 0] == 0).all()
    torch.testing.assert_close(logits.softmax(1)[:, 1], X[:, 0, ::4, ::4].sigmoid())
    assert as_logits(network, None, 3) is network
    assert as_logits(wrapped(lambda x: x, 2), None, 2).num_classes == 2


@pytest.mark.parametrize("function", ["plain", "one"])
def test_weights_of_one_logit_fit_a_function(code: str, weights_of: Callable[[int], Path], function: str) -> None:
    """Whether the function makes as many channels as it is asked for, or one."""
    model = build_model(f"{code}:{function}", 2, weights=weights_of(1), strict_head=True)
    assert isinstance(model, AsLogits)
    assert (model.num_classes, model.spec, model.stride) == (2, f"{code}:{function}", 4)
    assert set(model.state_dict()) == {"conv.weight", "conv.bias"}
    two = build_model(f"{code}:plain", 2, weights=weights_of(2), strict_head=True)
    assert not isinstance(two, AsLogits)
    with pytest.raises(ModelError, match="3 classes"):
        build_model(f"{code}:plain", 2, weights=weights_of(3), strict_head=True)
    with pytest.raises(ModelError, match="1 channels for 3 classes"):
        build_model(f"{code}:one", 3, weights=weights_of(1), strict_head=True)


@pytest.mark.parametrize("spec", ["kdcache:tiny", "smp:unet-resnet18", "smp:fpn-resnet50", "segformer:b0"])
def test_weights_of_one_logit_fit_a_listed_model(tmp_path: Path, spec: str) -> None:
    """At its native stride, with its own resize; exported and opened again it is the same model."""
    torch.manual_seed(0)
    own = build_model(spec, 1).eval()
    torch.save(own.state_dict(), tmp_path / "w.pth")
    text = f"{spec}@{tmp_path}/w.pth"
    model, description = open_model(text, Classes("background", "lesion"), (64, 64))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = model(x).logits
        assert torch.equal(logits[:, 1:], own(x).logits)
    assert (model.stride, model.align_corners, model.taps) == (own.stride, own.align_corners, own.taps)
    assert logits.shape[-1] == -(-64 // own.stride)
    exported = export_model(model, description, tmp_path / "e.safetensors")
    assert exported.relative == 0
    assert set(load_file(tmp_path / "e.safetensors")) == set(own.state_dict())
    again, same = open_model(f"{spec}@{tmp_path}/e.safetensors", Classes("background", "lesion"))
    assert (state_digest(again), same.class_names) == (state_digest(model), ("background", "lesion"))
    unnamed = open_model(text, lambda count: Classes(*(f"class {n}" for n in range(count))), (64, 64))[1]
    assert unnamed.class_names == ("class 0", "class 1")


def test_a_spec_says_what_its_outputs_are(code: str, weights_of: Callable[[int], Path]) -> None:
    """Before the weights or after them; the name of the model has it, for a store to know its teacher by."""
    weights = weights_of(3)
    plain = build_model(f"{code}:plain", 3, weights=weights, strict_head=True).eval()
    for text in (f"{code}:softmax,outputs=probabilities@{weights}", f"{code}:softmax@{weights},outputs=probabilities"):
        model, description = open_model(text, Classes("a", "b", "c"), (16, 24))
        assert model.spec == description.spec == f"{code}:softmax,outputs=probabilities"
        torch.testing.assert_close(model(X).logits.softmax(1), plain(X).logits.softmax(1))
    with pytest.raises(
        ModelError, match=r"Unknown outputs 'softmax'[\s\S]*For a softmax write .*outputs=probabilities"
    ):
        open_model(f"{code}:softmax@{weights},outputs=softmax", Classes("a", "b", "c"), (16, 24))
    depth = build_model(f"{code}:sigmoid+depth,max=9,outputs=sigmoid", 3)
    assert (depth.spec, set(depth.head_kinds)) == (
        f"{code}:sigmoid+depth,max=9,outputs=sigmoid", {"segmentation", "depth"},
    )  # fmt: skip


def test_outputs_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "run,outputs=odd").mkdir()
    assert split_outputs(f"{tmp_path}/run,outputs=odd") == (f"{tmp_path}/run,outputs=odd", None)
    assert split_outputs("runs/a@last,outputs=sigmoid") == ("runs/a@last", "sigmoid")
    assert str(Run(tmp_path, "last", "sigmoid")) == f"{tmp_path}@last,outputs=sigmoid"


def test_outputs_need_classes() -> None:
    network = nn.Conv2d(3, 1, 1)
    model = WrappedModel("own:net", network, None, {})
    with pytest.raises(ModelError, match=r"Cannot use outputs=sigmoid[\s\S]*Leave out"):
        as_logits(model, "sigmoid")
