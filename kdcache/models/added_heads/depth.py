"""A depth head on any model: `MODEL+depth`, and its options.

    kdcache:tiny+depth                            on the model's last tap, softplus, at most 80 m
    kdcache:tiny+depth,tap=stage2,as=exp,max=10   on a named tap, exp, at most 10 m
    timm:resnet18,weights=FILE+depth,tap=stage4   on a model of timm or transformers
    kdcache:hydra,max=10                          only the parameterisation, of a model with a depth head

Two 3x3 convolutions at the tap's stride, the second with one channel. Shapes: c channels of the tap.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.heads import Parameterisation, RegressionHead, raw_of
from kdcache.models.added_heads.wrapper import WithHead, tap_channels
from kdcache.models.foreign.hub_spec import is_hub
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.models.weights import DEPTH_HEAD
from kdcache.tasks import DEPTH

_CHANNELS = 32
_START = 8
"""The first predictions are `max_depth` divided by this, whatever the image shows."""
_OPTIONS = ("tap", "as", "max")
_VALUE = re.compile(r"[\w.+-]+")
"""The values of an option: a name or a number, without characters that a shell interprets."""


@dataclass(frozen=True)
class DepthSpec:
    """The options of a depth head, as in `MODEL+depth,tap=stage2,as=exp,max=10`.

    Attributes:
        added: True if the head is added to the model (`+depth`). False if the model itself has a depth head.
        tap: the tap that an added head reads. None for the model's last tap.
        head: the function from raw output to depth (`as`), and the largest depth (`max`).
    """

    added: bool
    tap: str | None
    head: RegressionHead


def split_depth(spec: str) -> tuple[str, DepthSpec | None]:
    """Split `MODEL+depth,OPTIONS` into MODEL and the options of its depth head, such as `tap=head,as=exp,max=10`.

    For a MODEL that has a depth head itself, the spec is `MODEL,OPTIONS`. Return (spec, None) if the spec has neither
    `+depth` nor such options.

    Raises: ModelError for an unknown option.
    """
    text, options = _spelled(spec)
    model = text.removesuffix(f"+{DEPTH}")
    name, _, added = model.rpartition("/")[2].rpartition(":")[2].rpartition("+")
    if name and added[:1].isalpha() and not is_hub(spec):  # `deeplabv3+-resnet101` is a name of smp's, misspelt
        nearest = "aux" if added.startswith("aux") else DEPTH
        raise _refused(spec, f"{added!r} after +", f"{model.rpartition('+')[0]}+{nearest}")
    if model == text and not options:
        return spec, None
    values = dict[str, str]()
    for option in options:
        name, _, value = option.partition("=")
        if name not in _OPTIONS or name in values or not _VALUE.fullmatch(value) or (name == "tap" and model == text):
            raise _refused(spec, repr(option), f"{model}+{DEPTH},tap=head,as=exp,max=10")
        values[name] = value
    try:
        kind: Any = values.get("as", RegressionHead.parameterisation)
        if kind not in get_args(Parameterisation)[:2]:
            raise ValueError(f"as is softplus or exp, not {kind}")
        head = RegressionHead(parameterisation=kind, max_depth=float(values.get("max", RegressionHead.max_depth or 0)))
    except ValueError as error:
        raise _refused(spec, str(error), f"{text},as=exp,max=10") from error
    return model, DepthSpec(model != text, values.get("tap"), head)


def _spelled(spec: str) -> tuple[str, list[str]]:
    """Split the options of a depth head off a spec. Options before `+depth` belong to a hub model itself."""
    if is_hub(spec):
        model, added, rest = spec.rpartition(f"+{DEPTH}")
        return (model + added, rest.split(",")[1:]) if added and rest[:1] in ("", ",") else (spec, [])
    folder, slash, rest = spec.rpartition("/")  # a folder may be called anything
    name, *options = rest.split(",")
    return folder + slash + name, options


class DepthDecoder(nn.Sequential):
    """A depth head: two 3x3 convolutions from a feature (B, c, h, w) to the raw output of depth (B, 1, h, w).

    Args:
        channels: channels of the feature, c.
        head: the function from raw output to depth, and the largest depth, from which the first predictions follow
            (see `start_at_one_depth`).
        width: channels between the two convolutions.
    """

    def __init__(self, channels: int, head: RegressionHead, width: int = _CHANNELS) -> None:
        first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        last = nn.Conv2d(width, head.channels, 3, padding=1)
        super().__init__(first, nn.BatchNorm2d(width), nn.ReLU(inplace=True), last)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        start_at_one_depth(last, head)


def start_at_one_depth(last: nn.Conv2d, head: RegressionHead) -> None:
    """Initialise a depth head's last layer so that it first predicts nearly the same depth everywhere: `max_depth` / 8.

    For a `max_depth` of 80 m, that is 10 m.
    """
    nn.init.normal_(last.weight, std=0.01)
    assert last.bias is not None
    depth = torch.tensor((head.max_depth or 1.0) / _START, device="cpu")
    nn.init.constant_(last.bias, float(raw_of(depth, head.parameterisation)))


class OwnDepth(SegmentationModel):
    """A base class of kdcache's models that have a depth head without `+depth`.

    Attributes:
        depth_output: the head's last convolution.
    """

    depth_output: nn.Conv2d

    def set_depth(self, head: RegressionHead) -> None:
        """Set the kind of the depth head: the function from raw output to depth, and the largest depth.

        The head's last layer is initialised again, so that it first predicts nearly the same depth everywhere.
        """
        self.head_kinds[DEPTH] = head
        start_at_one_depth(self.depth_output, head)


class WithDepth(WithHead):
    """A model with an added depth head on one of its taps.

    Args:
        spec: the new model's spec.
        model: the model without the head.
        depth: the options of the head.
    Raises: ModelError if the tap is unknown, or if its feature is not (B, c, h, w).
    """

    prefix = DEPTH_HEAD

    def __init__(self, spec: str, model: SegmentationModel, depth: DepthSpec) -> None:
        if depth.tap is None and not model.taps:
            raise ModelError(
                f"Cannot choose a tap for the depth head of {model.spec}: it lists none",
                fix=f"Name one: {spec},tap=NAME, a module whose output is (B, c, h, w)",
            )
        super().__init__(
            spec,
            model,
            depth.tap or model.taps[-1],
            head_kinds={**model.head_kinds, DEPTH: depth.head},
            classifier_keys=model.classifier_keys,
        )
        self.depth_head = DepthDecoder(tap_channels(model, self.tap), depth.head)

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the model's outputs, with the raw output (B, 1, h, w) of the depth head.

        `x_B3HW` is normalised float RGB. `taps` are names of features to return.
        """
        outputs = self.model(x_B3HW, tuple(dict.fromkeys([*taps, self.tap])))
        raw_B1hw = self.depth_head(outputs.features[self.tap])
        return Outputs({**outputs.heads, DEPTH: raw_B1hw}, {tap: outputs.features[tap] for tap in taps})


