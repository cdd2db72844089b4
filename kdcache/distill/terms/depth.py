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
    """A loss between two depth maps in metres, computed by `of_images`.

    Attributes:
        student: the student's depth head.
        teacher: the cache's depth head, or None against labels.
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
        """Return the mean over images of `of_images` on prediction and reference."""
        raw_B1HW = resize(wide(batch.student.heads[DEPTH]), batch.rows.size, self.student_align_corners)
        prediction_BHW = self.compared(self.student.values(raw_B1HW)[:, 0], self.student)
        reference_BHW, mask_BHW = self._reference(batch, prediction_BHW.dtype)
        weight_B = self.image_weight(mask_BHW, prediction_BHW.dtype)
        total = (weight_B * self.of_images(prediction_BHW, reference_BHW, mask_BHW)).sum()
        return divide(total, weight_B.sum() if count is None else count.to(total.dtype))

    def count(self, batch: TermBatch) -> Tensor:
        """Return the number of images with a valid pixel (`depth-l1`: valid pixels), 0-dimensional."""
        dtype = wide(batch.student.logits).dtype
        return self.image_weight(self._reference(batch, dtype)[1], dtype).sum()

    def image_weight(self, mask_BHW: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight (B,) of each image's loss in the mean over the batch: 1 with a valid pixel, 0 without."""
        return mask_BHW.flatten(1).any(1).to(dtype)

    def compared(self, values_BHW: Tensor, head: RegressionHead | None) -> Tensor:
        """Convert values in a head's unit, or labels without a head, to metres of at least `MIN_DEPTH`."""
        return clip(values_BHW, MIN_DEPTH, None)

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the loss (B,) of each image's valid pixels, 0 without any (`kdcache.distill.depth`)."""
        raise NotImplementedError

    @torch.no_grad()
    def _reference(self, batch: TermBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the map to compare the student with, and its valid pixels: (B, H, W) each."""
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
        """Return a teacher's map and its valid pixels, replaced by the pasted samples' at their pixels."""
        assert rows.own is not None, "samples were pasted"
        if rows.pasted is None:
            others = neighbours(values_BHW), neighbours(mask_BHW)
        elif DEPTH not in (rows.pasted.targets or {}):  # nothing is known of what was pasted
            return values_BHW, mask_BHW & rows.own
        else:
            others = self._taught(rows.pasted, rows.size, dtype)
        return torch.where(rows.own, values_BHW, others[0]), torch.where(rows.own, mask_BHW, others[1])

    def _taught(self, batch: Batch, size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the map of a batch's teacher at the student's image of `size`, and its valid pixels."""
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
    """`depth-l1`: mean |p - r| in metres, over all valid pixels of a batch."""

    kind = "depth-l1"

    def image_weight(self, mask_BHW: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the number of valid pixels (B,), so the mean is over pixels."""
        return mask_BHW.sum((1, 2)).to(dtype)

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the mean absolute error (B,)."""
        return depth.l1(prediction_BHW, reference_BHW, mask_BHW)


class DepthBerhu(DepthTerm):
    """`depth-berhu`: the reverse Huber loss in metres, with a bound of a fifth of an image's largest error."""

    kind = "depth-berhu"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the reverse Huber loss (B,)."""
        return depth.berhu(prediction_BHW, reference_BHW, mask_BHW)


class DepthSilog(DepthTerm):
    """`depth-silog`: 10 sqrt(mean g^2 - 0.85 (mean g)^2), with g = log p - log r of an image."""

    kind = "depth-silog"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the scale-invariant logarithmic loss (B,)."""
        return depth.silog(prediction_BHW, reference_BHW, mask_BHW)


class DepthGradient(DepthTerm):
    """`depth-gradient`: gradient matching of logarithms over four scales: edges and shapes at any scale."""

    kind = "depth-gradient"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the gradient matching (B,) of logarithms."""
        return depth.gradient_matching(prediction_BHW.log(), reference_BHW.log(), mask_BHW)


class DepthSsi(DepthTerm):
    """`depth-ssi`: inverse depths, each aligned by its own median and deviation, without the worst fifth.

    Gradient matching is added with the weight alpha, 0.5. Metres are inverted. Other units, such as those of MiDaS and
    Depth Anything, already are inverse depth up to a scale and a shift.
    """

    kind = "depth-ssi"
    spec: specs.DepthSsi

    def compared(self, values_BHW: Tensor, head: RegressionHead | None) -> Tensor:
        """Convert metres to inverse depth, and leave other units unchanged."""
        if head is not None and head.unit != METRES:
            return values_BHW
        return clip(values_BHW, MIN_DEPTH, None).reciprocal()

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the scale- and shift-invariant loss (B,)."""
        return depth.scale_shift_invariant(prediction_BHW, reference_BHW, mask_BHW, self.spec.alpha)


def _above_zero(values: Tensor, head: RegressionHead) -> Tensor:
    """Raise values that float16 rounded to 0 to the smallest depth, which a positive head can represent."""
    return values if head.parameterisation == "identity" else values.clamp_min(MIN_DEPTH)


def stored_head(manifest: Any, task: str) -> RegressionHead:
    """Return a cache's head of a numeric task in the form of a model's."""
    head = manifest.heads[task]
    largest = None if head.range is None else head.range[1]
    return RegressionHead(head.channels, head.unit, head.parameterisation, largest)
