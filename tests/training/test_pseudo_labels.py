"""What a training says of its pseudo labels before its first step."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdcache.data import ClassList, open_split
from kdcache.errors import RecipeError
from kdcache.store import Cache, open_cache
from kdcache.training import CacheDataset, LabelledDataset, TrainConfig, make_config, pseudo_labels, train
from kdcache.training.criterion import label_counts
from kdcache.training.pseudo_labels import collapse_note, effective_classes, pseudo_notes


@pytest.fixture
def pseudo(student: dict[str, Any]) -> Callable[..., TrainConfig]:
    return lambda *thresholds, **changes: make_config(
        **student
        | {"method": "none", "term": [{"kind": "pseudo", "threshold": threshold} for threshold in thresholds]}
        | changes
    )


def probabilities(cache: Cache, merged: Sequence[Sequence[int]]) -> torch.Tensor:
    """Probabilities (N, len(merged), H, W) of merged classes, of all first views, in float64."""
    paths = ["targets/segmentation/values"]
    rows = [cache.read(cache.manifest.record(n), paths)[paths[0]] for n in range(cache.manifest.dataset.samples)]
    p_NChw = torch.stack([torch.from_numpy(row) for row in rows]).double().softmax(1)
    sums = torch.stack([p_NChw[:, list(own)].sum(1) for own in merged], 1)
    return F.interpolate(sums.log(), cache.view_size, mode="bilinear").softmax(1)


def confidences(cache: Cache) -> torch.Tensor:
    """The teacher's probability of its class, of every pixel of the first views."""
    return probabilities(cache, [[number] for number in range(cache.num_classes)]).amax(1).flatten()


def test_a_low_share_is_told_with_the_threshold_that_keeps_half(cache: Cache, pseudo: Any) -> None:
    sure = confidences(cache)
    quarter, most = (float(sure.quantile(q)) for q in (0.75, 0.1))
    notes = list(pseudo_notes(pseudo(quarter, most), CacheDataset(cache)))
    assert len(notes) == 1  # of the threshold that keeps most there is nothing to say
    share, half = re.findall(r"keeps ([0-9.]+) % of the pixels .*\. ([0-9.]+) would keep half", notes[0])[0]
    assert float(share) == pytest.approx(25, abs=2)
    assert float(half) == pytest.approx(float(sure.median()), rel=0.06)
    assert any(f"{name} " in notes[0] for name in cache.manifest.dataset.class_names)


def test_merged_classes_are_as_sure_as_the_sum_of_their_probabilities(cache: Cache, pseudo: Any) -> None:
    merged = [[0, 2, 4, 6], [1, 3]]  # 5 is dropped
    dataset = CacheDataset(cache)
    lookup = np.full(256, 255, np.uint8)
    for number, own in enumerate(merged):
        lookup[own] = number
    dataset.mapped = ClassList(("even", "odd"), ((0, 0, 0), (9, 9, 9))), lookup
    sure, best = probabilities(cache, merged).max(1)
    threshold = float(sure.quantile(0.75))
    (note,) = pseudo_notes(pseudo(threshold), dataset)
    shares = {name: float(share) for name, share in re.findall(r"(even|odd) ([0-9.e+]+) %", note)}
    for number, name in enumerate(("even", "odd")):
        own = sure[best == number]
        assert shares.get(name, 0) == pytest.approx(100 * float((own >= threshold).double().mean()), abs=3)
    total = float(re.findall(r"keeps ([0-9.]+) %", note)[0])
    assert total == pytest.approx(25, abs=2)
    assert list(pseudo_notes(pseudo(threshold), CacheDataset(cache))) != [note]


def test_none_at_all_is_noted_and_refused_where_nothing_else_is_learnt(cache: Cache, pseudo: Any) -> None:
    samples = cache.manifest.dataset.samples
    (note,) = pseudo_notes(pseudo(0.9999), CacheDataset(cache))
    assert f"No pseudo labels from 0.9999 in all {samples} samples of {cache.place} (split train)" in note
    for alone in ({"ce_weight": 0.0}, {"labels": "none"}):
        with pytest.raises(RecipeError, match="No pseudo labels from") as caught:
            list(pseudo_notes(pseudo(0.9999, **alone), CacheDataset(cache)))
        assert "which keeps half" in caught.value.fix
    assert list(pseudo_notes(pseudo(0.9999, labels="none"), CacheDataset(cache), pasted=True)) == [note]


