"""The native logits, resized, are torchvision's own output; its state dicts load under their own names."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import segmentation

from kdcache.errors import ModelError
from kdcache.models import SegmentationModel, build_model, list_models, load_weights
from kdcache.models.architectures import torchvision_heads

CLASSES = 5
STRIDES = {"deeplabv3_mobilenet_v3_large": 16}  # 8 for the others


def _original(name: str, aux: bool) -> nn.Module:
    torch.manual_seed(0)
    more = {"aux_loss": True} if aux else {}
    network: nn.Module = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES, **more)
    for module in network.modules():  # fresh statistics would leave the deep nets' activations to explode
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.mul_(0.5)
    return network.eval()


@pytest.mark.parametrize("name", torchvision_heads.NAMES)
def test_resized_logits_are_torchvisions(name: str) -> None:
    original = _original(name, aux=False)
    model = build_model(f"torchvision:{name}", CLASSES).eval()
    assert list(model.state_dict()) == list(original.state_dict())
    load_weights(model, original.state_dict(), strict_head=True)
    stride = STRIDES.get(name, 8)
    assert model.stride == stride
    assert not model.align_corners
    for size in [(64, 48), (65, 51)]:
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = original(x)["out"]
            logits = model(x).logits
            assert logits.shape == (2, CLASSES, -(-size[0] // stride), -(-size[1] // stride))
            assert torch.isfinite(expected).all()
            assert torch.equal(model.upsample(logits, size), expected)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_auxiliary_heads_are_listed(name: str) -> None:
    state = _original(name, aux=True).state_dict()
    report = load_weights(build_model(f"torchvision:{name}", CLASSES), state, strict_head=True)
    assert set(report.unused_auxiliary) == {k for k in state if k.startswith("aux_classifier.")} != set()
    assert set(report.loaded) | set(report.unused_auxiliary) == set(state)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_taps(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(f"torchvision:{name}", CLASSES).eval()
    info = next(i for i in list_models() if i.spec == model.spec)
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        plain = model(x)
        tapped = model(x, model.taps)
    assert plain.features == {}
    assert torch.equal(plain.logits, tapped.logits)
    assert tuple(tapped.features) == model.taps == tuple(info.taps)
    for tap, feature in tapped.features.items():
        t = info.taps[tap]
        assert feature.shape == (1, t.channels, 64 // t.stride, 96 // t.stride)


def test_head_tap_is_the_classifiers_input_before_dropout() -> None:
    torch.manual_seed(0)
    model = build_model("torchvision:fcn_resnet50", CLASSES).eval()
    with torch.inference_mode():
        heads, features = model(torch.randn(1, 3, 33, 33), ["head"])
        logits = heads["segmentation"]
        classifier = model.get_submodule("classifier.4")
        assert torch.equal(classifier(features["head"]), logits)


def test_unknown_tap_names_the_near_one() -> None:
    model = build_model("torchvision:lraspp_mobilenet_v3_large", CLASSES)
    with pytest.raises(ModelError, match="stage4"):
        model(torch.zeros(2, 3, 64, 64), ["stge4"])


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model: SegmentationModel = build_model("torchvision:lraspp_mobilenet_v3_large", CLASSES)
    model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_threads_do_not_mix_their_taps() -> None:
    torch.manual_seed(0)
    model = build_model("torchvision:lraspp_mobilenet_v3_large", CLASSES).eval()
    images = [torch.randn(1, 3, 64, 64) for _ in range(3)]
    with torch.inference_mode():
        expected = [model(x, ["stage3"]).features["stage3"] for x in images]
    features: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.inference_mode():
            features[i] = model(images[i], ["stage3"]).features["stage3"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, feature in enumerate(expected):
        torch.testing.assert_close(features[i], feature)


def test_default_weights_are_downloaded_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    published = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    asked: list[str] = []

    def loader(url: str, **_options: object) -> dict[str, Tensor]:
        asked.append(url)
        return dict(published.state_dict())

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", loader)
    spec = "torchvision:lraspp_mobilenet_v3_large"
    build_model(spec, 21)
    assert asked == []
    teacher = build_model(spec, None, weights="default")
    assert len(asked) == 1
    assert asked[0].endswith(".pth")
    assert teacher.num_classes == 21
    assert all(torch.equal(v, published.state_dict()[k]) for k, v in teacher.state_dict().items())
    student = build_model(spec, CLASSES, weights="default")
    assert student.load_report is not None
    assert {k.rpartition(".")[0] for k in student.load_report.reinitialised} == {
        "classifier.low_classifier",
        "classifier.high_classifier",
    }
    with pytest.raises(
        ModelError, match=r"weights have 21 classes, and the data or their class map 5[\s\S]*--class-map"
    ):
        build_model(spec, CLASSES, weights="default", strict_head=True)


def test_failed_download_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(url: str, **_options: object) -> dict[str, Tensor]:
        raise OSError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", loader)
    with pytest.raises(ModelError, match=r"https://download\.pytorch\.org.*no route"):
        build_model("torchvision:fcn_resnet50", None, weights="default")
