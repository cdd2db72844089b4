"""Features in 8 bits against float64 arithmetic, on random and on adversarial numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from kdcache.errors import RecipeError
from kdcache.store import CopyChanges, copy_store, open_cache
from kdcache.store.format.eight_bits import (
    Loss,
    check_cells,
    describe,
    feature_dtype,
    measure,
    pairs,
    quantise,
    restore,
    stored_features,
)
from kdcache.store.format.manifest_models import Feature

LARGEST = 65504.0
SMALLEST = 2.0**-24
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
MAPS = SHAPES.flatmap(
    lambda shape: st.sampled_from([np.float16, np.float32]).flatmap(
        lambda dtype: arrays_of.arrays(
            dtype,
            shape,
            elements=st.floats(-LARGEST, LARGEST, width=16)
            | st.sampled_from([0.0, -0.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST]),
        )
    )
)


@given(MAPS)
def test_what_is_kept_is_within_half_a_step(maps) -> None:
    bytes_, scales = quantise(maps)
    assert (bytes_.dtype, scales.dtype) == (np.uint8, np.float16)
    assert (bytes_.shape, scales.shape) == (maps.shape, (len(maps), 2, maps.shape[1]))
    assert np.isfinite(scales).all()
    low, step = (scales[:, row].astype(np.float64)[..., None, None] for row in range(2))
    x = maps.astype(np.float64)
    assert (low <= x).all()
    assert (x <= low + 255 * step * (1 + 1e-6)).all()
    exact = low + bytes_ * step
    # Half a step, and the rounding of float32 in a quotient of at most 255.
    assert (np.abs(exact - x) <= 0.5 * step * (1 + 1e-4) + 1e-12).all()
    restored = restore(bytes_, scales)
    assert restored.dtype == np.float32
    assert (np.abs(restored - exact) <= 1e-6 * (np.abs(low) + 255 * step)).all()


@given(MAPS)
def test_scales_are_the_nearest_outward(maps) -> None:
    """No float16 number lies between the ends of a channel and its scales: in exact fractions."""
    _, scales = quantise(maps)
    for record, channel in np.ndindex(maps.shape[:2]):
        low, step = scales[record, :, channel]
        lowest, highest = (Fraction(float(end(maps[record, channel]))) for end in (np.min, np.max))
        assert Fraction(float(low)) <= lowest
        assert low == LARGEST or lowest < Fraction(float(np.nextafter(low, np.float16(LARGEST))))
        assert Fraction(float(step)) * 255 >= (highest - Fraction(float(low))) * (1 - Fraction(1, 2**50))
        if step > 0:
            assert Fraction(float(np.nextafter(step, np.float16(0)))) * 255 < highest - Fraction(float(low))


@pytest.mark.parametrize("value", [0.0, 3.0, -1.5, 0.1, 1e-7, LARGEST, -LARGEST])
def test_a_channel_without_a_range_is_kept_to_the_last_bit_of_float16(value: float) -> None:
    maps = np.full((1, 1, 4, 4), value, np.float32)
    half = float(np.float16(value))
    bytes_, scales = quantise(maps)
    if half == np.float32(value):
        assert (scales[0, 1, 0], bytes_.max()) == (0, 0)
        assert (restore(bytes_, scales) == half).all()
    assert np.abs(restore(bytes_, scales) - maps).max() <= max(abs(value) * 2.0**-11 / 255, SMALLEST / 2)


def test_the_whole_of_float16_and_what_lies_beyond() -> None:
    maps = np.zeros((1, 2, 4, 4), np.float32)
    maps[0, :, 0, 0], maps[0, :, 0, 1] = LARGEST, -LARGEST
    cut = maps.copy()
    cut[0, 1, 0, :2] = 1e9, -3e38
    for one, other in zip(quantise(maps), quantise(cut), strict=True):
        assert np.array_equal(one, other)
    halves = stored_features(
        dict(zip(("features/a", "scales/a"), quantise(maps), strict=True)), {"a": Feature(channels=2, size=(4, 4))}
    )
    assert halves.keys() == {"features/a"}
    assert halves["features/a"].dtype == np.float16
    assert np.isfinite(halves["features/a"]).all(), "a byte may stand for a little more than 65504"


def test_the_figures_against_float64() -> None:
    maps = np.random.default_rng(3).normal(2, 5, (6, 7, 5, 4)).astype(np.float32)
    maps[2] = 0
    kept = restore(*quantise(maps)).astype(np.float64)
    exact = maps.astype(np.float64)
    cells = (maps.transpose(0, 2, 3, 1).reshape(-1, 7) for maps in (exact, kept))
    cosines = [
        1.0 if not np.any(x) else x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(*cells, strict=True)
    ]
    centred = exact - exact.mean((0, 2, 3))[:, None, None]
    found = measure(maps)
    assert found.records == 6
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-7)
    assert found.cosine_least == pytest.approx(min(cosines), abs=1e-7)
    assert found.gradient_error == pytest.approx(np.linalg.norm(exact - kept) / np.linalg.norm(centred), rel=5e-3)
    assert measure(np.ones((1, 2, 4, 4), np.float32)).gradient_error == 0


def test_a_gradient_error_is_one() -> None:
    """Of sum (s - t)^2 by a student s of channel means."""
    maps = np.random.default_rng(4).normal(size=(3, 4, 6, 6)).astype(np.float32)
    student = np.broadcast_to(maps.mean((0, 2, 3), keepdims=True), maps.shape).astype(np.float64)
    true, stored = (2 * (student - target) for target in (maps, restore(*quantise(maps))))
    error = np.linalg.norm(stored - true) / np.linalg.norm(true)
    assert measure(maps).gradient_error == pytest.approx(error, rel=5e-3)


def test_what_lies_beyond_is_noticed() -> None:
    loss = Loss()
    loss.add(np.full((1, 4, 4), LARGEST, np.float32))
    assert not loss.beyond
    loss.add(np.full((1, 4, 4), 65536.0, np.float32))
    assert loss.beyond


def test_summaries_and_small_maps_stay_float16() -> None:
    sizes = {"summary": (1, 1), "deep": (3, 5), "blocks": (4, 4)}
    assert [feature_dtype("uint8", size) for size in sizes.values()] == ["float16", "float16", "uint8"]
    assert feature_dtype("fp16", (14, 14)) == "float16"
    check_cells("uint8", sizes)
    check_cells("fp16", {})
    with pytest.raises(RecipeError, match="Cannot store summary of 1x1 cells in 8 bits"):
        check_cells("uint8", {"summary": (1, 1)})
    with pytest.raises(RecipeError, match="features in 8 bits: there are none"):
        check_cells("uint8", {})
    features = {tap: Feature(channels=2, size=size, dtype="float16") for tap, size in sizes.items()}
    lines = list(describe(features, {}, wanted="uint8"))
    assert lines[0] == "summary stays float16: it has 1x1 cells"
    assert lines[2] == "blocks stays float16: its range is beyond float16"
    assert not list(describe(features, {}))


def test_pairs() -> None:
    assert [pairs(size) for size in ((1, 1), (1, 2), (14, 14))] == [0, 1, 19110]


def test_copies_into_8_bits_and_back(plan, tmp_path) -> None:
    wanted = plan()
    source = open_cache(wanted.write(tmp_path / "fp16"))
    copy_store(source, tmp_path / "uint8", CopyChanges(feature_dtype="uint8", shard_records=3))
    eight = open_cache(tmp_path / "uint8")
    assert {tap: feature.dtype for tap, feature in eight.manifest.features.items()} == {
        "head": "uint8",
        "stage1": "uint8",
    }
    for tap in ("head", "stage1"):
        bytes_, scales = quantise(wanted.arrays[f"features/{tap}"])
        for record in range(len(eight)):
            rows = eight.read(record, [f"features/{tap}", f"scales/{tap}"])
            assert np.array_equal(rows[f"features/{tap}"], bytes_[record])
            assert np.array_equal(rows[f"scales/{tap}"], scales[record])
            assert np.array_equal(eight.feature(record, tap), restore(bytes_[record], scales[record]))
    figures = eight.manifest.feature_fidelity
    assert figures["head"] == measure(wanted.arrays["features/head"])
    copy_store(eight, tmp_path / "back", CopyChanges(feature_dtype="fp16", features=("head",)))
    back = open_cache(tmp_path / "back")
    assert back.manifest.features == {"head": Feature(channels=3, size=(6, 8))}
    assert back.manifest.feature_fidelity == {"head": figures["head"]}, "what was lost stays lost"
    assert np.array_equal(back.feature(7, "head"), eight.feature(7, "head").astype(np.float16))
    copy_store(eight, tmp_path / "same", CopyChanges(codec="none"))
    assert np.array_equal(open_cache(tmp_path / "same").feature(7, "stage1"), eight.feature(7, "stage1"))
    with pytest.raises(RecipeError, match="features in 8 bits: there are none"):
        copy_store(source, tmp_path / "none", CopyChanges(feature_dtype="uint8", features=()))
    assert not (tmp_path / "none").exists()
