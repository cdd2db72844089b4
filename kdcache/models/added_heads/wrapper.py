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
    """Base of models that add heads to another model or remove them.

    The tensors of the wrapped model keep their names in the state dict, so its weights load with and without a wrapper.

    Attributes:
        model: the wrapped model.
        prefix: the prefix of added names in the state dict, or "".

    Args:
        num_classes, head_kinds, classifier_keys: the properties of the new model, after the change of heads.
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
        """Check names against the wrapped model's taps. Raises: ModelError."""
        self.model.check_taps(taps)

    def adopt_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors of a file under the wrapped model's names."""
        return self.model.adopt_names(state)


class WithoutClasses(Wrapper):
    """A model for data without classes, with its other heads, if any."""

    def __init__(self, model: SegmentationModel) -> None:
        kinds = {name: kind for name, kind in model.head_kinds.items() if name != SEGMENTATION}
        super().__init__(model.spec, model, num_classes=0, head_kinds=kinds, classifier_keys=model.classifier_keys)

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Run the model, and drop its segmentation."""
        outputs = self.model(x_B3HW, taps)
        return Outputs({name: outputs.heads[name] for name in self.head_kinds}, outputs.features)


class WithHead(Wrapper):
    """A model with one more head on one of its taps, `tap`.

    Args:
        head_kinds, classifier_keys: the properties that the model has with the head.
    Raises: ModelError for an unknown tap.
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
    """Return the number of channels of a model's feature (B, c, h, w)."""
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
    own = tuple(prefix + name for name in (module.prefix,) if name)
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(own)]:
        state[prefix + _PREFIX + key[len(prefix) :]] = state.pop(key)
