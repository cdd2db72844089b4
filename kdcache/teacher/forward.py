"""One way to run a teacher: eval mode, no gradients, one precision."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kdcache.errors import ModelError
from kdcache.models import SegmentationModel

Precision = Literal["float32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def place(model: SegmentationModel, device: torch.device) -> None:
    """Make a model ready to teach: eval mode, on the device, weights in the channels-last order of its pixels."""
    model.eval().to(device).to(memory_format=torch.channels_last)


def teach(
    model: SegmentationModel,
    pixels_BHW3: Tensor,
    taps: Sequence[str],
    precision: Precision,
    device: torch.device,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, C, h, w) float32 at native stride and the tapped features, on `device`.

    Args:
        pixels_BHW3: uint8, on any device.
    """
    with (
        torch.inference_mode(),
        torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST),
    ):
        pixels = pixels_BHW3.to(device, non_blocking=True)
        output = model(model.normalise(pixels), taps)
    return output.logits.float(), output.features


def out_of_memory(batch_size: int, error: Exception) -> ModelError:
    """A full GPU, with the way out."""
    return ModelError(
        "a batch of the teacher must fit the device's memory",
        received=f"out of memory at batch size {batch_size}",
        remedy=f"use --batch-size {max(1, batch_size // 2)} or --device cpu",
    )


def not_finite(what: str, record: int, sample: str) -> ModelError:
    """A teacher that says NaN or infinity; -inf for a single class is finite once packed."""
    return ModelError(
        "a teacher's output must be finite",
        received=f"NaN or infinity in {what} of record {record}, {sample}",
        remedy="check the teacher's weights and normalisation; use --precision float32",
    )
