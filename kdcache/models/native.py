"""The one interface of every model: the outputs of its heads at their native stride, features by name.

Most heads end in a bilinear resize to the image's size. That resize is deterministic, so it is left out here: storing
and distilling its input costs 16 to 64 times less. `SegmentationModel.upsample` is the resize.

Shapes: B batch, C classes, H W image, h w native stride, c channels of a feature.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.errors import ModelError, suggest
from kdcache.heads import CategoricalHead, HeadKind, RegressionHead
from kdcache.models.foreign.processor import PROBE_SIZE, Processor
from kdcache.tasks import SEGMENTATION

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Outputs(NamedTuple):
    """A model's outputs for a batch.

    Attributes:
        heads: name -> (B, C, h, w) at the head's native stride, not upsampled: `segmentation` has logits, `depth` the
            raw output of a regression (`kdcache.heads`).
        features: tap -> (B, c, h', w') for the requested taps.
    """

    heads: dict[str, Tensor]
    features: dict[str, Tensor]

    @property
    def logits(self) -> Tensor:
        """Logits (B, C, h, w) of segmentation. Raises: ModelError for a model without that head."""
        if SEGMENTATION not in self.heads:
            raise ModelError(
                f"No logits: the model has {', '.join(self.heads) or 'no head'}, and no head {SEGMENTATION}",
                fix=f"Use a model that has a head {SEGMENTATION}.",
            )
        return self.heads[SEGMENTATION]


@dataclass(frozen=True)
class LoadReport:
    """The result of loading weights into a model, as names of tensors in the state dict."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()  # only counters that do not matter (num_batches_tracked)
    unexpected: tuple[str, ...] = ()  # of an image classifier's head, dropped when its backbone is taken
    unused_auxiliary: tuple[str, ...] = ()  # auxiliary heads, which serve training only
    reinitialised: tuple[str, ...] = ()  # left at their random initialisation
    class_names: tuple[str, ...] = ()  # that came with the weights, one for each class; () where they are not known
    notes: tuple[str, ...] = ()  # what a user should know of the file


