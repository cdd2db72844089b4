"""What a training says of its pseudo labels before its first step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kdcache.errors import RecipeError
from kdcache.store import Cache, open_cache
from kdcache.train import make_config
from kdcache.train.config import TrainConfig
from kdcache.train.pseudo_labels import pseudo_notes


@pytest.fixture
def pseudo(student: dict[str, Any]) -> Callable[..., TrainConfig]:
    return lambda *thresholds, **changes: make_config(
        **student
        | {"method": "none", "term": [{"kind": "pseudo", "threshold": threshold} for threshold in thresholds]}
        | changes
    )


def confidences(cache: Cache) -> torch.Tensor:
    """The teacher's probability of its class, of every pixel of the first views."""
    paths = ["targets/segmentation/values"]
    rows = [cache.read(cache.manifest.record(n), paths)[paths[0]] for n in range(cache.manifest.dataset.samples)]
    logits = F.interpolate(
        torch.stack([torch.from_numpy(row) for row in rows]).double(), cache.view_size, mode="bilinear"
    )
    return logits.softmax(1).amax(1).flatten()


def test_a_low_share_is_told_with_the_threshold_that_keeps_half(cache: Cache, pseudo: Any) -> None:
    sure = confidences(cache)
    quarter, most = (float(sure.quantile(q)) for q in (0.75, 0.1))
    notes = list(pseudo_notes(pseudo(quarter, most), cache))
    assert len(notes) == 1  # of the threshold that keeps most there is nothing to say
    share, half = re.findall(r"are on ([0-9.]+) % of the pixels .*; ([0-9.]+) would keep half", notes[0])[0]
    assert float(share) == pytest.approx(25, abs=2)
    assert float(half) == pytest.approx(float(sure.median()), rel=0.06)
    assert any(f"{name} " in notes[0] for name in cache.manifest.dataset.class_names)


def test_none_at_all_is_noted_and_refused_where_nothing_else_is_learnt(cache: Cache, pseudo: Any) -> None:
    samples = cache.manifest.dataset.samples
    (note,) = pseudo_notes(pseudo(0.9999), cache)
    assert f"none from 0.9999 in all {samples} samples of {cache.place} (split train)" in note
    with pytest.raises(RecipeError, match="none from") as caught:
        list(pseudo_notes(pseudo(0.9999, ce_weight=0.0), cache))
    assert "which keeps half" in caught.value.remedy


def test_quantiles_other_terms_and_data_without_a_store_have_none(cache: Cache, pseudo: Any) -> None:
    assert not list(pseudo_notes(pseudo(term=[{"kind": "pseudo", "quantile": 0.1}]), cache))
    assert not list(pseudo_notes(pseudo(method="kl"), cache))
    assert not list(pseudo_notes(pseudo(0.9999), None))


def test_a_store_of_raw_logits_is_looked_at_too(make_cache: Callable[..., Path], cache: Cache, pseudo: Any) -> None:
    raw = open_cache(make_cache(raw_logits=True))
    threshold = float(confidences(cache).quantile(0.75))
    own, other = (list(pseudo_notes(pseudo(threshold), store)) for store in (raw, cache))
    assert own == other != []
