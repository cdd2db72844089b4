"""The course of the trainings: curves of all runs in their rows' colours, and the size of each term's gradient."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.curves import Curves, Points, read_curves
from kdcache.analysis.report.charts import Line, line_chart
from kdcache.analysis.report.render import number, render, row_class
from kdcache.analysis.runs import Entry
from kdcache.run_folder import LITTLE, MUCH, Run

_LOWEST, _HIGHEST = 1e-3, 1e3
_DEPTH = {
    "depth_rmse": "Validation rmse of depth",
    "ema_depth_rmse": "Validation rmse of depth of the weights' moving average (EMA)",
}
_OF_TASKS = {
    "loss": "Training loss of the task {task}",
    "norm": "Gradient norm of the task {task}",
    "weight": "Weight of the task {task}",
}
Norms = list[tuple[int, dict[str, float]]]


@dataclass(frozen=True)
class Training:
    """The log of one run.

    Attributes:
        row: the run's row.
        place: the row's index in `Comparison.rows`, which selects the colour.
        run: the run.
        curves: the curves of losses and validation scores.
        norms: for each step at which the log has gradient norms, the pair (step, name of a loss term -> its norm).
        tasks: curves by metric ("loss", "norm" or "weight") and task: metric -> task -> points (step, value).
    """

    row: Row
    place: int
    run: Entry
    curves: Curves
    norms: Norms
    tasks: Mapping[str, Mapping[str, Points]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row's name, with seed and fold if the row has several runs."""
        if len(self.row.runs) < 2:
            return self.row.name
        seed, fold = self.run.key
        return f"{self.row.name}, seed {seed}" + ("" if fold is None else f", fold {fold}")


def read_trainings(comparison: Comparison, runs: Mapping[str, Entry]) -> list[Training]:
    """Read the logs of all runs of a comparison. Runs without a log are left out.

    `runs` are the compared runs by name. Raises: RecipeError for an invalid log.
    """
    trainings = []
    for place, row in enumerate(comparison.rows):
        for score in row.runs:
            entry = runs.get(score.run)
            if entry is None or entry.run is None or (curves := read_curves(entry.run)) is None:
                continue
            trainings.append(Training(row, place, entry, curves, read_norms(entry.run), read_tasks(entry.run)))
    return trainings


def read_norms(run: Run) -> Norms:
    """Return the gradient norms in a run's log: pairs of a step and the norm of each loss term by name.

    The result is empty if the training measured none.
    """
    norms = []
    for row in run.metrics or ():
        if row["kind"] == "gradients":
            terms = {name: value for name, value in row.items() if name not in ("kind", "step", "tasks")}
            norms.append((row["step"], {name: math.nan if norm is None else norm for name, norm in terms.items()}))
    return norms


def read_tasks(run: Run) -> dict[str, dict[str, Points]]:
    """Return the curves of each task in a run's log: metric -> task -> points (step, value).

    The metrics are "loss", "norm" (of the gradient) and "weight".
    """
    measured: dict[str, dict[str, Points]] = {key: {} for key in _OF_TASKS}
    for row in run.metrics or ():
        for task, values in row.get("tasks", {}).items() if row["kind"] in ("train", "gradients") else ():
            for key in _OF_TASKS:
                # A gradients line has the losses of its one batch too: those of the train lines are drawn.
                if values.get(key) is not None and (key == "norm" or row["kind"] == "train"):
                    measured[key].setdefault(task, []).append((row["step"], float(values[key])))
    return measured


