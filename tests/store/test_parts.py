"""What the parts of a manifest say of each other."""

from __future__ import annotations

import pytest

from kdcache.store.parts import Training
from kdcache.store.schema import head_arrays


@pytest.mark.parametrize(
    ("fold", "asked", "left_out"),
    [
        (None, (0, 2), False),
        ((1, 3), (1, 3), True),
        ((1, 3), (0, 3), False),
        ((0, 2), (0, 4), True),  # a half is made of whole quarters
        ((0, 2), (2, 4), True),
        ((0, 2), (1, 4), False),
        ((0, 2), (0, 3), False),  # a third is no part of a half
        ((0, 4), (0, 2), False),  # nor a half of a quarter
    ],
)
def test_a_training_left_out_what_is_part_of_its_fold(fold, asked, left_out) -> None:
    assert Training(ids_digest="0", fold=fold).left_out(*asked) is left_out


@pytest.mark.parametrize(("classes", "kind"), [(256, "uint8"), (257, "uint16")])
def test_indices_hold_the_last_class(plan, classes, kind) -> None:
    manifest = plan(records=2, k=2, classes=classes).manifest
    assert {spec.path: spec.dtype for spec in head_arrays(manifest, "segmentation")} == {
        "targets/segmentation/values": "float16",
        "targets/segmentation/indices": kind,
        "targets/segmentation/tail": "float16",
    }
