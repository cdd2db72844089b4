"""Models by name: listed ones, `hf:`, `timm:`, `ultralytics:`, `module:function`, `path/to/file.py:function`."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdcache.errors import ModelError, suggest
from kdcache.model_table import NEEDS, ModelInfo, TapInfo, lacks, pip_command
from kdcache.models import callables
from kdcache.models.added_heads import base_of
from kdcache.models.added_heads.auxiliary import WithAuxiliary, split_auxiliary
from kdcache.models.added_heads.depth import split_depth, with_depth
from kdcache.models.added_heads.wrapper import WithoutClasses
from kdcache.models.architectures import deeplab, hub_models, hydra, segformer, smp, tiny, torchvision_heads, yolo
from kdcache.models.foreign.hub_spec import HubSpec, is_checkpoint, is_hub, parse_hub
from kdcache.models.logits import as_logits
from kdcache.models.native import SegmentationModel
from kdcache.models.weights import Weights, count_classes, load_weights, read_metadata, read_weights
from kdcache.run_folder import split_outputs
from kdcache.tasks import SEGMENTATION

_LISTED_CLASSES = 21
_LISTED_PX = 256


class _Family(Protocol):
    """The interface of a Python module that builds models."""

    @property
    def NAMES(self) -> tuple[str, ...]: ...  # noqa: N802
    def classifier_keys(self, name: str) -> tuple[str, ...]: ...
    def build(self, name: str, num_classes: int) -> SegmentationModel: ...
    def default_state(self, name: str, whole: bool) -> dict[str, Tensor]: ...


class _OpenFamily(_Family, Protocol):
    """A module that builds more models than it lists."""

    def check_name(self, name: str) -> None: ...


_FAMILIES: dict[str, tuple[_Family, ...]] = {
    "torchvision": (torchvision_heads,),
    "kdcache": (tiny, hydra, deeplab),
    "segformer": (segformer,),
    "smp": (smp,),
    "ultralytics": (yolo,),
}
_OPEN: dict[str, _OpenFamily] = {"smp": smp, "ultralytics": yolo}


def build_model(
    spec: str,
    num_classes: int | None,
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    strict_head: bool | None = None,
) -> SegmentationModel:
    """Build a model in training mode on the CPU.

    >>> import kdcache
    >>> model = kdcache.build_model("kdcache:tiny", num_classes=7)
    >>> model.taps
    ('stage1', 'stage2', 'stage3', 'stage4', 'head')

    Args:
        spec: a name from `list_models`, `module:function` or `path/to/file.py:function`. Add `+depth` for a depth head,
            `+aux` for an auxiliary head, and `,outputs=sigmoid` at the end if the model returns no logits.
        num_classes: None takes the number in the weights, or the function's default. 0, for data without classes,
            leaves out the segmentation head.
        weights: None starts from random weights. `default` downloads published weights once. A mapping has the tensors
            by name. Otherwise a file or folder (see `read_weights`), or `ultralytics:FILE.pt`. `model.load_report` has
            the result.
        mean: the mean of RGB in 0 to 1. None takes the mean in a file of `kdcache export`, or else the model's.
        std: the standard deviation of RGB in 0 to 1. None works as for `mean`.
        strict_head: True requires each tensor in the weights. False lets a classifier of another number of classes keep
            random values. None is True if `num_classes` is None, else False.
    Raises: ModelError for an unknown spec, weights that do not fit, a function that fails, or a model without the heads
        that are asked for.
    """
    stated, outputs = split_outputs(spec)
    without, auxiliary = split_auxiliary(stated)
    base, depth = split_depth(without)
    hub = parse_hub(base) if is_hub(base) else None
    builder, name = (None, base) if hub else _home(base)
    if num_classes is not None and num_classes < 0:
        raise ModelError(f"Invalid num_classes {num_classes}: it must be at least 0", fix="Count the data's classes.")
    strict = num_classes is None if strict_head is None else strict_head
    pretrained = hub is not None and weights == "default"
    loaded = None if weights is None or pretrained else _read(base, weights, whole=strict)
    count = 1 if num_classes == 0 else num_classes  # no family builds a classifier of no class
    if hub is not None:
        make: Callable[[int | None], SegmentationModel] = partial(
            _build_hub, base, hub, pretrained=pretrained, strict=strict
        )
    elif builder is None:
        make = partial(callables.build, base)
    else:
        make = partial(builder.build, name)
        if count is None:
            if loaded is None:
                raise ModelError(
                    f"Unknown number of classes of {spec}: there is neither num_classes nor weights",
                    fix="Give the number of classes, or weights to read it from.",
                )
            keys = builder.classifier_keys(name)
            count = count_classes(loaded.state, keys) if keys else 1
    model = make(count)
    if count == 2 and strict and loaded is not None and _are_of_one_logit(loaded.state, model):
        model = make(1)
    model = as_logits(model, outputs, count)
    if outputs is not None:
        without = f"{without},outputs={outputs}"
    if depth is not None:
        model = with_depth(without, model, depth)
    if num_classes == 0 and SEGMENTATION in model.head_kinds:
        model = WithoutClasses(model)
    if auxiliary is not None:
        model = WithAuxiliary(spec, model, auxiliary)
    if loaded is not None:
        report = load_weights(model, loaded.state, strict_head=strict)
        model.load_report = replace(report, class_names=loaded.class_names, notes=loaded.notes)
    if builder is smp and weights == "default":
        model.mean, model.std = smp.default_moments(name)
    elif isinstance(weights, str | Path) and weights != "default" and (moments := _exported_moments(weights)):
        model.mean, model.std = moments
    if mean is not None:
        model.mean = mean
    if std is not None:
        model.std = std
    return model


def _build_hub(
    base: str, hub: HubSpec, num_classes: int | None, *, pretrained: bool, strict: bool
) -> SegmentationModel:
    return hub_models.build_hub(base, hub, num_classes, pretrained=pretrained, strict=strict)


def is_listed(spec: str) -> bool:
    """Return True if a spec begins with a family of models, such as `kdcache:`. The name after it is not checked."""
    return base_of(spec).rpartition(":")[0] in _FAMILIES


def is_function(spec: str) -> bool:
    """Return True if a spec names a user's function: `module:function` or `path/to/file.py:function`.

    Nothing is imported.

    Raises: ModelError for an unknown spec.
    """
    base = base_of(spec)
    return not is_hub(base) and _home(base)[0] is None


def is_shipped(spec: str) -> bool:
    """Return True if a spec is valid and does not name a user's function. An error may then suggest this model."""
    try:
        return not is_function(spec)
    except ModelError:
        return False


