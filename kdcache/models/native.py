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
        heads: name -> (B, C, h, w) at the head's native stride, before the last resize. `segmentation` has logits.
            `depth` has numbers that the head's nonlinearity turns into depth (see `kdcache.heads.values_of`).
        features: tap -> (B, c, h', w') for the requested taps.
    """

    heads: dict[str, Tensor]
    features: dict[str, Tensor]

    @property
    def logits(self) -> Tensor:
        """The logits (B, C, h, w) of segmentation. Raises: ModelError if the model has no segmentation head."""
        if SEGMENTATION not in self.heads:
            raise ModelError(
                f"No logits: the model has {', '.join(self.heads) or 'no head'}, and no head {SEGMENTATION}",
                fix=f"Use a model that has a head {SEGMENTATION}.",
            )
        return self.heads[SEGMENTATION]


@dataclass(frozen=True)
class LoadReport:
    """The result of loading weights into a model. All fields but the last two are names of tensors in the state dict.

    Attributes:
        loaded: the tensors that were copied.
        missing: counters of BatchNorm that the weights do not have. They do not matter.
        unexpected: tensors of an image classifier's head, which are left out if its backbone is loaded.
        unused_auxiliary: tensors of auxiliary heads that the model does not have.
        reinitialised: tensors that keep their random values.
        class_names: the class names stored with the weights, in the order of the class ids, or ().
        notes: notes for the user about the weights file.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()  # only counters that do not matter (num_batches_tracked)
    unexpected: tuple[str, ...] = ()  # of an image classifier's head, dropped when its backbone is taken
    unused_auxiliary: tuple[str, ...] = ()  # auxiliary heads, which serve training only
    reinitialised: tuple[str, ...] = ()  # left at their random initialisation
    class_names: tuple[str, ...] = ()  # that came with the weights, one for each class; () where they are not known
    notes: tuple[str, ...] = ()  # what a user should know of the file


