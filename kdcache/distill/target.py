"""What a teacher said about a batch, as a store holds it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kdcache_kernels import PackedTarget, target_argmax_confidence
from kdcache_kernels.window import ViewPositions, view_positions

INSIDE = "inside"
"""Of the extras: (B, 4) float64 edges, in pixels of the view, of what shows the image; the rest is grey."""


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
    extras: dict[str, Tensor] = {}  # noqa: RUF012 # path -> (B, ...) other arrays of the store that were asked for

    @classmethod
    def of(cls, parts: Sequence[Tensor], extras: dict[str, Tensor] | None = None) -> "Target":
        """From its first five fields, in their order."""
        values, indices, tail, window, flip = parts
        return cls(values, indices, tail, window, flip, extras or {})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Target":
        """The same on another device."""
        return self.map(lambda part: part.to(device, non_blocking=non_blocking))

    def map(self, change: "Change") -> "Target":
        """The same with every tensor changed."""
        return Target.of(
            [change(part) for part in self[:5]], {path: change(part) for path, part in self.extras.items()}
        )

    def present(self) -> bool:
        """Whether there are logits."""
        return self.values.numel() > 0

    def packed(self, form: TargetFormat) -> PackedTarget:
        """The logits, as the kernels take them."""
        sparse = self.indices.numel() > 0
        return PackedTarget(
            values=self.values,
            indices=self.indices if sparse else None,
            tail=self.tail if sparse else None,
            num_classes=form.num_classes,
            view_size=form.view_size,
            align_corners=form.align_corners,
        )

    def said(self, form: TargetFormat, size: tuple[int, int], *, impl: str = "auto") -> tuple[Tensor, Tensor]:
        """The teacher's best class and its probability (B, H, W), as the student's image of `size` shows them."""
        return target_argmax_confidence(self.packed(form), size, self.window, self.flip, impl=impl)

    def inside(self, form: TargetFormat, size: tuple[int, int]) -> Tensor:
        """Which pixels (B, H, W) of the student's image lie in the view."""
        return self._positions(form, size).inside()

    def shown(self, form: TargetFormat, size: tuple[int, int]) -> Tensor | None:
        """Which pixels (B, H, W) show the image, where a view may reach beyond it; None is all."""
        if INSIDE not in self.extras:
            return None
        at = self._positions(form, size)
        y0_B1, x0_B1, y1_B1, x1_B1 = self.extras[INSIDE].mT[..., None].unbind()
        rows_BH, columns_BW = (at.y >= y0_B1) & (at.y < y1_B1), (at.x >= x0_B1) & (at.x < x1_B1)
        return rows_BH[:, :, None] & columns_BW[:, None, :]

    def _positions(self, form: TargetFormat, size: tuple[int, int]) -> ViewPositions:
        return view_positions(self.window, self.flip, form.view_size, size, self.window.device)


class Change(Protocol):
    def __call__(self, part: Tensor, /) -> Tensor: ...


def neighbours(part: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, ... of a tensor (B, ...); B is even. What is empty stays so."""
    return part.reshape(-1, 2, *part.shape[1:]).flip(1).reshape(part.shape) if part.numel() else part