def describe_models() -> list[ModelInfo]:
    """Return an entry for each model that `kdcache models` lists: its size, stride, taps and heads.

    To find these, each model is built, most of them on torch's meta device, without memory for weights. Models whose
    library is not installed are left out.
    """
    return [describe_model(spec) for family in _FAMILIES if not lacks(family) for spec in _specs(family)]


class _CountsOnCpu(TorchFunctionMode):
    """Runs torch.linspace on the CPU, because some networks read its numbers and the meta device has none."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "cpu"} if function is torch.linspace else {}
        return function(*args, **{**(kwargs or {}), **device})


def describe_model(spec: str) -> ModelInfo:
    """Return a model's entry in the list of `kdcache models`, computed with 21 classes."""
    device = "cpu" if is_hub(spec) else "meta"  # these are probed with numbers
    with torch.device(device), _CountsOnCpu():
        model = build_model(spec, _LISTED_CLASSES).eval()
    height, width = model.probe_size if is_hub(spec) else (_LISTED_PX, _LISTED_PX)
    with torch.inference_mode():
        features = model(torch.zeros(1, 3, height, width, device=device), model.taps).features
    taps = {tap: TapInfo(f.shape[1], height // f.shape[2]) for tap, f in features.items()}
    return ModelInfo(
        spec=spec,
        parameters=sum(p.numel() for p in model.parameters()),
        stride=model.stride,
        align_corners=model.align_corners,
        taps=taps,
        heads=tuple(model.head_kinds),
    )


def _home(spec: str) -> tuple[_Family | None, str]:
    """Return the module that builds a spec (None for a user's function), and the name after the colon."""
    family, _, name = spec.rpartition(":")
    if family in _FAMILIES:
        builder = next((module for module in _FAMILIES[family] if name in module.NAMES), _OPEN.get(family))
        if builder is not None:
            if lacks(family):
                raise ModelError(f"Missing {NEEDS[family]} for {spec}", fix=pip_command(family))
            if family in _OPEN:
                _OPEN[family].check_name(name)
            return builder, name
    if not family or family in _FAMILIES or _misspelt(family):
        _refuse_unknown(spec)
    return None, name


def _misspelt(family: str) -> bool:
    """Return True if a name is no module, but similar to a family of models."""
    if "." in family or "/" in family or not suggest(family, _FAMILIES, cutoff=0.75):
        return False
    return importlib.util.find_spec(family) is None and not any(Path(family + end).exists() for end in ("", ".py"))


def _specs(family: str) -> Iterator[str]:
    return (f"{family}:{name}" for module in _FAMILIES[family] for name in module.NAMES)


def _read(spec: str, weights: str | Path | Mapping[str, Tensor], whole: bool) -> Weights:
    if isinstance(weights, Mapping):
        return Weights(dict(weights))
    if is_checkpoint(str(weights)):
        spec, whole, weights = str(weights), True, "default"
    if weights != "default":
        return read_weights(weights)
    builder, name = _home(spec)
    if builder is None:
        raise ModelError(
            f"No published weights of {spec}: it is your own function", fix="Load them in the function, or give a file."
        )
    names = getattr(builder, "default_names", None) if whole else None
    return Weights(builder.default_state(name, whole), () if names is None else names(name))


def _are_of_one_logit(state: Mapping[str, Tensor], model: SegmentationModel) -> bool:
    """Return True if weights have one output channel instead of two, and otherwise fit the model."""
    expected = model.state_dict()
    state = model.adopt_names(state)
    differing = [(expected[name].shape, state[name].shape) for name in expected if name in state]
    differing = [(ours, theirs) for ours, theirs in differing if ours != theirs]
    return bool(differing) and all(ours[:1] == (2,) and theirs == (1, *ours[1:]) for ours, theirs in differing)


def _exported_moments(weights: str | Path) -> tuple[list[float], list[float]] | None:
    """Return mean and std in the header of a file that `kdcache export` wrote, or None."""
    metadata = read_metadata(weights)
    if not {"mean", "std", "spec"} <= set(metadata):
        return None
    with suppress(ValueError):  # somebody else's words for something else
        return json.loads(metadata["mean"]), json.loads(metadata["std"])
    return None


def _refuse_unknown(spec: str) -> NoReturn:
    specs = [spec for family in _FAMILIES for spec in _specs(family)]
    model, at, _ = spec.partition("@")
    named = next((listed for listed in specs if listed.partition(":")[2] == spec.rpartition(":")[2]), spec)
    fix = suggest(named, specs, f"Use one of {', '.join(specs)}.", cutoff=0.5)
    if at and model in specs:
        fix = f"Name the model alone, {model}, and the weights that a training begins with by --init FILE"
    raise ModelError(f"Unknown model {spec!r}", fix=fix)
