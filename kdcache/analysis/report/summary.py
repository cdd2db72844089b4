"""The first screen of the page: whether distillation helped, in one sentence, and what was compared."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison, Row, collapse, is_collapsed
from kdcache.analysis.report.charts import ticks
from kdcache.analysis.report.render import number, points, quoted, render
from kdcache.analysis.report.scores import signed
from kdcache.analysis.statistics import Difference
from kdcache.analysis.tables import interval_spans
from kdcache.analysis.task_views import FURTHER, VIEWS
from kdcache.metrics.tables import percent
from kdcache.tasks import SEGMENTATION, TASKS

_MOST_TICKS = 6
Measured = tuple[Row, Difference]
"""A row, and its distance to its baseline."""


def summary(comparison: Comparison, device: str | None) -> Markup:
    """Return the first section of the report page: the headline, a chart of the differences, and facts on the data.

    `device` is the name of the device on which the runs were evaluated, or None.
    """
    answer, sentence, more = headline(comparison)
    return render(
        "summary.html",
        comparison=comparison,
        device=device,
        answer=answer,
        sentence=sentence,
        more=more,
        chart=differences(comparison),
    )


def headline(comparison: Comparison) -> tuple[str, str, list[str]]:
    """Return the answer to "did distillation help?": a few words such as "Yes.", an explanation, and further sentences.

    It covers the rows that learnt from a teacher and have a baseline. Other rows count only if there are none.
    """
    every = measured(comparison)
    rows = [pair for pair in every if pair[0].distilled] or every
    further = {task: found for task in FURTHER if (found := _task_sentence(comparison, task)) is not None}
    if not rows and further:
        answer, sentence = next(iter(further.values()))
        return answer, sentence[0].upper() + sentence[1:], []
    if not rows:
        fix = "A baseline is a run of the same model that learnt from labels alone (--method none)"
        return "Unknown.", "No row has a baseline to be measured against.", [f"{fix}; --baseline names another."]
    best, difference = max(rows, key=lambda pair: pair[0].miou.mean)
    gaps = [gap for _, gap in rows]
    reached = f"reaches {percent(best.miou.mean)} % mIoU, {gap_words(difference.mean)} {quoted(difference.baseline)}"
    sentence = f"The best row, {quoted(best.name)}, {reached}{_interval(difference)}."
    if len(rows) > 1:
        sentence = f"{_tally(rows)} {sentence}"
    more = [*_meaning(gaps), *_control(best), *_caution(gaps, difference), *_teacher(comparison, best)]
    nothing = [f"{words}." for row in comparison.rows if (words := collapse(row, quoted(row.name)))]
    if all(_both_collapsed(comparison, *pair) for pair in rows):
        same = all(is_nothing(gap.mean) for gap in gaps)
        word = "No difference." if same else "Unknown: nothing was learnt."
        return word, " ".join([*nothing, sentence]), _teacher(comparison, best)
    more = [*nothing, *more, *(f"{task.capitalize()}: {words}" for task, (_, words) in further.items())]
    if not best.distilled:
        return "Unknown.", f"No row that has a baseline learnt from a teacher. {sentence}", more
    return _answer(gaps, _of_the_loss(rows)), sentence, more


def _task_sentence(comparison: Comparison, task: str) -> tuple[str, str] | None:
    """Return the answer and a sentence on a task: the row with the best score of those measured against a baseline.

    None if there is no such row.
    """
    every = measured(comparison, task)
    if not every:
        return None
    rows, view = [pair for pair in every if pair[0].distilled] or every, VIEWS[task]
    best, gap = max(rows, key=lambda pair: TASKS[task].best(pair[0].spread(task).mean))
    # Where less is better, the sign that the words go by is turned round.
    answer = _answer([replace(difference, mean=TASKS[task].best(difference.mean)) for _, difference in rows])
    size = view.gap_text(abs(gap.mean)).removeprefix("+")
    words = "as much as" if gap.mean == 0 else f"{size} {view.unit} {'less' if gap.mean < 0 else 'more'} than"
    ends = (
        ""
        if math.isnan(gap.half_width)
        else (f" (95 % interval over {gap.over} {signed(gap.low, task)} to {signed(gap.high, task)})")
    )
    score = f"{view.called} of {view.score_text(best.spread(task).mean)} {view.unit}"
    sentence = f"the best row, {quoted(best.name)}, has {score}, {words} {quoted(gap.baseline)}{ends}: "
    return answer, f"{sentence}{gap.verdict}."


def measured(comparison: Comparison, task: str = SEGMENTATION) -> list[Measured]:
    """Return the rows whose difference from a baseline is known in a task, each with this difference."""
    gaps = ((row, row.differences(task)[0]) for row in comparison.contestants)
    return [(row, gap) for row, gap in gaps if gap is not None and not math.isnan(gap.mean)]


def _answer(every: Sequence[Difference], of_the_loss: int = 0) -> str:
    """Return the answer of all rows. The best of several rows may be lucky, so a single gain is not enough.

    `of_the_loss` is the number of gains above noise that the loss itself may explain.
    """
    gaps = [gap for gap in every if not is_nothing(gap.mean)]
    if not gaps:
        return "No difference."
    above = sum(map(_is_above, gaps)) - of_the_loss
    below = sum(gap.verdict == "above noise" and gap.mean < 0 for gap in gaps)
    if above and below:
        return "For some rows."
    if above or below:
        word, few = ("Yes", above) if above else ("No", below)
        return f"{word}." if few == len(every) else f"{word}, in {few} of {len(every)} rows."
    if any(not math.isnan(gap.half_width) for gap in gaps):
        return "Not shown."
    signs = {gap.mean > 0 for gap in gaps}
    if len(signs) > 1 or len(gaps) < len(every):
        return "Unknown: the rows disagree, and one run shows little."
    if all(gap.resampled is not None and gap.resampled.low <= 0 <= gap.resampled.high for gap in gaps):
        return "Unknown: one run shows little, and the interval over images includes zero."
    return f"It {'looks' if signs == {True} else 'does not look'} so, but one run shows little."


def _both_collapsed(comparison: Comparison, row: Row, difference: Difference) -> bool:
    """Return whether neither a row nor its baseline has learnt anything: then their distance means nothing."""
    baselines = [rival for rival in comparison.rows if rival.name == difference.baseline]
    return is_collapsed(row) and all(map(is_collapsed, baselines))


def _is_above(gap: Difference) -> bool:
    return gap.verdict == "above noise" and gap.mean > 0 and not is_nothing(gap.mean)


def _of_the_loss(rows: Sequence[Measured]) -> int:
    """Return the number of rows above their baseline, but not above their control: their gain may be the loss's own."""
    return sum(
        _is_above(gap) and row.control is not None and not math.isnan(row.control.mean) and not _is_above(row.control)
        for row, gap in rows
    )


