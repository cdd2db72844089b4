"""Attention maps beside the targets and raw logits, against float64 arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kdcache
from kdcache.errors import MismatchError, ModelError, RecipeError
from kdcache.sharing import build_command
from kdcache.store import CopyChanges, Records, copy_store, inspect_store, open_cache
from kdcache.store.format.manifest_models import Statistic
from kdcache.teacher import (
    Teacher,
    TeacherProbe,
    build_cache,
    compare_teacher,
    load_teachers,
    options_of,
    plan_manifest,
)
from kdcache.teacher.build.statistics import attention
from kdcache.training import CacheDataset

WORDS = ("at:head", "at:stage2")
MAX = "targets/segmentation/max"


@pytest.fixture
def several(tmp_path, classes, model_of) -> Teacher:
    origins = []
    for seed in range(3):
        save_file(dict(model_of(len(classes), seed).state_dict()), tmp_path / f"{seed}.safetensors")
        origins.append(f"kdcache:tiny@{tmp_path}/{seed}.safetensors")
    return load_teachers(origins, classes, weights=(2, 1, 1))


def pixels(cache, record) -> torch.Tensor:
    return torch.from_numpy(cache.read(record, ["pixels/image"])["pixels/image"])[None]


def test_what_is_stored(tmp_path, several, split, options) -> None:
    build_cache(split, several, tmp_path / "s.zarr", options(statistics=WORDS, raw_logits=True, top_k=4, batch_size=1))
    cache = open_cache(tmp_path / "s.zarr")
    about = cache.manifest
    assert about.features == {}
    assert about.statistics == {
        "at.head": Statistic(kind="at", tap="head", size=(8, 12)),
        "at.stage2": Statistic(kind="at", tap="stage2", size=(4, 6)),
    }
    for record in range(7):
        image = pixels(cache, record)
        with torch.inference_mode():
            first = several.model.parts[0]
            features = first(first.normalise(image), ("head", "stage2")).features
            logits = several.model(several.model.normalise(image)).logits[0].double().numpy()
        for tap in ("head", "stage2"):
            energy = (features[tap][0].double().numpy() ** 2).sum(0)
            stored = cache.read(record, [f"statistics/at.{tap}"])[f"statistics/at.{tap}"]
            assert stored.dtype == np.float16
            assert np.abs(stored - energy / energy.max()).max() < 2e-3, tap
        row = cache.read(record, [MAX, "targets/segmentation/values"])
        assert row[MAX].dtype == np.float32
        assert np.abs(row[MAX] - logits.max(0)).max() < 1e-5
        raw = np.sort(logits, axis=0)[::-1][:4]
        assert np.abs(row[MAX] + row["targets/segmentation/values"] - raw).max() < 0.01


def test_raw_logits_of_one_teacher(tmp_path, teacher, split, options) -> None:
    """Values and maximum together are the teacher's own logits, whose constant an ensemble does not have."""
    build_cache(split, teacher, tmp_path / "s.zarr", options(raw_logits=True, batch_size=1))
    cache = open_cache(tmp_path / "s.zarr")
    row = cache.read(2, [MAX, "targets/segmentation/values"])
    with torch.inference_mode():
        logits = teacher.model(teacher.model.normalise(pixels(cache, 2))).logits[0].numpy()
    assert logits.max(0).std() > 0.1
    assert np.array_equal(row[MAX], logits.max(0))
    assert np.abs(row[MAX] + row["targets/segmentation/values"] - logits).max() < 0.01
    assert compare_teacher(Records(cache), teacher, torch.device("cpu")).ok
    for augment in ("warp", "replay"):
        assert len(CacheDataset(cache, augment=augment)) == 7


def test_attention_of_extremes() -> None:
    feature = torch.zeros(3, 2, 2, 2)
    feature[1, 0, 0, 0], feature[1, 1, 0, 0], feature[1, 0, 1, 1] = 3.0, -4.0, 2.5
    feature[2, 0, 0, 1], feature[2, 1, 1, 0] = 1e30, 5e29
    found = attention(feature)
    assert found[0].tolist() == [[0, 0], [0, 0]]
    assert found[1].tolist() == [[1, 0], [0, 0.25]]
    assert found[2].tolist() == [[0, 1], [0.25, 0]]
    feature[0, 0, 0, 0] = math.nan
    assert attention(feature)[0].isnan().any(), "what is no number is no map of zeros"
    assert attention(feature.half())[1].tolist() == [[1, 0], [0, 0.25]]
    assert attention(1e-30 * feature)[1].flatten().tolist() == pytest.approx([1, 0, 0, 0.25]), "squares underflow"


