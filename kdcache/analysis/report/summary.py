"""The first screen of the page: did distillation help, in one sentence, and what was compared."""

import math
from collections.abc import Sequence

from kdcache.analysis.comparison import Comparison, Row, collapse, is_collapsed
from kdcache.analysis.report.charts import ticks
from kdcache.analysis.report.html import Html, facts, join, number, paragraphs, points, section, tag
from kdcache.analysis.spread import Difference
from kdcache.metrics.tables import percent

_MOST_TICKS = 6


def summary(comparison: Comparison, device: str | None) -> Html:
    """The headline, the differences as a drawing, the facts."""
    answer, sentence, more = headline(comparison)
    card = tag(
        "div",
        tag("p", tag("strong", answer), " ", _firm(sentence), class_="headline"),
        paragraphs(map(_firm, more), "aside"),
        differences(comparison),
        class_="card answer",
    )
    notes = None
    if comparison.notes:
        notes = tag("div", tag("h3", "Mind"), tag("ul", *(tag("li", note) for note in comparison.notes)))
    return section("summary", "Did distillation help?", card, facts(_facts(comparison, device)), notes)


def headline(comparison: Comparison) -> tuple[str, str, list[str]]:
    """A word, a sentence, and the reservations beside it, on all rows that have a baseline."""
    rows = measured(comparison)
    if not rows:
        remedy = "A baseline is a run of the same model that learnt from labels alone (--method none)"
        return "Unknown.", "No row has a baseline to be measured against.", [f"{remedy}; --baseline names another."]
    best = max(rows, key=lambda row: row.miou.mean)
    difference = best.difference
    assert difference is not None
    reached = f"reaches {percent(best.miou.mean)} % mIoU, {gap_words(difference.mean)} {quoted(difference.baseline)}"
    sentence = f"The best row, {quoted(best.name)}, {reached}{_interval(difference)}."
    if len(rows) > 1:
        sentence = f"{_tally(rows)} {sentence}"
    more = [*_meaning(rows), *_caution(rows, difference), *_teacher(comparison, best)]
    nothing = [f"{words}." for row in comparison.rows if (words := collapse(row, quoted(row.name)))]
    if all(_both_collapsed(comparison, row) for row in rows):
        same = all(is_nothing(gap.mean) for gap in _gaps(rows))
        word = "No difference." if same else "Unknown: nothing was learnt."
        return word, " ".join([*nothing, sentence]), _teacher(comparison, best)
    return _answer(rows), sentence, [*nothing, *more]