def with_depth(spec: str, model: SegmentationModel, depth: DepthSpec) -> SegmentationModel:
    """Return the model with a depth head of the given options. Its spec becomes `spec`.

    If `depth.added` is True, a head is added to a model without one. Otherwise the options are set on the depth head
    that the model itself has, in place.

    Args:
        spec: the full spec.
        model: the model without an added head.
        depth: the options.
    Raises: ModelError if a head is to be added and the model has one, or if options are given and it has none.
    """
    existing = model.head_kinds.get(DEPTH)
    if depth.added and existing is None:
        return WithDepth(spec, model, depth)
    if not depth.added and isinstance(model, OwnDepth):
        model.spec = spec
        model.set_depth(depth.head)
        return model
    if existing is None:
        raise ModelError(
            f"Cannot use the options of a depth head in {spec}: {model.spec} has none",
            fix=f"Write {model.spec}+{DEPTH}",
        )
    raise ModelError(f"Cannot add a depth head in {spec}: {model.spec} has one already", fix=f"Write {model.spec}")


def _refused(spec: str, problem: str, example: str) -> ModelError:
    return ModelError(
        f"Invalid depth head {spec!r}: {problem}",
        fix=f"Write MODEL+{DEPTH} with options ,tap=NAME ,as=softplus or ,as=exp and ,max=METRES. An auxiliary head of "
        f"classes is +aux, at the end. For example {example}",
    )
