"""Terms of a depth head: against labels, or against a teacher's stored depth.

The student's raw output is resized to the label's size, bilinear, then becomes metres (`kdcache.heads`). A label is
valid where it is a number within 0.001 m and the head's `max_depth`. A teacher's map lies on its own cells and is
dense: it is sampled bilinearly at the label's pixels, through window and flip as logits are, in the space in which its
head resizes: its values become the raw output that they came from, are resampled, and become values again. A cell whose
value is not finite has none, nor has a pixel that reads it. Metres are divided by the zoom of a window that was drawn
to look nearer than the view that the teacher saw. Values beyond the student's range are clipped to it, as a
prediction is; labels beyond it do not count.

A gate and the void of segmentation labels concern classes: these terms count every pixel inside the view that shows the
image. Each is the mean over the images that have a valid pixel; `depth-l1` is the mean over all valid pixels.

Default weights give a gradient over the parameters that both heads share of about CE's: medians of 1.57 (l1), 1.32
(berhu), 0.62 (silog), 0.60 (gradient) and 0.65 (ssi) times it, of nine measurements each, which differ by a factor of
three (exact labels of scenes, 26 m on average; steps 51, 151 and 651 of kdcache:tiny+depth that learnt by silog, three
seeds). The errors of the first two are metres, so scenes of other depths want other weights.
"""

from typing import Any

import torch
from torch import Tensor

from kdcache.distill import depth
from kdcache.distill.batch import neighbours
from kdcache.distill.target import Target
from kdcache.distill.terms.base import HeadBatch, Term, TermBatch, TermSetup, divide, grid_of, wide
from kdcache.heads import DEPTH, METRES, RegressionHead, clip, raw_of
from kdcache.settings import terms as specs
from kdcache_kernels.target_cells import resample, resize
from kdcache_kernels.window import view_positions

MIN_DEPTH = 1e-3
"""The smallest depth in metres that counts, of labels, teachers and students: logarithms and inverses stay finite."""


