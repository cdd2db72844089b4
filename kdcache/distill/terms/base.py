"""The base of all terms: one loss between a student and the arrays of a store, on its own and unweighted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from kdcache.distill.batch import Batch, PseudoLabels
from kdcache.distill.outputs import StudentOutputs
from kdcache.distill.target import Target, TargetFormat
from kdcache.heads import SEGMENTATION, HeadKind
from kdcache.settings.term import FeatureTerm, LossTerm
from kdcache_kernels.target_cells import Cells, lay_cells, sample_view
from kdcache_kernels.topk import compute_dtype
from kdcache_kernels.window import Size


class TermTargets(TargetFormat, Protocol):
    """The facts about a store that making terms takes; an open cache is one. Labels in its place have no manifest."""

    @property
    def manifest(self) -> Any: ...


@dataclass(frozen=True)
class TermSetup:
    """What terms are made with.

    Attributes:
        targets: an open cache, or `LabelTargets`.
        arrays: paths of the store that the term needs.
        student_taps: the student's features -> channels, most useful last.
        student_heads: what the student's heads are in training, by name.
        align_corners: whether the student's own final resize aligns corners.
        impl: which kernels compute pseudo labels and their loss, `auxiliary` and `dist`, as in `distill_loss`.
        class_weight: (C,) of `pseudo` and `auxiliary`; None weighs every class 1.
        label_smoothing: of `auxiliary`.
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
class HeadBatch:
    """What a batch has for a head beside segmentation; None for what it has not.

    Attributes:
        output: (B, c, h, w) of the student at its native stride, raw; receives the gradient.
        label: (B, H, W) of the task of the same name.
        target: the teacher's values.
    """

    output: Tensor | None = None
    label: Tensor | None = None
    target: Target | None = None


@dataclass(frozen=True)
class TermBatch:
    """The inputs of a term. Shapes: B batch, C classes, H W the student's image, c channels of a feature.

    Attributes:
        logits: (B, C, h, w) of the student at its native stride; receives the gradient.
        features: student's tap -> (B, c, h', w'); receive the gradient.
        labels: (B, H, W) uint8, 255 is void; None for an unlabelled batch.
        target: the teacher's packed logits.
        stored: other arrays of the store by path: features/<tap> (B, c, h, w) floats, statistics/at.<tap> (B, h, w),
            statistics/similarity.<tap> (B, p) uint8, targets/segmentation/max (B, h, w).
        pixel_weight: (B, H, W) gate of the teacher's terms; None is 1. It does not change what a mean is over.
        size: (H, W).
        counted: (B, H, W) bool, which pixels of the view the means are over (those that show the image, those with a
            label); None is all.
        window, flip, zoom, own: as in `Batch`.
        pasted: the same with the targets of another stream's samples, whose pixels were pasted; None where the
            neighbours' were, if any.
        shown: (B, H, W) bool, which pixels show the image, or one that was pasted, for terms that read it; None is all.
        heads: heads beside segmentation, by name.
        others: outputs for the rows of other streams of the batch, by the stream's name.
        pseudo: pseudo labels of the weak view, by who made them.
    """

    logits: Tensor
    features: Mapping[str, Tensor]
    labels: Tensor | None
    target: Target | None
    stored: Mapping[str, Tensor]
    pixel_weight: Tensor | None
    size: Size
    counted: Tensor | None = None
    window: Tensor | None = None
    flip: Tensor | None = None
    zoom: Tensor | None = None
    own: Tensor | None = None
    pasted: "TermBatch | None" = None
    shown: Tensor | None = None
    heads: Mapping[str, HeadBatch] = field(default_factory=dict)
    others: Mapping[str, StudentOutputs] = field(default_factory=dict)
    pseudo: Mapping[str, PseudoLabels] = field(default_factory=dict)

    def with_targets(self, batch: Batch) -> "TermBatch":
        """Return the same with the targets of another batch, where that has them."""
        targets = batch.targets or {}
        heads = {name: replace(head, target=targets.get(name)) for name, head in self.heads.items()}
        at = batch.window, batch.flip, batch.zoom
        return replace(self, target=batch.target, heads=heads, window=at[0], flip=at[1], zoom=at[2])


