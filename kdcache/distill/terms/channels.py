"""Channel-wise distillation: where in the image each channel is strong."""

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.distill.terms.base import MAXIMUM, Term, TermBatch, TermTargets, wide
from kdcache.distill.terms.features import Projected
from kdcache.distill.terms.on_cells import OnCells, divergence, mean_of, seen_on_cells
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels.topk import compute_dtype


def images_counted(term: Term, batch: TermBatch) -> Tensor:
    """How many images have a pixel that counts, 0-dimensional."""
    counted_Bhw = term.cells(batch, term.grid(batch), wide(batch.logits)).counted
    return _images_of(counted_Bhw)


def _images_of(counted_Bhw: Tensor) -> Tensor:
    return (counted_Bhw > 0).flatten(1).any(1).to(counted_Bhw.dtype).sum()


def compare_channels(
    term: Term, batch: TermBatch, student_BCxx: Tensor, teacher_BChw: Tensor, count: Tensor | None
) -> Tensor:
    """Return T^2 / C * sum over channels of KL(p_t || p_s) over the cells, mean over the images that count.

    Args:
        student_BCxx, teacher_BChw: of equal channels, each on its own grid.
        count: of images.
    """
    seen = seen_on_cells(term, batch, student_BCxx, teacher_BChw)
    counted_Bhw, weight_Bhw = seen.cells
    log_t, log_s = (_over_cells(x, weight_Bhw) for x in (seen.teacher, seen.student))
    # A gate that is not finite is no weight above 0: `_over_cells` would leave it out without a word.
    spoilt = seen.spoilt | (~weight_Bhw.isfinite() & (counted_Bhw > 0)).any()
    total = divergence(log_t, log_s).sum(-1).mean(1).sum()
    count = _images_of(counted_Bhw) if count is None else count
    return term.temperature**2 * mean_of(total, count, spoilt, student_BCxx)


def _over_cells(logits_BChw: Tensor, weight_Bhw: Tensor) -> Tensor:
    """(B, C, h w): log-probabilities over the cells of each class and image; a cell enters by its weight above 0."""
    weight_B1n = weight_Bhw.flatten(1)[:, None]
    logits_BCn = logits_BChw.flatten(2) + torch.where(weight_B1n > 0, weight_B1n, 1).log()
    # A finite floor: an image without counted cells then has two equal distributions, where -inf would give NaN.
    return logits_BCn.masked_fill(weight_B1n <= 0, -1e30).log_softmax(-1)


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
        assert batch.target is not None  # by `reads_target`; all classes are kept, by `check_terms`
        teacher_BChw = batch.target.values.to(compute_dtype(batch.logits.dtype))
        if MAXIMUM in self._arrays:
            teacher_BChw = teacher_BChw + batch.stored[MAXIMUM][:, None].to(teacher_BChw.dtype)
        return compare_channels(self, batch, batch.logits, teacher_BChw, count)

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
        return compare_channels(self, batch, student_Bchw, teacher_Bchw, count)

    def count(self, batch: TermBatch) -> Tensor:
        """The number of images in which any pixel counts, 0-dimensional."""
        return images_counted(self, batch)
