"""Convert other outputs to logits: probabilities, sigmoids, one logit for two classes.

    net.py:build@w.pth,outputs=sigmoid          log p - log(1 - p) of every class
    net.py:build@w.pth,outputs=probabilities    log p
    net.py:build@w.pth,outputs=logits           already logits, although they look otherwise

One logit z of a network for two classes is (0, z). A bilinear resize of the result differs slightly from the logarithm
of resized probabilities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache.errors import ModelError, suggest
from kdcache.heads import CategoricalHead
from kdcache.models.added_heads.wrapper import Wrapper
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.run_folder import OUTPUTS
from kdcache.tasks import SEGMENTATION

_LEAST, _MOST = 1e-12, 1 - 2**-24  # the largest float32 below 1


class AsLogits(Wrapper):
    """A model whose segmentation output is converted to logits. Names in its state dict are the wrapped model's.

    Args:
        spec: the new model's spec.
        model: the wrapped model.
        outputs: what the wrapped model returns: `probabilities` that sum to 1, `sigmoid` (a probability of each class
            alone), or `logits`. None is logits.
        two: True if the wrapped model's single output channel becomes two classes.
    """

    def __init__(self, spec: str, model: SegmentationModel, outputs: str | None = None, *, two: bool = False) -> None:
        count = 2 if two else model.num_classes
        kinds = {**model.head_kinds, SEGMENTATION: CategoricalHead(count)}
        super().__init__(spec, model, num_classes=count, head_kinds=kinds, classifier_keys=model.classifier_keys)
        self.untrained = model.untrained
        self.outputs = outputs
        self.two = two

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the wrapped model's outputs, with its segmentation output converted to logits.

        The attribute `outputs` says what the wrapped model returns. `x_B3HW` is normalised float RGB. `taps` are names
        of features to return.
        """
        outputs = self.model(x_B3HW, taps)
        return Outputs({**outputs.heads, SEGMENTATION: self._logits(outputs.logits)}, outputs.features)

    def _logits(self, raw_BChw: Tensor) -> Tensor:
        """Return the logits (B, num_classes, h, w). From probabilities they are float32 and finite."""
        if self.outputs in ("probabilities", "sigmoid"):
            p_BChw = raw_BChw.float()
            raw_BChw = p_BChw.clamp(min=_LEAST).log()
            if self.outputs == "sigmoid" or p_BChw.shape[1] == 1:  # of two classes, one
                raw_BChw = raw_BChw - (1 - p_BChw.clamp(max=_MOST)).log()
        return torch.cat([torch.zeros_like(raw_BChw), raw_BChw], 1) if self.two else raw_BChw


def one_logit_note(origin: str, model: SegmentationModel, names: Sequence[str]) -> str | None:
    """Return a note for a model of two classes with one output logit: the logit's class is `names[1]`.

    Return None if the model has a logit for each class.

    Args:
        origin: where the weights come from, for the note.
        model: the model.
        names: the names of the two classes. The class `names[0]` gets the logit 0.
    """
    if not isinstance(model, AsLogits) or model.num_classes == model.model.num_classes:
        return None
    return f"{origin} has one logit for two classes: it is that of {names[1]}, and {names[0]} has 0"


def as_logits(model: SegmentationModel, outputs: str | None, classes: int | None = None) -> SegmentationModel:
    """Return a model whose segmentation output is converted to logits.

    Args:
        model: the model to convert. It is returned unchanged if there is nothing to convert.
        outputs: what it returns: `probabilities` that sum to 1, `sigmoid` (a probability of each class alone), or
            `logits`. None is logits.
        classes: 2 turns a single logit into the logits of two classes. Any other value changes nothing.
    Raises: ModelError for unknown `outputs`, and for a model without a segmentation head.
    """
    if outputs not in (None, *OUTPUTS):
        raise ModelError(
            f"Unknown outputs {outputs!r} of {model.spec}",
            fix=suggest(str(outputs), OUTPUTS, f"Use one of {', '.join(OUTPUTS)}."),
        )
    if outputs is not None and SEGMENTATION not in model.head_kinds:
        raise ModelError(
            f"Cannot use outputs={outputs}: {model.spec} has no head {SEGMENTATION}, only "
            f"{', '.join(model.head_kinds) or 'none'}",
            fix=f"Leave out ,outputs={outputs}",
        )
    two = classes == 2 and model.num_classes == 1
    if outputs is None and not two:
        return model
    spec = model.spec if outputs is None else f"{model.spec},outputs={outputs}"
    return AsLogits(spec, model, outputs, two=two)
