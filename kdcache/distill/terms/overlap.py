"""Terms on labels only: the overlap of a prediction and the label of each class in an image."""

import numpy as np
import torch
from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, divide, wide
from kdcache_kernels.target_cells import resize


class Overlap(Term):
    """A base of loss terms that compare predictions and labels per image and class.

    Subclasses implement `of_classes`, which returns a loss for each image and class. They need no teacher. The loss is
    the mean over the classes in an image's label, then the mean over images with a labelled pixel. It does not depend
    on how a batch is divided among processes or accumulated parts. Void pixels never count. Gates and masks of teacher
    terms do not apply.
    """

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean of the classes' losses over the classes in an image's label, then over the labelled images.

        `count` is the denominator, 0-dimensional. None uses the batch's own number of labelled images. The method
        `of_classes` computes the loss of each class.
        """
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
        """Return the denominator of the loss: the number of images with a labelled pixel, 0-dimensional."""
        labelled_BHW = batch.rows.label < self.targets.num_classes
        return labelled_BHW.flatten(1).any(1).to(wide(batch.student.logits).dtype).sum()

    def of_classes(self, probability_BCP: Tensor, shown_BCP: Tensor, labelled_B1P: Tensor) -> Tensor:
        """Return the loss (B, C) of each image and class.

        The caller ignores classes that an image's label does not have.

        Args:
            probability_BCP: the student's probabilities at the P pixels of each image.
            shown_BCP: bool, True if the pixel's label is the class.
            labelled_B1P: bool, True if the pixel has a label.
        """
        raise NotImplementedError


class Dice(Overlap):
    """The loss term `dice`: 1 - 2 sum(p g) / (sum p + sum g) for each class in an image's label.

    The sums are over the image's labelled pixels. p is the student's probability of the class, and g is 1 if the
    pixel's label is the class, else 0. The loss of an image is the mean over the classes in its label. The loss of a
    batch is the mean over its images with a labelled pixel. Default weight 1.

    Source: Sudre et al. 2017, arXiv 1707.03237, equation 2. In the first version, Milletari et al. 2016, arXiv
        1606.04797, the denominator has squares.
    """

    kind = "dice"

    def of_classes(self, probability_BCP: Tensor, shown_BCP: Tensor, labelled_B1P: Tensor) -> Tensor:
        """Return 1 - Dice of each image and class, (B, C).

        Args:
            probability_BCP: the student's probabilities at the P pixels of each image.
            shown_BCP: bool, True if the pixel's label is the class.
            labelled_B1P: bool, True if the pixel has a label.
        """
        both_BC = (probability_BCP * shown_BCP).sum(2)
        either_BC = (probability_BCP * labelled_B1P).sum(2) + shown_BCP.sum(2)
        return 1 - 2 * both_BC / either_BC.masked_fill(either_BC == 0, 1)


class Lovasz(Overlap):
    """The loss term `lovasz`: the Lovasz extension of 1 - IoU for each class in an image's label.

    The loss is the mean over these classes, then the mean over images with a labelled pixel. So an image with only void
    does not count. Otherwise the loss equals the authors' code with `classes="present", per_image=True`. The term sorts
    the pixels of every class and keeps several tensors (B, C, H, W). Default weight 1.

    Source: Berman et al. 2018, arXiv 1705.08790, algorithm 1 and equation 12.
    """

    kind = "lovasz"

    def of_classes(self, probability_BCP: Tensor, shown_BCP: Tensor, labelled_B1P: Tensor) -> Tensor:
        """Return the Lovasz extension of 1 - IoU (B, C) of each image and class. Void pixels count in no class.

        Args:
            probability_BCP: the student's probabilities at the P pixels of each image.
            shown_BCP: bool, True if the pixel's label is the class.
            labelled_B1P: bool, True if the pixel has a label.
        """
        error_BCP = (shown_BCP.to(probability_BCP.dtype) - probability_BCP).abs()
        with torch.no_grad():
            # Void pixels come last, where they change no other pixel's weight.
            order_BCP = falling_order(error_BCP.masked_fill(~labelled_B1P, -1))
            shown_sorted_BCP = shown_BCP.gather(2, order_BCP).to(error_BCP.dtype)
            weight_BCP = torch.empty_like(error_BCP).scatter(2, order_BCP, jaccard_steps(shown_sorted_BCP))
        return (error_BCP * weight_BCP * labelled_B1P).sum(2)


def falling_order(error_BCP: Tensor) -> Tensor:
    """Return the indices (int64) that sort the last axis of a tensor (B, C, P), from the largest value on."""
    if error_BCP.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.argsort(-error_BCP.numpy(), axis=2))  # in a seventh of torch's time
    return error_BCP.argsort(dim=2, descending=True, stable=True)


def jaccard_steps(shown_BCP: Tensor) -> Tensor:
    """Return how much 1 - IoU rises when one pixel after the other becomes wrong: a rise per pixel, (B, C, P).

    The P pixels are sorted by error, from the largest to the smallest. `shown_BCP` is 1.0 if the pixel's label is the
    class, else 0.0.
    """
    total_BC1 = shown_BCP.sum(2, keepdim=True)
    intersection_BCP = total_BC1 - shown_BCP.cumsum(2)
    union_BCP = total_BC1 + (1 - shown_BCP).cumsum(2)
    jaccard_BCP = 1 - intersection_BCP / union_BCP
    return jaccard_BCP.diff(dim=2, prepend=torch.zeros_like(jaccard_BCP[..., :1]))
