"""One drawn sample: the arrays of one row of a batch, and how samples become a batch.

A sample is drawn into memory that the caller gives, usually a row of a batch (`Row`), because allocating and stacking
tensors of single samples would cost as much as reading.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import collate as collate_parts
from torch.utils.data._utils.collate import default_collate_fn_map

from kdcache.distill import SEGMENTATION, Batch

Array = np.ndarray[Any, Any]
Row = Mapping[str, Array]
"""Arrays to draw one sample into, by the names of `Batch.to_dict`: the memory of a batch without its first axis."""
CLASS_LABEL = f"labels/{SEGMENTATION}"


def row_of(batch: Batch, *at: int) -> Row:
    """Return the numpy arrays of one sample of a batch, which share the batch's memory: name -> array.

    `at` is the sample's index in the batch. Without it, `batch` is a single sample. The names are the keys of
    `Batch.to_dict`.
    """
    place: Any = (*at, ...)
    return {name: tensor.numpy()[place] for name, tensor in batch.to_dict().items()}


def collate(samples: Sequence[Batch], *, collate_fn_map: dict[Any, Callable[..., Any]] | None = None) -> Batch:
    """Stack samples into a batch. A `DataLoader` over samples of this type calls it by default.

    `collate_fn_map` is type -> function that stacks values of this type, as torch's `collate` passes it. None is
    torch's default.
    """
    leaves, specs = zip(*map(pytree.tree_flatten, samples), strict=True)
    kinds = default_collate_fn_map if collate_fn_map is None else collate_fn_map
    stacked = [collate_parts(parts, collate_fn_map=kinds) for parts in zip(*leaves, strict=True)]
    batch: Batch = pytree.tree_unflatten(stacked, specs[0])
    return batch


default_collate_fn_map[Batch] = collate  # by the way that the docstring of torch's default_collate gives