class Term(nn.Module):
    """One loss; its parameters (projections of the student) are trained with the student and never exported.

    Float32 under autocast too, float64 for float64 inputs; no host synchronisation, no data-dependent shape. Means
    are over counted pixels: a gate weighs these and does not shrink the denominator. Without any the loss is 0 and so
    is its gradient.

    Args:
        spec: whose taps are filled in.
    Attributes:
        kind: the spec's, or of a companion its own name.
        weight: the spec's, or the kind's default. Default weights give a gradient over the student's parameters that
            compares with CE's. The docstrings say how: mean over batches of CamVid at 144x192, teacher kdcache:base at
            stride 4, student kdcache:tiny after 150 and 650 steps.
        reads_shown: whether it reads `TermBatch.shown`.
        measured: whether its value is logged alone and is no part of the loss.
        gather: concatenates a tensor over the processes along its first axis, in which the own part alone carries a
            gradient; None when there is one.
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
        """Return who makes the pseudo labels of weak views that it reads of a batch."""
        return ()

    def companions(self) -> "tuple[Term, ...]":
        """Return further terms of the loss that go with it."""
        return ()

    def arrays(self) -> tuple[str, ...]:
        """Paths of the store that `TermBatch.stored` must hold."""
        return self._arrays

    @property
    def reads_target(self) -> bool:
        """Whether `TermBatch.target` must hold the teacher's logits."""
        return self.spec.reads_logits

    @property
    def head(self) -> str | None:
        """The head beside segmentation whose output it compares; None for a term of logits or features."""
        return None if self.spec.head == SEGMENTATION else self.spec.head

    @property
    def task(self) -> str:
        """The task whose loss it is a part of."""
        return self.spec.task

    @property
    def reads_logits(self) -> bool:
        """Whether it reads the student's logits of segmentation."""
        return self.head is None and not self.spec.reads_taps

    @property
    def teaches_student(self) -> bool:
        """Whether the student gets a gradient of it."""
        return True

    @property
    def reads_teacher(self) -> bool:
        """Whether it learns from a teacher, or from labels in its place; False for a term on labels alone."""
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
        """The student's features that it needs."""
        return (self._student_tap,) if self.spec.reads_taps else ()

    def after_step(self, batch: Batch) -> None:
        """Remember what later batches are compared with, once a step has learnt from a batch."""

    def describe(self) -> str | None:
        """A description of what is resized or projected, set by `prepare` or the first batch; None when nothing is."""
        return self._description

    def prepare(self, batch: TermBatch) -> None:
        """Read the shapes of a batch for `describe`."""

    def note_resize(self, student: Tensor, teacher: Tensor, of: str = "", then: str = "") -> None:
        """Describe how a student's map whose size is not the teacher's is changed."""
        changes = [then] if then else []
        if grid_of(student) != grid_of(teacher):
            changes.insert(0, f"resized from {shape_text(student)} to the teacher's {shape_text(teacher)} cells")
        verb = "are" if self._student_tap == "logits" else "is"
        self._description = (
            f"{self.kind}: {of}the student's {self._student_tap} {verb} {' and '.join(changes)}" if changes else None
        )

    def forward(self, batch: TermBatch, count: Tensor | None = None) -> Tensor:
        """The loss of a batch: a scalar, not weighted.

        Args:
            count: the denominator, in the place of its own `count`: the mean over the parts of a larger batch, over
                which their losses then average to its own.
        """
        if not torch.compiler.is_compiling():
            self.prepare(batch)
        with torch.autocast(batch.logits.device.type, enabled=False):
            return self.loss(batch, count)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Compute what `forward` returns, at full precision."""
        raise NotImplementedError

    def count(self, batch: TermBatch) -> Tensor:
        """The denominator of `loss`: the counted cells, 0-dimensional. Only the dtype and rows of `logits` matter.

        A term whose formula takes several sums over the batch has as many numbers.
        """
        return self.cells(batch, self.grid(batch), wide(batch.logits)).counted.sum()

    def grid(self, batch: TermBatch) -> Size:
        """(h, w) of the teacher's cells."""
        if self.reads_target:
            assert batch.target is not None
            return grid_of(batch.target.values)
        return grid_of(batch.stored[self._arrays[0]])

    def cells(self, batch: TermBatch, grid: Size, like: Tensor) -> Cells:
        """How much every cell of a grid over the student's image counts."""
        return lay_cells(
            batch.window,
            batch.flip,
            batch.pixel_weight,
            batch.counted,
            batch_size=batch.logits.shape[0],
            view_size=self.targets.view_size,
            size=batch.size,
            grid=grid,
            like=like,
        )

    def seen(self, batch: TermBatch, map_Bchw: Tensor, dtype: torch.dtype) -> Tensor:
        """A map of the view as the student's image shows it, on as many cells."""
        return sample_view(map_Bchw, batch.window, batch.flip, self.targets.view_size, dtype)

    def mean(self, loss_Bhw: Tensor, cells: Cells, count: Tensor | None) -> Tensor:
        """The mean of a loss (B, h, w) over the counted cells, or over `count` of them."""
        return divide((loss_Bhw * cells.weight).sum(), cells.counted.sum() if count is None else count)

    def of_all(self, rows_Nx: Tensor) -> Tensor:
        """The rows of all processes; only this process's own carry a gradient."""
        return rows_Nx if self.gather is None else self.gather(rows_Nx)


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64."""
    return x.to(compute_dtype(x.dtype))


def divide(total: Tensor, count: Tensor) -> Tensor:
    """Return total / count, and 0 where the count is 0."""
    return total * count.reciprocal().masked_fill(count == 0, 0)


def grid_of(map_Bchw: Tensor) -> Size:
    """(h, w) of a map."""
    return map_Bchw.shape[-2], map_Bchw.shape[-1]


def unit(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Divide by the norm over some dimensions; zero stays zero and gets no gradient."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)


def shared(loss: Tensor, own: int, all_rows: int) -> Tensor:
    """A loss that every process computes whole, its gradient times the number of processes.

    Each process has the gradient of its own part alone; their mean is to be the sum of these.
    """
    return loss + (all_rows / own - 1) * (loss - loss.detach())


def shape_text(map_Bchw: Tensor) -> str:
    """'36x48'."""
    return "x".join(str(side) for side in map_Bchw.shape[-2:])
