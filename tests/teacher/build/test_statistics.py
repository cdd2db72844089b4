"""Maps beside the targets and raw logits, against float64 arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdcache.errors import MismatchError, ModelError, RecipeError
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
from kdcache.teacher.build.statistics import attention, measure
from kdcache.training import CacheDataset

WORDS = ("at:head", "at:stage2", "confidence", "entropy", "agreement")
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
        "confidence": Statistic(kind="confidence", size=(8, 12)),
        "entropy": Statistic(kind="entropy", size=(8, 12)),
        "agreement": Statistic(kind="agreement", size=(8, 12)),
    }
    agreements = []
    for record in range(7):
        image = pixels(cache, record)
        with torch.inference_mode():
            said = [m(m.normalise(image), ("head", "stage2")) for m in several.model.parts]
            logits = several.model(several.model.normalise(image)).logits[0].double().numpy()
        p = np.stack([output.logits[0].double().softmax(0).numpy() for output in said])
        mean = np.einsum("m,mchw->chw", (0.5, 0.25, 0.25), p)
        wanted = {"confidence": mean.max(0), "entropy": -(mean * np.log(mean)).sum(0)}
        wanted["agreement"] = np.einsum("m,mhw->hw", (0.5, 0.25, 0.25), p.argmax(1) == mean.argmax(0))
        for tap in ("head", "stage2"):
            energy = (said[0].features[tap][0].double().numpy() ** 2).sum(0)
            wanted[f"at.{tap}"] = energy / energy.max()
        for name, values in wanted.items():
            stored = cache.read(record, [f"statistics/{name}"])[f"statistics/{name}"]
            assert stored.dtype == np.float16
            assert np.abs(stored - values).max() < 2e-3, name
        agreements.append(wanted["agreement"])
        row = cache.read(record, [MAX, "targets/segmentation/values"])
        assert row[MAX].dtype == np.float32
        assert np.abs(row[MAX] - logits.max(0)).max() < 1e-5
        raw = np.sort(logits, axis=0)[::-1][:4]
        assert np.abs(row[MAX] + row["targets/segmentation/values"] - raw).max() < 0.01
    assert {0.0, 0.25, 0.5, 0.75, 1.0} >= set(np.unique(agreements)) > {1.0}


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


def test_a_class_without_any_probability() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0]).view(1, 3, 1, 1)
    about = {kind: Statistic(kind=kind, size=(1, 1)) for kind in ("confidence", "entropy")}
    found = measure(about, logits, {})
    assert found["statistics/confidence"].item() == 0.5
    assert found["statistics/entropy"].item() == pytest.approx(math.log(2), abs=1e-3)


def test_agreement_on_a_coarser_grid(several, split, options) -> None:
    chosen = options(teacher_size=(64, 96), teacher_grid="view", statistics=("agreement", "entropy"))
    about = plan_manifest(TeacherProbe(split, several, chosen))
    assert {name: s.size for name, s in about.statistics.items()} == {"agreement": (8, 12), "entropy": (8, 12)}


def test_carried_along(tmp_path, several, split, options) -> None:
    """Copied, extended, inspected; a further statistic asks the teacher again and keeps what is there."""
    build_cache(split, several, tmp_path / "s", options(statistics=("entropy",), raw_logits=True, batch_size=1))
    cache = open_cache(tmp_path / "s")
    copy_store(cache, tmp_path / "copy", CopyChanges(codec="none", shard_records=2))
    copied = open_cache(tmp_path / "copy")
    for path in ("statistics/entropy", MAX):
        assert all(np.array_equal(cache.read(r, [path])[path], copied.read(r, [path])[path]) for r in range(7))
    more = options_of(cache.manifest, views=2, fidelity=False)
    assert more.statistics == ("entropy",)
    assert build_cache(split, several, tmp_path / "more", more, reuse=cache).reused == 7
    again = options_of(cache.manifest, statistics=("entropy", "at:head"), fidelity=False)
    result = build_cache(split, several, tmp_path / "again", again, reuse=cache)
    assert (result.records, result.reused) == (7, 7)
    found = open_cache(tmp_path / "again")
    assert list(found.manifest.statistics) == ["entropy", "at.head"]
    assert np.array_equal(found.read(3, [MAX])[MAX], cache.read(3, [MAX])[MAX])
    arrays = {array.path for array in inspect_store(tmp_path / "again").arrays}
    assert {"statistics/entropy", "statistics/at.head", MAX} <= arrays
    for change in ({"statistics": ()}, {"raw_logits": False}):
        chosen = options(**{"statistics": ("entropy",), "raw_logits": True, "batch_size": 1, **change})
        with pytest.raises(MismatchError, match=r"statistics|heads"):
            build_cache(split, several, tmp_path / "s", chosen)


def test_statistics_that_cannot_be(teacher, split, options) -> None:
    for word, remedy in {
        "entropi": "did you mean entropy",
        "at": "at:TAP",
        "at:": "at:TAP",
        "confidence:head": "did you mean confidence",
        "norm": "for instance",
    }.items():
        with pytest.raises(RecipeError, match="a statistic is") as caught:
            plan_manifest(TeacherProbe(split, teacher, options(statistics=(word,))))
        assert remedy in caught.value.remedy, word
    with pytest.raises(ModelError, match="a tap must be"):
        plan_manifest(TeacherProbe(split, teacher, options(statistics=("at:haed",))))
    with pytest.raises(RecipeError, match="agreement is that of several teachers"):
        plan_manifest(TeacherProbe(split, teacher, options(statistics=("agreement",))))
    alone = load_teachers([teacher.origin], split.classes, weights=(1,))
    with pytest.raises(RecipeError, match="agreement is that of several teachers"):
        plan_manifest(TeacherProbe(split, alone, options(statistics=("agreement",))))
