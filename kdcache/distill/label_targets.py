"""Labels in the teacher's place: the control that shows what a loss does without a teacher.

The label map of a batch, one-hot, is averaged over the area of each cell of a grid, void left out: the share of a
cell's labelled pixels that each class has. Its logarithm stands where a store's target would, so every term that reads
logits or probabilities computes with it as it does with a teacher's.
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
    """Targets that are made from the labels of each batch; takes the place of an open cache in `DistillLoss`.

    Attributes:
        num_classes: C.
        view_size: (H, W) of the labels.
        grid: (h, w), the cells that lie over them: the store's, or those of the student's logits.
        manifest: None: there is no store.
    """

    num_classes: int
    view_size: Size
    grid: Size
    ignore_index: int = 255
    align_corners: bool = False
    manifest: None = None

    @torch.no_grad()
    def replace_targets(self, batch: Batch, dtype: torch.dtype = torch.float32) -> Batch:
        """Return the batch with its labels in the place of its targets.

        They show the student's image itself, so the batch has no window, nor what comes with one; pixels that were
        pasted carry their own labels.

        Args:
            dtype: float32, or float64 for a student of float64.
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
        """(B, C, h, w): the share of each cell's labelled pixels that a class has; 0 in a cell without any.

        Memory: (B, C + 1, H, W) numbers.
        """
        ids_C11 = torch.arange(self.num_classes, device=label_BHW.device)[:, None, None]
        one_hot_BCHW = (label_BHW[:, None] == ids_C11).to(dtype)
        labelled_B1HW = (label_BHW != self.ignore_index)[:, None].to(dtype)
        labelled_B1hw = area_mean(labelled_B1HW, self.grid)
        return area_mean(one_hot_BCHW, self.grid) / labelled_B1hw.masked_fill(labelled_B1hw == 0, math.inf)
