"""The light DeepLab on MobileNetV3-Large."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_large

from kdcache.models import build_model
from kdcache.models.registry import describe_model

SPEC = "kdcache:deeplab-mobilenet"


def written_out(classes: int) -> nn.Module:
    """The network of its description, from torchvision's own parts."""
    return nn.Sequential(
        *mobilenet_v3_large(weights=None).features,
        nn.Conv2d(960, 256, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=6, dilation=6, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(256, classes, 1),
    ).eval()


def test_it_is_what_its_description_says() -> None:
    torch.manual_seed(0)
    model, expected = build_model(SPEC, 21).eval(), written_out(21)
    expected.load_state_dict(dict(zip(expected.state_dict(), model.state_dict().values(), strict=True)))
    for size in [(256, 256), (100, 130)]:
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            heads, features = model(x, model.taps)
            logits = heads["segmentation"]
            assert torch.equal(logits, expected(x))
            assert torch.equal(features["reduced"], expected[:20](x))
            assert torch.equal(model.get_submodule("classifier")(features["head"]), logits)
        assert logits.shape[-2:] == (-(-size[0] // 32), -(-size[1] // 32))


def test_size_and_taps() -> None:
    info = describe_model(SPEC)
    assert info.parameters == sum(p.numel() for p in written_out(21).parameters()) == 3_813_957
    assert {tap: (t.channels, t.stride) for tap, t in info.taps.items()} == {
        "stage1": (16, 2), "stage2": (24, 4), "stage3": (40, 8), "stage4": (112, 16), "stage5": (160, 32),
        "backbone": (960, 32), "reduced": (256, 32), "head": (256, 32),
    }  # fmt: skip


def test_imagenet_weights_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    published = mobilenet_v3_large(weights=None).state_dict()
    asked: list[str] = []

    def loader(url: str, **_options: object) -> dict[str, torch.Tensor]:
        asked.append(url)
        return dict(published)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", loader)
    build_model(SPEC, 3)
    assert asked == []
    model = build_model(SPEC, 3, weights="default", strict_head=False)
    assert len(asked) == 1
    assert "mobilenet_v3_large" in asked[0]
    assert torch.equal(model.state_dict()["backbone.16.0.weight"], published["features.16.0.weight"])
    assert model.load_report is not None
    assert {name.partition(".")[0] for name in model.load_report.reinitialised} == {"reduce", "context", "classifier"}


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = build_model(SPEC, 3)
    model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
