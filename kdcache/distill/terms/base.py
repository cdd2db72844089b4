"""The base of all terms: one unweighted loss between a student and the arrays of a cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from kdcache.distill.batch import Batch
from kdcache.distill.outputs import StudentOutputs
from kdcache.distill.target import TargetFormat
from kdcache.heads import HeadKind
from kdcache.settings.term import FeatureTerm, LossTerm
from kdcache.tasks import SEGMENTATION
from kdcache_kernels.target_cells import Cells, lay_cells, sample_view
from kdcache_kernels.topk import compute_dtype
from kdcache_kernels.window import Size


class TermTargets(TargetFormat, Protocol):
    """The facts about a cache that are needed to make terms. An open cache has them. Labels have no manifest."""

    @property
    def manifest(self) -> Any:
        """The manifest of the cache, or None."""


@dataclass(frozen=True)
class TermSetup:
    """What is needed to make terms.

    Attributes:
        targets: an open cache, or `LabelTargets`.
        arrays: paths of the cache's arrays that the term needs.
        student_taps: the student's features -> channels, most useful last.
        student_heads: the kinds of the student's heads in training, by name.
        align_corners: whether the student's own final resize aligns corners.
        impl: which kernels compute pseudo labels and their loss, `auxiliary` and `dist`, as in `distill_loss`.
        class_weight: (C,) of `pseudo` and `auxiliary`. None weighs every class 1.
        label_smoothing: the label smoothing of `auxiliary`.
        moments: (mean, standard deviation) of the teacher's channels, (c,) each, for a term that standardises them.
    """

    targets: TermTargets
    arrays: tuple[str, ...] = ()
    student_taps: Mapping[str, int] = field(default_factory=dict)
    student_heads: Mapping[str, HeadKind] = field(default_factory=dict)
    align_corners: bool = False
    impl: str = "auto"
    class_weight: Tensor | None = None
    label_smoothing: float = 0.0
    moments: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TermBatch:
    """The inputs of a term.

    Attributes:
        student: the student's outputs, each at its native stride, with the gradient.
        rows: the samples. `arrays` holds features as numbers: features/<tap> (B, c, h, w), statistics/at.<tap>
            (B, h, w), statistics/similarity.<tap> (B, p) uint8, targets/segmentation/max (B, h, w).
        pixel_weight: (B, H, W) gate of the teacher's terms, or None for 1. It does not change the denominator of a
            mean.
        counted: (B, H, W) bool, the view's pixels that means are over (those that show the image, those with a label).
            None is all.
        shown: (B, H, W) bool, pixels that show the image, or a pasted one, for terms that read it. None is all.
    """

    student: StudentOutputs
    rows: Batch
    pixel_weight: Tensor | None = None
    counted: Tensor | None = None
    shown: Tensor | None = None


class Term(nn.Module):
    """One loss. Its parameters (projections of the student) are trained with the student and never exported.

    It computes in float32 also under autocast, in float64 for float64 inputs, without host synchronisation or
    data-dependent shapes. Means are over counted pixels. A gate weighs these and does not shrink the denominator.
    Without any counted pixel the loss and its gradient are 0.

    Args:
        spec: the setting, with its taps filled in.

    Attributes:
        kind: the spec's, or the own name of a companion.
        weight: the spec's, or the kind's default. Default weights give a gradient over the student's parameters
            comparable to CE's. Docstrings give its size: mean over batches of CamVid at 144x192, teacher kdcache:base
            at stride 4, student kdcache:tiny after 150 and 650 steps.
        reads_shown: whether it reads `TermBatch.shown`.
        measured: whether its value is only logged and not part of the loss.
        gather: concatenates a tensor over the processes along its first axis, with a gradient only for this process's
            part, or None for a single process.
    """

    kind: str
    spec: LossTerm
    reads_shown: ClassVar[bool] = False
    measured: ClassVar[bool] = False

    def __init__(self, spec: LossTerm, setup: TermSetup) -> None:
        super().__init__()
        self.spec, self.setup = spec, setup
        self.kind = spec.kind
        self.weight = spec.default_weight if spec.weight is None else spec.weight
        self.targets, self._arrays = setup.targets, setup.arrays
        self.student_align_corners, self.impl = setup.align_corners, setup.impl
        self.gather: Callable[[Tensor], Tensor] | None = None
        self._student_tap = spec.student_tap if isinstance(spec, FeatureTerm) and spec.student_tap else "logits"
        self._description: str | None = None

    @classmethod
    def of(cls, spec: Any, setup: TermSetup) -> "Term":
        """Make the module of a spec."""
        return cls(spec, setup)

    def labellers(self) -> tuple[str, ...]:
        """Return the predictors (student, ema) whose pseudo labels of weak views it reads."""
        return ()

    def companions(self) -> "tuple[Term, ...]":
        """Return further terms of the loss that belong to it."""
        return ()

    def arrays(self) -> tuple[str, ...]:
        """Return the paths of the cache that `Batch.arrays` must hold."""
        return self._arrays

    @property
    def reads_target(self) -> bool:
        """Whether `Batch.target` must hold the teacher's logits."""
        return self.spec.reads_logits

    @property
    def head(self) -> str | None:
        """The head other than segmentation whose output it compares, or None."""
        return None if self.spec.head == SEGMENTATION else self.spec.head

    @property
    def task(self) -> str:
        """The task that the term belongs to."""
        return self.spec.task

    @property
    def reads_logits(self) -> bool:
        """Whether it reads the student's logits of segmentation."""
        return self.head is None and not self.spec.reads_taps

    @property
    def teaches_student(self) -> bool:
        """Whether the student gets a gradient from it."""
        return True

    @property
    def reads_teacher(self) -> bool:
        """Whether it learns from a teacher, or from labels instead of the teacher. False for a term on labels only."""
        return self.spec.reads_teacher

    @property
    def reads_labels(self) -> bool:
        """Whether it learns from labels."""
        return self.spec.reads_labels

    @property
    def scheduled(self) -> bool:
        """Whether `DistillLoss.set_distill_weight_scale` scales its weight."""
        return self.reads_teacher

    def student_taps(self) -> tuple[str, ...]:
        """Return the student's features that it needs."""
        return (self._student_tap,) if self.spec.reads_taps else ()

    def after_step(self, batch: Batch) -> None:
        """Remember data of a batch that a step has learnt from, to compare later batches with."""

    def describe(self) -> str | None:
        """Return what is resized or projected, after `prepare` or the first batch, or None for nothing."""
        return self._description

    def prepare(self, batch: TermBatch) -> None:
        """Read the shapes of a batch for `describe`."""

    def note_resize(self, student: Tensor, teacher: Tensor, of: str = "", then: str = "") -> None:
        """Record, for `describe`, how a student's map is resized to the teacher's size."""
        changes = [then] if then else []
        if grid_of(student) != grid_of(teacher):
            changes.insert(0, f"resized from {shape_text(student)} to the teacher's {shape_text(teacher)} cells")
        verb = "are" if self._student_tap == "logits" else "is"
        self._description = (
            f"{self.kind}: {of}the student's {self._student_tap} {verb} {' and '.join(changes)}" if changes else None
        )

    def forward(self, batch: TermBatch, count: Tensor | None = None) -> Tensor:
        """Return the loss of a batch: an unweighted scalar.

        `count` replaces its own `count` as denominator: the mean over the parts of a larger batch, so that their losses
        average to the whole batch's.
        """
        if not torch.compiler.is_compiling():
            self.prepare(batch)
        with torch.autocast(batch.student.logits.device.type, enabled=False):
            return self.loss(batch, count)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Compute the result of `forward` at full precision."""
        raise NotImplementedError

    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of `loss`: the counted cells, 0-dimensional. Of `logits` only dtype and rows matter.

        A term whose formula has several sums over the batch returns several numbers.
        """
        return self.cells(batch, self.grid(batch), wide(batch.student.logits)).counted.sum()

    def grid(self, batch: TermBatch) -> Size:
        """Return (h, w) of the teacher's cells."""
        if self.reads_target:
            assert batch.rows.target is not None
            return grid_of(batch.rows.target.values)
        return grid_of(batch.rows.arrays[self._arrays[0]])

    def cells(self, batch: TermBatch, grid: Size, like: Tensor) -> Cells:
        """Return how much every cell of a grid over the student's image counts."""
        return lay_cells(
            batch.rows.window,
            batch.rows.flip,
            batch.pixel_weight,
            batch.counted,
            batch_size=batch.student.logits.shape[0],
            view_size=self.targets.view_size,
            size=batch.rows.size,
            grid=grid,
            like=like,
        )

    def seen(self, batch: TermBatch, map_Bchw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the part of a view's map (B, c, h, w) that the student's image shows, resized to the same (h, w)."""
        return sample_view(map_Bchw, batch.rows.window, batch.rows.flip, self.targets.view_size, dtype)

    def mean(self, loss_Bhw: Tensor, cells: Cells, count: Tensor | None) -> Tensor:
        """Return the mean of a loss (B, h, w) over the counted cells, or over `count` of them."""
        return divide((loss_Bhw * cells.weight).sum(), cells.counted.sum() if count is None else count)

    def of_all(self, rows_Nx: Tensor) -> Tensor:
        """Return the rows of all processes. Only this process's rows carry a gradient."""
        return rows_Nx if self.gather is None else self.gather(rows_Nx)


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64."""
    return x.to(compute_dtype(x.dtype))


def divide(total: Tensor, count: Tensor) -> Tensor:
    """Return total / count, and 0 where the count is 0."""
    return total * count.reciprocal().masked_fill(count == 0, 0)


def grid_of(map_Bchw: Tensor) -> Size:
    """Return (h, w) of a map."""
    return map_Bchw.shape[-2], map_Bchw.shape[-1]


def unit(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Divide by the norm over some dimensions. Zeros stay zero and get no gradient."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)


def shared(loss: Tensor, own: int, all_rows: int) -> Tensor:
    """Return a loss that every process computes completely, with its gradient times the number of processes.

    Each process has only its own part's gradient. Averaging over processes then gives their sum.
    """
    return loss + (all_rows / own - 1) * (loss - loss.detach())


def shape_text(map_Bchw: Tensor) -> str:
    """Return the shape of a map as text, such as '36x48'."""
    return "x".join(str(side) for side in map_Bchw.shape[-2:])
