"""Networks that give probabilities are distinguished from those that give logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdcache.models import ClassMapped, EnsembleModel, build_model, returns_probabilities
from kdcache.models.callables import WrappedModel

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
LOGITS = {
    "logits": lambda y: y,
    "log-probabilities": lambda y: y.log_softmax(1),
    "never below 0": lambda y: y.relu(),
    "sums of 1": lambda y: y - y.mean(1, keepdim=True) + 1 / C,
    "each by itself": lambda y: y.sigmoid(),
    "percent": lambda y: 100 * y.softmax(1),
    "but for some pixels": lambda y: y.softmax(1) - 0.1 * (y[:, :1] > y[:, :1].median()),
    "but for one image": lambda y: torch.cat([y[:1], y[1:].softmax(1)]),
}


@pytest.mark.parametrize("end", PROBABILITIES.values(), ids=PROBABILITIES)
def test_probabilities_are_seen(end: Callable[[Tensor], Tensor]) -> None:
    assert returns_probabilities(model(end))


@pytest.mark.parametrize("end", LOGITS.values(), ids=LOGITS)
def test_logits_are_left_alone(end: Callable[[Tensor], Tensor]) -> None:
    assert not returns_probabilities(model(end))


def test_one_class_has_nothing_to_share() -> None:
    assert not returns_probabilities(model(lambda y: y.softmax(1), 1))


def test_listed_models_give_logits() -> None:
    assert not returns_probabilities(build_model("kdcache:tiny", C))
    assert not returns_probabilities(build_model("torchvision:lraspp_mobilenet_v3_large", C))


@pytest.mark.parametrize("place", [0, 1])
def test_members_and_mapped_teachers_are_looked_at_themselves(place: int) -> None:
    members = [model(LOGITS["logits"]), model(LOGITS["logits"])]
    assert not returns_probabilities(EnsembleModel(members))
    members[place] = model(PROBABILITIES["softmax"])
    assert returns_probabilities(EnsembleModel(members))
    assert returns_probabilities(ClassMapped(members[place], torch.tensor([0, 0, 1, 2, 3])))


def test_a_look_leaves_no_trace() -> None:
    seen = model(PROBABILITIES["softmax"]).train()
    seen.get_submodule("network.body.1").eval()
    before = {name: value.clone() for name, value in seen.state_dict().items()}
    random = torch.get_rng_state()
    modes = [module.training for module in seen.modules()]
    assert returns_probabilities(seen)
    assert [module.training for module in seen.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in seen.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_network_that_cannot_be_asked_is_left_alone() -> None:
    asked = model(lambda y: y.softmax(1))

    def full(y: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    asked.network.end = full
    assert not returns_probabilities(asked)
