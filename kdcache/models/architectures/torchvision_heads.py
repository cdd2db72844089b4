"""torchvision's segmentation networks without their final resize.

The backbone and the classifier are torchvision's modules under their own names, so its published state dicts load
directly. The forward walks them stage by stage, which gives the taps without hooks. Auxiliary heads are not built,
because only torchvision's own training uses them.

torchvision is imported when a model is built, never with this module.
"""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.errors import ModelError
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.tasks import SEGMENTATION

NAMES = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)

# tap -> child of torchvision's backbone; the last block of each width of MobileNetV3-Large, then its last 1x1.
_RESNET_TAPS = {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3", "layer4": "layer4"}
MOBILENET_TAPS = {"stage1": "1", "stage2": "3", "stage3": "6", "stage4": "12", "stage5": "15", "backbone": "16"}


class TorchvisionModel(SegmentationModel):
    """FCN or DeepLabV3 of torchvision: a backbone, and a head whose last layer is a 1x1 convolution, the classifier.

    Taps: `layer1` to `layer4` of a ResNet, or `stage1` to `stage5` and `backbone` (the output) of a MobileNetV3. Also
    `head`, the classifier's input before dropout.

    Args:
        name: the part of a spec after the colon, such as `fcn_resnet50`: torchvision's name.
        num_classes: the number of classes.
        network: the network of torchvision, whose parts become attributes.
    """

    backbone: nn.ModuleDict
    classifier: nn.Module

    def __init__(self, name: str, num_classes: int, network: nn.Module) -> None:
        stages = _RESNET_TAPS if "resnet" in name else MOBILENET_TAPS
        super().__init__(
            spec=f"torchvision:{name}",
            num_classes=num_classes,
            stride=16 if name == "deeplabv3_mobilenet_v3_large" else 8,
            taps=(*stages, "head"),
            backbone_prefix="backbone.",
            classifier_keys=classifier_keys(name),
        )
        self.backbone = network.get_submodule("backbone")  # type: ignore[assignment]
        self.classifier = network.get_submodule("classifier")
        self._tap_of = {child: tap for tap, child in stages.items()}

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the logits (B, C, h, w) at the native stride, and the features of the given taps.

        `x_B3HW` is normalised float RGB.
        """
        self.check_taps(taps)
        x = x_B3HW
        features: dict[str, Tensor] = {}  # of every stage that is tapped or that the head reads
        read: dict[str, str] = self.backbone.return_layers  # type: ignore[assignment]
        for child, module in self.backbone.items():
            x = module(x)
            if child in read:
                features[f"read/{read[child]}"] = x
            tap = self._tap_of.get(child, "")
            if tap in taps:
                features[tap] = x
        logits, features["head"] = self._head(features)
        return Outputs({SEGMENTATION: logits}, {tap: features[tap] for tap in taps})

    def _head(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = head = features["read/out"]
        *body, classifier = self.classifier.children()
        for module in body:
            x = module(x)
            if not isinstance(module, nn.Dropout):
                head = x
        return classifier(x), head


class LRASPPModel(TorchvisionModel):
    """LRASPP of torchvision: the logits of two classifiers, at strides 8 and 16, are summed at stride 8.

    So the native stride is 8. The tap `head` is the input of `high_classifier`, which reads the deeper of the two
    features.
    """

    def _head(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        low, high = features["read/low"], features["read/high"]
        head: Any = self.classifier  # torchvision's LRASPPHead
        x = head.cbr(high) * head.scale(high)
        x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return head.low_classifier(low) + head.high_classifier(x), x


def classifier_keys(name: str) -> tuple[str, ...]:
    """Return the prefixes, in the state dict, of the layers whose output channels are the classes.

    `name` is the part of a spec after the colon, such as `fcn_resnet50`.
    """
    if name.startswith("lraspp"):
        return ("classifier.low_classifier.", "classifier.high_classifier.")
    return ("classifier.4.",)


def build(name: str, num_classes: int) -> SegmentationModel:
    """Build a torchvision model with random weights. Nothing is downloaded.

    `name` is the part of a spec after the colon, such as `fcn_resnet50`.
    """
    from torchvision.models import segmentation

    # Both are None on purpose: torchvision downloads the backbone's weights by default.
    network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=num_classes)
    kind = LRASPPModel if name.startswith("lraspp") else TorchvisionModel
    return kind(name, num_classes, network)


def default_state(name: str, whole: bool) -> dict[str, Tensor]:
    """Return torchvision's published weights of a model, trained on COCO with VOC's 21 classes: name -> tensor.

    They are downloaded once.

    Args:
        name: the part of a spec after the colon, such as `fcn_resnet50`.
        whole: True asks for encoder and head, False for the encoder only. It changes nothing, because encoder and head
            are published as one file.
    Raises: ModelError with the address if the download fails, or if the file's digest is wrong.
    """
    from torchvision.models import get_model_weights

    published = get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = published.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"Cannot download weights 'default' from {published.url}: {error}",
            fix="Check the network, or fetch that file yourself and give its path as the weights.",
        ) from error
    return dict(state)


def default_names(name: str) -> tuple[str, ...]:
    """Return the class names of the model's published weights, in the order of the class ids.

    `name` is the part of a spec after the colon, such as `fcn_resnet50`.
    """
    from torchvision.models import get_model_weights

    return tuple(get_model_weights(name).DEFAULT.meta["categories"])
