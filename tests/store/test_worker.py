"""The number of a worker: typed, of torchrun, of a scheduler."""

from __future__ import annotations

import re

import pytest

from kdcache.errors import StoreError
from kdcache.store import Worker, worker_of

NAMES = (
    *("RANK", "WORLD_SIZE", "JOB_COMPLETION_INDEX"),
    *(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP")),
)


@pytest.fixture(autouse=True)
def put(monkeypatch: pytest.MonkeyPatch):
    """put(RANK=1): the environment has these and no other numbers."""

    def put(**numbers: object) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in numbers.items():
            monkeypatch.setenv(name, str(value))

    put()
    return put


def array(**numbers: int) -> dict[str, int]:
    return {f"SLURM_ARRAY_TASK_{name}": number for name, number in numbers.items()}


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "0.5/2"])
def test_a_worker_is_numbered_from_0(text) -> None:
    with pytest.raises(StoreError, match=f"--worker: {re.escape(repr(text))}"):
        worker_of(text)


def test_the_number_of_a_worker(put) -> None:
    assert worker_of("2/8") == Worker(2, 8)
    assert worker_of(None) == Worker(0, 1)
    put(RANK=1, WORLD_SIZE=3)
    assert worker_of(None) == Worker(1, 3)
    assert worker_of("0/2") == Worker(0, 2)


@pytest.mark.parametrize(("rank", "size"), [("3", None), ("3", "3"), ("-1", "2"), ("a", "2"), ("0", "0"), ("1", "x")])
def test_a_number_in_the_environment_that_owns_nothing(put, rank: str, size: str | None) -> None:
    """RANK=3 alone is no share of the work: such a build would write nothing, and say that it is done."""
    put(RANK=rank, **({} if size is None else {"WORLD_SIZE": size}))
    with pytest.raises(StoreError, match=r"RANK=[\s\S]*Unset these variables"):
        worker_of(None)
    assert worker_of("0/2") == Worker(0, 2)


@pytest.mark.parametrize(
    ("numbers", "text", "expected"),
    [
        (array(ID=2, COUNT=8, MIN=0, MAX=7, STEP=1), "auto", Worker(2, 8)),
        (array(ID=3, COUNT=8, MIN=1, MAX=8, STEP=1), "auto", Worker(2, 8)),  # --array=1-8
        (array(ID=14, COUNT=3, MIN=10, MAX=14, STEP=2), "auto", Worker(2, 3)),  # --array=10-14:2
        (array(ID=5, COUNT=1, MIN=5, MAX=5, STEP=1), "auto", Worker(0, 1)),
        ({"JOB_COMPLETION_INDEX": 3}, "auto/4", Worker(3, 4)),
        ({"RANK": 1, "WORLD_SIZE": 2}, "auto", Worker(1, 2)),
        ({"RANK": 0, "WORLD_SIZE": 1, **array(ID=1, COUNT=2, MIN=0, STEP=1)}, "auto", Worker(1, 2)),
    ],
)
def test_a_scheduler_numbers_a_worker(put, numbers: dict[str, int], text: str, expected: Worker) -> None:
    put(**numbers)
    assert worker_of(text) == expected


def test_an_array_numbers_nobody_who_does_not_ask(put) -> None:
    """Whoever submits one build of several in an array wants each whole."""
    put(**array(ID=2, COUNT=8, MIN=0, STEP=1))
    assert worker_of(None) == Worker(0, 1)


@pytest.mark.parametrize(
    ("numbers", "text", "named"),
    [
        ({}, "auto", "SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX and RANK are not set"),
        ({"JOB_COMPLETION_INDEX": 3}, "auto", "has only JOB_COMPLETION_INDEX=3"),
        ({"JOB_COMPLETION_INDEX": 3}, "auto/3", "JOB_COMPLETION_INDEX=3 with --worker auto/3"),
        ({"JOB_COMPLETION_INDEX": 3}, "auto/", "JOB_COMPLETION_INDEX=3"),
        (array(ID=9, COUNT=3, MIN=1, MAX=9, STEP=1), "auto", "SLURM_ARRAY_TASK_ID=9"),  # --array=1,5,9
        (array(ID=3, COUNT=2, MIN=0, MAX=4, STEP=2), "auto", "SLURM_ARRAY_TASK_ID=3"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "auto", "RANK=2"),
    ],
)
def test_numbers_of_a_scheduler_that_own_nothing(put, numbers: dict[str, int], text: str, named: str) -> None:
    put(**numbers)
    with pytest.raises(StoreError) as error:
        worker_of(text)
    assert named in error.value.problem
    assert "--worker" in error.value.fix


def test_one_of_several_takes_over(put) -> None:
    assert worker_of("1/3", take_over=True) == Worker(1, 3, take_over=True)
    assert Worker(1, 3, take_over=True).shards(5) == [1, 4, 0, 2, 3]
    with pytest.raises(StoreError, match="--take-over"):
        worker_of(None, take_over=True)
