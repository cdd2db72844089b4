"""Channel-wise distillation: where in the image each channel is strong."""

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.distill.terms.base import Term, TermBatch, TermTargets, divide, wide
from kdcache.distill.terms.features import Projected
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels.target_cells import Cells


class ChannelLogits(Term):
    """`cwd` of logits: T^2 / C * sum over channels of KL(p_t || p_s), p = softmax of x / T over the positions.

    Mean over the images in which any pixel counts. A cell enters both distributions by its share of counted pixels
    times the gate: a distribution over positions cannot be weighted afterwards. Needs raw logits, for what is
    subtracted from a position changes them.

    Default weight 0.15, temperature 4 (sum over positions, mean over channels and images): a gradient of 0.8 to 1
    of CE's. Published: 3.
    Source: Shu et al. 2021, arXiv 2011.13256, section 3.
    """

    default_weight = 0.15
    default_temperature = 4.0

    def prepare(self, batch: TermBatch) -> None:
        if batch.target is not None:
            self.note_resize(batch.logits, batch.target.values)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        return channel_kl(self.temperature, *self.both_logits(batch), count)

    def count(self, batch: TermBatch) -> Tensor:
        """The number of images in which any pixel counts, 0-dimensional."""
        return images_counted(self.cells(batch, self.grid(batch), wide(batch.logits)))


class ChannelFeatures(Projected):
    """`cwd` of a tap: as of logits; a student of other channels is projected by a trained 1x1 convolution.

    Default weight 3, temperature 4: a gradient of 0.4 to 1.3 of CE's. Published: 50.
    """

    default_weight = 3.0
    default_temperature = 4.0

    def __init__(
        self, spec: TermSpec, targets: TermTargets, arrays: tuple[str, ...], *, student_channels: int, **others: Any
    ) -> None:
        super().__init__(spec, targets, arrays, student_channels=student_channels, **others)
        teacher_channels = others["teacher_channels"]
        # A bias would move all positions alike, which a softmax over them does not see.
        alike = student_channels == teacher_channels
        self.projection = nn.Identity() if alike else nn.Conv2d(student_channels, teacher_channels, 1, bias=False)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        return channel_kl(self.temperature, *self.both_features(batch), count)

    def count(self, batch: TermBatch) -> Tensor:
        """The number of images in which any pixel counts, 0-dimensional."""
        return images_counted(self.cells(batch, self.grid(batch), wide(batch.logits)))


def images_counted(cells: Cells) -> Tensor:
    """How many images have a pixel that counts, 0-dimensional."""
    return (cells.counted > 0).flatten(1).any(1).to(cells.counted.dtype).sum()


def channel_kl(
    temperature: float, student_Bchw: Tensor, teacher_Bchw: Tensor, cells: Cells, count: Tensor | None
) -> Tensor:
    """KL over the positions of each channel, mean over the channels, per image in which any pixel counts."""
    weight_B1n = cells.weight.flatten(1)[:, None]
    log_weight_B1n = torch.where(weight_B1n > 0, weight_B1n, 1).log()

    def log_p(x_Bchw: Tensor) -> Tensor:
        # A finite floor: an image without counted cells then has two equal distributions, where -inf would give NaN.
        logits_Bcn = x_Bchw.flatten(2) / temperature + log_weight_B1n
        return logits_Bcn.masked_fill(weight_B1n <= 0, -1e30).log_softmax(-1)

    log_teacher_Bcn, log_student_Bcn = log_p(teacher_Bchw), log_p(student_Bchw)
    kl_Bc = (log_teacher_Bcn.exp() * (log_teacher_Bcn - log_student_Bcn)).sum(-1)
    return temperature**2 * divide(kl_Bc.mean(1).sum(), images_counted(cells) if count is None else count)