class SegmentationModel(nn.Module):
    """A network that maps normalised pixels to logits (and other heads) at its native stride, and to features.

    Subclasses implement `forward`. The attributes are not in the state dict, so a subclass decides the names in it.

    Attributes:
        spec: the model's spec, as `build_model` was given it.
        num_classes: the number of classes, or 0 without a segmentation head.
        head_kinds: the heads: name -> kind. The argument None gives a segmentation head only.
        untrained: the names of heads that still have random weights. They are not evaluated.
        stride: the native stride in pixels, rounded.
        align_corners: the flag of the heads' last bilinear resize.
        taps: the names of the available features. The last is usually the most useful.
        backbone_prefix: the prefix of the backbone's tensors in the state dict, or '' if unknown.
        classifier_keys: prefixes, in the state dict, of the layers whose output channels are the classes. () if
            unknown.
        load_report: what `build_model` loaded. None if the weights are random.
        probe_size: the (height, width) of an image that the network takes.
        processor: what the network expects of its images, except for mean and std.
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
        default = {SEGMENTATION: CategoricalHead(num_classes)}
        self.head_kinds: dict[str, HeadKind] = dict(default if head_kinds is None else head_kinds)
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
        """Return the heads' outputs at their native stride, and the requested features.

        Args:
            x_B3HW: normalised float RGB (see `normalise`).
            taps: names in `self.taps`, whose features to return.
        Returns: `heads`: name -> (B, C, h, w). `features`: tap -> (B, c, h', w').
        Raises: ModelError for an unknown tap.
        """
        raise NotImplementedError

    @property
    def mean(self) -> tuple[float, float, float]:
        """The mean of RGB in 0 to 1 that is subtracted from images. The default is ImageNet's."""
        return self._mean

    @mean.setter
    def mean(self, value: Iterable[float]) -> None:
        """Set the mean of RGB that is subtracted from images. Raises: ModelError unless it has three finite numbers."""
        self._mean = _rgb("mean", value)
        self._moments = {}

    @property
    def std(self) -> tuple[float, float, float]:
        """The standard deviation of RGB in 0 to 1 that images are divided by. The default is ImageNet's."""
        return self._std

    @std.setter
    def std(self, value: Iterable[float]) -> None:
        """Set the standard deviation of RGB. Raises: ModelError unless `value` is three finite numbers above 0."""
        std = _rgb("std", value)
        if min(std) <= 0:
            raise ModelError(f"Invalid std {std}: it must be above 0", fix="Give std of RGB in 0..1.")
        self._std = std
        self._moments = {}

    @property
    def multiple(self) -> int:
        """The number that height and width of the images must be multiples of, in pixels."""
        return self.processor.multiple

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """The only (height, width) of images that the network takes, or None if it takes several sizes."""
        return self.processor.fixed_size

    @property
    def probed_taps(self) -> tuple[str, ...]:
        """The taps whose features are in the fingerprint of a teacher without heads. () for a model with heads."""
        return () if self.head_kinds else self.taps[-1:]

    def see_as(self, *models: "SegmentationModel") -> None:
        """Let this model take only images of sizes that all given models take."""
        self.processor = Processor.of_all([model.processor for model in models])
        self.probe_size = next((m.probe_size for m in models if m.fixed_size is not None), models[0].probe_size)

    def check_size(self, size: tuple[int, int], flag: str = "--size") -> None:
        """Check that the network takes images of this (height, width).

        `flag` names the setting in the error. Raises: ModelError with the nearest size that the network takes.
        """
        near = self.processor.nearest(size)
        if tuple(size) != near:
            raise ModelError(
                f"{self.spec} cannot take images of {int(size[0])}x{int(size[1])}: it takes {self.processor.takes}",
                fix=f"Use {flag} {near[0]}x{near[1]}.",
            )

    def normalise(self, pixels_BHW3: Tensor) -> Tensor:
        """Return the network's input for uint8 RGB pixels: (pixels / 255 - mean) / std.

        Args:
            pixels_BHW3: uint8 (B, H, W, 3), on any device.
        Returns: float32 (B, 3, H, W) on the same device, in channels_last memory format.
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
        """Return (x - mean) / std for float RGB in 0 to 1, (B, 3, H, W), as a new tensor."""
        mean, std = self._moments_on(x_B3HW.device)
        return x_B3HW.sub(mean).div_(std)

    def upsample(self, logits_BChw: Tensor, size: tuple[int, int]) -> Tensor:
        """Return a head's output (B, C, h, w) resized to `size`, (H, W): bilinear, with the model's `align_corners`."""
        if tuple(logits_BChw.shape[-2:]) == tuple(size):
            return logits_BChw
        return F.interpolate(logits_BChw, size=size, mode="bilinear", align_corners=self.align_corners)

    @property
    def training_heads(self) -> dict[str, HeadKind]:
        """The heads that return an output in training mode only: name -> kind."""
        return {}

    @property
    def deployed(self) -> "SegmentationModel":
        """The model without the heads that are used in training only. A run saves the weights of this model."""
        return self

    @property
    def learnt_heads(self) -> tuple[str, ...]:
        """The names of the heads that have been trained: all heads that are not in `untrained`."""
        return tuple(name for name in self.head_kinds if name not in self.untrained)

    @property
    def regressions(self) -> dict[str, RegressionHead]:
        """The numeric heads, such as depth: name -> kind."""
        return {name: kind for name, kind in self.head_kinds.items() if isinstance(kind, RegressionHead)}

    def check_taps(self, taps: Iterable[str]) -> None:
        """Check that the model has these taps. Raises: ModelError for an unknown one, with the nearest name."""
        for tap in taps:
            if tap not in self.taps:
                raise ModelError(
                    f"Unknown tap {tap!r} of {self.spec}",
                    fix=suggest(tap, self.taps, f"Use one of {', '.join(self.taps)}."),
                )

    def adopt_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors `state` of a weights file (name -> tensor), renamed to this model's names.

        Other versions of a library may name the same tensors otherwise.
        """
        return state

    def _moments_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and std as (3, 1, 1) on `device`. They are kept, because a copy to the GPU would wait for it."""
        moments = self._moments.get(device)
        if moments is None:
            mean = torch.tensor(self._mean, dtype=torch.float32, device=device).view(3, 1, 1)
            std = torch.tensor(self._std, dtype=torch.float32, device=device).view(3, 1, 1)
            moments = self._moments[device] = (mean, std)
        return moments


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode in a with block. Afterwards each of its modules gets its earlier mode back."""
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
