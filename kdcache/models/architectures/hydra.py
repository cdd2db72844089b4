"""Two tasks on one backbone: `kdcache:hydra`, a `kdcache:tiny` with wider deep stages and a second head.

    shared         stages of 16, 32, 64 and 96 channels, and their pyramid's sum of 32 at stride 4
    segmentation   a 3x3 convolution to 32 channels and the classifier; its tap is `head`
    depth          a 3x3 convolution to 24 channels and a 3x3 to the raw output; its tap is `depth`

The saving against a second encoder goes into the deep stages, which cost little at strides 16 and 32. On 96x128 pixels
it takes 25.8 million multiply-adds. This is 0.59 of kdcache:tiny for one task plus kdcache:tiny+depth for the other.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kdcache.heads import RegressionHead
from kdcache.models.added_heads.depth import OwnDepth
from kdcache.models.architectures import tiny
from kdcache.models.architectures.tiny import PyramidNet, conv
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.tasks import DEPTH, SEGMENTATION

NAMES = ("hydra",)
_DECODER, _DEPTH_CHANNELS = 32, 24


class HydraNet(PyramidNet, OwnDepth):
    """The network of `kdcache:hydra`, with a segmentation head and a depth head at stride 4.

    Taps: `stage1` (stride 4) to `stage4`, `depth` and `head`. The last two are the inputs of the heads' last layers.

    Args:
        spec: the model's spec, such as `kdcache:hydra`.
        num_classes: the number of classes.
    """

    def __init__(self, spec: str, num_classes: int) -> None:
        super().__init__(spec, num_classes, stem=8, widths=(16, 32, 64, 96), depths=(1, 1, 1, 1), decoder=_DECODER)
        *stages, head = self.taps
        self.taps = (*stages, DEPTH, head)
        self.depth_smooth = conv(_DECODER, _DEPTH_CHANNELS)
        self.depth_output = nn.Conv2d(_DEPTH_CHANNELS, 1, 3, padding=1)
        self._initialise()
        self.set_depth(RegressionHead())

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the logits and the raw output of depth (B, 1, h, w) at stride 4, and the features of the given taps.

        `x_B3HW` is normalised float RGB.
        """
        self.check_taps(taps)
        features, pyramid_Bchw = self.pyramid(x_B3HW)
        features |= {DEPTH: self.depth_smooth(pyramid_Bchw), "head": self.smooth(pyramid_Bchw)}
        logits_BChw = self.classifier(self.dropout(features["head"]))
        heads = {SEGMENTATION: logits_BChw, DEPTH: self.depth_output(features[DEPTH])}
        return Outputs(heads, {tap: features[tap] for tap in taps})


def classifier_keys(name: str) -> tuple[str, ...]:
    """Return the prefixes, in the state dict, of the layers whose output channels are the classes.

    `name` is the part of a spec after the colon, such as `hydra`.
    """
    return tiny.classifier_keys(name)


def build(name: str, num_classes: int) -> SegmentationModel:
    """Build the model `hydra` with random weights, drawn from torch's global generator.

    `name` is the part of a spec after the colon: `hydra`.
    """
    return HydraNet(f"kdcache:{name}", num_classes)


def default_state(name: str, whole: bool) -> dict[str, Tensor]:
    """Raise a ModelError, because there are no published weights of `kdcache:hydra`.

    Args:
        name: the part of a spec after the colon, such as `hydra`.
        whole: True asks for encoder and head, False for the encoder only. It changes nothing.
    """
    return tiny.default_state(name, whole)
