"""What a comparison of runs says, as data: every table and report is made from this.

Fractions are in 0..1, NaN where nothing is known. A class is known by its name, which comes with the runs' own models
and is checked against the data's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.evaluate.cost import Cost
from kdcache.evaluate.metrics import Metrics
from kdcache.evaluate.spread import Difference, Key, Spread, plain


@dataclass(frozen=True)
class RunScore:
    """One run of a row; `reused` when an evaluation that was kept said so."""

    run: str
    seed: int | None
    fold: str | None
    metrics: Metrics
    reused: bool

    @property
    def key(self) -> Key:
        return self.seed, self.fold

    def to_json(self) -> dict[str, Any]:
        about = {"run": self.run, "seed": self.seed, "fold": self.fold, "reused": self.reused}
        return {**about, **self.metrics.to_json()}


@dataclass(frozen=True)
class Row:
    """Runs of one recipe.

    Attributes:
        model: the recipe's spec. differs: the settings in which it is not like other rows.
        iou: per class, in the order of `Comparison.class_names`.
        difference: of mIoU; None for a baseline and for a row without one. class_differences: of each class's IoU;
            of many classes a twentieth is above noise by chance.
        cost: of one image, of the first run's model.
        teacher: a row apart: no contestant. baseline: others are measured against it.
    """

    name: str
    model: str
    differs: dict[str, Any]
    runs: tuple[RunScore, ...]
    miou: Spread
    macc: Spread
    aacc: Spread
    iou: tuple[Spread, ...]
    difference: Difference | None
    class_differences: tuple[Difference, ...]
    cost: Cost
    teacher: bool
    baseline: bool

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        gaps = self.class_differences or (None,) * len(class_names)
        return {
            "name": self.name,
            "model": self.model,
            "teacher": self.teacher,
            "baseline": self.baseline,
            "differs": self.differs,
            "miou": self.miou.to_json(),
            "macc": self.macc.to_json(),
            "aacc": self.aacc.to_json(),
            "difference": None if self.difference is None else self.difference.to_json(),
            "classes": [
                {"name": name, "iou": iou.to_json(), "difference": None if gap is None else gap.to_json()}
                for name, iou, gap in zip(class_names, self.iou, gaps, strict=True)
            ],
            "cost": self.cost.to_json(),
            "runs": [score.to_json() for score in self.runs],
        }


@dataclass(frozen=True)
class Comparison:
    """All that is known of some runs on one split; fractions in 0..1.

    Attributes:
        data_sha256: of classes, ids, images and labels of the split.
        images: labelled ones, on which every run was judged (with `own_fold`: each on those of its fold).
        notes: what a reader could misread.
    """

    data: str
    split: str
    data_sha256: str
    images: int
    own_fold: bool
    weights: str
    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def best(self, value: Callable[[Row], float]) -> float:
        """The largest value of a column, the teacher apart; NaN when there is none."""
        known = [value(row) for row in self.rows if not row.teacher and not math.isnan(value(row))]
        return max(known, default=math.nan)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; NaN becomes null."""
        return {
            "data": self.data,
            "split": self.split,
            "data_sha256": self.data_sha256,
            "images": self.images,
            "own_fold": self.own_fold,
            "weights": self.weights,
            "classes": [
                {"name": name, "colour": list(colour)}
                for name, colour in zip(self.class_names, self.class_colours, strict=True)
            ],
            "best_miou": plain(self.best(lambda row: row.miou.mean)),
            "rows": [row.to_json(self.class_names) for row in self.rows],
            "notes": list(self.notes),
        }