def _tally(rows: Sequence[Measured]) -> str:
    """Count the rows that are better, worse or neither, and the comparisons behind them."""
    every = [gap for _, gap in rows]
    gaps = [gap for gap in every if not is_nothing(gap.mean)]
    sure = [gap for gap in gaps if gap.verdict == "above noise"]
    above = sum(gap.mean > 0 for gap in sure)
    unknown = sum(math.isnan(gap.half_width) for gap in gaps)
    counts = (
        (above, "above"),
        (len(sure) - above, "below"),
        (len(gaps) - len(sure) - unknown, "within noise"),
        (unknown, "of too few runs to tell"),
        (len(every) - len(gaps), "equal to it"),
    )
    parts = ", ".join(f"{count} {words}" for count, words in counts if count)
    comparisons = max(gap.comparisons for gap in every)
    how = f" ({comparisons} comparisons, adjusted by Holm)" if comparisons > 1 else ""
    loss = _of_the_loss(rows)
    caveat = (
        f" Of those above, {loss} {'is' if loss == 1 else 'are'} not above {'its' if loss == 1 else 'their'} control."
    )
    return f"Of {len(every)} rows measured against a baseline: {parts}{how}.{caveat if loss else ''}"


def gap_words(gap: float) -> str:
    """Return a difference of fractions in words: 0.012 becomes "1.20 points more than", -0.012 "1.20 points less than".

    A difference that rounds to nothing becomes "as much as".
    """
    if is_nothing(gap):
        return "as much as"
    return f"{percent(abs(gap))} points {'more' if gap > 0 else 'less'} than"


def is_nothing(gap: float) -> bool:
    """Return whether a difference of fractions rounds to 0.00 points."""
    return round(100 * gap, 2) == 0


def _interval(difference: Difference) -> str:
    drawn = difference.resampled
    spans = [(difference.over, difference.low, difference.high)]
    spans += [] if drawn is None else [(drawn.over, drawn.low, drawn.high)]
    texts = [f"over {over} {points(low)} to {points(high)}" for over, low, high in spans if not math.isnan(low)]
    return f" (95 % interval {', '.join(texts)})" if texts else ""


