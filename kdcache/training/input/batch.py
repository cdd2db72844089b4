"""One drawn sample: the arrays of one row of a batch, and how samples become a batch.

A sample is drawn into memory that the caller gives, usually a row of a batch (`Row`), because allocating and stacking
tensors of single samples would cost as much as reading.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import collate as collate_parts
from torch.utils.data._utils.collate import default_collate_fn_map

from kdcache.distill import SEGMENTATION, Batch
from kdcache.tasks import DEPTH

Array = np.ndarray[Any, Any]
_STORED = ("targets/", "arrays/")


@dataclass(frozen=True)
class Row:
    """Arrays to draw one sample into: the memory of a `Batch` without its first axis.

    Attributes:
        label: segmentation labels.
        depth: depth labels, or None if none are drawn.
        stored: (path, memory for a row of that array of the cache): targets and further arrays.
        others: the fields of `Batch`. Absent fields are None.
    """

    pixels: Array
    label: Array
    stored: list[tuple[str, Array]]
    window: Array | None
    flip: Array | None
    inside: Array | None
    dice: Array | None
    record: Array | None
    zoom: Array | None = None
    depth: Array | None = None
    weak: Array | None = None

    @classmethod
    def of(cls, batch: Batch, *at: int) -> "Row":
        """Return the memory of a single sample, or of the sample at index `at` of a batch."""
        place: Any = (*at, ...)
        arrays = {name: tensor.numpy()[place] for name, tensor in batch.to_dict().items()}
        return cls(
            pixels=arrays["pixels"],
            label=arrays[f"labels/{SEGMENTATION}"],
            stored=[(name.removeprefix("arrays/"), a) for name, a in arrays.items() if name.startswith(_STORED)],
            window=arrays.get("window"),
            flip=arrays.get("flip"),
            inside=arrays.get("inside"),
            dice=arrays.get("dice"),
            record=arrays.get("record"),
            zoom=arrays.get("zoom"),
            depth=arrays.get(f"labels/{DEPTH}"),
            weak=arrays.get("weak"),
        )


def collate(samples: Sequence[Batch], *, collate_fn_map: dict[Any, Callable[..., Any]] | None = None) -> Batch:
    """Stack samples into a batch. `DataLoader` does this by itself."""
    leaves, specs = zip(*map(pytree.tree_flatten, samples), strict=True)
    kinds = default_collate_fn_map if collate_fn_map is None else collate_fn_map
    stacked = [collate_parts(parts, collate_fn_map=kinds) for parts in zip(*leaves, strict=True)]
    batch: Batch = pytree.tree_unflatten(stacked, specs[0])
    return batch


default_collate_fn_map[Batch] = collate  # by the way that the docstring of torch's default_collate gives
