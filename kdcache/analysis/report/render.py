"""The templates of the page, filled in by jinja2. Names of classes, runs and samples are always escaped."""

import base64
import math
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from kdcache.analysis.comparison import Row
from kdcache.analysis.gallery import shorten
from kdcache.analysis.tables import row_name
from kdcache.metrics.tables import percent

_JSON: dict[str, Any] = {"allow_nan": False, "separators": (",", ":")}


def render(template: str, **values: Any) -> Markup:
    """Return one of this package's HTML templates, filled with values.

    Args:
        template: file name in the folder `templates`, such as "scores.html".
        values: name in the template -> value. All except Markup are escaped.
    """
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__ or ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = _JSON
    filters = (css_colour, data_uri, firm, number, percent, points, quoted, row_class, row_name, shorten)
    environment.filters |= {function.__name__: function for function in filters}
    environment.tests["unknown"] = math.isnan
    return environment


def as_json(value: Any) -> Markup:
    """Return a value as JSON that can stand in an HTML page."""
    return htmlsafe_json_dumps(value, **_JSON)


def css_colour(colour: tuple[int, int, int]) -> str:
    """Return an RGB colour (0 to 255) as CSS: "rgb(128 64 128)"."""
    return "rgb({} {} {})".format(*colour)


def data_uri(content: bytes, kind: str) -> str:
    """Return the content of a file as a data URI. `kind` is its media type, such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def firm(text: str) -> str:
    """Return a text in which no-break spaces replace spaces before percent signs, so "12 %" stays on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def number(value: float, digits: int = 2) -> str:
    """Return a number as text with at most `digits` decimals and without an exponent. NaN and infinity become "0"."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def points(value: float, digits: int = 2) -> str:
    """Return a difference of fractions as text in percentage points, with its sign: 0.012 becomes "+1.20".

    NaN becomes "-".

    `digits` is the number of decimals.
    """
    return "-" if math.isnan(value) else f"{100 * value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def quoted(name: str) -> str:
    """Return a row's name in quotation marks, because it may contain commas."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}"


def row_class(row: Row, place: int) -> str:
    """Return the CSS class with a row's colour. `place` is the row's index in the comparison."""
    return "row-teacher" if row.teacher else f"row-{place % 8}"
