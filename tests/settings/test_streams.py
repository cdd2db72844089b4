"""Streams as lines and tables, their shares, and the rows that they get of a batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import RecipeError
from kdcache.settings.streams import check_rows, parse_stream, rows_of, shares_of, to_line

VALUES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1).filter(
    lambda text: text == text.strip()
)


@given(cache=VALUES, data=VALUES, terms=st.lists(st.sampled_from(["cosine,weight=0.1", "dice"]), min_size=1))
def test_a_table_survives_its_line(cache: str, data: str, terms: list[str]) -> None:
    table = {"name": "one", "cache": cache, "limit_samples": "5", "term": terms, "data": data}
    assert parse_stream(to_line(table)) == table


def test_a_recipe_s_tables_become_lines() -> None:
    table = {"name": "a", "limit-labels": 3, "term": [{"kind": "cosine", "student-tap": "head"}, "dice"]}
    line = to_line(table)
    assert line == 'a,limit-labels=3,"term=cosine,student_tap=head",term=dice'
    assert parse_stream(line) == {
        "name": "a",
        "limit_labels": "3",
        "term": ["cosine,student_tap=head", "dice"],
    }
    assert to_line({"name": "a", "labels": ["segmentation", "depth"]}) == "a,labels=segmentation+depth"
    assert parse_stream("a,term=") == {"name": "a", "term": []}
    assert parse_stream("a,term=,weight=2") == {"name": "a", "term": [], "weight": "2"}
    last = to_line({"name": "a", "term": ["dice"], "weight": 0.5})  # the weight of the stream, not of its term
    assert parse_stream(last) == {"name": "a", "term": ["dice"], "weight": "0.5"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cache=a", "Missing name"),
        ("", "Missing name"),
        ("a,cache", "KEY=VALUE"),
        ("a,share=0.5,share=0.25", "there twice"),
        ("a,chache=x", "Did you mean cache"),
        ("a,data=x,shar=0.5", "Did you mean share"),
        ("a,term=dice,wieght=2", "Did you mean weight"),
        ("a,data=x,size=32x48", "a setting of the whole training"),
        ("a,lr=0.1", "a setting of the whole training"),
        ("a,mix=cutmix", "a setting of the whole training"),
        ("a,data=scenes:32x48,train=6,share=0.5", r'"data=scenes:32x48,train=6"'),
        ("a,data=my,folder", r'"data=my,folder"'),
        ("a,term=cosine,teacher_tap=head", r'"term=cosine,teacher_tap=head"'),
        ("a,term=dice,weight=0.5", "Or put weight=0.5 before term=dice"),
    ],
)
def test_malformed_lines_are_refused(line: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_stream(line)


def test_a_cache_is_repeated_to_join_others() -> None:
    table = parse_stream("a,cache=x.zarr,share=0.5,cache=sam=y.zarr,cache=z.zarr")
    assert table == {"name": "a", "cache": ["x.zarr", "sam=y.zarr", "z.zarr"], "share": "0.5"}
    assert to_line(table) == "a,cache=x.zarr,cache=sam=y.zarr,cache=z.zarr,share=0.5"
    assert parse_stream("a,cache=x.zarr")["cache"] == "x.zarr"


def test_streams_without_a_share_get_what_is_left() -> None:
    assert shares_of({"a": 0.5, "b": None, "c": None}) == [0.5, 0.25, 0.25]
    assert shares_of({"a": None}) == [1.0]
    assert shares_of({"a": 0.25, "b": 0.75}) == [0.25, 0.75]


@pytest.mark.parametrize("shares", [(0.5, 0.6), (0.5, 0.4), (1.0, None), (0.7, 0.7, None)])
def test_shares_that_do_not_sum_up_are_refused(shares: tuple[float | None, ...]) -> None:
    with pytest.raises(RecipeError, match=r"sum up to .*, not 1: a "):
        shares_of(dict(zip("abc", shares, strict=False)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 64), st.sampled_from([1, 2]))
def test_rows_are_those_of_the_shares_within_a_unit(parts: list[int], units: int, together: int) -> None:
    shares = [part / sum(parts) for part in parts]
    rows = rows_of(shares, units * together, together)
    assert sum(rows) == units * together
    for share, own in zip(shares, rows, strict=True):
        assert own % together == 0
        assert abs(own / together - share * units) < 1 + 1e-6


@pytest.mark.parametrize(
    ("shares", "batch_size", "together", "rows"),
    [
        ((0.5, 0.3, 0.2), 8, 1, [4, 2, 2]),  # 4, 2.4 and 1.6
        ((0.7, 0.15, 0.15), 9, 1, [6, 2, 1]),  # 6.3, 1.35 and 1.35: of equal remainders the first
        ((0.5, 0.3, 0.2), 16, 2, [8, 4, 4]),
    ],
)
def test_rows_that_are_left_go_to_the_largest_remainders(
    shares: tuple[float, ...], batch_size: int, together: int, rows: list[int]
) -> None:
    assert rows_of(shares, batch_size, together) == rows


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3]),
)
def test_the_batch_of_the_remedy_is_the_smallest_that_works(
    parts: list[int], size: int, together: int, processes: int
) -> None:
    named = {f"s{number}": part / sum(parts) for number, part in enumerate(parts)}

    def works(batch: int) -> bool:
        rows = rows_of(list(named.values()), batch, together)
        return sum(rows) == batch and all(own and own % (together * processes) == 0 for own in rows)

    if works(size):
        assert check_rows(named, size, together, processes) == rows_of(list(named.values()), size, together)
        return
    with pytest.raises(RecipeError) as refused:
        check_rows(named, size, together, processes)
    better = next(batch for batch in range(size, 5000) if works(batch))
    assert f"--batch-size {better}," in refused.value.fix