def test_a_target_without_a_confident_pixel_is_refused_beside_labels_of_another(
    student: dict[str, Any], cache_path: Path, scenes: str, tmp_path: Path
) -> None:
    """Nothing would be learnt of it, whatever the others teach; and nothing is begun."""
    target = f't,cache={cache_path},labels=none,method=none,"term=pseudo,threshold=0.9999"'
    streams = [f'l,"data={scenes}",method=none', target]
    settings = student | {"cache": None, "size": "32x48", "stream": streams, "batch_size": 4}
    with pytest.raises(RecipeError, match="stream t: No pseudo labels from") as caught:
        train(make_config(**settings), tmp_path / "run")
    assert "which keeps half" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_every_sample_is_counted_once(cache: Cache, pseudo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the estimate are not counted again when all samples are searched for a confident pixel."""
    monkeypatch.setattr(pseudo_labels, "LOOKED_AT", 2)
    counts = pseudo_labels.count_confidences(cache, cache, range(cache.manifest.dataset.samples))
    (note,) = pseudo_notes(pseudo(0.9999), CacheDataset(cache))
    totals = []
    none_found = pseudo_labels.none_confident
    monkeypatch.setattr(
        pseudo_labels,
        "none_confident",
        lambda cache, threshold, own: totals.append(own.predicted_CV) or none_found(cache, threshold, own),
    )
    assert list(pseudo_notes(pseudo(0.9999), CacheDataset(cache))) == [note]
    np.testing.assert_array_equal(totals[0], counts.predicted_CV)


def test_quantiles_other_terms_and_data_without_a_store_have_none(cache: Cache, scenes: str, pseudo: Any) -> None:
    assert not list(pseudo_notes(pseudo(term=[{"kind": "pseudo", "quantile": 0.1}]), CacheDataset(cache)))
    assert not list(pseudo_notes(pseudo(method="kl"), CacheDataset(cache)))
    folder = LabelledDataset(open_split(scenes, "train"), (32, 48))
    assert not list(pseudo_notes(pseudo(0.9999), folder))


def test_a_store_of_raw_logits_is_looked_at_too(make_cache: Callable[..., Path], cache: Cache, pseudo: Any) -> None:
    raw = open_cache(make_cache(raw_logits=True))
    threshold = float(confidences(cache).quantile(0.75))
    own, other = (list(pseudo_notes(pseudo(threshold), CacheDataset(store))) for store in (raw, cache))
    assert own == other != []


def test_a_teacher_that_knows_few_classes_is_noted(cache: Cache, pseudo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the labels' classes, as their entropy counts them, is the least."""
    target, labelled = CacheDataset(cache), LabelledDataset(open_split("scenes:32x48,train=6,val=3", "train"), (32, 48))
    config = pseudo(0.5, labels="none", ce_weight=0.0)
    counts = np.zeros(len(labelled.classes), np.int64)
    monkeypatch.setattr(pseudo_labels, "target_counts", lambda *_: counts)
    counts[:] = label_counts(labelled)
    assert collapse_note(config, target, [labelled]) is None
    most = int(counts.argmax())
    counts[np.arange(len(counts)) != most] //= 1000
    note = collapse_note(config, target, [labelled])
    assert note is not None
    shares = rf"predicts 1\.0 classes, and the labels have [2-7]\.\d .* {labelled.classes.names[most]} 99\.\d % "
    assert re.search(shares, note), note
    assert collapse_note(config, target, []) is None
    assert collapse_note(pseudo(method="none", term=[]), target, [labelled]) is None


@pytest.mark.parametrize(("counts", "classes"), [([5, 5, 0, 5], 3.0), ([7, 0], 1.0), ([0, 0], 0.0), ([1, 3], 1.7548)])
def test_classes_by_entropy(counts: list[int], classes: float) -> None:
    assert effective_classes(np.array(counts)) == pytest.approx(classes, rel=1e-4)
