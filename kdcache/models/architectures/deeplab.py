"""A light DeepLab on MobileNetV3-Large (`kdcache:deeplab-mobilenet`, 3.8 M parameters): a student.

    backbone    torchvision's MobileNetV3-Large without its classifier: 960 channels at stride 32, as for images'
                classes. Nothing in it is dilated (torchvision's own DeepLab dilates its last stage: stride 16)
    reduce      1x1 to 256 channels, BatchNorm, ReLU
    context     3x3 with dilation 6, BatchNorm, ReLU; dropout 0.1; the 1x1 classifier

One dilated convolution instead of the pyramid of five branches: a third of the parameters of torchvision's
`deeplabv3_mobilenet_v3_large`, and, at stride 32, logits of 8 x 8 for 256 x 256 pixels.
torchvision is imported when a model is built.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kdcache.models.architectures import torchvision_heads
from kdcache.models.architectures.torchvision_heads import MOBILENET_TAPS
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.tasks import SEGMENTATION

NAMES = ("deeplab-mobilenet",)
_CHANNELS = 256


class LightDeepLab(SegmentationModel):
    """The network of `kdcache:deeplab-mobilenet`: MobileNetV3 and a small DeepLab head, with logits at stride 32.

    Taps: `stage1` to `stage5` and `backbone` (the backbone's stages and output), `reduced` (its output with fewer
    channels), and `head` (the classifier's input).

    Args:
        name: the part of a spec after the colon, such as `deeplab-mobilenet`.
        num_classes: the number of classes.
        backbone: the layers of torchvision's MobileNetV3.
    """

    def __init__(self, name: str, num_classes: int, backbone: nn.Module) -> None:
        super().__init__(
            spec=f"kdcache:{name}",
            num_classes=num_classes,
            stride=32,
            taps=(*MOBILENET_TAPS, "reduced", "head"),
            backbone_prefix="backbone.",
            classifier_keys=classifier_keys(name),
        )
        self.backbone = backbone
        wide = 960
        self.reduce = nn.Sequential(
            nn.Conv2d(wide, _CHANNELS, 1, bias=False), nn.BatchNorm2d(_CHANNELS), nn.ReLU(inplace=True)
        )
        self.context = nn.Sequential(
            nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=6, dilation=6, bias=False),
            nn.BatchNorm2d(_CHANNELS),
            nn.ReLU(inplace=True),
        )
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(_CHANNELS, num_classes, 1)
        self._tap_of = {child: tap for tap, child in MOBILENET_TAPS.items()}

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the logits (B, C, h, w) at stride 32, and the features of the given taps.

        `x_B3HW` is normalised float RGB.
        """
        self.check_taps(taps)
        features: dict[str, Tensor] = {}
        x = x_B3HW
        for child, module in self.backbone.named_children():
            x = module(x)
            if (tap := self._tap_of.get(child, "")) in taps:
                features[tap] = x
        features["reduced"] = x = self.reduce(x)
        features["head"] = x = self.context(x)
        return Outputs({SEGMENTATION: self.classifier(self.dropout(x))}, {tap: features[tap] for tap in taps})


def classifier_keys(name: str) -> tuple[str, ...]:
    """Return the prefixes, in the state dict, of the layers whose output channels are the classes.

    `name` is the part of a spec after the colon, such as `deeplab-mobilenet`.
    """
    return ("classifier.",)


def build(name: str, num_classes: int) -> SegmentationModel:
    """Build the model `deeplab-mobilenet` with random weights. Nothing is downloaded.

    `name` is the part of a spec after the colon: `deeplab-mobilenet`.
    """
    from torchvision.models import mobilenet_v3_large

    return LightDeepLab(name, num_classes, mobilenet_v3_large(weights=None).features)


def default_state(name: str, whole: bool) -> dict[str, Tensor]:
    """Return the encoder's ImageNet weights: name -> tensor. torchvision downloads them once.

    Args:
        name: the part of a spec after the colon, such as `deeplab-mobilenet`.
        whole: True asks for encoder and head, False for the encoder only. It changes nothing, because only the
            encoder's weights are published.
    """
    return torchvision_heads.default_state("mobilenet_v3_large", whole)
