"""The student is looked at before it is trained, and the look changes nothing."""

from __future__ import annotations

import torch

from kdcache.models import build_model
from kdcache.train.criterion import tap_channels


def test_a_look_at_the_taps_is_no_training(config, cache_path) -> None:
    student = config(
        verb="train-student", data=None, size="32x48", cache=str(cache_path), method="none", term=("pseudo",)
    )
    model = build_model("torchvision:lraspp_mobilenet_v3_large", 7).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    channels = tap_channels(model, student)
    assert set(channels) == set(model.taps)
    assert all(count > 0 for count in channels.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    tap_channels(model, student)
    assert not model.training