def test_carried_along(tmp_path, several, split, options) -> None:
    """Copied, extended, inspected; a further statistic asks the teacher again and keeps what is there."""
    build_cache(split, several, tmp_path / "s", options(statistics=("at:stage2",), raw_logits=True, batch_size=1))
    cache = open_cache(tmp_path / "s")
    copy_store(cache, tmp_path / "copy", CopyChanges(codec="none", shard_records=2))
    copied = open_cache(tmp_path / "copy")
    for path in ("statistics/at.stage2", MAX):
        assert all(np.array_equal(cache.read(r, [path])[path], copied.read(r, [path])[path]) for r in range(7))
    more = options_of(cache.manifest, views=2, fidelity=False)
    assert more.statistics == ("at:stage2",)
    assert build_cache(split, several, tmp_path / "more", more, reuse=cache).reused == 7
    again = options_of(cache.manifest, statistics=("at:stage2", "at:head"), fidelity=False)
    result = build_cache(split, several, tmp_path / "again", again, reuse=cache)
    assert (result.records, result.reused) == (7, 7)
    found = open_cache(tmp_path / "again")
    assert list(found.manifest.statistics) == ["at.stage2", "at.head"]
    assert np.array_equal(found.read(3, [MAX])[MAX], cache.read(3, [MAX])[MAX])
    arrays = {array.path for array in inspect_store(tmp_path / "again").arrays}
    assert {"statistics/at.stage2", "statistics/at.head", MAX} <= arrays
    for change in ({"statistics": ()}, {"raw_logits": False}):
        chosen = options(**{"statistics": ("at:stage2",), "raw_logits": True, "batch_size": 1, **change})
        with pytest.raises(MismatchError, match=r"statistics|heads"):
            build_cache(split, several, tmp_path / "s", chosen)


def test_a_cache_of_an_earlier_version_is_trained_and_extended(
    tmp_path, several, split, options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its maps of the distribution are read as they are, and stay where they are."""
    entropy = {"entropy": Statistic(kind="entropy", size=(8, 12))}
    with monkeypatch.context() as earlier:
        earlier.setattr("kdcache.teacher.build.manifest.statistics_of", lambda *_: entropy)
        earlier.setattr(
            "kdcache.teacher.build.build.measure",
            lambda *_: {"statistics/entropy": torch.full((1, 8, 12), 0.5, dtype=torch.float16)},
        )
        build_cache(split, several, tmp_path / "old", options(batch_size=1))
    old = open_cache(tmp_path / "old")
    assert (old.read(3, ["statistics/entropy"])["statistics/entropy"] == 0.5).all()
    assert len(CacheDataset(old, augment="replay")) == 7
    copy_store(old, tmp_path / "copy", CopyChanges(shard_records=2))
    assert (open_cache(tmp_path / "copy").read(6, ["statistics/entropy"])["statistics/entropy"] == 0.5).all()
    with pytest.raises(MismatchError) as caught:
        build_cache(split, several, tmp_path / "old", options(batch_size=1))
    assert f"Add --from {tmp_path / 'old'}" in caught.value.fix
    assert "entropy" not in build_command(old.manifest)
    new = kdcache.build_cache(split, several, tmp_path / "new", reuse=tmp_path / "old", statistics=("at:head",))
    assert new.reused == 7
    assert "keeps its entropy" in capsys.readouterr().err
    assert list(open_cache(tmp_path / "new").manifest.statistics) == ["at.head"]


def test_statistics_that_cannot_be(teacher, split, options) -> None:
    for word in ("entropi", "at", "at:", "norm"):
        with pytest.raises(RecipeError, match="Unknown statistic") as caught:
            plan_manifest(TeacherProbe(split, teacher, options(statistics=(word,))))
        assert "--statistics at:head" in caught.value.fix
    for word in ("confidence", "entropy", "agreement"):
        with pytest.raises(RecipeError, match=f"{word} was removed"):
            plan_manifest(TeacherProbe(split, teacher, options(statistics=("at:head", word))))
    with pytest.raises(ModelError, match="Unknown tap"):
        plan_manifest(TeacherProbe(split, teacher, options(statistics=("at:haed",))))
