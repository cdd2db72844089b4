"""Numbers of processes in the environment: set by torchrun, or left over in a shell."""

from __future__ import annotations

import pytest

from kdcache.errors import RecipeError
from kdcache_cli.torchrun import numbered


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch):
    """numbers(RANK=1, WORLD_SIZE=4): the environment has these and no others."""

    def put(**given: object) -> None:
        for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))

    put()
    return put


def build(world) -> list[object]:
    return [
        *("build-teacher-cache", "--data", world / "data", "--teacher", world / "teacher", "--out", world / "new.zarr"),
        *("--shard-records", 1, "--views", 1),
    ]


def test_a_build_that_is_one_worker_of_many_says_so_first(world, cli, numbers) -> None:
    numbers(RANK=0, WORLD_SIZE=4)
    told = cli(*build(world))
    assert told.code == 0, told.err
    assert told.err.startswith("note: RANK=0 and WORLD_SIZE=4 in the environment make this process 0 of 4")
    assert "unset RANK WORLD_SIZE" in told.err.splitlines()[0]
    assert "the worker that ends last finishes the cache" in told.out
    # The remedy works: the same command without them makes the whole store.
    numbers()
    told = cli(*build(world))
    assert told.code == 0, told.err
    assert "RANK" not in told.err
    assert "from before" in told.out


def test_a_process_that_is_not_the_first_says_why_it_is_silent(world, cli, numbers) -> None:
    numbers(RANK=1, WORLD_SIZE=2)
    told = cli("models", "--json")
    assert told.code == 0
    assert told.out == ""
    assert "RANK=1 and WORLD_SIZE=2" in told.err
    assert "leaves the output to process 0" in told.err


@pytest.mark.parametrize("given", [{}, {"RANK": 0, "WORLD_SIZE": 1}, {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": 1}])
def test_one_process_is_told_nothing(cli, numbers, given) -> None:
    numbers(**given)
    told = cli("models", "--json")
    assert told.err == ""
    assert told.out


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_numbers_without_a_word(cli, numbers, rank) -> None:
    numbers(RANK=rank, WORLD_SIZE=2, TORCHELASTIC_RUN_ID="1234")
    told = cli("models", "--json")
    assert told.err == ""
    assert bool(told.out) is (rank == 0)


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "a", "WORLD_SIZE": 2},
        {"RANK": 1, "WORLD_SIZE": "two"},
        {"RANK": 2, "WORLD_SIZE": 2},
        {"RANK": -1, "WORLD_SIZE": 2},
        {"RANK": 0, "WORLD_SIZE": -3},
    ],
)
def test_numbers_that_are_none_are_refused(cli, numbers, given) -> None:
    numbers(**given)
    with pytest.raises(RecipeError, match="unset RANK WORLD_SIZE"):
        numbered()
    told = cli("models", "--json")
    assert told.code == 2
    assert "unset RANK WORLD_SIZE" in told.err
    assert f"RANK={given['RANK']}" in told.err
    assert "should not have happened" not in told.err


def test_a_number_without_a_count_builds_nothing_in_silence(world, cli, numbers, tree) -> None:
    """RANK=3 alone owns no shard: without a refusal the build would end as if all were done."""
    numbers(RANK=3)
    before = tree(world)
    told = cli(*build(world))
    assert told.code == 2
    assert "unset RANK WORLD_SIZE" in told.err
    assert tree(world) == before
