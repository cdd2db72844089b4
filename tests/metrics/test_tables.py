"""Tables: names travel with numbers."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from kdcache.metrics import (
    ConfusionMatrix,
    Metrics,
    TaskMetrics,
    class_rows,
    markdown_table,
    metrics_markdown,
    percent,
)

NAMES = ("road", "car", "sky", "never")


def measure(order: list[int], seed: int = 0) -> Metrics:
    """The same pixels when class ids are permuted: id i becomes order[i]."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, 300)
    predicted = np.where(rng.random(300) < 0.7, label, rng.integers(0, 3, 300))
    table = np.array(order)
    names = [NAMES[order.index(position)] for position in range(4)]
    confusion = ConfusionMatrix(names)
    confusion.update(torch.from_numpy(table[predicted]), torch.from_numpy(table[label]))
    return confusion.metrics()


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]])
def test_rows_are_permuted_with_the_class_ids(order: list[int]) -> None:
    plain, moved = measure([0, 1, 2, 3]), measure(order)
    assert class_rows(moved) != class_rows(plain)
    assert sorted(class_rows(moved)) == sorted(class_rows(plain))
    assert moved.miou == pytest.approx(plain.miou)


def test_a_class_that_does_not_occur_is_a_dash() -> None:
    rows = {name: rest for name, *rest in class_rows(measure([0, 1, 2, 3]))}
    assert rows["never"] == ["-", "-", "0.00"]
    assert percent(math.nan) == "-"
    assert percent(0.12345) == "12.35"
    assert sum(float(row[2]) for row in rows.values()) == pytest.approx(100, abs=0.02)


def metrics(*iou: float) -> Metrics:
    mean = float(np.nanmean(iou))
    return Metrics(("x", "y")[: len(iou)], iou, iou, (1,) * len(iou), mean, mean, 0.5)


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_escapes_what_would_end_a_cell() -> None:
    table = markdown_table(("run", "a|b", "c"), [("x|y", "1", "2"), ("z", "3", "-")])
    lines = table.splitlines()
    assert table.endswith("\n")
    assert cells(lines[0]) == ["run", "a|b", "c"]
    assert lines[1] == "| --- | ---: | ---: |"
    assert cells(lines[2]) == ["x|y", "1", "2"]
    assert cells(lines[3]) == ["z", "3", "-"]


def test_an_evaluation_as_markdown() -> None:
    found = measure([0, 1, 2, 3])
    text = metrics_markdown("student", TaskMetrics(found))
    assert text.startswith("# student\n\nmIoU ")
    assert percent(found.aacc) in text.splitlines()[2]
    assert [cells(line)[0] for line in text.splitlines()[6:]] == list(NAMES)


def test_a_name_makes_no_row_of_its_own() -> None:
    from kdcache.metrics import markdown_table

    table = markdown_table(("class", "IoU %"), [("road |\n| sky | 99.9 |\r\x85\u2028", "1.00")])
    assert len(table.splitlines()) == 3
