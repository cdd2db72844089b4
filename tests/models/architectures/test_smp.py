"""segmentation_models_pytorch: its own masks after the resize, any pair of names, sizes it cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import segmentation_models_pytorch as library
import torch
from torch import nn

from kdcache.errors import ModelError
from kdcache.models import build_model, load_weights
from kdcache.models.registry import describe_model

CLASSES = 4
PAIRS = {  # a pair for each architecture, and its native stride
    "unet-resnet18": 1,
    "unetplusplus-resnet18": 1,
    "manet-resnet18": 1,
    "linknet-resnet18": 1,
    "fpn-resnet18": 4,
    "pspnet-resnet18": 8,
    "deeplabv3-resnet18": 8,
    "deeplabv3plus-resnet18": 4,
    "pan-resnet18": 4,
    "upernet-resnet18": 4,
    "segformer-mit_b0": 4,
    "upernet-tu-convnext_atto": 4,
    "unet-efficientnet-b0": 1,
}


def original(name: str) -> Any:
    torch.manual_seed(0)
    architecture, _, encoder = name.partition("-")
    network = library.create_model(architecture, encoder, encoder_weights=None, classes=CLASSES)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


@pytest.mark.parametrize("name", PAIRS)
def test_resized_logits_are_the_librarys_masks(name: str) -> None:
    network = original(name)
    model = build_model(f"smp:{name}", CLASSES).eval()
    assert list(model.state_dict()) == list(network.state_dict())
    load_weights(model, network.state_dict(), strict_head=True)
    stride = PAIRS[name]
    assert model.stride == stride
    assert model.align_corners == (stride > 1)
    height, width = 128, 160  # PAN pools what is smaller away
    x = torch.randn(2, 3, height, width)
    with torch.inference_mode():
        expected = network(x)
        plain, tapped = model(x), model(x, model.taps)
        encoded = network.encoder(x)
    assert plain.logits.shape == (2, CLASSES, height // stride, width // stride)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model.upsample(plain.logits, (height, width)), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(plain.logits, tapped.logits)
    assert tuple(tapped.features) == model.taps
    assert model.taps[-1] == "head"
    for tap in model.taps[:-1]:
        assert torch.equal(tapped.features[tap], encoded[int(tap.removeprefix("stage"))])


def test_head_tap_is_the_classifiers_input() -> None:
    model = build_model("smp:deeplabv3plus-resnet18", CLASSES).eval()
    with torch.inference_mode():
        heads, features = model(torch.randn(1, 3, 64, 64), ["head"])
        logits = heads["segmentation"]
        assert torch.equal(model.get_submodule("segmentation_head.0")(features["head"]), logits)


def test_a_mix_transformer_has_no_first_stage() -> None:
    info = describe_model("smp:segformer-mit_b0")
    assert {tap: (t.channels, t.stride) for tap, t in info.taps.items()} == {
        "stage2": (32, 4), "stage3": (64, 8), "stage4": (160, 16), "stage5": (256, 32), "head": (256, 4)
    }  # fmt: skip
    assert describe_model("smp:deeplabv3plus-resnet101").parameters == sum(
        p.numel() for p in library.DeepLabV3Plus("resnet101", encoder_weights=None, classes=21).parameters()
    )


def test_sizes_that_the_library_refuses_are_refused() -> None:
    model = build_model("smp:fpn-resnet18", CLASSES).eval()
    with pytest.raises(ModelError, match=r"100x380[\s\S]*multiples of 32[\s\S]*--size 96x384"):
        model(torch.zeros(1, 3, 100, 380))
    unet = build_model("smp:unet-resnet18", CLASSES).eval()
    with torch.inference_mode():
        assert unet(torch.zeros(1, 3, 37, 51)).logits.shape == (1, CLASSES, 37, 51)


@pytest.mark.skipif(
    torch.__version__.startswith("2.14."),
    reason="torch 2.14 damages memory in the backward of a 1x1 convolution of 3 channels with a stride, on a CPU",
)
def test_learns_in_channels_last() -> None:
    torch.manual_seed(0)
    model = build_model("smp:unet-mobileone_s0", 2).to(memory_format=torch.channels_last)
    x = model.normalise(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
    logits = model(x).logits
    nn.functional.cross_entropy(logits, (x[:, 0] > 0).long()).backward()
    assert sum(p.grad is not None for p in model.parameters()) > 0.9 * len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("unet-resnet19", "smp:unet-resnet18"),
        ("unt-resnet18", "smp:unet-resnet18"),
        ("deeplabv3+-resnet101", "smp:deeplabv3-resnet101"),
        ("unet", "smp:unet-resnet18"),
        ("fpn-tu-convnext_ato", "smp:fpn-tu-convnext_atto"),
        ("dpt-tu-vit_tiny_patch16_224", "another architecture: unet"),
        ("unetplusplus-mit_b0", "smp:unet-mit_b0"),
        ("unet-tu-vit_tiny_patch16_224", "another encoder, for example smp:unet-resnet18."),
    ],
)
def test_wrong_names_name_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(f"smp:{name}", CLASSES)
    assert near in caught.value.fix
    assert f"smp:{name}" in caught.value.problem


def test_default_is_the_encoder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    create = library.create_model
    asked: list[object] = []

    def made(architecture: str, encoder: str, **options: Any) -> Any:
        asked.append(options.pop("encoder_weights"))
        return create(architecture, encoder, encoder_weights=None, **options)

    monkeypatch.setattr(library, "create_model", made)
    monkeypatch.setattr(
        "segmentation_models_pytorch.encoders.get_preprocessing_params",
        lambda name: {"input_space": "RGB", "input_range": [0, 255], "mean": [51.0] * 3, "std": [102.0] * 3},
    )
    model = build_model("smp:fpn-resnet18", CLASSES, weights="default", strict_head=False)
    assert asked == ["imagenet", None]
    assert model.load_report is not None
    assert all(name.startswith("encoder.") for name in model.load_report.loaded)
    assert "segmentation_head.0.weight" in model.load_report.reinitialised
    assert model.mean == pytest.approx((0.2,) * 3)
    assert model.std == pytest.approx((0.4,) * 3)
    with pytest.raises(ModelError, match="Unknown number of classes"):
        build_model("smp:fpn-resnet18", None, weights="default")


def test_offline_it_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_words: object, **_options: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", offline)
    with pytest.raises(ModelError, match=r"smp-hub/resnet18\.imagenet: no route"):
        build_model("smp:fpn-resnet18", CLASSES, weights="default")
