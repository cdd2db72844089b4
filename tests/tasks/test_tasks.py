"""What every task says of itself."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from kdcache.data import IGNORE_INDEX
from kdcache.heads import RegressionHead
from kdcache.tasks import AUXILIARY, DEPTH, METRES, SEGMENTATION, TASKS, Task


def test_names_are_those_of_their_tasks_in_the_order_of_tables() -> None:
    assert list(TASKS) == [SEGMENTATION, DEPTH] == [task.name for task in TASKS.values()]
    assert AUXILIARY not in TASKS


def test_void_is_what_labels_have_where_nothing_is_known() -> None:
    assert TASKS[SEGMENTATION].void == IGNORE_INDEX == 255
    assert math.isnan(TASKS[DEPTH].void)


def test_kinds_and_units_are_those_of_heads() -> None:
    kinds = set(get_args(Task.__annotations__["head"]))
    assert {task.head for task in TASKS.values()} == kinds
    assert (TASKS[SEGMENTATION].unit, TASKS[DEPTH].unit) == (None, METRES)
    assert RegressionHead().unit == METRES


@pytest.mark.parametrize(("task", "better", "worse"), [(SEGMENTATION, 0.7, 0.6), (DEPTH, 1.5, 1.6)])
def test_the_best_score_is_the_largest_with_its_sign(task: str, better: float, worse: float) -> None:
    assert TASKS[task].best(better) > TASKS[task].best(worse)
