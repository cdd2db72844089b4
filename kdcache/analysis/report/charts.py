"""Line charts as inline SVG: small, sharp, and readable without a script. With the script, the pointer shows values.

Coordinates are of the drawing, 420 x 250. A phone shows it at 0.8 of that, so no text is smaller than 12.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kdcache.analysis.report.render import number, render

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 34
_MOST_POINTS = 240
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: its name in the legend.
        style: the CSS class that gives its colour.
        points: its points (step, value).
    """

    name: str
    style: str
    points: Points


@dataclass(frozen=True)
class _Frame:
    """Coordinates of values in a chart."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    def up(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)


def line_chart(title: str, lines: Sequence[Line], x_name: str, unit: str = "", digits: int = 2) -> Markup:
    """Return a line chart as SVG in HTML. The page shows values under the mouse pointer.

    Args:
        title: the title.
        lines: the lines. Lines without points are left out.
        x_name: the name of the horizontal axis.
        unit: text after values, such as "%".
        digits: decimals of the values under the pointer.
    """
    drawn = [Line(line.name, line.style, thin(line.points)) for line in lines if line.points]
    if not drawn:
        return render("chart.html", title=title, lines=())
    frame = _frame(drawn)
    return render(
        "chart.html",
        title=title,
        lines=[(line, _values(line), _places(line, frame)) for line in drawn],
        alternative=_alternative(title, drawn, unit, digits),
        frame=json.dumps([*frame.x, *frame.y]),
        x_ticks=[(frame.across(value), tick_text(value)) for value in ticks(*frame.x, 6)],
        y_ticks=[(number(frame.up(value)), tick_text(value)) for value in ticks(*frame.y, 5)],
        unit=unit,
        digits=digits,
        x_name=x_name,
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
    )


def thin(points: Points) -> list[tuple[float, float]]:
    """Return at most 240 points (step, value) of a curve.

    A longer curve is divided into parts with equally many points. Each part becomes one point: its last step and its
    mean value.
    """
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / _MOST_POINTS)
    parts = [points[first : first + size] for first in range(0, len(points), size)]
    return [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]


def _frame(lines: Sequence[Line]) -> _Frame:
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    # What cannot be negative is not drawn as if it could.
    bottom = max(low - pad, 0.0) if low >= 0 else low - pad
    first, last = min(steps), max(steps)
    return _Frame((first, last if last > first else first + 1), (bottom, high + pad))


def tick_text(value: float) -> str:
    """Return a number as the text of a tick: 40000 becomes "40k". Negative numbers have a typographic minus sign."""
    text = f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _places(line: Line, frame: _Frame) -> list[tuple[str, str]]:
    return [(number(frame.across(step), 1), number(frame.up(value), 1)) for step, value in line.points]


def _values(line: Line) -> str:
    """Return the values for the pointer, with six digits."""
    rounded = [[float(f"{part:.6g}") for part in point] for point in line.points]
    return json.dumps(rounded, separators=(",", ":"))


def _alternative(title: str, lines: Sequence[Line], unit: str, digits: int) -> str:
    """Return a text alternative: the last value of each line."""
    ends = [f"{line.name} {line.points[-1][1]:.{digits}f}{f' {unit}' if unit else ''}" for line in lines]
    return f"{title}: at the end {', '.join(ends[:12])}{', ...' if len(ends) > 12 else ''}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round numbers from `low` to `high`, or [low] if `high` is not above `low`."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    exponent = math.floor(math.log10(span / most))
    steps = [base * 10**power for power in range(exponent, exponent + 3) for base in (1, 2, 5)]
    step = next(step for step in steps if math.floor(high / step) - math.ceil(low / step) + 1 <= most)
    return [round(place * step, 10) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
