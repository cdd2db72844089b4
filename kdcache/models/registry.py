"""Models by name: `torchvision:...`, `kdcache:...`, `module:function`, `path/to/file.py:function`."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from kdcache.errors import ModelError
from kdcache.models import callables, tiny, torchvision_heads
from kdcache.models.native import SegmentationModel
from kdcache.models.weights import count_classes, load_weights, read_state_dict

_LISTED_CLASSES = 21
_LISTED_PX = 256


class _Family(Protocol):
    """What a module of models offers."""

    @property
    def NAMES(self) -> tuple[str, ...]: ...  # noqa: N802
    def classifier_keys(self, name: str) -> tuple[str, ...]: ...
    def build(self, name: str, num_classes: int) -> SegmentationModel: ...
    def default_state(self, name: str) -> dict[str, Tensor]: ...


_FAMILIES: dict[str, _Family] = {"torchvision": torchvision_heads, "kdcache": tiny}


@dataclass(frozen=True)
class TapInfo:
    """A feature on offer: its channels and its stride in pixels."""

    channels: int
    stride: int


@dataclass(frozen=True)
class ModelInfo:
    """One line of the list of models; parameters are counted at 21 classes."""

    spec: str
    parameters: int
    stride: int
    align_corners: bool
    taps: Mapping[str, TapInfo]


def build_model(
    spec: str,
    num_classes: int | None,
    *,
    weights: str | Path | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    strict_head: bool | None = None,
) -> SegmentationModel:
    """Build a model in training mode on the CPU.

    Args:
        spec: a name that `list_models` shows, `module:function` or `path/to/file.py:function`.
        num_classes: None takes the number that the weights have, or a `module:function`'s own.
        weights: None initialises at random and downloads nothing; `default` downloads the library's own
            weights once; anything else is a file (see `read_state_dict`). What was loaded is
            `model.load_report`.
        mean, std: of RGB in 0..1; the model's own (ImageNet's for every listed model) when None.
        strict_head: whether every tensor must be in the weights. None is True without `num_classes` (a
            teacher as it was published) and False with it (an initialisation; see `load_weights`).
    Raises: ModelError for an unknown spec (with the nearest names), weights that do not fit, or a foreign
        function that fails.
    """
    family, _, name = spec.rpartition(":")
    known = _FAMILIES.get(family)
    if not family or (known is not None and name not in known.NAMES):
        _refuse_unknown(spec)
    if num_classes is not None and num_classes < 1:
        raise ModelError("num_classes must be at least 1", received=str(num_classes), remedy="count the data's classes")
    state = _state(spec, weights)
    if known is None:
        model = callables.build(spec, num_classes)
    else:
        count = num_classes
        if count is None:
            if state is None:
                _refuse_uncounted(spec)
            count = count_classes(state, known.classifier_keys(name))
        model = known.build(name, count)
    if state is not None:
        strict = num_classes is None if strict_head is None else strict_head
        model.load_report = load_weights(model, state, strict_head=strict)
    if mean is not None:
        model.mean = mean
    if std is not None:
        model.std = std
    return model


def list_models() -> list[ModelInfo]:
    """Every model with a name, built without memory or arithmetic (meta device). Imports torchvision."""
    return [_describe(f"{family}:{name}") for family, known in _FAMILIES.items() for name in known.NAMES]


def _describe(spec: str) -> ModelInfo:
    with torch.device("meta"), torch.no_grad():
        model = build_model(spec, _LISTED_CLASSES).eval()
        features = model(torch.empty(1, 3, _LISTED_PX, _LISTED_PX), model.taps).features
    taps = {tap: TapInfo(f.shape[1], _LISTED_PX // f.shape[2]) for tap, f in features.items()}
    return ModelInfo(
        spec=spec,
        parameters=sum(p.numel() for p in model.parameters()),
        stride=model.stride,
        align_corners=model.align_corners,
        taps=MappingProxyType(taps),
    )


def _state(spec: str, weights: str | Path | None) -> dict[str, Tensor] | None:
    if weights is None:
        return None
    if weights != "default":
        return read_state_dict(weights)
    family, _, name = spec.rpartition(":")
    if family not in _FAMILIES:
        raise ModelError(
            "weights 'default' are a library's published ones",
            received=f"{spec}, which is your own function",
            remedy="load them in the function, or give a file",
        )
    return _FAMILIES[family].default_state(name)


def _refuse_unknown(spec: str) -> NoReturn:
    specs = [f"{family}:{name}" for family, known in _FAMILIES.items() for name in known.NAMES]
    names = {s.partition(":")[2]: s for s in specs}
    near = difflib.get_close_matches(spec, specs, n=3, cutoff=0.5)
    near += [names[n] for n in difflib.get_close_matches(spec.rpartition(":")[2], names, n=3)]
    hint = " or ".join(dict.fromkeys(near)) or ", ".join(specs)
    raise ModelError(
        "a model is one that `kdcache models` lists, module:function, or path/to/file.py:function",
        received=repr(spec),
        remedy=f"did you mean {hint}?" if near else f"known names: {hint}",
    )


def _refuse_uncounted(spec: str) -> NoReturn:
    raise ModelError(
        "the number of classes must be known",
        received=f"{spec} with neither num_classes nor weights",
        remedy="give the number of classes, or weights to read it from",
    )
