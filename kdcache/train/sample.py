"""One item of a training, and a batch of them: the tensors, in one order.

A sample is drawn into memory that the caller gives, mostly a row of a batch (`Row`): torch tensors of single samples,
and stacking them, would cost as much as reading does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kdcache.distill import Target

Array = np.ndarray[Any, Any]


class Sample(NamedTuple):
    """One item; a batch has the same fields with a leading B."""

    pixels: Tensor  # uint8 (H, W, 3) RGB
    label: Tensor  # uint8 (H, W), 255 void
    target: Target

    def to_dict(self) -> dict[str, Tensor]:
        """Flat, for loops that take a batch apart by its names; what else the target brings is named by its path."""
        target = self.target._asdict()
        extras = target.pop("extras")
        return {"pixels": self.pixels, "label": self.label, **target, **extras}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> "Sample":
        """Of a `to_dict`, wherever its tensors have been moved."""
        named = {"pixels", "label", *Target._fields}
        extras = {name: tensor for name, tensor in tensors.items() if name not in named}
        target = Target.of([tensors[name] for name in Target._fields[:5]], extras)
        return cls(tensors["pixels"], tensors["label"], target)


class Row(NamedTuple):
    """One sample as arrays that are drawn into: the tensors of a `Sample`, or of one row of a batch, in their order."""

    pixels: Array
    label: Array
    values: Array
    indices: Array
    tail: Array
    window: Array
    flip: Array
    extras: dict[str, Array]

    @classmethod
    def of(cls, sample: Sample, *at: int) -> "Row":
        """Of a sample, or of the sample `at` a place in a batch."""
        place: Any = (*at, ...)
        extras = {path: part.numpy()[place] for path, part in sample.target.extras.items()}
        pixels, label, values, indices, tail, window, flip = (
            part.numpy()[place] for part in (*sample[:2], *sample.target[:5])
        )
        return cls(pixels, label, values, indices, tail, window, flip, extras)


def parts_of(batch: Sample) -> list[Tensor]:
    """The tensors of a batch in a fixed order."""
    return [batch.pixels, batch.label, *batch.target[:5], *batch.target.extras.values()]


def rows_of(batch: Sample, count: int, first: int = 0) -> Sample:
    """So many samples of a batch, in memory of the batch."""
    return batch_of([part[first : first + count] for part in parts_of(batch)], batch)


def batch_of(parts: list[Tensor], like: Sample | None = None) -> Sample:
    """The batch of `parts_of`; its extras are named as those of another batch."""
    names = () if like is None else like.target.extras
    extras = dict(zip(names, parts[7:], strict=True))
    return Sample(parts[0], parts[1], Target.of(parts[2:7], extras))