def curves(trainings: Sequence[Training]) -> Markup | None:
    """Return the HTML section with charts of scores, losses and speed, a line per run. None if `trainings` is empty."""
    if not trainings:
        return None
    parts = dict.fromkeys(name for run in trainings for name in run.curves.losses if name != "loss")
    streams = dict.fromkeys(
        name for run in trainings for _, norms in run.norms for name in norms if name.endswith("/loss")
    )
    scores = {"miou": "Validation mIoU", "ema_miou": "Validation mIoU of the weights' moving average (EMA)"}
    charts = [
        *(
            line_chart(title, [_line(run, run.curves.scores.get(name, []), 100) for run in trainings], "iteration", "%")
            for name, title in scores.items()
            if any(name in run.curves.scores for run in trainings)
            or (name == "miou" and not any(run.curves.depth for run in trainings))
        ),
        *(
            line_chart(title, [_line(run, run.curves.depth.get(name, [])) for run in trainings], "iteration", "m", 3)
            for name, title in _DEPTH.items()
            if any(name in run.curves.depth for run in trainings)
        ),
        line_chart("Training loss, all terms together", [_line(run, run.curves.losses["loss"]) for run in trainings],
                   "iteration", digits=4),
        *(
            line_chart(f"Training loss, its part {name}, unweighted",
                       [_line(run, run.curves.losses.get(name, [])) for run in trainings], "iteration", digits=4)
            for name in parts
        ),
        *(
            line_chart(f"Gradient norm of {name}, weighted",
                       [_line(run, [(step, norms[name]) for step, norms in run.norms if name in norms])
                        for run in trainings], "iteration", digits=4)
            for name in streams
        ),
        *(
            line_chart(title.format(task=task),
                       [_line(run, run.tasks.get(key, {}).get(task, [])) for run in trainings], "iteration", digits=4)
            for key, title in _OF_TASKS.items()
            for task in dict.fromkeys(task for run in trainings for task in run.tasks.get(key, {}))
        ),
        line_chart("Speed", [_line(run, run.curves.speed) for run in trainings], "iteration", "images/s", 1),
    ]  # fmt: skip
    return render("training.html", rows={training.place: training.row for training in trainings}, charts=charts)


def gradients(trainings: Sequence[Training]) -> Markup | None:
    """Return the report's section that compares each loss term's gradient norm with cross-entropy's.

    A stream's terms are compared with the cross-entropy of the same stream. Return None if no log has gradient norms of
    other terms than cross-entropy.
    """
    terms = [
        _term(training, name)
        for training in trainings
        for name in dict.fromkeys(name for _, norms in training.norms for name in norms)
        if name.rpartition("/")[2] not in ("ce", "loss")
    ]
    if not terms:
        return None
    middles: dict[tuple[str, str], list[float]] = {}
    for term in terms:
        if term["shares"]:
            middles.setdefault((term["training"].row.name, term["name"]), []).append(term["middle"])
    return render(
        "gradients.html",
        terms=terms,
        warnings=[text for key, values in middles.items() if (text := _warning(*key, values)) is not None],
        zone=(_log_place(LITTLE), number(100 - float(_log_place(MUCH)))),
    )


def _warning(row: str, name: str, middles: Sequence[float]) -> str | None:
    """Return the warning about a term of a row, by the median over its runs, or None for none."""
    middle = statistics.median(middles)
    word = judge(middle)
    if word is None:
        return None
    meaning = "as it stands, this is a training without it" if middle < LITTLE else "as it stands, labels hardly count"
    why = f"its gradient is {times(middle)} that of cross-entropy"
    return f"{row}: {name} {word}, for {why}; {meaning}. Change its weight."


def judge(share: float) -> str | None:
    """Return a warning for a loss term whose gradient norm is `share` times cross-entropy's.

    It is the end of a sentence about the term. For 0.01 to 10 (`LITTLE` to `MUCH`) the result is None.
    """
    if share < LITTLE:
        return "hardly does anything"
    return "dominates the loss" if share > MUCH else None


def times(share: float) -> str:
    """Return a ratio as text, with two digits, or as a whole number from 100 on: 0.0123 becomes "0.012 times"."""
    return f"{share:.2g} times" if share < 100 else f"{share:.0f} times"


def _shares(norms: Norms, name: str) -> list[float]:
    stream, slash, _ = name.rpartition("/")
    pairs = [(terms.get(name, math.nan), terms.get(f"{stream}{slash}ce", math.nan)) for _, terms in norms]
    return [norm / ce for norm, ce in pairs if ce > 0 and math.isfinite(norm) and math.isfinite(ce)]


def _term(training: Training, name: str) -> dict[str, Any]:
    """Return a term's gradient ratios to cross-entropy, and their places on the scale."""
    shares = _shares(training.norms, name)
    middle = statistics.median(shares) if shares else math.nan
    return {
        "training": training,
        "name": name,
        "shares": shares,
        "middle": middle,
        "places": list(map(_log_place, shares)),
        "place": _log_place(middle),
        "word": judge(middle),
    }


def _log_place(share: float) -> str:
    """Return percent of the way from 0.001 to 1000, by logarithm."""
    clipped = min(max(share, _LOWEST), _HIGHEST)
    return number(100 * math.log(clipped / _LOWEST) / math.log(_HIGHEST / _LOWEST))


def _line(training: Training, points: Sequence[tuple[int, float]], factor: float = 1.0) -> Line:
    dashed = " dashed" if training.place >= 8 else ""
    style = f"{row_class(training.row, training.place)} of-{training.place}{dashed}"
    return Line(training.name, style, [(step, factor * value) for step, value in points])
