"""A comparison of runs as data, the source of every table and report.

Fractions are in 0..1, NaN if unknown. Classes are identified by name. Names come with the runs' models and are checked
against the data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdcache.analysis.statistics import Difference, Key, Spread, plain
from kdcache.analysis.task_views import FURTHER, VIEWS, TaskView
from kdcache.data.concat import parts_of, task_of
from kdcache.data.scenes.generate import is_scenes
from kdcache.display import html_table, private_places, public, public_names, without_places
from kdcache.metrics.chance import at_chance
from kdcache.metrics.confusion import Metrics
from kdcache.metrics.cost import Cost, Latency
from kdcache.metrics.evaluate import TaskMetrics
from kdcache.metrics.evaluators import EVALUATORS, Images
from kdcache.tasks import SEGMENTATION, TASKS


@dataclass(frozen=True)
class RunScore:
    """The metrics of one run of a row.

    Attributes:
        run: the run's name or path, as the user wrote it.
        seed, fold: from its recipe, or None.
        tasks: the metrics of each evaluated task.
        reused: whether the metrics come from a stored evaluation.
        class_names: the class names of the comparison.
    """

    run: str
    seed: int | None
    fold: str | None
    tasks: TaskMetrics
    reused: bool
    class_names: tuple[str, ...] = ()

    @property
    def metrics(self) -> Metrics:
        """The metrics of segmentation. All are NaN if segmentation is not evaluated."""
        if self.tasks.segmentation is not None:
            return self.tasks.segmentation
        names, nothing = self.class_names, (math.nan,) * len(self.class_names)
        return Metrics(names, nothing, nothing, (0,) * len(names), math.nan, math.nan, math.nan)

    def images(self, task: str) -> Images | None:
        """Return the numbers of each image in a task: counts of pixels per class, or depth metrics.

        Return None if they are not known.
        """
        metrics = self.tasks.by_task.get(task)
        return None if metrics is None else metrics.images

    def value(self, task: str, name: str | None = None) -> float:
        """Return a metric of a task, or NaN if the task is not evaluated.

        `name` is the metric's name, such as "miou". None returns the task's score.
        """
        metrics = self.tasks.by_task.get(task)
        return math.nan if metrics is None else float(getattr(metrics, name or TASKS[task].score))

    @property
    def key(self) -> Key:
        """Seed and fold. Runs of two rows are paired if their keys are equal."""
        return self.seed, self.fold

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values: the run, its seed, its fold and its metrics, such as `miou`."""
        origin = {"run": self.run, "seed": self.seed, "fold": self.fold, "reused": self.reused}
        further = {task: metrics.to_json() for task, metrics in self.tasks.by_task.items() if task in FURTHER}
        return {**origin, "at_chance": at_chance(self.metrics), **self.metrics.to_json(), **further}


