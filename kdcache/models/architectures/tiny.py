"""kdcache's own small encoder-decoder: a student (`tiny`) and a teacher to train from scratch (`base`).

Forward and backward of 8 x 3 x 144 x 192 on one EPYC core: tiny (0.14 M parameters) 50 ms, base (3.2 M) 240
ms.

    stem        two 3x3 stride-2 convolutions with few channels: nothing heavy runs above stride 4
    encoder     residual stages at strides 4, 8, 16, 32
    context     the global mean, projected and added to the deepest stage
    decoder     FPN: 1x1 projections, summed from the deepest up to stride 4, then one 3x3 and the classifier

Logits have size ceil(H/4) x ceil(W/4) for every H, W >= 32: each stride-2 convolution rounds up, and the
decoder resizes to the exact size of the skip it adds.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.errors import ModelError
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.tasks import SEGMENTATION

NAMES = ("tiny", "base")


class PyramidNet(SegmentationModel):
    """The network of `kdcache:tiny` and `kdcache:base`: residual encoder, feature pyramid, logits at stride 4.

    Taps: `stage1` (stride 4) to `stageN`, and `head`, the classifier's input before dropout.

    Args:
        spec: the model's spec, such as `kdcache:tiny`.
        num_classes: the number of classes.
        stem: channels at stride 2.
        widths: channels of each stage, at strides 4, 8, ...
        depths: residual blocks of each stage.
        decoder: channels of the pyramid.
        dropout: the probability that a channel is dropped before the classifier.
    """

    def __init__(
        self,
        spec: str,
        num_classes: int,
        *,
        stem: int,
        widths: Sequence[int],
        depths: Sequence[int],
        decoder: int,
        dropout: float = 0.0,
    ) -> None:
        names = [f"stage{i}" for i in range(1, len(widths) + 1)]
        super().__init__(
            spec=spec,
            num_classes=num_classes,
            stride=4,
            taps=(*names, "head"),
            backbone_prefix="encoder.",
            classifier_keys=classifier_keys(spec),
        )
        stages = OrderedDict([("stem", nn.Sequential(conv(3, stem, 2), conv(stem, widths[0], 2)))])
        before = widths[0]
        for i, (name, width, depth) in enumerate(zip(names, widths, depths, strict=True)):
            first = _Residual(before, width, stride=1 if i == 0 else 2)
            stages[name] = nn.Sequential(first, *[_Residual(width, width) for _ in range(depth - 1)])
            before = width
        self.encoder = nn.ModuleDict(stages)
        # Without BatchNorm: one value per image and channel has no spread to normalise by in a batch of one.
        self.context = nn.Conv2d(before, decoder, 1)
        self.lateral = nn.ModuleDict({n: nn.Conv2d(w, decoder, 1) for n, w in zip(names, widths, strict=True)})
        self.smooth = conv(decoder, decoder)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(decoder, num_classes, 1)
        self._initialise()

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the logits (B, C, h, w) at stride 4, and the features of the given taps.

        `x_B3HW` is normalised float RGB.
        """
        self.check_taps(taps)
        features, pyramid_Bchw = self.pyramid(x_B3HW)
        features["head"] = y = self.smooth(pyramid_Bchw)
        return Outputs({SEGMENTATION: self.classifier(self.dropout(y))}, {tap: features[tap] for tap in taps})

    def pyramid(self, x_B3HW: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the encoder's features (stage -> (B, c, h', w')) and their combination (B, decoder, h, w) at stride 4.

        To combine them, each stage's features are projected to `decoder` channels (see the class), upsampled and added.
        A context of the whole image is also added. `x_B3HW` is normalised float RGB.
        """
        features: dict[str, Tensor] = {}
        x = x_B3HW
        for name, stage in self.encoder.items():
            x = features[name] = stage(x)
        # `mean`, not adaptive pooling: its gradient is deterministic on CUDA.
        return features, fuse(self.lateral, features, self.context(x.mean((2, 3), keepdim=True)))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, _Residual):
                module.start_as_identity()
        # Near-uniform first predictions: the first loss is log(C) whatever the features are.
        nn.init.normal_(self.classifier.weight, std=0.01)


def fuse(lateral: nn.ModuleDict, features: Mapping[str, Tensor], context: Tensor) -> Tensor:
    """Return the sum (B, c, h, w) of a feature pyramid, at the size of its finest stage.

    Starting from the coarsest stage, the sum is resized to the next finer stage, whose feature is added.

    Args:
        lateral: stage -> a convolution of its feature to c channels. The finest stage is first.
        features: stage -> its feature (B, channels, height, width).
        context: (B, c, 1, 1), added to the coarsest stage.
    """
    y = context
    for name, project in reversed(list(lateral.items())):
        skip = project(features[name])
        if y.shape[-2:] != (1, 1):  # a single cell broadcasts: the same numbers without a resize
            y = F.interpolate(y, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        y = skip + y
    return y


class _Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut. If the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(channels, out_channels, stride)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(self.conv1(x))) + self.shortcut(x))

    def start_as_identity(self) -> None:
        """Set the scale of the last norm to zero (Goyal 2017, arXiv 1706.02677, section 5.1)."""
        nn.init.zeros_(self.norm2.weight)


def conv(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution from `channels` to `out_channels` without bias, followed by BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),  # of the norm's output, which nobody else reads
    )


def classifier_keys(name: str) -> tuple[str, ...]:
    """Return the prefixes, in the state dict, of the layers whose output channels are the classes.

    `name` is the part of a spec after the colon, such as `tiny`.
    """
    return ("classifier.",)


def build(name: str, num_classes: int) -> SegmentationModel:
    """Build `tiny` or `base` with random weights, drawn from torch's global generator.

    `name` is the part of a spec after the colon: `tiny` or `base`.
    """
    spec = f"kdcache:{name}"
    if name == "tiny":
        return PyramidNet(spec, num_classes, stem=8, widths=(16, 32, 48, 64), depths=(1, 1, 1, 1), decoder=32)
    return PyramidNet(
        spec, num_classes, stem=16, widths=(32, 64, 160, 256), depths=(1, 2, 2, 2), decoder=64, dropout=0.1
    )


def default_state(name: str, whole: bool) -> dict[str, Tensor]:
    """Raise a ModelError, because there are no published weights of `kdcache:tiny` and `kdcache:base`.

    Args:
        name: the part of a spec after the colon, such as `tiny`.
        whole: True asks for encoder and head, False for the encoder only. It changes nothing.
    """
    raise ModelError(
        f"No published weights of kdcache:{name}: it has no 'default'",
        fix="Leave the weights out, or give a file that `kdcache train-student` wrote.",
    )
