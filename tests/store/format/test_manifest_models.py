"""What the parts of a manifest say of each other."""

from __future__ import annotations

import pytest

from kdcache.store.format.manifest_models import Drawn, View
from kdcache.store.format.schema import head_arrays
from kdcache.store.format.teacher_models import Training


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


def test_folds_of_sequences_are_no_folds_of_ids() -> None:
    half = Training(ids_digest="0", fold=(0, 2), folds_by="^.")
    assert half.left_out(0, 2, "^.")
    assert not any(
        (half.left_out(0, 2), half.left_out(0, 2, "^.."), half.left_out(0, 4, "^."), half.left_out(1, 2, "^."))
    )
    with pytest.raises(ValueError, match="without a fold"):
        Training(ids_digest="0", folds_by="^.")


@pytest.mark.parametrize(
    ("crop", "low", "beyond"),
    [
        (None, 1.0, False),  # the default of a build: a view from zoom 1 never leaves its image
        (None, 0.99, True),
        ((24, 36), 0.5, False),  # half of the image's height and width
        ((24, 36), 0.49, True),
        ((12, 72), 1.0, False),
        ((12, 72), 0.9, True),  # along one axis
        ((48, 18), 0.9, True),
    ],
)
def test_a_view_reaches_beyond_its_image_from_the_zoom_at_which_it_shows_all_of_it(crop, low, beyond) -> None:
    drawn = Drawn(seed=0, scale=(low, 2.0), flip=True)
    kind = {"size": (48, 72)} if crop is None else {"kind": "crop", "size": crop, "image_size": (48, 72)}
    assert View(**kind, views_per_sample=2, drawn=drawn, pixels="stored").reaches_beyond is beyond


def test_a_whole_image_shows_nothing_beyond_itself() -> None:
    assert not View(size=(48, 72), pixels="stored").reaches_beyond


@pytest.mark.parametrize(("classes", "kind"), [(256, "uint8"), (257, "uint16")])
def test_indices_hold_the_last_class(plan, classes, kind) -> None:
    manifest = plan(records=2, k=2, classes=classes).manifest
    assert {spec.path: spec.dtype for spec in head_arrays(manifest, "segmentation")} == {
        "targets/segmentation/values": "float16",
        "targets/segmentation/indices": kind,
        "targets/segmentation/tail": "float16",
    }
