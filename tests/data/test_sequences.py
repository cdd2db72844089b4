"""Folds of whole sequences, and the sequences that judge and training share."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.data import SharedSequence, check_folds_by, folds_of, shared_sequences
from kdcache.errors import RecipeError

BY = "^(.+)_"


def video(name: str, frames: range) -> list[str]:
    return [f"{name}_{frame:05d}" for frame in frames]


def unevenness(sizes: list[int], fold_of: tuple[int, ...], folds: int) -> int:
    totals = np.bincount(fold_of, weights=sizes, minlength=folds)
    return int(totals.max() - totals.min()) if totals.all() else sum(sizes)


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), folds=st.integers(2, 3), data=st.data())
def test_whole_sequences_are_dealt_out_evenly(sizes, folds, data) -> None:
    if len(sizes) < folds:
        return
    ids = [sample for number, size in enumerate(sizes) for sample in video(f"v{number}", range(size))]
    fold_of = folds_of(ids, folds, BY)
    of_sequence = dict(zip((sample[:2] for sample in ids), fold_of.tolist(), strict=True))
    assert [of_sequence[sample[:2]] for sample in ids] == fold_of.tolist()
    assert set(of_sequence.values()) == set(range(folds))
    best = min(unevenness(sizes, dealt, folds) for dealt in product(range(folds), repeat=len(sizes)))
    assert unevenness(sizes, tuple(of_sequence.values()), folds) <= best + 2
    order = data.draw(st.permutations(range(len(ids))))
    assert folds_of([ids[n] for n in order], folds, BY).tolist() == fold_of[list(order)].tolist()


def test_the_largest_fold_exchanges_sequences() -> None:
    """Largest first alone gives 7 and 5 of these."""
    ids = [sample for name, size in zip("abcde", (3, 3, 2, 2, 2), strict=True) for sample in video(name, range(size))]
    assert np.bincount(folds_of(ids, 2, BY)).tolist() == [6, 6]


def test_a_sequence_is_the_first_group_or_the_match() -> None:
    ids = [*video("a/x", range(3)), *video("a/y", range(2)), *video("b/x", range(1))]
    assert np.bincount(folds_of(ids, 2, "[xy]")).tolist() == [4, 2]
    assert np.bincount(folds_of(ids, 2, "^(.)/(.)")).tolist() == [5, 1]
    assert folds_of(ids, 3, BY).tolist() == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("by", "folds", "received"),
    [
        ("(", 2, "'('"),
        ("^v(.*)_", 2, "names no sequence in 1 of 5 ids, such as 'w_00000'"),
        ("^(z*)", 2, "names no sequence in 5 of 5 ids, such as 'v1_00000'"),
        ("^(z)?", 2, "names no sequence in 5 of 5 ids"),
        ("_0", 2, "1 sequences, which --folds-by '_0' names, into 2 folds: _0"),
        ("^.", 3, "2 sequences, which --folds-by '^.' names, into 3 folds: v, w"),
        (BY, 6, "Cannot deal 5 samples into 6 folds"),
    ],
)
def test_patterns_that_cannot_be(by, folds, received) -> None:
    ids = [*video("v1", range(2)), *video("v2", range(2)), *video("w", range(1))]
    with pytest.raises(RecipeError, match="folds") as caught:
        folds_of(ids, folds, by)
    assert received in caught.value.problem
    assert caught.value.fix


def test_a_pattern_needs_folds() -> None:
    check_folds_by(None, folds=False)
    check_folds_by(BY, folds=True)
    for by, folds in ((BY, False), ("(", True)):
        with pytest.raises(RecipeError, match="--folds-by"):
            check_folds_by(by, folds=folds)


LONG, SHORT = video("a", range(90, 900, 30)), video("b", range(7, 70))
PHOTOGRAPHS = [f"2007_{number:06d}" for number in np.random.default_rng(0).permutation(9000)[:400]]
COUNTED = [f"train-{number:06d}" for number in range(400)]


@pytest.mark.parametrize(
    ("data", "judged", "shared"),
    [
        (LONG + SHORT, [*LONG[1::3], *SHORT[::7]], ["a_*", "b_*"]),
        (LONG, LONG[:9], ["a_*"]),
        (LONG, video("a", range(401, 421, 2)), ["a_*"]),  # another split: frames in between
        (LONG, SHORT, []),
        (LONG[:3], LONG[:1], []),  # too few to tell a step
        (PHOTOGRAPHS, PHOTOGRAPHS[::5], []),
        (COUNTED, COUNTED[::5], []),
        (COUNTED, [f"train-{number:06d}" for number in range(400, 500)], []),
        (["one", "two", "", "9" * 5000, "three_½"], ["one_", "1", "2"], []),
    ],
)
def test_sequences_by_number(data, judged, shared) -> None:
    used = [number for number, sample in enumerate(data) if sample not in set(judged)]
    assert [sequence.name for sequence in shared_sequences(data, used, judged)] == shared


def test_numbers_that_begin_anew_in_every_split_name_no_sequence() -> None:
    assert shared_sequences(LONG, range(len(LONG)), video("a", range(0, 600, 30))) == []


def test_sequences_by_pattern() -> None:
    data = [*LONG, *SHORT, "other"]
    used = range(5, len(data))
    judged = ["photograph", *LONG[:5], *video("c", range(4))]
    assert shared_sequences(data, used, judged, BY) == [SharedSequence("a", 5, len(LONG) - 5)]
    assert shared_sequences(data, used, LONG[:5]) == [SharedSequence("a_*", 5, len(LONG) - 5)]
    assert shared_sequences(data, range(len(LONG), len(data)), judged, BY) == []


def test_many_ids_take_no_time() -> None:
    ids = [f"{number // 50:06d}_{number % 50:06d}" for number in range(100_000)]
    shared = shared_sequences(ids, range(1, len(ids), 2), ids[::2])
    assert (len(shared), shared[0]) == (2000, SharedSequence("000000_*", 25, 25))
    assert np.bincount(folds_of(ids, 5, BY)).tolist() == [20_000] * 5
