"""The tasks: what a model predicts for every pixel, and the facts about it that all rooms ask for.

A room that does something of its own for each task has one table, keyed by the task's name:

    data/rendering/     how a label is cut out and resized
    settings/terms.py   which loss terms learn it
    metrics/            how it is evaluated (`evaluators.py`)
    analysis/           how it is compared (`task_tables.py`) and drawn (`task_pictures.py`)

This room imports no other.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Task:
    """A task: what a model predicts for every pixel.

    Attributes:
        name: the task's name, which is also the name of its head: "segmentation" or "depth".
        head: "categorical" if the head predicts classes, "regression" if it predicts numbers.
        void: the value of a pixel without a label: 255 or NaN.
        unit: the unit of the labels' numbers, such as "m", or None for class ids.
        score: the metric that ranks models and images: "miou" or "rmse".
        less: whether a lower score is better.
    """

    name: str
    head: Literal["categorical", "regression"]
    void: float
    unit: str | None
    score: str
    less: bool

    def best(self, value: float) -> float:
        """Return a score with its sign changed if lower is better. So the best score is always the largest result."""
        return -value if self.less else value


SEGMENTATION: Final = "segmentation"
"""The task of a class id per pixel."""
DEPTH: Final = "depth"
"""The task of the distance per pixel from the camera's plane (along its axis), in metres."""
AUXILIARY: Final = "auxiliary"
"""The second head that a model may have in training, on the labels of segmentation. It is no task."""

IGNORE_INDEX: Final = 255
"""The id of void pixels in every label: no class, no loss, no metric."""
METRES: Final = "m"
"""The unit of depth in metres. Heads with any other unit know depth up to a scale and a shift."""

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(SEGMENTATION, "categorical", IGNORE_INDEX, None, "miou", less=False),
        Task(DEPTH, "regression", math.nan, METRES, "rmse", less=True),
    )
}
"""Every task by its name, in the order of tables."""


def numeric(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of tasks or heads that predict numbers, such as "depth", in the given order."""
    return tuple(name for name in names if name in TASKS and TASKS[name].head == "regression")


def in_metres(names: Iterable[str]) -> bool:
    """Return whether at least one of the tasks or heads with these names predicts numbers in metres."""
    return any(TASKS[name].unit == METRES for name in numeric(names))