class DepthTerm(Term):
    """A loss between two maps of depth in metres, as `of_images` has it.

    Attributes:
        student: the student's depth head.
        teacher: the store's depth head; None against labels.
    """

    reads_shown = True

    def __init__(self, spec: specs.Depth, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        student = setup.student_heads[DEPTH]
        assert isinstance(student, RegressionHead), "check_student refuses another kind"
        self.student, self.teacher, self.teacher_align_corners = student, None, False
        if spec.reads_teacher:
            self.teacher = depth_head(setup.targets.manifest)
            self.teacher_align_corners = setup.targets.manifest.heads[DEPTH].align_corners

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        own = batch.heads[DEPTH]
        assert own.output is not None, "the student's outputs have the head (check_heads)"
        raw_B1HW = resize(wide(own.output), batch.size, self.student_align_corners)
        prediction_BHW = self.compared(self.student.values(raw_B1HW)[:, 0], self.student)
        reference_BHW, mask_BHW = self._reference(batch, prediction_BHW.dtype)
        weight_B = self.image_weight(mask_BHW, prediction_BHW.dtype)
        total = (weight_B * self.of_images(prediction_BHW, reference_BHW, mask_BHW)).sum()
        return divide(total, weight_B.sum() if count is None else count.to(total.dtype))

    def count(self, batch: TermBatch) -> Tensor:
        """The denominator of `loss`: the images with a valid pixel (`depth-l1`: the valid pixels), 0-dimensional."""
        dtype = wide(batch.logits).dtype
        return self.image_weight(self._reference(batch, dtype)[1], dtype).sum()

    def image_weight(self, mask_BHW: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight (B,) of each image's loss in the mean over the batch: 1 with a valid pixel, 0 without."""
        return mask_BHW.flatten(1).any(1).to(dtype)

    def compared(self, values_BHW: Tensor, head: RegressionHead | None) -> Tensor:
        """What is compared, of values in a head's unit; of labels without a head: metres, at least `MIN_DEPTH`."""
        return clip(values_BHW, MIN_DEPTH, None)

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """The loss (B,) of each image's valid pixels, 0 without any (`kdcache.distill.depth`)."""
        raise NotImplementedError

    @torch.no_grad()
    def _reference(self, batch: TermBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the student is compared with, and which pixels of it are valid: (B, H, W) each."""
        own = batch.heads[DEPTH]
        if self.teacher is None:
            values_BHW, mask_BHW = self._label(own)
        else:
            assert own.target is not None, "a batch has the targets of its terms (check_heads)"
            values_BHW, mask_BHW = self._with_pasted(self._taught(own.target, batch, dtype), batch, dtype)
        if batch.shown is not None:
            mask_BHW = mask_BHW & batch.shown
        return self.compared(values_BHW.to(dtype), self.teacher), mask_BHW

    def _label(self, own: HeadBatch) -> tuple[Tensor, Tensor]:
        assert own.label is not None, "a batch has the labels of its terms (check_heads)"
        return own.label, (own.label >= MIN_DEPTH) & (own.label <= (self.student.max_depth or torch.inf))

    def _with_pasted(
        self, taught: tuple[Tensor, Tensor], batch: TermBatch, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """A teacher's map and its valid pixels, with those of the samples that were pasted in their places."""
        (values_BHW, mask_BHW), own_BHW = taught, batch.own
        if own_BHW is None:
            return taught
        if batch.pasted is None:
            others = neighbours(values_BHW), neighbours(mask_BHW)
        else:
            target = batch.pasted.heads[DEPTH].target
            if target is None:  # nothing is known of what was pasted
                return values_BHW, mask_BHW & own_BHW
            others = self._taught(target, batch.pasted, dtype)
        return torch.where(own_BHW, values_BHW, others[0]), torch.where(own_BHW, mask_BHW, others[1])

    def _taught(self, target: Target, batch: TermBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.teacher is not None, "only against a teacher"
        values_B1hw = wide(target.values).to(dtype)
        raw_B1hw = raw_of(_above_zero(values_B1hw, self.teacher), self.teacher.parameterisation)
        known_B1hw = raw_B1hw.isfinite() & values_B1hw.isfinite()
        positions = view_positions(batch.window, batch.flip, self.targets.view_size, batch.size, values_B1hw.device)
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
        return mask_BHW.sum((1, 2)).to(dtype)

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        return depth.l1(prediction_BHW, reference_BHW, mask_BHW)


class DepthBerhu(DepthTerm):
    """`depth-berhu`: the reverse Huber loss in metres, its bound a fifth of an image's largest error."""

    kind = "depth-berhu"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        return depth.berhu(prediction_BHW, reference_BHW, mask_BHW)


class DepthSilog(DepthTerm):
    """`depth-silog`: 10 sqrt(mean g^2 - 0.85 (mean g)^2) of g = log p - log r of an image."""

    kind = "depth-silog"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        return depth.silog(prediction_BHW, reference_BHW, mask_BHW)


class DepthGradient(DepthTerm):
    """`depth-gradient`: gradient matching of logarithms, over four scales: edges and shapes, whatever the scale is."""

    kind = "depth-gradient"

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        return depth.gradient_matching(prediction_BHW.log(), reference_BHW.log(), mask_BHW)


class DepthSsi(DepthTerm):
    """`depth-ssi`: inverse depths, each aligned by its own median and deviation, the worst fifth left out.

    With gradient matching at weight alpha, 0.5. Metres are inverted; a head of another unit has inverse depth up to a
    scale and a shift already, as those of MiDaS and Depth Anything.
    """

    kind = "depth-ssi"
    spec: specs.DepthSsi

    def compared(self, values_BHW: Tensor, head: RegressionHead | None) -> Tensor:
        if head is not None and head.unit != METRES:
            return values_BHW
        return clip(values_BHW, MIN_DEPTH, None).reciprocal()

    def of_images(self, prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
        return depth.scale_shift_invariant(prediction_BHW, reference_BHW, mask_BHW, self.spec.alpha)


def _above_zero(values: Tensor, head: RegressionHead) -> Tensor:
    """Values of which a positive parameterisation has a raw output: what float16 rounded to 0 is the smallest depth."""
    return values if head.parameterisation == "identity" else values.clamp_min(MIN_DEPTH)


def depth_head(manifest: Any) -> RegressionHead:
    """The head of depth that a store has, as models have it."""
    head = manifest.heads[DEPTH]
    largest = None if head.range is None else head.range[1]
    return RegressionHead(head.channels, head.unit, head.parameterisation, largest)
