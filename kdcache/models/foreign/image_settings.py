"""Read what a model's image processor does to images, from transformers' file next to the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import ModelError
from kdcache.files import read_object
from kdcache.models.foreign.processor import Size

RGB = tuple[float, float, float]
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KNOWN = (
    *("do_rescale", "rescale_factor", "rescale_offset", "do_normalize", "image_mean", "image_std"),
    *("do_pad", "pad_size", "size", "do_flip_channel_order", "do_center_crop", "crop_size", "ensure_multiple_of"),
)
"""Settings of processors that kdcache reads."""
_OTHERWISE = {"do_color_quantize": "replaces colours by clusters", "do_grayscale": "makes images grey"}
"""Steps that no mean and std stand for."""


@dataclass(frozen=True)
class ImageSettings:
    """How images were prepared when a network was trained.

    Attributes:
        mean, std: to normalise RGB in 0 to 1. They include the rescaling of the network's image processor.
        multiple: height and width are multiples of this number of pixels.
        native_size: the (height, width) of the training images, or None if unknown.
        pads: True if training images were padded to `native_size`.
        channels: the order of colours that the first layer reads: `rgb` or `bgr`.
    """

    mean: RGB = _IMAGENET[0]
    std: RGB = _IMAGENET[1]
    multiple: int = 1
    native_size: Size | None = None
    pads: bool = False
    channels: str = "rgb"


def image_settings(folder: Path) -> tuple[ImageSettings, list[str]]:
    """Return how images are prepared for a model, as a file in its folder says, and notes for the user.

    The file is preprocessor_config.json, or else processor_config.json. Without both, the settings are ImageNet's, and
    a note says so.

    Raises: ModelError for steps other than scaling, normalising, resizing and padding.
    """
    nested = read_object(folder / "processor_config.json").get("image_processor")
    written = read_object(folder / "preprocessor_config.json") or (nested if isinstance(nested, Mapping) else {})
    if not written:
        note = (
            f"{folder} has no preprocessor_config.json: ImageNet's mean and std are used. --mean and --std change them"
        )
        return ImageSettings(), [note]
    settings = _defaults(written) | dict(written)
    for step, what in _OTHERWISE.items():
        if settings.get(step):
            raise ModelError(
                f"Cannot prepare images as {folder} asks: its processor {what} ({step} in preprocessor_config.json)",
                fix="Use another model, or a function of your own, FILE.py:FUNCTION, that does so itself.",
            )
    scale = 255 * float(settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale", True) else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    offset = 1.0 if settings.get("rescale_offset") else 0.0
    normalises = settings.get("do_normalize", "image_mean" in settings)
    mean, std = (_three(settings.get(f"image_{name}"), folder) for name in ("mean", "std"))
    if not normalises or mean is None or std is None:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    flips = bool(settings.get("do_flip_channel_order"))
    mean, std = (mean[::-1], std[::-1]) if flips else (mean, std)
    padded = _height_width(settings.get("pad_size")) if settings.get("do_pad") else None
    cropped = _height_width(settings.get("crop_size")) if settings.get("do_center_crop") else None
    return ImageSettings(
        mean=((mean[0] + offset) / scale, (mean[1] + offset) / scale, (mean[2] + offset) / scale),
        std=(std[0] / scale, std[1] / scale, std[2] / scale),
        multiple=int(settings.get("ensure_multiple_of") or 1),
        native_size=padded or cropped or _height_width(settings.get("size")),
        pads=padded is not None,
        channels="bgr" if flips else "rgb",
    ), []


def _defaults(written: Mapping[str, Any]) -> dict[str, Any]:
    """Return a processor's settings that its file leaves out: transformers' defaults."""
    import transformers

    name = str(written.get("image_processor_type") or written.get("feature_extractor_type") or "")
    kind = getattr(transformers, name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor"), None)
    found = {name: value for name in _KNOWN if (value := getattr(kind, name, None)) is not None}
    return found if kind is None else {"do_normalize": False} | found


def _three(value: Any, folder: Path) -> RGB | None:
    if value is None:
        return None
    numbers = tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * 3
    if len(numbers) != 3:
        raise ModelError(
            f"Cannot use the images that {folder} asks for: image_mean or image_std {value} has {len(numbers)} "
            "channels",
            fix="Use a model of RGB images.",
        )
    return numbers[0], numbers[1], numbers[2]


def _height_width(value: Any) -> Size | None:
    """Return the (height, width) of a size in a processor's file, or None if it limits one edge only."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, Mapping):
        return None
    if "shortest_edge" in value and value.get("shortest_edge") != value.get("longest_edge"):
        return None
    height, width = (value.get(edge) or value.get("longest_edge") for edge in ("height", "width"))
    return None if height is None or width is None else (int(height), int(width))
