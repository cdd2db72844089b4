"""Networks that give probabilities, or something else, are distinguished from those that give logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdcache.models import (
    AsLogits,
    ClassMapped,
    EnsembleModel,
    NotLogits,
    SegmentationModel,
    WrappedModel,
    build_model,
    not_logits,
)

C = 5


class Net(nn.Module):
    """A network with something at its end."""

    def __init__(self, end: Callable[[Tensor], Tensor], classes: int = C) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(3, classes, 3, 4, 1), nn.BatchNorm2d(classes), nn.Dropout(0.5))
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x))


def model(end: Callable[[Tensor], Tensor], classes: int = C) -> WrappedModel:
    return WrappedModel("own:net", Net(end, classes), classes)


def upsampled(y: Tensor) -> Tensor:
    return nn.functional.interpolate(y.softmax(1), scale_factor=2, mode="bilinear")


PROBABILITIES = {
    "softmax": lambda y: y.softmax(1),
    "sharp": lambda y: (40 * y).softmax(1),
    "in half precision": lambda y: y.softmax(1).half(),
    "after a resize": upsampled,
}
SIGMOIDS = {
    "each by itself": lambda y: y.sigmoid(),
    "in half precision": lambda y: y.sigmoid().half(),
    "of pixels that sum to 1 in some images alone": lambda y: torch.cat([y[:1].sigmoid(), y[1:].softmax(1)]),
    "clamped": lambda y: y.clamp(0, 1),
}
DOUBTFUL = {
    "never below 0": lambda y: y.relu(),
    "percent": lambda y: 100 * y.softmax(1),
    "class numbers": lambda y: y.argmax(1, keepdim=True).float().expand_as(y),
}
LOGITS = {
    "logits": lambda y: y,
    "log-probabilities": lambda y: y.log_softmax(1),
    "sums of 1": lambda y: y - y.mean(1, keepdim=True) + 1 / C,
    "but for some pixels": lambda y: y.softmax(1) - 0.1 * (y[:, :1] > y[:, :1].median()),
    "not begun": lambda y: 0 * y,
    "not finite": lambda y: y.sigmoid() * torch.nan,
}


def found(network: SegmentationModel) -> NotLogits:
    finding = not_logits(network)
    assert finding is not None
    return finding


@pytest.mark.parametrize("end", PROBABILITIES.values(), ids=PROBABILITIES)
def test_probabilities_are_seen(end: Callable[[Tensor], Tensor]) -> None:
    finding = found(model(end))
    assert finding.certain
    assert "sum to 1" in finding.text
    assert "outputs=probabilities" in finding.fix


@pytest.mark.parametrize("end", SIGMOIDS.values(), ids=SIGMOIDS)
def test_sigmoids_are_seen(end: Callable[[Tensor], Tensor]) -> None:
    finding = found(model(end))
    assert finding.certain
    assert "as after a sigmoid" in finding.text
    assert "outputs=sigmoid" in finding.fix


@pytest.mark.parametrize("end", DOUBTFUL.values(), ids=DOUBTFUL)
def test_numbers_of_which_none_is_negative_are_doubted(end: Callable[[Tensor], Tensor]) -> None:
    finding = found(model(end))
    assert not finding.certain
    assert "none below 0" in finding.text


@pytest.mark.parametrize("end", LOGITS.values(), ids=LOGITS)
def test_logits_are_left_alone(end: Callable[[Tensor], Tensor]) -> None:
    assert not_logits(model(end)) is None


def test_one_class_has_nothing_to_share() -> None:
    assert not_logits(model(lambda y: y.softmax(1), 1)) is None


def test_one_logit_of_two_classes_is_looked_at() -> None:
    """Beside the other logit, 0, a probability has no sum to be known by."""
    one = model(lambda y: y.sigmoid(), 1)
    assert "outputs=sigmoid" in found(AsLogits("own:net", one, two=True)).fix
    assert not_logits(AsLogits("own:net", model(lambda y: y, 1), two=True)) is None
    for outputs in ("sigmoid", "probabilities"):
        assert not_logits(AsLogits("own:net", one, outputs, two=True)) is None


def test_what_outputs_are_said_to_be_is_compared() -> None:
    softmax, sigmoid, plain = (model(end) for end in (lambda y: y.softmax(1), lambda y: y.sigmoid(), lambda y: y))
    assert not_logits(AsLogits("own:net", softmax, "probabilities")) is None
    assert not_logits(AsLogits("own:net", sigmoid, "sigmoid")) is None
    assert not_logits(AsLogits("own:net", softmax, "logits")) is None
    for kind in ("probabilities", "sigmoid"):
        finding = found(AsLogits("own:net", plain, kind))
        assert finding.certain
        assert f"leave out ,outputs={kind}" in finding.fix
        assert found(AsLogits("kdcache:tiny", build_model("kdcache:tiny", C), kind)).certain  # listed ones, too
    for network, kind, other in ((softmax, "sigmoid", "probabilities"), (sigmoid, "probabilities", "sigmoid")):
        finding = found(AsLogits("own:net", network, kind))
        assert not finding.certain
        assert f"outputs={other}" in finding.fix


def test_listed_models_give_logits() -> None:
    assert not_logits(build_model("kdcache:tiny", C)) is None
    assert not_logits(build_model("torchvision:lraspp_mobilenet_v3_large", C)) is None


@pytest.mark.parametrize("place", [0, 1])
def test_members_and_mapped_teachers_are_looked_at_themselves(place: int) -> None:
    members = [model(LOGITS["logits"]), model(LOGITS["logits"])]
    assert not_logits(EnsembleModel(members)) is None
    members[place] = model(PROBABILITIES["softmax"])
    assert found(EnsembleModel(members)).certain
    assert found(ClassMapped(members[place], torch.tensor([0, 0, 1, 2, 3]))).certain


def test_a_look_leaves_no_trace() -> None:
    seen = model(PROBABILITIES["softmax"]).train()
    seen.get_submodule("network.body.1").eval()
    before = {name: value.clone() for name, value in seen.state_dict().items()}
    random = torch.get_rng_state()
    modes = [module.training for module in seen.modules()]
    assert not_logits(seen) is not None
    assert [module.training for module in seen.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in seen.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_network_that_cannot_be_asked_is_left_alone() -> None:
    asked = model(lambda y: y.softmax(1))

    def full(y: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    asked.network.end = full
    assert not_logits(asked) is None


def test_a_network_of_one_size_is_asked_at_that_size() -> None:
    asked = model(lambda y: y.softmax(1))

    def only(y: Tensor) -> Tensor:
        assert y.shape[-2:] == (10, 12)
        return y.softmax(1)

    asked.network.end = only
    assert not_logits(asked) is None
    finding = not_logits(asked, (40, 48))
    assert finding is not None
    assert finding.certain