def _meaning(gaps: Sequence[Difference]) -> list[str]:
    """Return the meaning of the intervals, and what would show more."""
    tested = [gap for gap in gaps if not math.isnan(gap.half_width)]
    sentences = []
    if len(gaps) == len(tested) == 1:
        (gap,) = tested
        outside = abs(gap.mean) > gap.half_width
        sentences.append(
            f"The interval leaves out zero: more than chance, over {_runs(gap)}."
            if outside
            else f"The interval includes zero: {_runs(gap)} do not tell this difference from chance. More seeds may."
        )
        if gap.paired and not math.isnan(gap.unpaired.half_width):
            free = gap.unpaired
            alike = "unknown" if math.isnan(gap.correlation) else f"{gap.correlation:.2f}"
            sentences.append(
                f"Not paired by seed, the interval is {points(free.low)} to {points(free.high)}. The correlation of "
                f"the pairs is {alike}; where it is about 0, pairing narrows no interval."
            )
    elif any(gap.verdict == "within noise" for gap in tested):
        sentences.append("Within noise: these runs do not tell the row from its baseline. More seeds may.")
    if len(tested) < len(gaps):
        sentences.append(
            "Two trainings that differ only in their seed differ too; how much is unknown with one run. "
            "Train more seeds."
        )
    return sentences


def _runs(difference: Difference) -> str:
    return f"{difference.runs} pairs of runs" if difference.paired else f"{difference.runs} runs"


def _control(best: Row) -> list[str]:
    """Return how much of the best row's gain its loss reaches without a teacher."""
    gap = best.control
    if gap is None or math.isnan(gap.mean):
        return []
    if _is_above(gap):
        whose = "this much is the teacher's"
    elif gap.verdict == "above noise":
        whose = "the loss does better without the teacher"
    else:
        whose = f"{gap.verdict}, so that a gain may be the loss's own"
    return [
        f"It reaches {gap_words(gap.mean)} its control, the same loss with labels in the teacher's place"
        f"{_interval(gap)}: {whose}."
    ]


def _caution(gaps: Sequence[Difference], best: Difference) -> list[str]:
    """Return the caution that the best of several rows was partly lucky."""
    if len(gaps) < 2 or best.mean <= 0:
        return []
    return ["The best of several is chosen for its luck too: its difference is rather too large than too small."]


def _teacher(comparison: Comparison, best: Row) -> list[str]:
    reached = [row.miou.mean for row in comparison.teachers if not math.isnan(row.miou.mean)]
    if not reached:
        return []
    taught = max(reached)
    gap = taught - best.miou.mean
    if gap <= 0:
        return [f"The teacher itself reaches {percent(taught)} %, which this row surpasses."]
    return [f"The teacher itself reaches {percent(taught)} %, {percent(gap)} points more than this row."]


def differences(comparison: Comparison) -> dict[str, Any] | None:
    """Return a chart of each row's difference from its baseline, as the values that the page's template takes.

    Positions are in percent of the chart's width. None if no difference is known.
    """
    rows = measured(comparison)
    if not rows:
        return None
    spans = [(100 * gap.mean, 0.0 if math.isnan(gap.half_width) else 100 * gap.half_width) for _, gap in rows]
    # One wild interval of two runs must not make all the others invisible.
    widest = max(8 * max(abs(mean) for mean, _ in spans), 4.0)
    low = max(min(0.0, *(mean - half for mean, half in spans)), -widest)
    high = min(max(0.0, *(mean + half for mean, half in spans)), widest)
    margin = 0.06 * (high - low or 1.0)
    low, high = low - margin, high + margin

    def place(value: float) -> str:
        return number(100 * (min(max(value, low), high) - low) / (high - low))

    lines = []
    for (row, gap), (mean, half) in zip(rows, spans, strict=True):
        first, last = max(mean - half, low), min(mean + half, high)
        cut = ["cut-low"] * (mean - half < low) + ["cut-high"] * (mean + half > high)
        width = number(100 * (last - first) / (high - low))
        bar = {"has_bar": half > 0, "left": place(first), "width": width, "cut": " ".join(cut)}
        lines.append({"name": row.name, "gap": gap, "dot": place(mean), **bar})
    return {
        "lines": lines,
        "baselines": {gap.baseline for _, gap in rows},
        "over": interval_spans(comparison)[0],
        "tested": any(not math.isnan(gap.half_width) for _, gap in rows),
        "comparisons": max(gap.comparisons for _, gap in rows),
        "zero": place(0),
        "ticks": [(place(tick), number(tick).replace("-", "\N{MINUS SIGN}")) for tick in ticks(low, high, _MOST_TICKS)],
    }