@dataclass(frozen=True)
class Gaps:
    """The differences of a row's score in one task from the scores of other rows.

    Attributes:
        baseline: the difference from the baseline, or None if the row does not have a baseline.
        control: the difference from the control, or None if the row does not have a control.
    """

    baseline: Difference | None = None
    control: Difference | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the two differences as JSON values, under the names "difference" (to the baseline) and "control"."""
        gaps = {"difference": self.baseline, "control": self.control}
        return {name: None if gap is None else gap.to_json() for name, gap in gaps.items()}


@dataclass(frozen=True)
class Row:
    """The runs of one recipe, which differ only in seed and fold, with their mean scores.

    Attributes:
        name: its name, from `--name`, or else from the settings that distinguish it. If there are none, or if two rows
            would get the same name, it is made of folder names.
        model: the spec of the model.
        differs: the settings that distinguish the row from other rows, by flag.
        runs: the metrics of each run.
        cost: the cost of one image, measured with the model of the first run.
        teacher: whether this is the teacher's row, which is outside the ranking.
        baseline: whether other rows are compared with this row.
        scores: mean and standard deviation of each metric: task -> metric -> Spread.
        iou: the IoU of each class, in the order of `Comparison.class_names`.
        gaps: the differences from baseline and control, by task.
        class_differences: for each class, the difference of its IoU from the baseline's.
        distilled: whether it learnt from a teacher's targets. True also if its recipe is unknown.
    """

    name: str
    model: str
    differs: dict[str, Any]
    runs: tuple[RunScore, ...]
    cost: Cost
    teacher: bool
    baseline: bool
    scores: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict)
    iou: tuple[Spread, ...] = ()
    gaps: Mapping[str, Gaps] = field(default_factory=dict)
    class_differences: tuple[Difference, ...] = ()
    distilled: bool = True

    def spread(self, task: str, name: str | None = None) -> Spread:
        """Return mean and standard deviation of a metric over the runs, NaN if the task is not evaluated.

        `name` is the metric's name, such as "miou". None returns the task's score.
        """
        return self.scores.get(task, {}).get(name or TASKS[task].score, Spread.of(()))

    def differences(self, task: str) -> tuple[Difference | None, Difference | None]:
        """Return two differences of a task's score: from the baseline, and from the control.

        Each is None if the row does not have a baseline or control.
        """
        gaps = self.gaps.get(task, Gaps())
        return gaps.baseline, gaps.control

    def with_gaps(self, task: str, **gaps: Difference | None) -> "Row":
        """Return a copy of the row whose differences of a task are replaced.

        Args:
            task: such as `segmentation`.
            gaps: `baseline=`, `control=` or both, the new differences from the baseline and from the control.
        """
        return replace(self, gaps={**self.gaps, task: replace(self.gaps.get(task, Gaps()), **gaps)})

    @property
    def miou(self) -> Spread:
        """The mIoU, 0 to 1: mean and standard deviation over the runs."""
        return self.spread(SEGMENTATION)

    @property
    def difference(self) -> Difference | None:
        """The difference of the mIoU from the baseline's, or None if there is no baseline."""
        return self.differences(SEGMENTATION)[0]

    @property
    def control(self) -> Difference | None:
        """The difference of the mIoU from the control's, or None if there is no control."""
        return self.differences(SEGMENTATION)[1]

    @property
    def collapsed(self) -> tuple[tuple[str, str], ...]:
        """The runs that have learnt nothing: pairs of a run and the reason in words."""
        return tuple((score.run, why) for score in self.runs if (why := at_chance(score.metrics)) is not None)

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return the row as JSON values: attributes, scores and differences.

        Segmentation's scores, such as "miou", are at the top level. "depth" has the scores of depth. "classes" has
        the IoU of each class, in the order of `class_names`, the names of all classes.
        """
        gaps = self.class_differences or (None,) * len(class_names)
        return {
            "name": self.name,
            "model": self.model,
            "teacher": self.teacher,
            "baseline": self.baseline,
            "differs": self.differs,
            **{name: self.spread(SEGMENTATION, name).to_json() for name in EVALUATORS[SEGMENTATION].figures},
            **self.gaps.get(SEGMENTATION, Gaps()).to_json(),
            "classes": [
                {"name": name, "iou": iou.to_json(), "difference": None if gap is None else gap.to_json()}
                for name, iou, gap in zip(class_names, self.iou, gaps, strict=True)
            ],
            **{task: self._further_json(task) for task in FURTHER if task in self.scores},
            "cost": self.cost.to_json(),
            "runs": [score.to_json() for score in self.runs],
        }

    def _further_json(self, task: str) -> dict[str, Any]:
        spreads = {name: spread.to_json() for name, spread in self.scores[task].items()}
        return spreads | self.gaps.get(task, Gaps()).to_json()


def collapse(row: Row, name: str) -> str | None:
    """Return a warning if the scores of some of a row's runs are at chance level, or None if no run's scores are.

    `name` is the row's name in the warning.
    """
    collapsed = row.collapsed
    if not collapsed:
        return None
    run, why = collapsed[0]
    verb = "collapsed" if all(words.startswith("predicts") for _, words in collapsed) else "learnt nothing"
    if len(row.runs) == 1:
        return f"{name} {verb}: it {why}"
    who = (
        f"all {len(collapsed)} runs" if len(collapsed) == len(row.runs) else f"{len(collapsed)} of {len(row.runs)} runs"
    )
    return f"{who} of {name} {verb}: {run} {why}"


def is_collapsed(row: Row) -> bool:
    """Return True if the segmentation scores of all of the row's runs are at chance level.

    Such scores are no better than those of a constant or random prediction, see `at_chance`. A row without runs gives
    False.
    """
    return bool(row.runs) and len(row.collapsed) == len(row.runs)


def alike(row: Row) -> str | None:
    """Return a warning that all runs of a row have exactly the same metrics, or None.

    Equal metrics mean that the seed changed nothing, so the noise between runs is unknown.
    """
    scores = {(score.tasks.segmentation, score.tasks.depth) for score in row.runs}
    if len(row.runs) < 2 or len(scores) > 1 or is_collapsed(row):
        return None
    return (
        f"the {len(row.runs)} runs of {row.name} score exactly alike: their seeds have changed nothing, and how noisy "
        "such runs are is not known"
    )


def _figure(spread: Spread, view: TaskView) -> str:
    """Return a mean and its standard deviation as text of a small table, such as "63.1 ± 0.4", or "-" for NaN."""
    if math.isnan(spread.mean):
        return "-"
    times, digits = view.times, view.short[1]
    deviation = "" if math.isnan(spread.std) else f" ± {times * spread.std:.{digits}f}"
    return f"{times * spread.mean:.{digits}f}{deviation}"


@dataclass(frozen=True)
class Comparison:
    """The results of runs on one split, with one row for each recipe. Scores are fractions from 0 to 1, or metres.

    Attributes:
        data, split: the data set and its split.
        data_sha256: digest of the split's classes, ids, images and labels.
        images: number of labelled images.
        own_fold: whether each run was evaluated only on the fold that its training left out.
        weights: which weights of the runs were evaluated, such as "best".
        class_names, class_colours: names and RGB colours of the classes.
        rows: the results.
        notes: warnings for the reader, one sentence each.
        smoke: whether the runs come from a shortened recipe, so that scores mean nothing.
        depth_range: the depth labels that count, in words, or None if depth is not evaluated.
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
    smoke: bool = False
    depth_range: str | None = None

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {miou}" for name, miou, *_ in self._score_rows)
        return f"<Comparison on {self.data}, split {self.split}, {self.images} images: {scores}>"

    def _repr_html_(self) -> str:
        judged = [VIEWS[task].short[0] for task in self.tasks]
        header = ("", *judged, "beside", "verdict", "parameters M", "ms per image")
        title = f"{public(self.data)}, split {self.split}, {self.images} images"
        return html_table(title if self.banner is None else f"{title}. {self.banner}", header, self._score_rows)

    @property
    def _score_rows(self) -> list[list[str]]:
        """Rows of name, score per task, baseline, verdict and cost. The full tables are in `tables`."""
        rows = []
        for row in self.rows:
            scores = [_figure(row.spread(task), VIEWS[task]) for task in self.tasks]
            gap = next((gap for task in VIEWS if (gap := row.differences(task)[0]) is not None), None)
            beside = ["", ""] if gap is None else [gap.baseline, gap.verdict]
            time = "" if row.cost.latency is None else f"{row.cost.latency.median_ms:.1f}"
            name = f"{row.name} (teacher)" if row.teacher and "teacher" not in row.name else row.name
            rows.append([name, *scores, *beside, f"{row.cost.parameters / 1e6:.2f}", time])
        return rows

    @property
    def _places(self) -> dict[str, str]:
        """The folders of this machine that the comparison names, each with the name that may travel."""
        runs = [score.run for row in self.rows for score in row.runs]
        named = private_places([self.data, runs, [[row.name, row.model, row.differs] for row in self.rows]])
        return named | public_names(runs)

    def without_folders(self, text: str) -> str:
        """Return `text` with public names (see `kdcache.display.public`) instead of the comparison's private paths."""
        return str(without_places(text, self._places))

    @property
    def banner(self) -> str | None:
        """A warning above all tables, for runs of a shortened recipe or on generated scenes, or None."""
        return banner(self.data, self.smoke)

    @property
    def contestants(self) -> list[Row]:
        """All rows except the teacher's."""
        return [row for row in self.rows if not row.teacher]

    @property
    def teachers(self) -> list[Row]:
        """The teacher's rows."""
        return [row for row in self.rows if row.teacher]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in which at least one run is evaluated: "segmentation", "depth"."""
        judged = {task for row in self.rows for score in row.runs for task in score.tasks.by_task}
        return tuple(task for task in TASKS if task in judged)

    @property
    def latency(self) -> Latency | None:
        """The latency of the first row that has one, or None. All measured rows have the same device and threads."""
        return next((row.cost.latency for row in self.rows if row.cost.latency is not None), None)

    def best(self, value: Callable[[Row], float], *, least: bool = False) -> float:
        """Return the largest (or with `least` the smallest) value over all rows except the teacher's.

        `value` is a function that returns a number for a row. Rows with NaN do not count. The result is NaN if there is
        none.
        """
        values = [value(row) for row in self.contestants if not math.isnan(value(row))]
        return min(values, default=math.nan) if least else max(values, default=math.nan)

    def is_best(self, row: Row, value: Callable[[Row], float], *, least: bool = False) -> bool:
        """Return whether a row has the best value of all rows except the teacher's. If all are equal, no row is best.

        `value` is a function that returns a number for a row. `least` says that smaller numbers are better.
        """
        values = [value(contestant) for contestant in self.contestants]
        all_equal = len(values) > 1 and len(set(values)) == 1
        return not row.teacher and not all_equal and value(row) == self.best(value, least=least)

    def best_score(self, task: str) -> float:
        """Return the best score in a task over all rows except the teacher's, or NaN if there is none."""
        return self.best(lambda row: row.spread(task).mean, least=VIEWS[task].less)

    def _further_json(self) -> dict[str, Any]:
        judged = [task for task in self.tasks if task in FURTHER]
        best = {f"best_{task}_{TASKS[task].score}": plain(self.best_score(task)) for task in judged}
        return best | ({"depth_range": self.depth_range} if judged else {})

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values, with null for NaN.

        Public names, such as a run's name, replace the paths of this machine in all texts.
        """
        content = {
            "data": self.data,
            "split": self.split,
            "banner": self.banner,
            "data_sha256": self.data_sha256,
            "images": self.images,
            "own_fold": self.own_fold,
            "weights": self.weights,
            "classes": [
                {"name": name, "colour": list(colour)}
                for name, colour in zip(self.class_names, self.class_colours, strict=True)
            ],
            "best_miou": plain(self.best_score(SEGMENTATION)),
            **self._further_json(),
            "rows": [row.to_json(self.class_names) for row in self.rows],
            "notes": list(self.notes),
        }
        found: dict[str, Any] = without_places(content, self._places)
        return found


def banner(data: str, smoke: bool = False) -> str | None:
    """Return a warning that scores mean nothing, or None if they may mean something.

    Args:
        data: the data set as the user named it, or several, joined as in "DATA + DATA". Procedural scenes get the
            warning.
        smoke: True for a run of a shortened recipe, which also gets the warning.
    """
    drawn = any(is_scenes(task_of(part)[1]) for part in parts_of(data))
    if not drawn and not smoke:
        return None
    what = "Smoke run" if smoke else "Procedural scenes"
    what += " on procedural scenes" if drawn and smoke else ""
    pictures = ", no photographs" if drawn else ", a few hundred steps at most"
    return f"{what}{pictures}: it shows that everything works, and nothing about any data set, model or method."
