"""Wrappers of a model that add a head on one of its taps, or remove its classes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.heads import HeadKind
from kdcache.models.native import Outputs, SegmentationModel, in_eval_mode
from kdcache.tasks import SEGMENTATION

_PREFIX = "model."


class Wrapper(SegmentationModel):
    """A base class of models that add a head to another model, or remove one.

    The tensors of the wrapped model keep their names in the state dict. So the same weights file loads into the wrapped
    model and into this one.

    Args:
        spec: the new model's spec.
        model: the wrapped model, which becomes the attribute `model`.
        num_classes: the number of classes of the new model.
        head_kinds: the heads of the new model: name -> kind.
        classifier_keys: prefixes, in the state dict, of the layers whose output channels are the classes.

    Attributes:
        prefix: the prefix, in the state dict, of the tensors that are added, or ''.
    """

    prefix = ""

    def __init__(
        self,
        spec: str,
        model: SegmentationModel,
        *,
        num_classes: int,
        head_kinds: Mapping[str, HeadKind],
        classifier_keys: Iterable[str],
    ) -> None:
        super().__init__(
            spec=spec,
            num_classes=num_classes,
            stride=model.stride,
            taps=model.taps,
            align_corners=model.align_corners,
            backbone_prefix=model.backbone_prefix,
            classifier_keys=tuple(classifier_keys),
            head_kinds=head_kinds,
        )
        self.mean, self.std = model.mean, model.std
        self.see_as(model)
        self.model = model
        self.register_state_dict_post_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def check_taps(self, taps: Iterable[str]) -> None:
        """Check that the wrapped model has these taps. Raises: ModelError for an unknown one."""
        self.model.check_taps(taps)

    def adopt_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of a weights file under the names that the wrapped model gives them.

        `state` is name -> tensor, as the file has them. Other versions of a library may name the same tensors
        otherwise.
        """
        return self.model.adopt_names(state)


class WithoutClasses(Wrapper):
    """A model without its segmentation head, for data without classes. Its other heads stay."""

    def __init__(self, model: SegmentationModel) -> None:
        kinds = {name: kind for name, kind in model.head_kinds.items() if name != SEGMENTATION}
        super().__init__(model.spec, model, num_classes=0, head_kinds=kinds, classifier_keys=model.classifier_keys)

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the model's outputs without segmentation.

        `x_B3HW` is normalised float RGB. `taps` are names of features to return.
        """
        outputs = self.model(x_B3HW, taps)
        return Outputs({name: outputs.heads[name] for name in self.head_kinds}, outputs.features)


class WithHead(Wrapper):
    """A base class of models that add a head which reads one of the model's taps.

    Args:
        spec: the new model's spec.
        model: the model without the head.
        tap: the tap that the head reads.
        head_kinds: all heads of the new model: name -> kind.
        classifier_keys: prefixes, in the state dict, of the layers whose output channels are the classes.
    Raises: ModelError if the tap is unknown.
    """

    def __init__(
        self,
        spec: str,
        model: SegmentationModel,
        tap: str,
        *,
        head_kinds: Mapping[str, HeadKind],
        classifier_keys: Iterable[str],
    ) -> None:
        model.check_taps([tap])
        super().__init__(
            spec, model, num_classes=model.num_classes, head_kinds=head_kinds, classifier_keys=classifier_keys
        )
        self.tap = tap


def tap_channels(model: SegmentationModel, tap: str) -> int:
    """Return the number of channels of the feature (B, c, h, w) at a tap, found by running the model once."""
    like = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, *model.probe_size, device=like.device, dtype=like.dtype)
    with torch.no_grad(), in_eval_mode(model):
        feature = model(image, [tap]).features[tap]
    return feature.shape[1]


def _strip_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for key in [k for k in state if k.startswith(prefix + _PREFIX)]:
        state[prefix + key[len(prefix + _PREFIX) :]] = state.pop(key)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    assert isinstance(module, Wrapper)
    added = tuple(prefix + name for name in (module.prefix,) if name)
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(added)]:
        state[prefix + _PREFIX + key[len(prefix) :]] = state.pop(key)
