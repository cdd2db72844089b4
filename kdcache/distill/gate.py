"""Gates: a weight per pixel on the teacher's terms.

| part | weight of a pixel | needs |
| --- | --- | --- |
| `correct` | 0 if the teacher's best class is not the label; pixels without a label count | labels |
| `confidence:X` | 1 if its highest probability is at least X | |
| class weights | the weight of the teacher's best class: its trust times its rarity | (C,) numbers |

The parts are multiplied. The denominators of the terms still count all pixels, so a gate does not raise the weight of
the pixels that pass. Sources: confidence as in FixMatch (Sohn 2020, arXiv 2001.07685); `correct` drops pixels at which
the teacher is wrong.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdcache.distill.batch import Batch
from kdcache.distill.target import TargetFormat
from kdcache.errors import RecipeError

KINDS = ("none", "correct", "confidence:X")


@dataclass(frozen=True)
class GateSpec:
    """A gate by name.

    Attributes:
        kind: the pixels that pass. `none`: all. `correct`: void pixels, and pixels whose label is the teacher's best
            class. `confidence`: pixels at which the teacher's best class has at least the probability `threshold`.
        threshold: a probability, in 0..1. Only `confidence` uses it.
    """

    kind: str = "none"
    threshold: float = 0.0


def parse_gate(text: str) -> GateSpec:
    """Return the gate of a text: "none", "correct", or for example "confidence:0.7".

    Raises: RecipeError for any other text.
    """
    kind, _, number = text.partition(":")
    try:
        threshold = float(number) if kind == "confidence" else 0.0
    except ValueError:
        threshold = math.nan
    exists = kind == "confidence" or text in ("none", "correct")
    if not exists or (kind == "confidence" and not 0 < threshold < 1):
        raise RecipeError(
            f"Invalid value of --gate: {text!r}",
            fix="Use none, correct or confidence:X with X between 0 and 1, for example --gate confidence:0.7",
        )
    return GateSpec(kind, threshold)


class Gate(nn.Module):
    """A module that computes the weights (B, H, W) of pixels in the teacher's terms, from targets and labels.

    Args:
        spec: which pixels pass. None lets all pass.
        class_weight: (C,) weights at least 0. A pixel has the weight of the teacher's best class. None weighs all
            classes 1.
        ignore_index: the void class id of the labels.
    """

    class_weight: Tensor | None

    def __init__(
        self, spec: GateSpec | None = None, class_weight: Tensor | None = None, ignore_index: int = 255
    ) -> None:
        super().__init__()
        self.spec = spec or GateSpec()
        self.ignore_index = ignore_index
        self.register_buffer("class_weight", class_weight, persistent=False)

    @property
    def open(self) -> bool:
        """True if the gate has no effect: the weight of every pixel is 1."""
        return self.spec.kind == "none" and self.class_weight is None

    @torch.no_grad()
    def forward(self, batch: Batch, form: TargetFormat, *, impl: str = "auto") -> Tensor | None:
        """Return the weights (B, H, W) float32 of a batch's pixels. Return None if the gate weighs all pixels 1.

        The call never waits for the device.

        Args:
            batch: the batch, with a segmentation target.
            form: an object that describes the targets, such as an open cache.
            impl: the implementation of the kernels: "auto", "triton", "numba", "torch" or "reference".
        """
        if self.open:
            return None
        argmax_BHW, confidence_BHW = batch.argmax_confidence(form, batch.size, impl=impl)
        weight_BHW = torch.ones(argmax_BHW.shape, device=argmax_BHW.device)
        if self.spec.kind == "confidence":
            weight_BHW = (confidence_BHW >= self.spec.threshold).float()
        elif self.spec.kind == "correct":
            weight_BHW = ((argmax_BHW == batch.label) | (batch.label == self.ignore_index)).float()
        if self.class_weight is not None:
            weight_BHW = weight_BHW * self.class_weight[argmax_BHW.long()]
        return weight_BHW
