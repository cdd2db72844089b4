"""The first screen of the page: did distillation help, in one sentence, and what was compared."""

import math
from collections.abc import Sequence

from kdcache.evaluate.comparison import Comparison, Row
from kdcache.evaluate.report.html import Html, facts, join, number, paragraphs, points, section, tag
from kdcache.evaluate.spread import Difference
from kdcache.evaluate.tables import percent

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
    """A word, a sentence, and what must be said beside it, on the best row that has a baseline."""
    rows = measured(comparison)
    if not rows:
        remedy = "A baseline is a run of the same model that learnt from labels alone (--method none)"
        said = [f"{remedy}; --baseline names another."]
        return "Unknown.", "No row has a baseline to be measured against.", said
    best = max(rows, key=lambda row: row.miou.mean)
    found = best.difference
    assert found is not None
    sentence = (
        f"The best row, {quoted(best.name)}, reaches {percent(best.miou.mean)} % mIoU, "
        f"{gap_words(found.mean)} {quoted(found.baseline)}{_interval(found)}."
    )
    more = [_meaning(found), *_caution(rows, found), *_teacher(comparison, best)]
    return _answer(found), sentence, more


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


def _answer(found: Difference) -> str:
    if found.verdict == "above noise":
        return "Yes." if found.mean > 0 else "No."
    if found.verdict == "within noise":
        return "Not shown."
    return (
        "It looks so, but one run shows little." if found.mean > 0 else "It does not look so, but one run shows little."
    )


def quoted(name: str) -> str:
    """A row's name within a sentence: it may have commas of its own."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}"


def gap_words(gap: float) -> str:
    """A difference of fractions, as in `1.20 points more than`."""
    if round(100 * gap, 2) == 0:
        return "as much as"
    return f"{percent(abs(gap))} points {'more' if gap > 0 else 'less'} than"


def _interval(found: Difference) -> str:
    if math.isnan(found.half_width):
        return ""
    low, high = points(found.mean - found.half_width), points(found.mean + found.half_width)
    return f" (95 % interval {low} to {high})"


def _meaning(found: Difference) -> str:
    if found.verdict == "above noise":
        return f"The interval leaves out zero: more than chance, over {_runs(found)}."
    if found.verdict == "within noise":
        return f"The interval includes zero: {_runs(found)} do not tell this difference from chance. More seeds may."
    return (
        "Two trainings that differ only in their seed differ too; how much is unknown with one run. Train more seeds."
    )


def _runs(found: Difference) -> str:
    return f"{found.runs} pairs of runs" if found.paired else f"{found.runs} runs"


def _caution(rows: Sequence[Row], found: Difference) -> list[str]:
    """Of the others, and that a best of several is chosen for its luck too."""
    if len(rows) < 2:
        return []
    above = sum(row.difference is not None and row.difference.mean > 0 for row in rows)
    said = f"Of {len(rows)} rows with a baseline {above} {'is' if above == 1 else 'are'} above it."
    if found.mean > 0:
        said += " The best of several is chosen for its luck too: its difference is rather too large than too small."
    return [said]


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
        found = row.difference
        assert found is not None
        half = 0.0 if math.isnan(found.half_width) else found.half_width
        ends += [100 * (found.mean - half), 100 * (found.mean + half)]
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
    if any("cut-" in line for line in lines):
        title += ", and an arrow says that one is longer"
    return tag("figure", tag("figcaption", title), *lines, axis, class_="gaps")


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two ends, at most so many."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    exponent = math.floor(math.log10(span / most))
    steps = [base * 10**power for power in range(exponent, exponent + 3) for base in (1, 2, 5)]
    step = next(step for step in steps if math.floor(high / step) - math.ceil(low / step) + 1 <= most)
    return [round(place * step, 10) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def verdict(found: Difference | None) -> Html | None:
    """The verdict as a chip: its sign says the direction, so that colour is never alone."""
    if found is None:
        return None
    kind, sign = "unknown", "?"
    if found.verdict == "within noise":
        kind, sign = "within", "\N{ALMOST EQUAL TO}"
    elif found.verdict == "above noise":
        kind = "better" if found.mean > 0 else "worse"
        sign = "\N{BLACK UP-POINTING TRIANGLE}" if found.mean > 0 else "\N{BLACK DOWN-POINTING TRIANGLE}"
    return tag("span", tag("span", sign, aria_hidden="true"), f" {found.verdict}", class_=f"chip {kind}")


def _difference_line(row: Row, low: float, high: float, *, named: bool) -> Html:
    found = row.difference
    assert found is not None
    mean = 100 * found.mean
    half = 0.0 if math.isnan(found.half_width) else 100 * found.half_width
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
    name = tag("span", row.name, tag("small", f"to {found.baseline}") if named else None, class_="name")
    said = tag("span", tag("b", points(found.mean)), " ", verdict(found), class_="said")
    return tag("div", name, track, said, class_="gap")


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
