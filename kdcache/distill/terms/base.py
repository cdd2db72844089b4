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
    """The format of the targets that loss terms read, and a cache's manifest.

    An open cache and `LabelTargets` have this interface.
    """

    @property
    def manifest(self) -> Any:
        """The manifest of the cache, or None for labels as targets."""


@dataclass(frozen=True)
class TermSetup:
    """The inputs for making a loss term's module.

    Attributes:
        targets: an open cache, or `LabelTargets`.
        arrays: paths of the cache's arrays that the term reads, such as `features/stage4`.
        student_taps: name of a tap of the student -> its number of channels. A term without a chosen tap takes the
            tap with the same name as the teacher's, or else the last one.
        student_heads: name of a head that the student has in training -> its kind.
        align_corners: True if the student's own final resize aligns corners.
        impl: the implementation of the kernels, such as `auto` or `reference`. Only terms with a kernel use it.
        class_weight: (C,) weights of the classes in the terms `pseudo` and `auxiliary`. None weighs all 1.
        label_smoothing: the label smoothing of the term `auxiliary`, in [0, 1).
        moments: mean and standard deviation of the teacher's channels, (c,) each, for a term with
            `standardise=channels`. None for other terms.
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
    """The input of a loss term.

    Attributes:
        student: the student's outputs, each at its native stride, with the gradient.
        rows: the samples. The keys of `rows.arrays` are features/<tap> (B, c, h, w), statistics/at.<tap> (B, h, w),
            statistics/similarity.<tap> (B, p) and targets/segmentation/max (B, h, w). Similarities are uint8, for p
            pairs of cells. The last array has the teacher's largest raw logits. Features stored in 8 bits are decoded.
        pixel_weight: (B, H, W), the gate of the teacher's terms. It does not change a mean's denominator. None weighs
            all 1.
        counted: (B, H, W) bool, True for the pixels that means include: those that show the image, and if void is
            excluded, have a label. None is all. Terms themselves exclude pixels outside the view.
        shown: (B, H, W) bool, True for pixels that show the image or a pasted one, for terms with `reads_shown`. None
            is all.
    """

    student: StudentOutputs
    rows: Batch
    pixel_weight: Tensor | None = None
    counted: Tensor | None = None
    shown: Tensor | None = None


class Term(nn.Module):
    """A loss term: a module that compares a student's outputs with targets, features or labels.

    A subclass implements `loss`, and overrides `count` if its mean is not over cells.

    A term's parameters, such as projections of the student's features, are trained with the student and never exported.
    A term computes in float32 also under autocast, and in float64 for float64 inputs. It never waits for the device.

    Means are over counted pixels, or over cells, each weighted by its share of counted pixels. A gate is a further
    weight in the sum, but not in the denominator. Without any counted pixel the loss and its gradient are 0.

    Args:
        spec: the term's options, with its taps filled in.
        setup: the cache, and facts about the student.

    Attributes:
        kind: the kind in `spec`, or the name of a companion term.
        weight: the weight in `spec`, or the kind's default. With default weights, a weighted term's gradient over the
            student's parameters is about as long as the cross-entropy's. The docstring of each class gives the measured
            ratio of these lengths. Unless it says otherwise, the ratio is a mean over batches of CamVid at 144x192. The
            teacher is kdcache:base at stride 4. The student is kdcache:tiny after 150 and 650 steps.
        reads_shown: True if the term reads `TermBatch.shown`.
        measured: True if the value is only logged and not added to the loss.
        gather: a function that concatenates a tensor over the processes along its first axis, with a gradient only for
            this process's part. None for a single process.
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
        """Make the module for a term's settings, `spec`. Some options give a module of another class."""
        return cls(spec, setup)

    def labellers(self) -> tuple[str, ...]:
        """Return the networks, `student` or `ema`, whose pseudo labels of weak views the term reads."""
        return ()

    def companions(self) -> "tuple[Term, ...]":
        """Return further terms that the loss must have with this term, such as a discriminator's own loss."""
        return ()

    def arrays(self) -> tuple[str, ...]:
        """Return the paths of the cache's arrays that `Batch.arrays` must hold, such as `features/stage4`."""
        return self._arrays

    @property
    def reads_target(self) -> bool:
        """True if `Batch.target` must hold the teacher's logits."""
        return self.spec.reads_logits

    @property
    def head(self) -> str | None:
        """The name of the head whose output the term compares, such as `depth`. None for the segmentation head."""
        return None if self.spec.head == SEGMENTATION else self.spec.head

    @property
    def task(self) -> str:
        """The task that the term belongs to: `segmentation` or `depth`."""
        return self.spec.task

    @property
    def reads_logits(self) -> bool:
        """True if the term reads the student's segmentation logits."""
        return self.head is None and not self.spec.reads_taps

    @property
    def teaches_student(self) -> bool:
        """True if the student gets a gradient from the term."""
        return True

    @property
    def reads_teacher(self) -> bool:
        """True if the term learns from a teacher, or from labels that replace the teacher's targets.

        It is False for a term that only has labels, such as `dice`.
        """
        return self.spec.reads_teacher

    @property
    def reads_labels(self) -> bool:
        """True if the term learns from labels."""
        return self.spec.reads_labels

    @property
    def scheduled(self) -> bool:
        """True if the term learns from the teacher. Then `--distill-schedule` can change its weight over time."""
        return self.reads_teacher

    def student_taps(self) -> tuple[str, ...]:
        """Return the names of the student's features that the term reads."""
        return (self._student_tap,) if self.spec.reads_taps else ()

    def after_step(self, batch: Batch) -> None:
        """Store data of a batch, if later batches are compared with it. The default does nothing.

        It is called after the optimizer's step.
        """

    def describe(self) -> str | None:
        """Return one line about what the term resizes or projects, or None if it does neither.

        The line is complete after `prepare` or the first batch.
        """
        return self._description

    def prepare(self, batch: TermBatch) -> None:
        """Remember the shapes of a batch's maps, for `describe`. The default does nothing."""

    def note_resize(self, student: Tensor, teacher: Tensor, of: str = "", then: str = "") -> None:
        """Remember, for `describe`, whether the student's map is resized to the teacher's size, and what follows.

        Args:
            student: the student's map (B, c, h, w).
            teacher: the teacher's map (B, ..., h, w).
            of: text before "the student's", such as "the attention of ".
            then: text about a change after the resize, such as "projected from 32 to 64 channels".
        """
        changes = [then] if then else []
        if grid_of(student) != grid_of(teacher):
            changes.insert(0, f"resized from {shape_text(student)} to the teacher's {shape_text(teacher)} cells")
        verb = "are" if self._student_tap == "logits" else "is"
        self._description = (
            f"{self.kind}: {of}the student's {self._student_tap} {verb} {' and '.join(changes)}" if changes else None
        )

    def forward(self, batch: TermBatch, count: Tensor | None = None) -> Tensor:
        """Return the unweighted loss of a batch, 0-dimensional.

        `count` is the denominator. None uses `self.count(batch)`. For a batch in several parts, pass the mean of the
        parts' counts. Then the parts' losses average to the whole batch's loss.
        """
        if not torch.compiler.is_compiling():
            self.prepare(batch)
        with torch.autocast(batch.student.logits.device.type, enabled=False):
            return self.loss(batch, count)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the unweighted loss of a batch, 0-dimensional. Subclasses implement it, and `forward` calls it.

        Autocast is off. `count` is the denominator. None uses the batch's own.
        """
        raise NotImplementedError

    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of `loss`: the sum over all cells of a cell's share of counted pixels, 0-dimensional.

        Of the student's logits, only the dtype and the number of images matter. Subclasses may count something else,
        such as images. A subclass whose loss has two denominators returns a tensor (2,).
        """
        return self.cells(batch, self.grid(batch), wide(batch.student.logits)).counted.sum()

    def grid(self, batch: TermBatch) -> Size:
        """Return the (h, w) of the teacher's cells: the rows and columns of its map."""
        if self.reads_target:
            assert batch.rows.target is not None
            return grid_of(batch.rows.target.values)
        return grid_of(batch.rows.arrays[self._arrays[0]])

    def cells(self, batch: TermBatch, grid: Size, like: Tensor) -> Cells:
        """Return how much each cell of a grid over the student's image counts and weighs, (B, h, w) each.

        A cell's count is its share of counted pixels, in 0..1. A cell's weight is the mean gate of its pixels, where
        pixels that are not counted enter with 0.

        Args:
            batch: the batch, with its masks and gate.
            grid: (h, w), the number of cells down and across.
            like: a tensor with the result's device and dtype.
        """
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
        """Return the part of a teacher's map (B, c, h, w) that the student's window shows, resized to the same (h, w).

        The map covers the whole view. `batch` has the windows and flips. The result has `dtype` and no gradient.
        """
        return sample_view(map_Bchw, batch.rows.window, batch.rows.flip, self.targets.view_size, dtype)

    def mean(self, loss_Bhw: Tensor, cells: Cells, count: Tensor | None) -> Tensor:
        """Return the weighted mean of a loss (B, h, w) over cells, 0-dimensional.

        Args:
            loss_Bhw: the loss of each cell.
            cells: how much each cell counts and weighs.
            count: the denominator. None is the sum of `cells.counted`.
        """
        return divide((loss_Bhw * cells.weight).sum(), cells.counted.sum() if count is None else count)

    def of_all(self, rows_Nx: Tensor) -> Tensor:
        """Return this process's rows (N, ...) together with the rows of all other processes, in the order of ranks.

        N is equal in all processes. Only this process's rows carry a gradient. If training has one process, the rows
        are returned unchanged.
        """
        return rows_Nx if self.gather is None else self.gather(rows_Nx)


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x.to(compute_dtype(x.dtype))


def divide(total: Tensor, count: Tensor) -> Tensor:
    """Return total / count, and 0 where the count is 0."""
    return total * count.reciprocal().masked_fill(count == 0, 0)


def grid_of(map_Bchw: Tensor) -> Size:
    """Return the (h, w) of a map, the sizes of its last two axes."""
    return map_Bchw.shape[-2], map_Bchw.shape[-1]


def unit(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Return x divided by its L2 norm over the axes `dims`. Zeros stay zero and get no gradient."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)


def shared(loss: Tensor, own: int, all_rows: int) -> Tensor:
    """Return the loss with the same value, but with its gradient multiplied by `all_rows / own`.

    Use it if every process computes the loss of all samples, but only its own samples carry a gradient. The factor
    turns the average of the processes' gradients into their sum.

    Args:
        loss: 0-dimensional, equal in all processes.
        own: number of samples of this process.
        all_rows: number of samples of all processes.
    """
    return loss + (all_rows / own - 1) * (loss - loss.detach())


def shape_text(map_Bchw: Tensor) -> str:
    """Return the last two axes of a map as text, such as '36x48'."""
    return "x".join(str(side) for side in map_Bchw.shape[-2:])