def _firm(text: str) -> str:
    """A number and its percent sign stay on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def measured(comparison: Comparison) -> list[Row]:
    """The contestants whose distance to a baseline is known."""
    return [
        row
        for row in comparison.rows
        if not row.teacher and row.difference is not None and not math.isnan(row.difference.mean)
    ]


def _gaps(rows: Sequence[Row]) -> list[Difference]:
    return [row.difference for row in rows if row.difference is not None]


def _answer(rows: Sequence[Row]) -> str:
    """The answer of all rows: that the best of several did well by luck is none."""
    gaps = [gap for gap in _gaps(rows) if not is_nothing(gap.mean)]
    if not gaps:
        return "No difference."
    above = sum(gap.verdict == "above noise" and gap.mean > 0 for gap in gaps)
    below = sum(gap.verdict == "above noise" and gap.mean < 0 for gap in gaps)
    if above and below:
        return "For some rows."
    if above or below:
        word, few = ("Yes", above) if above else ("No", below)
        return f"{word}." if few == len(rows) else f"{word}, in {few} of {len(rows)} rows."
    if any(not math.isnan(gap.half_width) for gap in gaps):
        return "Not shown."
    signs = {gap.mean > 0 for gap in gaps}
    if len(signs) > 1 or len(gaps) < len(rows):
        return "Unknown: the rows disagree, and one run shows little."
    return f"It {'looks' if signs == {True} else 'does not look'} so, but one run shows little."


def _both_collapsed(comparison: Comparison, row: Row) -> bool:
    """Whether neither a row nor its baseline has learnt anything: then their distance means nothing."""
    assert row.difference is not None
    baselines = [other for other in comparison.rows if other.name == row.difference.baseline]
    return is_collapsed(row) and all(map(is_collapsed, baselines))


def _tally(rows: Sequence[Row]) -> str:
    """How many rows are better, worse, neither, and by how many comparisons at once."""
    gaps = [gap for gap in _gaps(rows) if not is_nothing(gap.mean)]
    sure = [gap for gap in gaps if gap.verdict == "above noise"]
    above = sum(gap.mean > 0 for gap in sure)
    unknown = sum(math.isnan(gap.half_width) for gap in gaps)
    counts = (
        (above, "above"),
        (len(sure) - above, "below"),
        (len(gaps) - len(sure) - unknown, "within noise"),
        (unknown, "of too few runs to tell"),
        (len(rows) - len(gaps), "equal to it"),
    )
    parts = ", ".join(f"{count} {words}" for count, words in counts if count)
    comparisons = max(gap.comparisons for gap in _gaps(rows))
    how = f" ({comparisons} comparisons, adjusted by Holm)" if comparisons > 1 else ""
    return f"Of {len(rows)} rows measured against a baseline: {parts}{how}."


def quoted(name: str) -> str:
    """A row's name within a sentence: it may have commas of its own."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}"


def gap_words(gap: float) -> str:
    """A difference of fractions, as in `1.20 points more than`."""
    if is_nothing(gap):
        return "as much as"
    return f"{percent(abs(gap))} points {'more' if gap > 0 else 'less'} than"


def is_nothing(gap: float) -> bool:
    """Whether a difference of fractions is 0 in points of two digits, which is all that is shown."""
    return round(100 * gap, 2) == 0


def _interval(difference: Difference) -> str:
    if math.isnan(difference.half_width):
        return ""
    low, high = points(difference.mean - difference.half_width), points(difference.mean + difference.half_width)
    return f" (95 % interval {low} to {high})"


def _meaning(rows: Sequence[Row]) -> list[str]:
    """The meaning of the intervals, and what would show more."""
    gaps = _gaps(rows)
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
                f"the pairs is {alike}; where it is about 0, pairing buys nothing."
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


def _caution(rows: Sequence[Row], best: Difference) -> list[str]:
    """A best of several is chosen for its luck too."""
    if len(rows) < 2 or best.mean <= 0:
        return []
    return ["The best of several is chosen for its luck too: its difference is rather too large than too small."]


def _teacher(comparison: Comparison, best: Row) -> list[str]:
    teachers = [row for row in comparison.rows if row.teacher and not math.isnan(row.miou.mean)]
    if not teachers:
        return []
    taught = max(row.miou.mean for row in teachers)
    gap = taught - best.miou.mean
    if gap <= 0:
        return [f"The teacher itself reaches {percent(taught)} %, which this row surpasses."]
    return [f"The teacher itself reaches {percent(taught)} %, {percent(gap)} points more than this row."]


