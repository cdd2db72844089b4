"""Two tasks on one backbone: `kdcache:hydra`, the encoder of `kdcache:tiny` under a decoder for each head.

    encoder        as in kdcache:tiny, shared
    segmentation   the decoder of kdcache:tiny: 32 channels, one 3x3 and the classifier; its tap is `head`
    depth          16 channels, one 3x3 and a 3x3 to the raw output; its tap is `depth`

On 96x128 pixels it takes 20.6 million multiply-adds: 0.56 of two kdcache:tiny, and 0.47 of kdcache:tiny for one task
beside kdcache:tiny+depth for the other.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kdcache.heads import DEPTH, RegressionHead
from kdcache.models.added_heads.depth import OwnDepth
from kdcache.models.architectures import tiny
from kdcache.models.architectures.tiny import PyramidNet, conv, fuse
from kdcache.models.native import Outputs, SegmentationModel

NAMES = ("hydra",)
_DEPTH_CHANNELS = 16
_WIDTHS = (16, 32, 48, 64)


class HydraNet(PyramidNet, OwnDepth):
    """The network. Taps: `stage1` (stride 4) to `stage4`, `depth` and `head`: what each head's last layer reads."""

    def __init__(self, spec: str, num_classes: int) -> None:
        super().__init__(spec, num_classes, stem=8, widths=_WIDTHS, depths=(1, 1, 1, 1), decoder=32)
        *stages, head = self.taps
        self.taps = (*stages, DEPTH, head)
        c = _DEPTH_CHANNELS
        self.depth_context = nn.Conv2d(_WIDTHS[-1], c, 1)
        self.depth_lateral = nn.ModuleDict({n: nn.Conv2d(w, c, 1) for n, w in zip(stages, _WIDTHS, strict=True)})
        self.depth_smooth = conv(c, c)
        self.depth_output = nn.Conv2d(c, 1, 3, padding=1)
        self._initialise()
        self.set_depth(RegressionHead())

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        own = [tap for tap in taps if tap != DEPTH]
        outputs = super().forward(x_B3HW, list(dict.fromkeys([*own, *self.lateral])))
        stages = outputs.features
        mean_Bc11 = stages[list(self.lateral)[-1]].mean((2, 3), keepdim=True)
        y = self.depth_smooth(fuse(self.depth_lateral, stages, self.depth_context(mean_Bc11)))
        features = {**stages, DEPTH: y}
        return Outputs({**outputs.heads, DEPTH: self.depth_output(y)}, {tap: features[tap] for tap in taps})


def classifier_keys(name: str) -> tuple[str, ...]:
    """Prefixes of the tensors whose first axis is the classes."""
    return tiny.classifier_keys(name)


def build(name: str, num_classes: int) -> SegmentationModel:
    """Build the model with random weights from torch's global generator."""
    return HydraNet(f"kdcache:{name}", num_classes)


def default_state(name: str, whole: bool) -> dict[str, Tensor]:
    """There are no published weights. Raises: ModelError always."""
    return tiny.default_state(name, whole)
