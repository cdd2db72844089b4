"""Programs get the error of their own network as a ModelError, with theirs as its cause."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache.errors import ModelError
from kdcache.faults import naming_network, network_fault
from kdcache.models import WrappedModel
from kdcache.teacher.load.forward import teach
from kdcache.training import make_config, train


class OfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 2, 3, 4, 1), Alone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Alone(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise ValueError("one image at a time")
        return x


def test_a_teacher_names_its_layer_and_the_line() -> None:
    model = WrappedModel("mine", OfOne(), 2)
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"network mine on images of 32x32: ValueError in its layer body\.1") as caught:
        teach(model, pixels, (), "float32", torch.device("cpu"))
    assert "test_own_network.py:" in caught.value.problem
    assert isinstance(caught.value.__cause__, ValueError)
    assert teach(model, pixels[:1], (), "float32", torch.device("cpu")).logits.shape == (1, 2, 8, 8)


def test_a_training_of_one_pooled_image_names_batch_norm(tmp_path) -> None:
    settings = {"model": "torchvision:deeplabv3_mobilenet_v3_large", "iterations": 1, "batch_size": 1, "workers": 0}
    settings |= {"data": "scenes:32x48,train=2,val=1", "size": (32, 48), "device": "cpu"}
    with pytest.raises(ModelError, match="BatchNorm2d") as caught:
        train(make_config(verb="train-teacher", **settings), tmp_path / "run")
    assert "--batch-size 2 or more" in caught.value.fix
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("error", [KeyError("a"), MemoryError(), torch.OutOfMemoryError("full")])
def test_errors_of_others_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_network():
        raise error
    assert caught.value is error
    assert network_fault(error) is None
