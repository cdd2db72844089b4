"""Networks of segmentation_models_pytorch as `smp:ARCH-ENCODER` (`pip install '.[smp]'`), at their native stride.

    smp:unet-resnet18, smp:deeplabv3plus-resnet101, smp:segformer-mit_b0, smp:upernet-tu-convnext_tiny, ...

Encoder, decoder and head are the library's modules under their own names, so its state dicts load directly. Only the
head's last upsampling is left out. NAMES lists some useful pairs, but any pair that the library can build works. The
library is imported when a model is built.
"""

import difflib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.models.architectures.hub import not_downloaded
from kdcache.models.foreign.processor import Processor
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.tasks import SEGMENTATION

NAMES = (
    "unet-resnet18",
    "unet-resnet34",
    "unet-efficientnet-b0",
    "unetplusplus-resnet34",
    "fpn-resnet50",
    "pspnet-resnet50",
    "pan-resnet34",
    "upernet-resnet50",
    "deeplabv3plus-mobilenet_v2",
    "deeplabv3plus-resnet50",
    "deeplabv3plus-resnet101",
    "segformer-mit_b0",
)


_SIMPLE = ("unet", "fpn")
"""Architectures that take every encoder with a pyramid of features."""


class SmpModel(SegmentationModel):
    """A model of segmentation_models_pytorch, of any architecture except DPT.

    Taps: `stage1` (stride 2), `stage2` (stride 4) and so on are the encoder's features. A Mix Transformer has no
    `stage1`. `head` is the decoder's output, which the classifier reads.

    Args:
        name: the part of a spec after the colon, such as `unet-resnet18`: architecture and encoder.
        num_classes: the number of classes.
        network: the network of the library, whose parts become attributes.
    """

    encoder: nn.Module
    decoder: nn.Module
    segmentation_head: nn.Sequential

    def __init__(self, name: str, num_classes: int, network: Any) -> None:
        classifier, upsampling = network.segmentation_head[0], network.segmentation_head[1]
        stride = round(getattr(upsampling, "scale_factor", 1))
        stages = [f"stage{i}" for i, channels in enumerate(network.encoder.out_channels) if i and channels]
        super().__init__(
            spec=f"smp:{name}",
            num_classes=num_classes,
            stride=stride,
            taps=(*stages, "head"),
            align_corners=stride > 1,  # without an upsampling of its own, as labels are resized
            backbone_prefix="encoder.",
            classifier_keys=classifier_keys(name),
        )
        assert classifier.out_channels == num_classes
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.segmentation_head = network.segmentation_head
        if network.requires_divisible_input_shape:
            self.processor = Processor(multiple=int(network.encoder.output_stride))

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the logits (B, C, h, w) at the native stride, and the features of the given taps.

        `x_B3HW` is normalised float RGB. Raises: ModelError for an unknown tap or an image size that the network does
        not take.
        """
        self.check_taps(taps)
        self.check_size((x_B3HW.shape[-2], x_B3HW.shape[-1]))
        features = self.encoder(x_B3HW)
        by_tap = {f"stage{i}": feature for i, feature in enumerate(features)}
        by_tap["head"] = self.decoder(list(features))
        return Outputs({SEGMENTATION: self.segmentation_head[0](by_tap["head"])}, {tap: by_tap[tap] for tap in taps})


def classifier_keys(name: str) -> tuple[str, ...]:
    """Return the prefixes, in the state dict, of the layers whose output channels are the classes.

    `name` is the part of a spec after the colon, such as `unet-resnet18`.
    """
    return ("segmentation_head.0.",)


def check_name(name: str) -> None:
    """Check that the library has both parts of `name`: the architecture and the encoder.

    `name` is the part of a spec after the colon, such as `unet-resnet18`.

    Raises: ModelError with the nearest names.
    """
    import segmentation_models_pytorch as library
    import timm

    architectures = [a for a in library.MODEL_ARCHITECTURES_MAPPING if a != "dpt"]
    encoders = list(library.encoders.get_encoder_names())
    architecture, _, encoder = name.partition("-")
    if architecture == "dpt":
        raise ModelError(
            f"Cannot use smp:{name}: its transformer takes images of one size",
            fix=f"Use another architecture: {', '.join(architectures)}",
        )
    has_encoder = encoder in encoders or (encoder.startswith("tu-") and timm.is_model(encoder.removeprefix("tu-")))
    if architecture in architectures and has_encoder:
        return
    better = architecture if architecture in architectures else _nearest(architecture, architectures, "unet")
    if encoder.startswith("tu-"):
        near = _nearest(encoder.removeprefix("tu-"), timm.list_models(), "resnet18")
        hint = encoder if has_encoder else f"tu-{near}"
    else:
        hint = encoder if has_encoder else _nearest(encoder, encoders, "resnet18")
    if not encoder:
        problem, choice = f"Missing encoder in 'smp:{name}'", "Write smp:ARCH-ENCODER."
    elif architecture not in architectures:
        problem = f"Unknown architecture {architecture!r} in 'smp:{name}'"
        choice = f"Architectures: {', '.join(architectures)}."
    else:
        problem = f"Unknown encoder {encoder!r} in 'smp:{name}'"
        choice = "Encoders of timm have the prefix tu-."
    raise ModelError(problem, fix=f"Did you mean smp:{better}-{hint}? {choice}")


def build(name: str, num_classes: int) -> SegmentationModel:
    """Build a model of segmentation_models_pytorch with random weights. Nothing is downloaded.

    `name` is the part of a spec after the colon, such as `unet-resnet18`.

    Raises: ModelError if the architecture or the encoder is unknown, or if they do not fit together.
    """
    check_name(name)
    return SmpModel(name, num_classes, _create(name, num_classes, None))


def default_state(name: str, whole: bool) -> dict[str, Tensor]:
    """Return the encoder's ImageNet weights: name -> tensor. They are downloaded once.

    The weights of the Mix Transformers (`mit_b0` to `mit_b5`) are NVIDIA's, for research only.

    Args:
        name: the part of a spec after the colon, such as `unet-resnet18`.
        whole: True asks for encoder and head, False for the encoder only. It changes nothing, because only encoders'
            weights are published.
    Raises: ModelError if they cannot be downloaded.
    """
    check_name(name)
    encoder = name.partition("-")[2]
    weights: Any = True if encoder.startswith("tu-") else "imagenet"
    try:
        network = _create(name, 1, weights)
    except ModelError:
        raise
    except Exception as error:  # the hub's own errors, those of its HTTP client, OSError
        raise not_downloaded(f"smp-hub/{encoder}.imagenet", error) from error
    return {f"encoder.{key}": value for key, value in network.encoder.state_dict().items()}


def default_moments(name: str) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of RGB in 0 to 1 that the encoder's weights were trained with.

    The weights are the ImageNet weights that smp downloads. `name` is the part of a spec after the colon, such as
    `unet-resnet18`.

    Raises: ModelError if they were trained on other channels than red, green and blue, or cannot be looked up.
    """
    from segmentation_models_pytorch.encoders import get_preprocessing_params

    encoder = name.partition("-")[2]
    try:
        published = get_preprocessing_params(encoder)
    except Exception as error:
        raise not_downloaded(f"smp-hub/{encoder}.imagenet", error) from error
    if published["input_space"] != "RGB":
        raise ModelError(
            f"Cannot use the weights of {encoder}: it sees {published['input_space']}, not RGB",
            fix="Use another encoder.",
        )
    top = max(published["input_range"])
    return [v / top for v in published["mean"]], [v / top for v in published["std"]]


def _create(name: str, num_classes: int, encoder_weights: Any) -> Any:
    import segmentation_models_pytorch as library

    architecture, _, encoder = name.partition("-")
    try:
        return library.create_model(architecture, encoder, encoder_weights=encoder_weights, classes=num_classes)
    except (ValueError, KeyError, NotImplementedError, AssertionError) as error:
        reason = str(error.args[0] if error.args else error).splitlines()[0]
        raise ModelError(
            f"Cannot build smp:{name}: {reason}",
            fix=f"Use another encoder, for example smp:{architecture}-resnet18"
            + ("." if architecture in _SIMPLE else f", or another architecture: smp:unet-{encoder}"),
        ) from error


def _nearest(name: str, names: Sequence[str], fallback: str) -> str:
    return next(iter(difflib.get_close_matches(name, names, n=1)), fallback)
