"""Channel-wise distillation: where in the image each channel is strong."""

from typing import Any

from torch import Tensor, nn

from kdcache.distill.terms.base import MAXIMUM, Term, TermBatch, TermTargets, wide
from kdcache.distill.terms.features import Projected
from kdcache.distill.terms.on_cells import OnCells, family_for, options_of
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels import channel_loss


def images_counted(term: Term, batch: TermBatch) -> Tensor:
    """How many images have a pixel that counts, 0-dimensional."""
    counted_Bhw = term.cells(batch, term.grid(batch), wide(batch.logits)).counted
    return (counted_Bhw > 0).flatten(1).any(1).to(counted_Bhw.dtype).sum()


class ChannelLogits(OnCells):
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

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        maximum_Bhw = batch.stored[MAXIMUM] if MAXIMUM in self._arrays else None
        return channel_loss(*self.both_raw(batch), maximum_Bhw, **self.options(batch), count=count)

    def count(self, batch: TermBatch) -> Tensor:
        """The number of images in which any pixel counts, 0-dimensional."""
        return images_counted(self, batch)


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
        student_Bchw = self.projection(wide(batch.features[self._student_tap]))
        teacher_Bchw = self.standardised(batch.stored[self._arrays[0]], student_Bchw.dtype)
        options = options_of(self, batch, family_for(student_Bchw.dtype, self.impl))
        return channel_loss(student_Bchw, teacher_Bchw, **options, count=count)

    def count(self, batch: TermBatch) -> Tensor:
        """The number of images in which any pixel counts, 0-dimensional."""
        return images_counted(self, batch)
