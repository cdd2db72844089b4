"""Measure what a copy of a cache loses against the teacher's outputs, without the teacher."""

import numpy as np
import torch

from kdcache.store import Cache, Codec, Fidelity, evenly_spread, round_targets
from kdcache.store.copy import rounds
from kdcache.store.subset import SAMPLE_RECORDS
from kdcache.teacher.build.fidelity import measure_fidelity

_NEGLIGIBLE = 0.1  # float16 alone loses a thousandth of what five bits of mantissa do


def copied_fidelity(source: Cache, codec: Codec | None) -> Fidelity | None:
    """Return the error of a copy's logits, compared with the teacher's logits, without running the teacher.

    Only a copy with codec `small` rounds, if its source has another codec. A few of the source's records are then
    rounded and measured. Other copies have the source's fidelity.

    Args:
        source: the cache to copy.
        codec: how arrays of the copy are compressed: "default", "small" or "none". If it is None, the source's codec.
    Returns: the error. None if it is unknown, as for a rounded copy of a cache that stores only the top k classes.
    """
    manifest = source.manifest
    if not rounds(manifest, codec):
        return manifest.fidelity
    assert codec is not None
    records = evenly_spread(len(source), SAMPLE_RECORDS)
    rows = [source.read(record, source.target_paths()) for record in records]
    if all(np.array_equal(row[path], rounded) for row in rows for path, rounded in round_targets(row, codec).items()):
        return manifest.fidelity  # a copy of a rounded store
    if manifest.segmentation is None or not source.head.dense or manifest.fidelity is None:
        return None
    logits = (torch.from_numpy(row["targets/segmentation/values"]).float() for row in rows)
    lost = measure_fidelity(logits, source.head.k, codec, source.view_size, align_corners=source.align_corners)
    return lost if manifest.fidelity.kl_t1 <= _NEGLIGIBLE * lost.kl_t1 else None
