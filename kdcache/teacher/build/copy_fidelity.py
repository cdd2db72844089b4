"""What a copy of a store lost beside the teacher, whom nobody asks again."""

import numpy as np
import torch

from kdcache.store import Cache, Codec, Fidelity, round_targets
from kdcache.store.copy import rounds
from kdcache.teacher.build.fidelity import measure_fidelity
from kdcache.teacher.build.manifest import SAMPLE_RECORDS

_NEGLIGIBLE = 0.1  # float16 alone loses a thousandth of what five bits of mantissa do


def copied_fidelity(source: Cache, codec: Codec | None) -> Fidelity | None:
    """The figures of a copy into `codec` (None: the source's).

    The source's own where the copy holds the same numbers, decoded or not. Where it rounds, what that loses beside the
    source, if the source keeps all classes and is known to have lost next to nothing itself. Else None: two losses
    cannot be told from the second alone.
    """
    about = source.manifest
    if not rounds(about, codec):
        return about.fidelity
    assert codec is not None
    records = np.linspace(0, len(source) - 1, min(SAMPLE_RECORDS, len(source))).round()
    rows = [source.read(int(record), source.target_paths()) for record in records]
    if all(np.array_equal(row[path], kept) for row in rows for path, kept in round_targets(row, codec).items()):
        return about.fidelity  # a copy of a rounded store
    if not source.head.dense or about.fidelity is None:
        return None
    said = (torch.from_numpy(row["targets/segmentation/values"]).float() for row in rows)
    lost = measure_fidelity(said, source.head.k, codec, source.view_size, align_corners=source.align_corners)
    return lost if about.fidelity.kl_t1 <= _NEGLIGIBLE * lost.kl_t1 else None