class SegmentationModel(nn.Module):
    """A network from normalised pixels to logits at its native stride.

    Subclasses implement `forward`. Nothing set here enters the state dict, so a subclass decides the names in it.

    Attributes:
        spec: the name that `build_model` was given.
        num_classes: C, or 0 without a head `segmentation`.
        head_kinds: the kind of each head's output, by the head's name.
        untrained: names of the heads with random weights, which are not judged because the run learnt nothing for them.
        stride: nominal native stride in pixels. The exact ratio follows from the sizes.
        align_corners: whether the heads' final bilinear resize aligns corners.
        taps: names of the available features, most useful last.
        backbone_prefix: how the backbone's names in the state dict begin, or "" if unknown.
        classifier_keys: prefixes of the tensors with the classes as first axis, or () if they are not known.
        load_report: what `build_model` loaded, or None if the weights are random.
        probe_size: (H, W) of an image that it takes.
        processor: what it expects of its images, in addition to mean and std.
    """

    def __init__(
        self,
        *,
        spec: str,
        num_classes: int,
        stride: int,
        taps: Sequence[str],
        align_corners: bool = False,
        backbone_prefix: str = "",
        classifier_keys: Sequence[str] = (),
        head_kinds: Mapping[str, HeadKind] | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        own = {SEGMENTATION: CategoricalHead(num_classes)}
        self.head_kinds: dict[str, HeadKind] = dict(own if head_kinds is None else head_kinds)
        self.untrained: tuple[str, ...] = ()
        self.stride = stride
        self.align_corners = align_corners
        self.taps = tuple(taps)
        self.backbone_prefix = backbone_prefix
        self.classifier_keys = tuple(classifier_keys)
        self.load_report: LoadReport | None = None
        self.probe_size = PROBE_SIZE
        self.processor = Processor()
        self._mean, self._std = IMAGENET_MEAN, IMAGENET_STD
        # Not buffers: they would follow `model.half()` and lose the precision of the pixels.
        self._moments: dict[torch.device, tuple[Tensor, Tensor]] = {}

    if TYPE_CHECKING:  # nn.Module types its call as Any

        def __call__(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
            """Run the network. See `forward`."""

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Run the network.

        Args:
            x_B3HW: floating, already normalised (see `normalise`).
            taps: names out of `self.taps`.
        Returns: each head's output (B, C, h, w) at its native stride, and the features (B, c, h', w') by tap.
        Raises: ModelError for an unknown tap.
        """
        raise NotImplementedError

    @property
    def mean(self) -> tuple[float, float, float]:
        """The mean of RGB in 0..1; ImageNet's unless it was set."""
        return self._mean

    @mean.setter
    def mean(self, value: Iterable[float]) -> None:
        """Set the mean. Raises: ModelError unless these are three finite numbers."""
        self._mean = _rgb("mean", value)
        self._moments = {}

    @property
    def std(self) -> tuple[float, float, float]:
        """The standard deviation of RGB in 0..1, above 0; ImageNet's unless it was set."""
        return self._std

    @std.setter
    def std(self, value: Iterable[float]) -> None:
        """Set the deviation. Raises: ModelError unless these are three finite numbers above 0."""
        std = _rgb("std", value)
        if min(std) <= 0:
            raise ModelError(f"Invalid std {std}: it must be above 0", fix="Give std of RGB in 0..1.")
        self._std = std
        self._moments = {}

    @property
    def multiple(self) -> int:
        """The number that both sides of its images must be multiples of."""
        return self.processor.multiple

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(H, W) of its images if it takes no other, or None for any."""
        return self.processor.fixed_size

    @property
    def probed_taps(self) -> tuple[str, ...]:
        """The features that identify a teacher without heads."""
        return () if self.head_kinds else self.taps[-1:]

    def see_as(self, *models: "SegmentationModel") -> None:
        """Restrict the images to those that all given models take."""
        self.processor = Processor.of_all([model.processor for model in models])
        self.probe_size = next((m.probe_size for m in models if m.fixed_size is not None), models[0].probe_size)

    def check_size(self, size: tuple[int, int], flag: str = "--size") -> None:
        """Check that its patches cover images of (H, W) exactly. Raises: ModelError with the nearest size that fits."""
        near = self.processor.nearest(size)
        if tuple(size) != near:
            raise ModelError(
                f"{self.spec} cannot take images of {int(size[0])}x{int(size[1])}: it takes {self.processor.takes}",
                fix=f"Use {flag} {near[0]}x{near[1]}.",
            )

    def normalise(self, pixels_BHW3: Tensor) -> Tensor:
        """Turn uint8 RGB into the network's input: (pixels / 255 - mean) / std.

        Args:
            pixels_BHW3: uint8, on any device.
        Returns: float32 (B, 3, H, W) on the same device, in channels_last memory format (the pixels' own order, so
            nothing is transposed).
        Raises: ModelError for another dtype or shape.
        """
        if pixels_BHW3.dtype != torch.uint8 or pixels_BHW3.ndim != 4 or pixels_BHW3.shape[-1] != 3:
            raise ModelError(
                f"Cannot use pixels {pixels_BHW3.dtype} {tuple(pixels_BHW3.shape)}",
                fix="Pass RGB bytes with the channels last: uint8 (B, H, W, 3).",
            )
        mean, std = self._moments_on(pixels_BHW3.device)
        x_B3HW = pixels_BHW3.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        return x_B3HW.div_(255).sub_(mean).div_(std)

    def standardise(self, x_B3HW: Tensor) -> Tensor:
        """Return (x - mean) / std for RGB in 0..1, in new memory: the second half of `normalise`."""
        mean, std = self._moments_on(x_B3HW.device)
        return x_B3HW.sub(mean).div_(std)

    def upsample(self, logits_BChw: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize a head's output to (H, W) = `size` as the model would: bilinear, with its `align_corners`."""
        if tuple(logits_BChw.shape[-2:]) == tuple(size):
            return logits_BChw
        return F.interpolate(logits_BChw, size=size, mode="bilinear", align_corners=self.align_corners)

    @property
    def training_heads(self) -> dict[str, HeadKind]:
        """The kinds of further heads, by name, that answer only in training mode."""
        return {}

    @property
    def deployed(self) -> "SegmentationModel":
        """The model of the trained weights, without heads that answer only in training mode."""
        return self

    @property
    def learnt_heads(self) -> tuple[str, ...]:
        """The names of the heads that have learnt something, as far as known."""
        return tuple(name for name in self.head_kinds if name not in self.untrained)

    @property
    def regressions(self) -> dict[str, RegressionHead]:
        """The numeric heads, by name."""
        return {name: kind for name, kind in self.head_kinds.items() if isinstance(kind, RegressionHead)}

    def check_taps(self, taps: Iterable[str]) -> None:
        """Raise ModelError for the first unknown tap, with the nearest name."""
        for tap in taps:
            if tap not in self.taps:
                raise ModelError(
                    f"Unknown tap {tap!r} of {self.spec}",
                    fix=suggest(tap, self.taps, f"Use one of {', '.join(self.taps)}."),
                )

    def adopt_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors of a weights file under this model's names, if other library versions use others."""
        return state

    def _moments_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and std as (3, 1, 1) on `device`, kept: a copy to the GPU per batch would synchronise."""
        moments = self._moments.get(device)
        if moments is None:
            mean = torch.tensor(self._mean, dtype=torch.float32, device=device).view(3, 1, 1)
            std = torch.tensor(self._std, dtype=torch.float32, device=device).view(3, 1, 1)
            moments = self._moments[device] = (mean, std)
        return moments


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode in a with block, so BatchNorm learns nothing. Then restore every module's mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _rgb(name: str, value: Iterable[float]) -> tuple[float, float, float]:
    numbers = tuple(float(v) for v in value)
    if len(numbers) != 3 or not all(math.isfinite(v) for v in numbers):
        raise ModelError(
            f"Invalid {name} {numbers}: give three finite numbers",
            fix="Give red, green and blue in 0..1, for example 0.485 0.456 0.406",
        )
    return numbers[0], numbers[1], numbers[2]
