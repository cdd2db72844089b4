"""Terms of a depth head: against labels, or against a teacher's stored depth.

The student's raw output is resized to the label's size, bilinear, then becomes metres (`kdcache.heads`). A label is
valid if it is between 0.001 m and the head's `max_depth`. A teacher's map lies on its own cells and is dense. It is
sampled bilinearly at the label's pixels, through window and flip like logits, in the space in which its head resizes:
values become raw output, are resampled, and become values again. A cell with a value that is not finite is invalid, and
so is a pixel that reads it. Metres are divided by the zoom of a window that looks nearer than the teacher's view.
Values beyond the student's range are clipped to it, like predictions. Labels beyond it do not count.

A gate and the void of segmentation labels concern only classes. These terms count every pixel inside the view that
shows the image. Each is the mean over the images that have a valid pixel, except `depth-l1`, which is the mean over all
valid pixels.

Default weights give a gradient over the parameters that both heads share of about CE's. The medians are 1.57 (l1), 1.32
(berhu), 0.62 (silog), 0.60 (gradient) and 0.65 (ssi) times it, of nine measurements each, which differ by a factor of
three (exact labels of scenes, 26 m on average; steps 51, 151 and 651 of kdcache:tiny+depth that learnt by silog, three
seeds). The errors of the first two are in metres, so scenes with other depths need other weights.
"""

from typing import Any

import torch
from torch import Tensor

from kdcache.distill import depth
from kdcache.distill.batch import Batch, neighbours
from kdcache.distill.terms.base import Term, TermBatch, TermSetup, divide, grid_of, wide
from kdcache.heads import RegressionHead, clip, raw_of
from kdcache.settings import terms as specs
from kdcache.tasks import DEPTH, METRES
from kdcache_kernels.target_cells import resample, resize
from kdcache_kernels.window import Size, view_positions

MIN_DEPTH = 1e-3
"""The smallest depth in metres that counts, of labels, teachers and students: logarithms and inverses stay finite."""