def differences(comparison: Comparison) -> Html | None:
    """Each row's distance to its baseline as a dot with its interval, zero marked."""
    rows = measured(comparison)
    if not rows:
        return None
    ends = [0.0]
    for row in rows:
        difference = row.difference
        assert difference is not None
        half = 0.0 if math.isnan(difference.half_width) else difference.half_width
        ends += [100 * (difference.mean - half), 100 * (difference.mean + half)]
    # One wild interval of two runs must not make all the others invisible.
    means = [abs(100 * row.difference.mean) for row in rows if row.difference is not None]
    widest = max(8 * max(means), 4.0)
    low, high = (max(min(ends), -widest), min(max(ends), widest))
    margin = 0.06 * (high - low or 1.0)
    low, high = low - margin, high + margin
    baselines = {row.difference.baseline for row in rows if row.difference is not None}
    lines = [_difference_line(row, low, high, named=len(baselines) > 1) for row in rows]
    marks = [
        tag("span", number(tick).replace("-", "\N{MINUS SIGN}"), style=f"left:{_at(tick, low, high)}%")
        for tick in ticks(low, high, _MOST_TICKS)
    ]
    axis = tag("div", tag("span"), tag("div", *marks, class_="axis"), tag("span"), class_="gap", aria_hidden="true")
    title = f"Points of mIoU to {quoted(*baselines) if len(baselines) == 1 else 'the baseline'}"
    if any(not math.isnan(row.difference.half_width) for row in rows if row.difference is not None):
        title += "; bars are 95 % intervals"
        comparisons = max(gap.comparisons for gap in _gaps(rows))
        title += f", verdicts are adjusted for {comparisons} comparisons" if comparisons > 1 else ""
    if any("cut-" in line for line in lines):
        title += ", and an arrow says that one is longer"
    return tag("figure", tag("figcaption", title), *lines, axis, class_="gaps")


def verdict(difference: Difference | None) -> Html | None:
    """The verdict as a chip: its sign shows the direction, so that colour is never alone."""
    if difference is None:
        return None
    kind, sign = "unknown", "?"
    if difference.verdict == "within noise":
        kind, sign = "within", "\N{ALMOST EQUAL TO}"
    elif difference.verdict == "above noise":
        kind = "better" if difference.mean > 0 else "worse"
        sign = "\N{BLACK UP-POINTING TRIANGLE}" if difference.mean > 0 else "\N{BLACK DOWN-POINTING TRIANGLE}"
    return tag("span", tag("span", sign, aria_hidden="true"), f" {difference.verdict}", class_=f"chip {kind}")


def _difference_line(row: Row, low: float, high: float, *, named: bool) -> Html:
    difference = row.difference
    assert difference is not None
    mean = 100 * difference.mean
    half = 0.0 if math.isnan(difference.half_width) else 100 * difference.half_width
    first, last = max(mean - half, low), min(mean + half, high)
    cut = ("cut-low " if mean - half < low else "") + ("cut-high" if mean + half > high else "")
    left, width = _at(first, low, high), number(100 * (last - first) / (high - low))
    bar = tag("span", class_=f"bar {cut}".strip(), style=f"left:{left}%;width:{width}%") if half else None
    track = tag(
        "div",
        tag("span", class_="zero", style=f"left:{_at(0, low, high)}%"),
        bar,
        tag("span", class_="dot", style=f"left:{_at(mean, low, high)}%"),
        class_="track",
        aria_hidden="true",
    )
    name = tag("span", row.name, tag("small", f"to {difference.baseline}") if named else None, class_="name")
    words = tag("span", tag("b", points(difference.mean)), " ", verdict(difference), class_="said")
    return tag("div", name, track, words, class_="gap")


def _at(value: float, low: float, high: float) -> str:
    return number(100 * (min(max(value, low), high) - low) / (high - low))


def _facts(comparison: Comparison, device: str | None) -> list[tuple[str, str | Html]]:
    runs = sum(len(row.runs) for row in comparison.rows)
    images = f"{comparison.images} labelled"
    if comparison.own_fold:
        images += ", each run on the fold that its training left out"
    timed = next((row.cost.latency for row in comparison.rows if row.cost.latency is not None), None)
    machine = device or "unknown"
    if timed is not None:
        machine += f" ({timed.device}, {timed.threads} thread{'' if timed.threads == 1 else 's'})"
    return [
        ("Data", join(comparison.data, tag("small", f" sha256 {comparison.data_sha256[:12]}"))),
        ("Split", comparison.split),
        ("Images", images),
        ("Classes", str(len(comparison.class_names))),
        ("Rows and runs", f"{len(comparison.rows)} and {runs}"),
        ("Weights", f"{comparison.weights} of each run"),
        ("Judged on", machine),
    ]
