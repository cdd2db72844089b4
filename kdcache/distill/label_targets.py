"""Labels in the teacher's place: the control that shows the effect of a loss without a teacher.

The one-hot label map of a batch is averaged over each cell of a grid, without void: the share of a cell's labelled
pixels that each class has. Its logarithm replaces the cache's target, so every term that reads logits or probabilities
computes with it as with a teacher's.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.distill.batch import SEGMENTATION, Batch
from kdcache.distill.target import Target
from kdcache_kernels.target_cells import area_mean
from kdcache_kernels.window import Size

LOG_FLOOR = -30.0
"""The log-probability of a class that a cell does not show: e^-30, exact in float16. So low that a temperature does not
smooth the labels: at T = 4 all absent of 19 classes together get 1 % of a cell."""


@dataclass(frozen=True)
class LabelTargets:
    """Targets made from the labels of each batch (the control). They replace an open cache in `DistillLoss`.

    Attributes:
        num_classes: the number of classes, C.
        view_size: (H, W) of the labels in pixels.
        grid: (h, w), the number of cells down and across that the labels are averaged over.
        ignore_index: the void class id.
        align_corners: False, because cells are areas.
        manifest: None, because there is no cache.
    """

    num_classes: int
    view_size: Size
    grid: Size
    ignore_index: int = 255
    align_corners: bool = False
    manifest: None = None

    @torch.no_grad()
    def replace_targets(self, batch: Batch, dtype: torch.dtype = torch.float32) -> Batch:
        """Return the batch with its labels as targets of `dtype`, float32 or float64.

        The targets lie over the student's image, so the batch loses its window, flip, inside, own and pasted fields.
        Pasted pixels already have their own labels.
        """
        log_share_BChw = self.shares(batch.label, dtype).log().clamp_min(LOG_FLOOR)
        return replace(
            batch,
            targets={SEGMENTATION: Target(log_share_BChw)},
            window=None,
            flip=None,
            inside=None,
            own=None,
            pasted=None,
        )

    def shares(self, label_BHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the share (B, C, h, w) of each class among the labelled pixels of each cell.

        Shares are 0 in a cell without labelled pixels. `label_BHW` holds class ids, and `dtype` is the result's.
        Memory: (B, C + 1, H, W) numbers.
        """
        ids_C11 = torch.arange(self.num_classes, device=label_BHW.device)[:, None, None]
        one_hot_BCHW = (label_BHW[:, None] == ids_C11).to(dtype)
        labelled_B1HW = (label_BHW != self.ignore_index)[:, None].to(dtype)
        labelled_B1hw = area_mean(labelled_B1HW, self.grid)
        return area_mean(one_hot_BCHW, self.grid) / labelled_B1hw.masked_fill(labelled_B1hw == 0, math.inf)
