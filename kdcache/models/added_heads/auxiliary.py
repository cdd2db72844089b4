"""An auxiliary segmentation head on any model: `MODEL+aux`, and its option.

    kdcache:tiny+aux               on the last stage but one of the network
    kdcache:tiny+aux,tap=stage2    on a named tap
    kdcache:tiny+depth+aux         with a depth head

It answers only in training mode, and is not part of the trained model: weights, exports and caches are those of the
model without it. It is torchvision's `FCNHead` (3x3 convolution to a quarter of the channels, BatchNorm, ReLU, 1x1
convolution) under torchvision's names, so its published weights fit on torchvision's tap (`layer3`).

Sources: Zhao et al. 2017 (PSPNet), arXiv 1612.01105, section 3.3; Tsai et al. 2018, arXiv 1802.10349, section 4.1.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.heads import CategoricalHead, HeadKind
from kdcache.models.added_heads.wrapper import WithHead, tap_channels
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.models.weights import AUXILIARY_HEAD
from kdcache.tasks import AUXILIARY, SEGMENTATION

_SPELLED = re.compile(r"(?P<model>.+)\+aux(?:,(?P<options>.*))?")
_STAGE = re.compile(r"(stage|layer)\d+")
_DROPOUT = 3
"""Where an `FCNHead` has its dropout."""
_CLASSIFIER = f"{AUXILIARY_HEAD}4."


@dataclass(frozen=True)
class AuxiliarySpec:
    """The options of an auxiliary head, as in `MODEL+aux,tap=stage2`.

    Attributes:
        tap: the tap that the head reads. None for the network's second to last stage.
    """

    tap: str | None = None


def split_auxiliary(spec: str) -> tuple[str, AuxiliarySpec | None]:
    """Split `MODEL+aux,tap=NAME` into MODEL and the options of its auxiliary head. Without `+aux`, return (spec, None).

    Raises: ModelError for an unknown option.
    """
    folder, slash, name = spec.rpartition("/")  # a folder may be called anything
    spelled = _SPELLED.fullmatch(name)
    if spelled is None:
        return spec, None
    model = folder + slash + spelled["model"]
    if spelled["options"] is None:
        return model, AuxiliarySpec()
    key, _, tap = spelled["options"].partition("=")
    if key != "tap" or not re.fullmatch(r"[\w.-]+", tap):
        raise ModelError(
            f"Invalid auxiliary head {spec!r}: {spelled['options']!r}",
            fix=f"Write MODEL+aux,tap=NAME, for example {model}+aux,tap=stage3",
        )
    return model, AuxiliarySpec(tap)


class WithAuxiliary(WithHead):
    """A model with an auxiliary segmentation head on one of its taps. The head returns logits in training mode only.

    Args:
        spec: the new model's spec.
        model: the model without the head.
        auxiliary: the options of the head.
    Raises: ModelError if the model has no classes, if the tap is unknown, or if no tap is given and the model has
        fewer than two stages.
    """

    prefix = AUXILIARY_HEAD

    def __init__(self, spec: str, model: SegmentationModel, auxiliary: AuxiliarySpec) -> None:
        from torchvision.models.segmentation.fcn import FCNHead

        if SEGMENTATION not in model.head_kinds:
            raise ModelError(
                f"Cannot add an auxiliary head in {spec}: {model.spec} has no classes, only "
                f"{', '.join(model.head_kinds) or 'no head'}",
                fix=f"Write {model.spec}",
            )
        super().__init__(
            spec,
            model,
            auxiliary.tap or _last_but_one(spec, model),
            head_kinds=model.head_kinds,
            classifier_keys=(*model.classifier_keys, _CLASSIFIER) if model.classifier_keys else (),
        )
        self.aux_classifier = FCNHead(tap_channels(model, self.tap), model.num_classes)
        self.aux_classifier[_DROPOUT] = nn.Identity()  # several processes compute what one does

    @property
    def training_heads(self) -> dict[str, HeadKind]:
        """The head that is added for training, as a dict with one entry: name -> kind. It has the model's classes."""
        return {AUXILIARY: CategoricalHead(self.num_classes)}

    @property
    def deployed(self) -> SegmentationModel:
        """The model without the auxiliary head."""
        self.model.mean, self.model.std = self.mean, self.std
        return self.model

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the model's outputs. In training mode, they include the logits of the auxiliary head.

        `x_B3HW` is normalised float RGB. `taps` are the names of the taps whose features to return.
        """
        if not self.training:
            return self.model(x_B3HW, taps)
        outputs = self.model(x_B3HW, tuple(dict.fromkeys([*taps, self.tap])))
        logits_BChw = self.aux_classifier(outputs.features[self.tap])
        return Outputs({**outputs.heads, AUXILIARY: logits_BChw}, {tap: outputs.features[tap] for tap in taps})

    def adopt_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors `state` of a weights file (name -> tensor), renamed to this model's names.

        An auxiliary head in the file is left out if the shape of its first layer differs from this model's.
        """
        state = super().adopt_names(state)
        first = f"{AUXILIARY_HEAD}0.weight"
        if first not in state or state[first].shape == self.state_dict()[first].shape:
            return state
        return {name: value for name, value in state.items() if not name.startswith(AUXILIARY_HEAD)}


def _last_but_one(spec: str, model: SegmentationModel) -> str:
    """Return the tap of the second to last stage. Raises: ModelError if the model has fewer than two stages."""
    stages = [tap for tap in model.taps if _STAGE.fullmatch(tap)]
    if len(stages) < 2:
        raise ModelError(
            f"Cannot choose a tap for the auxiliary head of {model.spec}: its taps "
            f"({', '.join(model.taps) or 'none are listed'}) are not stages",
            fix=f"Name one: {spec},tap=NAME, a module whose output is (B, c, h, w)",
        )
    return stages[-2]