class DepthTerm(Term):
    """A base of loss terms between two depth maps. Subclasses implement `of_images`, the loss of each image.

    The student's map is compared with a reference: the label, or the teacher's map. A pixel is valid if it shows the
    image, not padding, and its reference is known. A label must also be at least 0.001 m, and at most the student's
    largest depth.

    Attributes:
        student: the kind of the student's depth head.
        teacher: the kind of the cache's depth head. None if depth is compared with labels.
    """

    reads_shown = True

    def __init__(self, spec: specs.Depth, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        student = setup.student_heads[DEPTH]
        assert isinstance(student, RegressionHead), "check_student refuses another kind"
        self.student, self.teacher, self.teacher_align_corners = student, None, False
        if spec.reads_teacher:
            self.teacher = stored_head(setup.targets.manifest, DEPTH)
            self.teacher_align_corners = setup.targets.manifest.heads[DEPTH].align_corners

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean loss over the images with a valid pixel, 0-dimensional.

        The subclass's method `of_images` computes the loss of each image. `count` is the denominator, 0-dimensional.
        None uses the number of images with a valid pixel in `batch`.
        """
        raw_B1HW = resize(wide(batch.student.heads[DEPTH]), batch.rows.size, self.student_align_corners)
        prediction_BHW = self.compared(self.student.values(raw_B1HW)[:, 0], self.student)
        reference_BHW, mask_BHW = self._reference(batch, prediction_BHW.dtype)
        weight_B = self.image_weight(mask_BHW, prediction_BHW.dtype)
        total = (weight_B * self.of_images(prediction_BHW, reference_BHW, mask_BHW)).sum()
        return divide(total, weight_B.sum() if count is None else count.to(total.dtype))

    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of the loss: the number of images with a valid pixel, 0-dimensional.

        For `depth-l1` it is the number of valid pixels.
        """
        dtype = wide(batch.student.logits).dtype
        return self.image_weight(self._reference(batch, dtype)[1], dtype).sum()

    def image_weight(self, mask_BHW: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight (B,) of each image's loss in the mean: 1 with a valid pixel, 0 without one.

        `mask_BHW` is True at valid pixels. `dtype` is the result's.
        """
        return mask_BHW.flatten(1).any(1).to(dtype)

    def compared(self, values_BHW: Tensor, head: RegressionHead | None) -> Tensor:
        """Convert values (B, H, W) to the quantity that is compared: metres of at least `MIN_DEPTH`.

        `head` is the kind of head that the values come from, or None for labels.
        """
        return clip(values_BHW, MIN_DEPTH, None)

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the loss (B,) of each image, 0 for an image without a valid pixel.

        Args:
            prediction_BHW: the student's depth from `compared`: metres, unless a subclass converts them. Only it gets a
                gradient.
            reference_BHW: depth of the labels or the teacher, in the same unit.
            mask_BHW: bool, True for valid pixels.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _reference(self, batch: TermBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the depth map to compare the student with, and the bool mask of its valid pixels: (B, H, W) each."""
        if self.teacher is None:
            values_BHW = batch.rows.labels[DEPTH]
            mask_BHW = (values_BHW >= MIN_DEPTH) & (values_BHW <= (self.student.max_depth or torch.inf))
        else:
            values_BHW, mask_BHW = self._taught(batch.rows, batch.rows.size, dtype)
            if batch.rows.own is not None:
                values_BHW, mask_BHW = self._with_pasted(values_BHW, mask_BHW, batch.rows, dtype)
        if batch.shown is not None:
            mask_BHW = mask_BHW & batch.shown
        return self.compared(values_BHW.to(dtype), self.teacher), mask_BHW

    def _with_pasted(
        self, values_BHW: Tensor, mask_BHW: Tensor, rows: Batch, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return a teacher's map and its mask, with the pasted samples' map and mask at pasted pixels."""
        assert rows.own is not None, "samples were pasted"
        if rows.pasted is None:
            others = neighbours(values_BHW), neighbours(mask_BHW)
        elif self.spec.head not in (rows.pasted.targets or {}):  # nothing is known of what was pasted
            return values_BHW, mask_BHW & rows.own
        else:
            others = self._taught(rows.pasted, rows.size, dtype)
        return torch.where(rows.own, values_BHW, others[0]), torch.where(rows.own, mask_BHW, others[1])

    def _taught(self, batch: Batch, size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the teacher's map over the student's image of `size`, (B, H, W), and the mask of its valid pixels."""
        assert self.teacher is not None, "only against a teacher"
        assert batch.targets is not None, "a batch has the targets of its terms (check_heads)"
        values_B1hw = wide(batch.targets[DEPTH].values).to(dtype)
        raw_B1hw = raw_of(_above_zero(values_B1hw, self.teacher), self.teacher.parameterisation)
        known_B1hw = raw_B1hw.isfinite() & values_B1hw.isfinite()
        positions = view_positions(batch.window, batch.flip, self.targets.view_size, size, values_B1hw.device)
        matrices = positions.hat_matrices(grid_of(raw_B1hw), self.teacher_align_corners, dtype)
        raw_B1HW = resample(torch.where(known_B1hw, raw_B1hw, 0), *matrices)
        unknown_B1HW = resample((~known_B1hw).to(dtype), *matrices)
        taught_BHW = self.teacher.values(raw_B1HW)[:, 0]
        if batch.zoom is not None and self.teacher.unit == METRES:
            taught_BHW = taught_BHW / batch.zoom.to(dtype)[:, None, None]
        if self.teacher.unit == METRES and self.student.max_depth is not None:
            taught_BHW = taught_BHW.clamp_max(self.student.max_depth)
        return taught_BHW, (unknown_B1HW[:, 0] == 0) & positions.inside()


class DepthL1(DepthTerm):
    """The loss term `depth-l1`: the mean absolute error in metres, over all valid pixels of a batch."""

    kind = "depth-l1"

    def image_weight(self, mask_BHW: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the number of valid pixels (B,) of each image, so that the mean is over pixels.

        `mask_BHW` is True at valid pixels. `dtype` is the result's.
        """
        return mask_BHW.sum((1, 2)).to(dtype)

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return each image's mean absolute error (B,) in metres, 0 for an image without a valid pixel.

        Args:
            prediction_BHW: the student's depth in metres.
            reference_BHW: depth of the labels or the teacher in metres.
            mask_BHW: bool, True for valid pixels.
        """
        return depth.l1(prediction_BHW, reference_BHW, mask_BHW)


class DepthBerhu(DepthTerm):
    """The loss term `depth-berhu`: the reverse Huber loss in metres.

    e is prediction - reference, and c is a fifth of the image's largest |e|. An error counts as |e| up to c, and as
    (e^2 + c^2) / (2 c) above. The loss is the mean over the valid pixels of an image, then over the images with a valid
    pixel. A pixel is valid if it shows the image and its reference depth is known and in range.
    """

    kind = "depth-berhu"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return each image's reverse Huber loss (B,) in metres, 0 for an image without a valid pixel.

        Args:
            prediction_BHW: the student's depth in metres.
            reference_BHW: depth of the labels or the teacher in metres.
            mask_BHW: bool, True for valid pixels.
        """
        return depth.berhu(prediction_BHW, reference_BHW, mask_BHW)


class DepthSilog(DepthTerm):
    """The loss term `depth-silog`: 10 sqrt(mean g^2 - 0.85 (mean g)^2), with g = log prediction - log reference.

    These means are over the valid pixels of an image. The loss is the mean over the images with a valid pixel.
    """

    kind = "depth-silog"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return each image's scale-invariant logarithmic loss (B,), 0 for an image without a valid pixel.

        Args:
            prediction_BHW: the student's depth in metres, at least 0.001.
            reference_BHW: depth of the labels or the teacher in metres, at least 0.001 at valid pixels.
            mask_BHW: bool, True for valid pixels.
        """
        return depth.silog(prediction_BHW, reference_BHW, mask_BHW)


class DepthGradient(DepthTerm):
    """The loss term `depth-gradient`: compares how log depth changes between pixels that are 1, 2, 4 and 8 apart.

    So it compares edges and shapes, and ignores a common factor of all depths. For each distance, the absolute
    differences between the student's and the target's changes are summed and divided by the number of valid pixels. The
    loss of an image is the sum over the four distances. The loss of a batch is the mean over the images with a valid
    pixel.
    """

    kind = "depth-gradient"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the loss (B,) of each image: how much the error of log(depth) changes between neighbouring pixels.

        It is `gradient_matching` of the logarithms of both maps.

        Args:
            prediction_BHW: the student's depth.
            reference_BHW: depth of the labels or the teacher.
            mask_BHW: bool, True for valid pixels.
        """
        return depth.gradient_matching(prediction_BHW.log(), reference_BHW.log(), mask_BHW)


class DepthSsi(DepthTerm):
    """The loss term `depth-ssi`: the difference of inverse depths, after aligning each map's shift and scale.

    Depth in metres is inverted. Other units, as in MiDaS and Depth Anything, already are inverse depth up to a scale
    and a shift. Each map is shifted by its median, and divided by the mean absolute deviation from this median. The sum
    of an image's absolute differences, without the largest 20 %, is divided by twice the number of valid pixels.
    `alpha` (default 0.5) times `gradient_matching` of the aligned maps is added. The loss is the mean over the images
    with a valid pixel.
    """

    kind = "depth-ssi"
    spec: specs.DepthSsi

    def compared(self, values_BHW: Tensor, head: RegressionHead | None) -> Tensor:
        """Return metres as inverse depth (1 / metres), and values in other units unchanged: (B, H, W).

        `head` is the head that predicted `values_BHW`, and has their unit. None stands for labels, which are in metres.
        """
        if head is not None and head.unit != METRES:
            return values_BHW
        return clip(values_BHW, MIN_DEPTH, None).reciprocal()

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the scale- and shift-invariant loss (B,) of each image, 0 for an image without a valid pixel.

        Args:
            prediction_BHW: the student's inverse depth, from `compared`, in 1 / metres or up to a scale and a shift.
            reference_BHW: the inverse depth of the labels or the teacher, in either unit.
            mask_BHW: bool, True for valid pixels.
        """
        return depth.scale_shift_invariant(prediction_BHW, reference_BHW, mask_BHW, self.spec.alpha)


def _above_zero(values: Tensor, head: RegressionHead) -> Tensor:
    """Replace values that float16 rounded to 0 by `MIN_DEPTH`, because a positive head cannot represent 0."""
    return values if head.parameterisation == "identity" else values.clamp_min(MIN_DEPTH)


def stored_head(manifest: Any, task: str) -> RegressionHead:
    """Return the kind (channels, unit, parameterisation and largest value) of the head that a cache has for a task.

    Args:
        manifest: the cache's manifest.
        task: a numeric task that the cache has, such as `depth`.
    """
    head = manifest.heads[task]
    largest = None if head.range is None else head.range[1]
    return RegressionHead(head.channels, head.unit, head.parameterisation, largest)
