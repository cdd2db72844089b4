"""Builds that store features in bytes, and similarities between cells, against the teacher's own features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.data import open_split
from kdcache.errors import ModelError, RecipeError
from kdcache.sharing import build_command
from kdcache.store import CopyChanges, Records, copy_store, inspect_store, open_cache
from kdcache.teacher import TeacherProbe, build_cache, compare_teacher, load_teacher, options_of, plan_manifest
from kdcache.teacher.build.cost_estimate import estimate
from kdcache.teacher.build.statistics import similarities

SIMILAR = "statistics/similarity.head"


class Backbone(nn.Module):
    """Logits of the data's classes, a map and a summary; `largest` is the largest number of the map."""

    def __init__(self, classes: int, largest: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.Conv2d(3, 6, 4, stride=4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Conv2d(6, classes, 1)
        self.largest = largest
        self.scaled = nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.blocks(image)
        self.pool(maps)
        peak = torch.zeros_like(maps)
        peak[:, 0, 0, 0] = self.largest
        self.scaled(maps + peak)
        return self.classify(maps)


def live(teacher, cache, record: int, tap: str) -> np.ndarray:
    image = torch.from_numpy(cache.read(record, ["pixels/image"])["pixels/image"])[None]
    with torch.inference_mode():
        found: np.ndarray = teacher.model(teacher.model.normalise(image), (tap,)).features[tap][0].numpy()
    return found


def test_what_is_stored(tmp_path, teacher, split, options) -> None:
    words = {"features": ("head", "stage2"), "feature_dtype": "uint8", "statistics": ("similarity:head", "at:stage2")}
    build_cache(split, teacher, tmp_path / "s", options(**words, batch_size=1, fidelity=True))
    cache = open_cache(tmp_path / "s")
    assert {tap: feature.dtype for tap, feature in cache.manifest.features.items()} == {
        "head": "uint8",
        "stage2": "uint8",
    }
    assert cache.manifest.statistics["similarity.head"].size == (8, 12)
    assert cache.specs[SIMILAR].shape == (96 * 95 // 2,)
    for record in range(7):
        exact = live(teacher, cache, record, "head").astype(np.float64)
        step = cache.read(record, ["scales/head"])["scales/head"][1].astype(np.float64)[:, None, None]
        assert (np.abs(cache.feature(record, "head") - exact) <= 0.501 * step + 1e-6).all()
        tokens = exact.reshape(len(exact), -1).T
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        cosines = np.array([tokens[i] @ tokens[j] for i in range(96) for j in range(i + 1, 96)])
        stored = cache.read(record, [SIMILAR])[SIMILAR]
        assert stored.dtype == np.uint8
        # Half of 2 / 255, and the rounding of float32 before it.
        assert np.abs(stored / 127.5 - 1 - cosines).max() <= 1 / 255 + 1e-5
        wanted = np.rint((cosines + 1) * 127.5)
        assert (stored == wanted).mean() > 0.999
    figures = cache.manifest.feature_fidelity
    assert set(figures) == {"head", "stage2"}
    assert all(
        0.999 < one.cosine_least <= one.cosine <= 1 and 0 < one.gradient_error < 0.02 for one in figures.values()
    )
    agreement = compare_teacher(Records(cache), teacher, torch.device("cpu"))
    assert agreement.ok
    assert agreement.values[SIMILAR] <= 1 / 255 + 1e-6
    assert agreement.features["head"].gradient_error == pytest.approx(figures["head"].gradient_error, rel=0.1)
    facts = inspect_store(tmp_path / "s").facts()
    assert any("head in 8 bits: cosine" in value for _, value in facts)
    assert "--feature-dtype uint8" in build_command(cache.manifest)
    assert "--statistics similarity:head,at:stage2" in build_command(cache.manifest)


def test_a_build_of_similarities_alone_is_extended(tmp_path, teacher, split, options) -> None:
    few = options(features_only=True, statistics=("similarity:head",), batch_size=1)
    build_cache(split, teacher, tmp_path / "s", few)
    cache = open_cache(tmp_path / "s")
    assert not cache.manifest.heads
    assert not cache.manifest.features
    assert compare_teacher(Records(cache), teacher, torch.device("cpu")).ok
    more = options_of(cache.manifest, features=("head",), feature_dtype="uint8", fidelity=False)
    assert more.statistics == ("similarity:head",)
    result = build_cache(split, teacher, tmp_path / "more", more, reuse=cache)
    assert (result.records, result.reused) == (7, 7)
    found = open_cache(tmp_path / "more")
    assert np.array_equal(found.read(3, [SIMILAR])[SIMILAR], cache.read(3, [SIMILAR])[SIMILAR])
    again = build_cache(split, teacher, tmp_path / "again", options_of(found.manifest, views=2), reuse=found)
    assert (again.records, again.reused) == (7, 7), "both arrays of a tap in 8 bits are taken over"
    for record in range(7):
        assert np.array_equal(open_cache(tmp_path / "again").feature(2 * record, "head"), found.feature(record, "head"))


def test_a_copy_in_8_bits_is_nearly_the_build(tmp_path, teacher, split, options) -> None:
    """They differ by float16, which the copy begins with."""
    build_cache(split, teacher, tmp_path / "fp16", options(features=("head",)))
    build_cache(split, teacher, tmp_path / "uint8", options(features=("head",), feature_dtype="uint8"))
    copy_store(open_cache(tmp_path / "fp16"), tmp_path / "copy", CopyChanges(feature_dtype="uint8"))
    built, copied = open_cache(tmp_path / "uint8"), open_cache(tmp_path / "copy")
    for record in range(7):
        one, other = built.feature(record, "head"), copied.feature(record, "head")
        step = built.read(record, ["scales/head"])["scales/head"][1][:, None, None]
        assert (np.abs(one - other) <= 1.3 * step).all(), "a byte, and the last bit of a step"
    assert inspect_store(tmp_path / "uint8").bytes_on_disk < inspect_store(tmp_path / "fp16").bytes_on_disk


@pytest.mark.filterwarnings("ignore")
def test_taps_that_stay_float16(tmp_path, split, options) -> None:
    teacher = load_teacher(Backbone(len(split.classes), largest=1e5), split)
    chosen = options(features=("blocks", "pool", "scaled"), feature_dtype="uint8")
    build_cache(split, teacher, tmp_path / "s", chosen)
    cache = open_cache(tmp_path / "s")
    assert {tap: feature.dtype for tap, feature in cache.manifest.features.items()} == {
        "blocks": "uint8",
        "pool": "float16",
        "scaled": "float16",
    }
    assert cache.feature(0, "scaled").max() == 65504
    assert build_cache(split, teacher, tmp_path / "s", chosen).kept == 7, "the same command continues"


def test_what_cannot_be(tmp_path, teacher, split, options) -> None:
    own = load_teacher(Backbone(len(split.classes)), split)
    for tap, why in (((), "features in 8 bits: there are none"), (("pool",), "pool of 1x1 cells")):
        with pytest.raises(RecipeError, match=f"Cannot store {why}"):
            plan_manifest(TeacherProbe(split, own, options(features=tap, feature_dtype="uint8")))
    with pytest.raises(RecipeError, match="Cannot store similarities between the cells of pool"):
        plan_manifest(TeacherProbe(split, own, options(statistics=("similarity:pool",))))
    with pytest.raises(ModelError, match="Unknown tap"):
        plan_manifest(TeacherProbe(split, teacher, options(statistics=("similarity:haed",))))
    for value in (np.nan, np.inf):
        broken = load_teacher(Backbone(len(split.classes), largest=value), split)
        for words in ({"features": ("scaled",), "feature_dtype": "uint8"}, {"statistics": ("similarity:scaled",)}):
            with pytest.raises(ModelError, match="NaN or infinity in"):
                build_cache(split, broken, tmp_path / "broken", options(**words))


def test_similarities_of_extremes() -> None:
    feature = torch.zeros(3, 2, 1, 3)
    feature[0, :, 0] = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 3.0]])
    feature[1] = 1e30 * feature[0]
    assert similarities(feature)[0].tolist() == [0, 128, 128], "opposite, and at right angles: 127.5 is rounded to even"
    assert similarities(feature)[1].tolist() == [0, 128, 128], "squares would overflow"
    assert similarities(feature)[2].tolist() == [128, 128, 128], "cells of zeros"
    assert similarities(1e-30 * feature)[0].tolist() == [0, 128, 128]
    assert similarities(torch.ones(1, 4, 1, 3)).tolist() == [[255, 255, 255]]
    feature[0, 0, 0, 0] = torch.nan
    assert similarities(feature)[0].isnan().any()


@pytest.mark.parametrize("dtype", ["fp16", "uint8"])
def test_a_plan_foretells_the_bytes(tmp_path, teacher, split, options, dtype: str) -> None:
    """Of every array, from fewer records than there are."""
    many = open_split("scenes:36x52,train=24,val=1", "train")
    chosen = options(features=("head",), feature_dtype=dtype, statistics=("similarity:head",), shard_records=24)
    found = estimate(many, teacher, chosen, records=16)
    build_cache(many, teacher, tmp_path / "s", chosen)
    built = {array.path: array.bytes_on_disk / 24 for array in inspect_store(tmp_path / "s").arrays}
    assert ("scales/head" in found.chosen.sizes) == (dtype == "uint8")
    for path in ("features/head", SIMILAR):
        assert found.chosen.sizes[path] == pytest.approx(built[path], rel=0.03), path
    other = "fp16" if dtype == "uint8" else "uint8"
    priced = {cost.setting.flags(found.chosen.setting): cost.bytes for cost in found.neighbours}
    assert (priced[f"--feature-dtype {other}"] < found.chosen.bytes) == (dtype == "fp16")
