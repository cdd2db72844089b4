"""The one way to run a teacher: eval mode, no gradients, one precision."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kdcache.errors import ModelError
from kdcache.faults import naming_network
from kdcache.models import Outputs, SegmentationModel
from kdcache.tasks import SEGMENTATION
from kdcache_kernels.window import area_matrix

Precision = Literal["float32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def place(model: SegmentationModel, device: torch.device) -> None:
    """Prepare a model to predict: eval mode, on the device, weights in the channels-last order of its pixels."""
    model.eval().to(device).to(memory_format=torch.channels_last)


def teach(
    model: SegmentationModel,
    pixels_BHW3: Tensor,
    taps: Sequence[str],
    precision: Precision,
    device: torch.device,
    grid: tuple[int, int] | None = None,
) -> Outputs:
    """Return the teacher's heads (B, C, h, w) float32 at native stride and the tapped features, on `device`.

    Segmentation has logits. A regression has its values in the head's unit, after the nonlinearity. `pixels_BHW3` are
    uint8, on any device. `grid` (h, w) is coarser than the teacher's own, and its probabilities are averaged to it.

    Raises: ModelError that names the network, for an error in its code.
    """
    with torch.inference_mode(), naming_network():
        with torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            pixels = pixels_BHW3.to(device, non_blocking=True)
            output = model(model.normalise(pixels), taps)
        heads = {name: head.float() for name, head in output.heads.items()}
        heads |= {name: kind.values(heads[name]) for name, kind in model.regressions.items()}
        if grid is not None:
            heads[SEGMENTATION] = coarser(heads[SEGMENTATION], grid)
        return Outputs(heads, output.features)


def coarser(logits_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return logits of the mean probabilities in each cell of a coarser grid, (B, C, *grid) float32.

    A teacher at 288x384 with targets on the grid of 144x192 (CamVid, 34 images) has KL 0.012 nats to its own grid.
    Antialiased logits have 0.019 and mean logits 0.013. Of the three, it also fits the labels best. The
    mean of the log-sum-exp is added back, so raw logits keep about their scale.
    """
    if tuple(logits_BChw.shape[-2:]) == tuple(grid):
        return logits_BChw
    logits = logits_BChw.float()
    mass_B1hw = logits.logsumexp(1, keepdim=True)
    p_BChw = area_mean((logits - mass_B1hw).exp(), grid)
    return p_BChw.clamp(min=torch.finfo(torch.float32).tiny).log() + area_mean(mass_B1hw, grid)


def area_mean(x_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return means over the cells of a coarser grid, (B, C, *grid), weighted by the overlap of finer cells."""
    sizes = zip(grid, x_BChw.shape[-2:], strict=True)
    rows_ih, columns_jw = (area_matrix(coarse, fine, x_BChw) for coarse, fine in sizes)
    return rows_ih @ x_BChw @ columns_jw.mT


def out_of_memory(batch_size: int) -> ModelError:
    """Return the error for a full GPU, with the batch size to try."""
    return ModelError(
        f"Out of memory: the teacher's forward pass at batch size {batch_size}",
        fix=f"Use --batch-size {max(1, batch_size // 2)} or --device cpu",
    )


def not_finite(what: str, record: int, sample: str) -> ModelError:
    """Return the error for NaN or infinite outputs. -inf for a single class is fine, and finite once packed."""
    return ModelError(
        f"NaN or infinity in {what} of record {record}, {sample}",
        fix="Check the teacher's weights and normalisation, or use --precision float32",
    )
