"""The loss of a student: cross-entropy beside KL to the cached teacher.

`loss = ce_weight * CE(up(z), y) + kl_weight * T^2 * KL(softmax(up(t)/T) || softmax(up(z)/T))`, computed by
`kdcache_kernels.distill_loss`. Temperature and weights are choices of the training, never of the store.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kdcache_kernels import KernelError as KernelError
from kdcache_kernels import LossParts as LossParts
from kdcache_kernels import PackedTarget, distill_denominators, distill_loss
from kdcache_kernels.ops import choose_implementation as choose_implementation


class TargetFormat(Protocol):
    """What must be known of a store to read its targets; an open cache is one."""

    @property
    def num_classes(self) -> int: ...
    @property
    def view_size(self) -> tuple[int, int]: ...
    @property
    def align_corners(self) -> bool: ...


class Target(NamedTuple):
    """What the teacher said about a batch, as the store holds it, and the window that the student looks through.

    An empty tensor means absent: no indices and tail for a dense target, no values when no target was read.
    """

    values: Tensor  # (B, k, h, w) float16: logit minus the pixel's maximum
    indices: Tensor  # (B, k, h, w) uint8 or uint16, or empty
    tail: Tensor  # (B, h, w) float16 log-odds of the mass outside the top k, or empty
    window: Tensor  # (B, 4) float64 (y0, x0, y1, x1), edge coordinates in pixels of the view
    flip: Tensor  # (B,) bool

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Target":
        """The same on another device."""
        return Target(*(part.to(device, non_blocking=non_blocking) for part in self))


class DistillLoss(nn.Module):
    """CE + KL of a batch, from low-resolution student logits and a packed target.

    Args:
        targets: an open cache (number of classes, view size and resize rule of its targets).
        ce_weight, kl_weight: at least 0; a term of weight 0 is not computed.
        temperature: of the KL term, above 0.
        class_weight: (C,) weights of the cross-entropy.
        distill_void: whether pixels without a label teach too.
        align_corners: of the student's own final resize.
        impl: which implementation computes it (see `kdcache_kernels.distill_loss`).
    Attributes:
        average: mean of a tensor over the processes that share a batch; None when there is one. The denominators are
            then the whole batch's over the number of processes, so that the processes' losses, and their gradients,
            average to the whole batch's.
    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        targets: TargetFormat | None = None,
        *,
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        temperature: float = 2.0,
        class_weight: Tensor | None = None,
        ignore_index: int = 255,
        distill_void: bool = True,
        align_corners: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.targets = targets
        self.ce_weight = ce_weight
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.distill_void = distill_void
        self.align_corners = align_corners
        self.impl = impl
        self.average: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(
        self, student_logits_BChw: Tensor, labels_BHW: Tensor | None, target: Target | None = None
    ) -> LossParts:
        """Loss, and its parts before weighting: all scalars, float32.

        Args:
            student_logits_BChw: at the head's native stride; receives the gradient.
            labels_BHW: uint8, `ignore_index` is void.
            target: of the same batch; not needed when kl_weight is 0.
        """
        return self._loss(student_logits_BChw, labels_BHW, target, self.ce_weight, self.kl_weight)

    def terms(
        self, student_logits_BChw: Tensor, labels_BHW: Tensor | None, target: Target | None = None
    ) -> dict[str, Tensor]:
        """Every active term on its own, weighted and differentiable: name -> scalar. For gradient norms."""
        found = {}
        if self.ce_weight > 0:
            found["ce"] = self._loss(student_logits_BChw, labels_BHW, target, self.ce_weight, 0.0).loss
        if self.kl_weight > 0 and self._has(target):
            found["kl"] = self._loss(student_logits_BChw, labels_BHW, target, 0.0, self.kl_weight).loss
        return found

    def _has(self, target: Target | None) -> bool:
        return target is not None and self.targets is not None and target.values.numel() > 0

    def _loss(
        self, logits: Tensor, labels: Tensor | None, target: Target | None, ce_weight: float, kl_weight: float
    ) -> LossParts:
        teaching = target if kl_weight > 0 and self._has(target) else None
        packed = None if teaching is None else self._packed(teaching)
        counted: dict[str, Any] = {
            "class_weight": self.class_weight,
            "ignore_index": self.ignore_index,
            "window_B4": None if teaching is None else teaching.window,
            "flip_B": None if teaching is None else teaching.flip,
            "distill_void": self.distill_void,
        }
        ce_denominator, kl_denominator = None, None
        if self.average is not None:
            own = distill_denominators(labels, packed, num_classes=logits.shape[1], **counted)
            ce_denominator, kl_denominator = self.average(torch.stack(own)).unbind()
        return distill_loss(
            logits,
            labels,
            packed,
            ce_weight=ce_weight,
            kl_weight=0.0 if teaching is None else kl_weight,
            temperature=self.temperature,
            align_corners=self.align_corners,
            ce_denominator=ce_denominator,
            kl_denominator=kl_denominator,
            impl=self.impl,
            **counted,
        )

    def _packed(self, target: Target) -> PackedTarget:
        assert self.targets is not None
        sparse = target.indices.numel() > 0
        return PackedTarget(
            values=target.values,
            indices=target.indices if sparse else None,
            tail=target.tail if sparse else None,
            num_classes=self.targets.num_classes,
            view_size=self.targets.view_size,
            align_corners=self.targets.align_corners,
        )
