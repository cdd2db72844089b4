"""Terms on labels only: the overlap of a prediction and the label of each class in an image."""

import numpy as np
import torch
from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, divide, wide
from kdcache_kernels.target_cells import resize


class Overlap(Term):
    """A loss per image and class: mean over the classes in an image's label, then over labelled images.

    Dice and Lovasz are not sums over pixels, so each image is computed separately, whatever the processes and
    accumulated parts. Void pixels never count, and an image with only void does not count. Gates and masks of a
    teacher's terms do not apply.
    """

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean over labelled images of the mean over their classes of `of_classes`."""
        logits_BCHW = resize(wide(batch.student.logits), batch.rows.size, self.student_align_corners)
        probability_BCP = logits_BCHW.softmax(1).flatten(2)
        label_B1P = batch.rows.label.flatten(1)[:, None]
        shown_BCP = label_B1P == torch.arange(logits_BCHW.shape[1], device=label_B1P.device)[:, None]
        labelled_B1P = shown_BCP.any(1, keepdim=True)
        present_BC = shown_BCP.any(2)
        loss_BC = torch.where(present_BC, self.of_classes(probability_BCP, shown_BCP, labelled_B1P), 0)
        loss_B = divide(loss_BC.sum(1), present_BC.sum(1).to(loss_BC.dtype))
        return divide(loss_B.sum(), self.count(batch) if count is None else count)

    def count(self, batch: TermBatch) -> Tensor:
        """Return the number of images with a labelled pixel, 0-dimensional."""
        labelled_BHW = batch.rows.label < self.targets.num_classes
        return labelled_BHW.flatten(1).any(1).to(wide(batch.student.logits).dtype).sum()

    def of_classes(self, probability_BCP: Tensor, shown_BCP: Tensor, labelled_B1P: Tensor) -> Tensor:
        """Return the loss (B, C) of each class. Values of classes that a label does not show are ignored.

        Args:
            probability_BCP: the student's probabilities.
            shown_BCP: bool, whether a pixel's label is the class.
            labelled_B1P: bool, whether a pixel has a label.
        """
        raise NotImplementedError


class Dice(Overlap):
    """`dice`: 1 - 2 sum(p g) / (sum p + sum g) over the labelled pixels of an image, g the one-hot label.

    Classes that an image's label does not show are left out. Their probability reduces the other classes'.

    Default weight 1.
    Source: Milletari et al. 2016, arXiv 1606.04797, whose denominator has squares; as written by Sudre et al. 2017,
    arXiv 1707.03237, equation 2.
    """

    kind = "dice"

    def of_classes(self, probability_BCP: Tensor, shown_BCP: Tensor, labelled_B1P: Tensor) -> Tensor:
        """Return 1 - Dice (B, C) of each class."""
        both_BC = (probability_BCP * shown_BCP).sum(2)
        either_BC = (probability_BCP * labelled_B1P).sum(2) + shown_BCP.sum(2)
        return 1 - 2 * both_BC / either_BC.masked_fill(either_BC == 0, 1)


class Lovasz(Overlap):
    """`lovasz`: the Lovasz extension of 1 - IoU at the errors |g - p| of an image's labelled pixels.

    It equals the authors' code with `classes="present", per_image=True`, except that an image with only void does not
    count. It sorts the pixels of every class and keeps several tensors of label size times classes.

    Default weight 1.
    Source: Berman et al. 2018, arXiv 1705.08790, algorithm 1 and equation 12.
    """

    kind = "lovasz"

    def of_classes(self, probability_BCP: Tensor, shown_BCP: Tensor, labelled_B1P: Tensor) -> Tensor:
        """Return the Lovasz extension of 1 - IoU (B, C) of each class."""
        error_BCP = (shown_BCP.to(probability_BCP.dtype) - probability_BCP).abs()
        with torch.no_grad():
            # Void pixels come last, where they change no other pixel's weight.
            order_BCP = falling_order(error_BCP.masked_fill(~labelled_B1P, -1))
            shown_sorted_BCP = shown_BCP.gather(2, order_BCP).to(error_BCP.dtype)
            weight_BCP = torch.empty_like(error_BCP).scatter(2, order_BCP, jaccard_steps(shown_sorted_BCP))
        return (error_BCP * weight_BCP * labelled_B1P).sum(2)


def falling_order(error_BCP: Tensor) -> Tensor:
    """Return the positions of a map's values along its last axis, from the largest value on."""
    if error_BCP.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.argsort(-error_BCP.numpy(), axis=2))  # in a seventh of torch's time
    return error_BCP.argsort(dim=2, descending=True, stable=True)


def jaccard_steps(shown_BCP: Tensor) -> Tensor:
    """Return how much 1 - IoU rises with each further wrong pixel, (B, C, P), for pixels by falling error.

    `shown_BCP` is 1 if the pixel's label is the class, else 0.
    """
    total_BC1 = shown_BCP.sum(2, keepdim=True)
    intersection_BCP = total_BC1 - shown_BCP.cumsum(2)
    union_BCP = total_BC1 + (1 - shown_BCP).cumsum(2)
    jaccard_BCP = 1 - intersection_BCP / union_BCP
    return jaccard_BCP.diff(dim=2, prepend=torch.zeros_like(jaccard_BCP[..., :1]))
