"""How the trainings went: curves of all runs in their rows' colours, and how much each term of the loss did."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.curves import Curves, read_curves
from kdcache.analysis.report.charts import Line, line_chart
from kdcache.analysis.report.html import Child, Html, join, number, section, simple_table, tag
from kdcache.analysis.report.scores import row_class, swatch
from kdcache.analysis.runs import Entry
from kdcache.run_folder import Run

LITTLE, MUCH = 0.01, 10.0
"""Norms of a term's gradient, beside that of cross-entropy, beyond which its weight is worth a word."""
_LOWEST, _HIGHEST = 1e-3, 1e3
Norms = list[tuple[int, dict[str, float]]]


@dataclass(frozen=True)
class Training:
    """The log of one run of a row; `norms` of its terms' gradients by step."""

    row: Row
    place: int
    run: Entry
    curves: Curves
    norms: Norms

    @property
    def name(self) -> str:
        """The row's, with the seed and fold where the row has several runs."""
        if len(self.row.runs) < 2:
            return self.row.name
        seed, fold = self.run.key
        return f"{self.row.name}, seed {seed}" + ("" if fold is None else f", fold {fold}")


def read_trainings(comparison: Comparison, runs: Mapping[str, Entry]) -> list[Training]:
    """The trainings of all runs that keep a log. Raises: RecipeError for a log that is none."""
    trainings = []
    for place, row in enumerate(comparison.rows):
        for score in row.runs:
            entry = runs.get(score.run)
            if entry is None or entry.run is None or (curves := read_curves(entry.run)) is None:
                continue
            trainings.append(Training(row, place, entry, curves, read_norms(entry.run)))
    return trainings


def read_norms(run: Run) -> Norms:
    """(step, norm by term) of a run's log."""
    norms = []
    for row in run.metrics or ():
        if row["kind"] == "gradients":
            terms = {name: value for name, value in row.items() if name not in ("kind", "step")}
            norms.append((row["step"], {name: math.nan if norm is None else norm for name, norm in terms.items()}))
    return norms


def curves(trainings: Sequence[Training]) -> Html | None:
    """Section of the curves; None when no run keeps a log."""
    if not trainings:
        return None
    parts = dict.fromkeys(name for run in trainings for name in run.curves.losses if name != "loss")
    charts = [
        line_chart("Validation mIoU", [_line(run, run.curves.scores.get("miou", []), 100) for run in trainings],
                   "iteration", "%"),
        line_chart("Training loss, all terms together", [_line(run, run.curves.losses["loss"]) for run in trainings],
                   "iteration", digits=4),
        *(
            line_chart(f"Training loss, its part {name}, unweighted",
                       [_line(run, run.curves.losses.get(name, [])) for run in trainings], "iteration", digits=4)
            for name in parts
        ),
        line_chart("Speed", [_line(run, run.curves.speed) for run in trainings], "iteration", "images/s", 1),
    ]  # fmt: skip
    lead = "Rows that learn from other terms have other losses: compare the lines of one part, or mIoU."
    grid = tag("div", *charts, class_="charts")
    return section("training", "How the trainings went", _legend(trainings), grid, lead=lead)


def gradients(trainings: Sequence[Training]) -> Html | None:
    """Section on the terms' gradients beside that of cross-entropy; None when there is no term besides."""
    rows: list[tuple[Child, ...]] = []
    middles: dict[tuple[str, str], list[float]] = {}
    for training in trainings:
        for name in dict.fromkeys(name for _, norms in training.norms for name in norms if name != "ce"):
            shares = _shares(training.norms, name)
            rows.append((join(swatch(training.place, training.row), training.name), name, *_cells(shares)))
            if shares:
                middles.setdefault((training.row.name, name), []).append(statistics.median(shares))
    if not rows:
        return None
    warnings = [tag("p", text) for key, values in middles.items() if (text := _warning(*key, values)) is not None]
    box = tag("div", *warnings, class_="warning") if warnings else None
    table = simple_table(
        "Norm of each weighted term's gradient over the student's parameters, beside that of cross-entropy",
        ("row", "term", "first", "median", "last", "0.001 to 1000 times, the shaded part is in proportion", "verdict"),
        rows,
        "gradients",
    )
    lead = "A term whose gradient is a hundredth of cross-entropy's does nothing; one of ten times drowns the labels."
    return section("gradients", "What each term of the loss did", box, table, lead=lead)


def _warning(row: str, name: str, middles: Sequence[float]) -> str | None:
    """The warning about a term of a row, by the median over its runs; None for none."""
    middle = statistics.median(middles)
    word = judge(middle)
    if word is None:
        return None
    meaning = "as it stands, this is a training without it" if middle < LITTLE else "as it stands, labels hardly count"
    why = f"its gradient is {times(middle)} that of cross-entropy"
    return f"{row}: {name} {word}, for {why}; {meaning}. Change its weight."


def judge(share: float) -> str | None:
    """Words on a ratio of norms; None where it is in proportion."""
    if share < LITTLE:
        return "hardly does anything"
    return "drowns the labels" if share > MUCH else None


def times(share: float) -> str:
    """0.0123 as `0.012 times`."""
    return f"{share:.2g} times" if share < 100 else f"{share:.0f} times"


def _shares(norms: Norms, name: str) -> list[float]:
    pairs = [(terms.get(name, math.nan), terms.get("ce", math.nan)) for _, terms in norms]
    return [norm / ce for norm, ce in pairs if ce > 0 and math.isfinite(norm) and math.isfinite(ce)]


def _cells(shares: Sequence[float]) -> tuple[Child, ...]:
    if not shares:
        return ("-", "-", "-", None, "no cross-entropy beside it")
    middle = statistics.median(shares)
    zone = f"left:{number(_log_place(LITTLE))}%;right:{number(100 - _log_place(MUCH))}%"
    track = tag(
        "span",
        tag("span", class_="zone", style=zone),
        *(tag("span", class_="dot small", style=f"left:{number(_log_place(share))}%") for share in shares),
        tag("span", class_="dot", style=f"left:{number(_log_place(middle))}%"),
        class_="log-track",
        aria_hidden="true",
    )
    word = judge(middle)
    chip = tag("span", word or "in proportion", class_=f"chip {'worse' if word else 'within'}")
    return (f"{shares[0]:.2g} \u00d7", f"{middle:.2g} \u00d7", f"{shares[-1]:.2g} \u00d7", track, chip)


def _log_place(share: float) -> float:
    """Percent of the way from 0.001 to 1000, by logarithm."""
    held = min(max(share, _LOWEST), _HIGHEST)
    return 100 * math.log(held / _LOWEST) / math.log(_HIGHEST / _LOWEST)


def _line(training: Training, points: Sequence[tuple[int, float]], factor: float = 1.0) -> Line:
    style = f"{row_class(training.place, training.row)} of-{training.place}" + (
        " dashed" if training.place >= 8 else ""
    )
    return Line(training.name, style, [(step, factor * value) for step, value in points])


def _legend(trainings: Sequence[Training]) -> Html:
    """A switch for each row: with the script they hide its lines."""
    seen = {training.place: training.row for training in trainings}
    switches = [
        tag("label", tag("input", type="checkbox", checked=True, data_place=place), swatch(place, row), row.name)
        for place, row in seen.items()
    ]
    return tag("div", *switches, class_="legend controls", role="group", aria_label="Rows that are drawn")
