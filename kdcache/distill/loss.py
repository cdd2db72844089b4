"""The loss of a student: cross-entropy, KL to the cached teacher, and further terms.

`loss = ce_weight * CE(up(z), y) + kl_weight * T^2 * KL(softmax(up(t)/T) || softmax(up(z)/T)) + sum of weight * term`.
The first two are one operation, `kdcache_kernels.distill_loss`. Temperature and weights belong to the training.

Depth terms belong to the task `depth`, all others to `segmentation`. A `Criterion` weighs and balances such losses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kdcache.distill.batch import SEGMENTATION, Batch, StoredTargets
from kdcache.distill.checks import (
    Size,
    check_arrays,
    check_heads,
    check_logits,
    check_pseudo,
    check_rows,
    check_taps,
    check_targets,
    check_weights,
    labelled_batch,
    may_read_values,
    shows_otherwise,
    window_error,
)
from kdcache.distill.counts import Counts
from kdcache.distill.gate import Gate
from kdcache.distill.label_targets import LabelTargets
from kdcache.distill.masks import TeacherMasks, gated, union
from kdcache.distill.merged_targets import MergedTargets
from kdcache.distill.outputs import Losses, Outputs, StudentOutputs, unpacked
from kdcache.distill.target import TargetFormat
from kdcache.tasks import TASKS
from kdcache_kernels import distill_denominators, distill_loss
from kdcache_kernels.topk import compute_dtype

if TYPE_CHECKING:
    from kdcache.distill.terms import Term, TermBatch


class DistillLoss(nn.Module):
    """Cross-entropy + KL distillation loss on low-resolution logits, plus optional terms.

    >>> import kdcache
    >>> cache = kdcache.open_cache("streets.zarr")
    >>> batch = next(iter(torch.utils.data.DataLoader(kdcache.CacheDataset(cache), batch_size=2)))
    >>> model = kdcache.build_model("kdcache:tiny", cache.num_classes)
    >>> criterion = kdcache.DistillLoss(cache, temperature=2.0)
    >>> criterion(model(model.normalise(batch.pixels)), batch).loss.backward()

    Args:
        targets: an open cache, `LabelTargets` to use the labels of every batch as targets, or `MergedTargets` of a
            cache with other classes. None is a loss without a teacher.
        ce_weight, kl_weight: at least 0, and 0 skips the term. At 1, KL's gradient is several times the
            cross-entropy's.
        temperature: temperature T of the KL term, above 0.
        class_weight: (C,) weights of the classes in the cross-entropy. None weighs all 1.
        label_smoothing: share of every label, in [0, 1), that is spread over all classes, as in `F.cross_entropy`.
        focal_gamma: exponent of the focal loss, at least 0: a pixel's cross-entropy is multiplied by (1 - p)^gamma,
            where p is the probability of its label. It excludes label smoothing.
        ignore_index: the void class id of the labels.
        distill_void: True if the teacher's terms also count pixels without a label. Ignored if labels are the targets.
        align_corners: True if the student's own final resize aligns corners.
        gate: weights of the pixels in the teacher's terms. None weighs all 1.
        further: other terms (`kdcache.distill.terms`), each with its own weight.
        scheduled: True if `set_distill_weight_scale` may change the weights of the teacher's terms while training.
        size: (H, W) of the labels of a whole view, if their aspect ratio differs from the view's. None is the view's.
        impl: the implementation of the kernels: `auto`, `triton`, `numba`, `torch` or `reference`.
    Raises: RecipeError for an invalid weight, temperature or impl.
    Source: Hinton et al. 2015, arXiv 1503.02531, section 2. Focal loss: Lin et al. 2017, arXiv 1708.02002.
    """

    class_weight: Tensor | None
    distill_weight_scale: Tensor | None

    def __init__(
        self,
        targets: TargetFormat | None = None,
        *,
        ce_weight: float = 1.0,
        kl_weight: float = 0.3,
        temperature: float = 2.0,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        ignore_index: int = 255,
        distill_void: bool = True,
        align_corners: bool = False,
        gate: Gate | None = None,
        further: "Sequence[Term]" = (),
        scheduled: bool = False,
        size: Size | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_weights(temperature, impl, ce_weight=ce_weight, kl_weight=kl_weight)
        self.targets = targets
        self.ce_weight, self.kl_weight = ce_weight, kl_weight
        self.temperature = temperature
        self.label_smoothing, self.focal_gamma = label_smoothing, focal_gamma
        self.ignore_index = ignore_index
        self.distill_void = distill_void and not isinstance(targets, LabelTargets)
        self._masks = TeacherMasks(targets, self.distill_void, ignore_index)
        self.align_corners, self.impl = align_corners, impl
        self.gate = gate or Gate()
        self.further = nn.ModuleList(further)
        self._size = size
        self._fitting = set[Size]()  # sizes of labels that were compared with a target's windows on a GPU
        self.register_buffer("class_weight", class_weight, persistent=False)
        # On the device, and changed in place: a CUDA graph reads this very tensor.
        self.register_buffer("distill_weight_scale", torch.ones(()) if scheduled else None, persistent=False)

    @property
    def terms(self) -> "list[Term]":
        """The terms other than cross-entropy and KL."""
        return list(self.further)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Return the weights and the temperature as text. `print(loss)` shows it."""
        return f"ce_weight={self.ce_weight}, kl_weight={self.kl_weight}, temperature={self.temperature}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all terms, in the order of `Losses.terms`: `ce`, `kl`, then the others.

        A second term of one kind has a number: `cosine`, `cosine_2`.
        """
        kinds = [term.kind for term in self.terms]
        before = (kinds[:at].count(kind) for at, kind in enumerate(kinds))
        return ("ce", "kl", *(f"{kind}_{n + 1}" if n else kind for kind, n in zip(kinds, before, strict=True)))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, `segmentation` or `depth`, that have a term of weight above 0."""
        learnt = {term.task for term in self.terms if term.weight > 0}
        learnt |= {SEGMENTATION} if self.ce_weight > 0 or self.kl_weight > 0 else set()
        return tuple(task for task in TASKS if task in learnt)

    @property
    def part_tasks(self) -> dict[str, str]:
        """The task of each term: name of the term -> `segmentation` or `depth`."""
        tasks = (SEGMENTATION, SEGMENTATION, *(term.task for term in self.terms))
        return dict(zip(self.names, tasks, strict=True))

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Names of the student's features that the terms read."""
        return tuple(dict.fromkeys(tap for term in self.terms for tap in term.student_taps()))

    @property
    def arrays(self) -> tuple[str, ...]:
        """Paths of the cache's arrays that the terms read from `Batch.arrays`, such as `features/stage4`."""
        return tuple(dict.fromkeys(path for term in self.terms for path in term.arrays()))

    def set_distill_weight_scale(self, scale: float) -> None:
        """Multiply the given weights of KL and the other teacher terms by `scale`, until the next call.

        The loss must have been made with `scheduled=True`. Before the first call, the factor is 1.
        """
        assert self.distill_weight_scale is not None
        self.distill_weight_scale.fill_(scale)

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Let terms with a memory, such as `queue`, store the batch. Call it after the optimizer's step."""
        for term in (term for term in self.terms if _active(term, batch)):
            term.after_step(batch)

    @torch.no_grad()
    def counts(self, batch: Batch, dtype: torch.dtype = torch.float32) -> Counts:
        """Return the denominators of a batch's loss, which do not depend on the student's outputs.

        `dtype` is the dtype of the student's logits.

        Raises: RecipeError or DataError if the batch lacks something that a term reads.
        """
        batch = self._with_targets(batch, dtype)
        self._check(batch)
        ce, kl = self._fused_counts(batch)
        if not len(self.further):
            return Counts(ce, kl)
        no_logits = torch.empty((len(batch.any_label), 0, 1, 1), dtype=dtype, device=batch.any_label.device)
        term_batch = self.term_batch(StudentOutputs(no_logits), batch, None)
        zero = no_logits.new_zeros(())
        terms = tuple(term.count(term_batch) if _active(term, batch) else zero for term in self.terms)
        return Counts(ce, kl, terms)

    def counted(self, counts: Counts) -> dict[str, Tensor]:
        """Return the sum of the denominators of each task's terms, as a dict: task -> 0-dimensional tensor.

        The sum is 0 if no term of the task counts a pixel or image. `counts` is a result of
        `DistillLoss.counts`. Only tasks with a term of weight above 0 are keys.
        """
        weights = (self.ce_weight, self.kl_weight, *(0 if term.measured else term.weight for term in self.terms))
        parts = list(zip(self.part_tasks.values(), weights, (counts.ce, counts.kl, *counts.terms), strict=False))
        counted = {
            learnt: [n.sum() for task, weight, n in parts if task == learnt and weight > 0] for learnt in self.tasks
        }
        return {task: torch.stack(numbers).sum() for task, numbers in counted.items()}

    def _fused_counts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the denominators of cross-entropy and KL, 0-dimensional each."""
        if SEGMENTATION not in batch.labels:
            zero = torch.zeros((), device=batch.any_label.device)
            return zero, zero
        teaching = self.kl_weight > 0 and self._teaches(batch)
        counted_BHW = union(self._masks.counted_by_kl(batch)) if teaching else None
        target = batch.target if teaching and counted_BHW is None else None
        num_classes = self.targets.num_classes if self.targets is not None else 256
        ce, kl = distill_denominators(
            batch.label,
            None if target is None or self.targets is None else target.packed(self.targets),
            num_classes=num_classes if self.class_weight is None else len(self.class_weight),
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            window_B4=None if target is None else batch.window,
            flip_B=None if target is None else batch.flip,
            distill_void=self.distill_void,
        )
        return ce, kl if counted_BHW is None else counted_BHW.sum().double()

    def forward(
        self,
        outputs: Outputs | Tensor,
        batch: Batch | StoredTargets,
        counts: Counts | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Losses:
        """Return the loss, and its terms before weighting: all 0-dimensional, float32.

        Args:
            outputs: the student's outputs, with their gradient: logits (B, C, h, w) and other heads at native stride,
                and the features (B, c, h, w) of `student_taps`. Or only a tensor of logits.
            batch: labels and targets of the same samples. If `batch.targets` is None, there is no teacher, and the
                teacher's terms are 0. Stored targets (`Cache.targets_for`) need `labels`.
            counts: denominators to divide by. None uses the batch's own. For a batch in several parts (processes or
                accumulated steps), pass the mean of the parts' counts. Then the parts' losses average to the whole
                batch's loss.
            labels: segmentation labels (B, H, W) of an integer dtype, instead of the batch's.
        Raises: RecipeError if the batch lacks targets, arrays or features that an active term reads. DataError if the
            batch has no labels, has parts with different numbers of rows, or has labels that do not fit the target's
            window.
        """
        if labels is not None or not isinstance(batch, Batch):
            batch = labelled_batch(batch, labels, unpacked(outputs).logits.device)
        by_task, terms = self.by_task(outputs, batch, counts)
        return Losses(total(by_task), terms)

    def by_task(
        self, outputs: Outputs | Tensor, batch: Batch, counts: Counts | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return two dicts: the weighted loss of each task, and the value of each term.

        Args:
            outputs: the student's outputs with their gradient, or only a tensor of logits (B, C, h, w).
            batch: labels and targets of the same samples. If `batch.targets` is None, the teacher's terms are 0.
            counts: denominators to divide by. None uses the batch's own.
        Returns: task -> the weighted sum of its terms, with a gradient; name of a term -> its value before weighting,
            without a gradient. All values are 0-dimensional.
        Raises: RecipeError and DataError for an unsuitable batch or outputs, as `forward` does.
        """
        student = unpacked(outputs)
        batch = self._with_targets(batch, student.logits.dtype)
        self._check(batch, student)
        gate = self.gate_of(batch)
        fused, ce, kl = self._fused(student.logits, batch, gate, counts, self.ce_weight, self.kl_weight)
        by_task: dict[str, Tensor] = {SEGMENTATION: fused}
        values = [ce, kl]
        for term, value in self._values(student, batch, gate, counts):
            values.append(torch.zeros_like(ce) if value is None else value.detach())
            if value is not None and not term.measured:
                weighted = self._weight(term) * value
                by_task[term.task] = by_task[term.task] + weighted if term.task in by_task else weighted
        return by_task, dict(zip(self.names, values, strict=True))

    def parts(self, outputs: Outputs | Tensor, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Return the weighted loss of each active term, as a dict: name -> 0-dimensional tensor with a gradient.

        Use it to measure the gradient of each term. Terms that do not teach the student are left out.

        Args:
            outputs: the student's outputs, or only a tensor of logits (B, C, h, w).
            batch: labels and targets of the same samples.
            counts: denominators to divide by. None uses the batch's own.
        Raises: RecipeError and DataError for an unsuitable batch or outputs, as `forward` does.
        """
        student = unpacked(outputs)
        batch = self._with_targets(batch, student.logits.dtype)
        self._check(batch, student)
        gate = self.gate_of(batch)
        parts = {}
        if self.ce_weight > 0:
            parts["ce"] = self._fused(student.logits, batch, gate, counts, self.ce_weight, 0.0)[0]
        if self.kl_weight > 0 and self._teaches(batch):
            parts["kl"] = self._fused(student.logits, batch, gate, counts, 0.0, self.kl_weight)[0]
        values = self._values(student, batch, gate, counts)
        for name, (term, value) in zip(self.names[2:], values, strict=True):
            if value is not None and term.teaches_student:
                parts[name] = self._weight(term) * value
        return parts

    def _values(
        self, outputs: StudentOutputs, batch: Batch, gate: Tensor | None, counts: Counts | None
    ) -> "Iterator[tuple[Term, Tensor | None]]":
        """Yield each further term with its unweighted value, or with None if the term is not active."""
        terms = self.terms
        if not terms:
            return
        shared: Sequence[Tensor | None] = [None] * len(terms) if counts is None else counts.terms
        term_batch = self.term_batch(outputs, batch, gate)
        for term, count in zip(terms, shared, strict=True):
            yield term, term(term_batch, count) if _active(term, batch) else None

    def _with_targets(self, batch: Batch, dtype: torch.dtype) -> Batch:
        """Return the batch with the targets that terms read: its own targets, merged ones, or its labels."""
        if isinstance(self.targets, MergedTargets):
            return self.targets.replace_targets(batch)
        if not isinstance(self.targets, LabelTargets) or SEGMENTATION not in batch.labels:
            return batch
        return self.targets.replace_targets(batch, compute_dtype(dtype))

    def _check(self, batch: Batch, outputs: StudentOutputs | None = None) -> None:
        """Check a batch, and the student's outputs if they are given. Raises: RecipeError, DataError."""
        if torch.compiler.is_compiling():
            return
        active = [term for term in self.terms if _active(term, batch)]
        terms = [term for term in self.terms if term.weight > 0 and term.reads_teacher]
        kl = ["kl"] if self.kl_weight > 0 else []
        check_targets(batch, self.targets, kl + [term.kind for term in terms if term.reads_target])
        check_rows(None if outputs is None else outputs.logits, batch)
        if outputs is not None and outputs.logits.shape[1] == 0:
            check_logits(["ce"] * (self.ce_weight > 0) + kl + [term.kind for term in active if term.reads_logits])
        check_pseudo(active, batch)
        check_heads(active, batch, None if outputs is None else outputs.heads)
        if batch.targets is None or self.targets is None or not (kl or terms):
            return
        check_arrays(terms, batch)
        if outputs is not None:
            check_taps(terms, outputs.features)
        if batch.size not in self._fitting and may_read_values(batch.any_label):
            if shows_otherwise(batch, self.targets, self._size):
                raise window_error(self.targets, batch.size, self._size)
            if batch.any_label.device.type != "cpu":  # reading waits for the device: once for each size
                self._fitting.add(batch.size)

    def _now(self, weight: float) -> Tensor | float:
        return weight if self.distill_weight_scale is None else weight * self.distill_weight_scale

    def _weight(self, term: "Term") -> Tensor | float:
        return self._now(term.weight) if term.scheduled else term.weight

    def _teaches(self, batch: Batch) -> bool:
        return self.targets is not None and batch.target is not None

    def gate_of(self, batch: Batch) -> Tensor | None:
        """Return the gate's weights (B, H, W) float32 of a batch's pixels.

        Return None if all weights are 1, if the batch has no targets, or if the loss is only the cross-entropy.
        """
        if self.gate.open or not self._teaches(batch) or not (self.kl_weight > 0 or len(self.further)):
            return None
        return cast("Tensor", self.gate(batch, self.targets, impl=self.impl))

    def term_batch(self, outputs: StudentOutputs, batch: Batch, gate: Tensor | None) -> "TermBatch":
        """Return the input of the terms other than cross-entropy and KL, for the student's outputs and a batch.

        `gate` holds the weights (B, H, W) of the pixels in teacher terms, or None if all are 1.
        """
        from kdcache.distill.terms import TermBatch

        return TermBatch(
            outputs,
            replace(batch, arrays=batch.numbers) if outputs.features else batch,
            pixel_weight=gate,
            counted=self._masks.counted(batch),
            shown=self._masks.shown(batch) if any(term.reads_shown for term in self.terms) else None,
        )

    def _fused(
        self,
        logits: Tensor,
        batch: Batch,
        gate: Tensor | None,
        counts: Counts | None,
        ce_weight: float,
        kl_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_teacher = kl_weight > 0 and self._teaches(batch)
        if logits.shape[1] == 0 or (ce_weight == 0 and not by_teacher):
            zero = logits.new_zeros((), dtype=compute_dtype(logits.dtype))
            return zero, zero, zero
        if not by_teacher:
            return self._call(logits, replace(batch, targets=None), None, counts, ce_weight, kl_weight)
        (_, own_BHW), *pasted = taught = self._masks.counted_by_kl(batch)
        counted_BHW = union(taught) if counts is None else None
        count = None if counted_BHW is None else counted_BHW.sum(dtype=torch.float32)
        call = partial(self._call, logits, counts=counts, kl_weight=kl_weight, kl_count=count)
        loss, ce, kl = call(batch, gated(gate, own_BHW), ce_weight=ce_weight)
        # Where pixels were pasted, another target teaches: the KL of both adds up, by a denominator that both share.
        for pasted_batch, mask_BHW in pasted:
            of_pasted = call(pasted_batch, gated(self.gate_of(pasted_batch), mask_BHW), ce_weight=0.0)
            loss, kl = loss + of_pasted[0], kl + of_pasted[2]
        return loss, ce, kl

    def _call(
        self,
        logits: Tensor,
        batch: Batch,
        weight: Tensor | None,
        counts: Counts | None,
        ce_weight: float,
        kl_weight: float,
        kl_count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        target = batch.target
        packed = None if target is None or self.targets is None else target.packed(self.targets)
        loss, ce, kl = distill_loss(
            logits,
            batch.label,
            packed,
            ce_weight=ce_weight,
            kl_weight=0.0 if packed is None else self._now(kl_weight),
            temperature=self.temperature,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            focal_gamma=self.focal_gamma,
            ignore_index=self.ignore_index,
            window_B4=None if packed is None else batch.window,
            flip_B=None if packed is None else batch.flip,
            pixel_weight_BHW=weight,
            distill_void=self.distill_void,
            align_corners=self.align_corners,
            ce_denominator=None if counts is None else counts.ce,
            kl_denominator=counts.kl if kl_count is None and counts is not None else kl_count,
            impl=self.impl,
        )
        return loss, ce.detach(), kl.detach()


def total(by_task: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the tasks' losses. `by_task` is task -> its loss, 0-dimensional."""
    loss, *others = by_task.values()
    return sum(others, loss)


def _active(term: "Term", batch: Batch) -> bool:
    """Return True if a term is computed for a batch.

    A term of weight 0 is not computed. Without a teacher in the batch, only label terms are.
    """
    return term.weight > 0 and (batch.targets is not None or not term.reads_teacher)
