"""HTML out of Python functions, without a template engine: text is escaped unless it is `Html` already.

    tag("a", "A & B", href="#top", class_="link")  ->  <a href="#top" class="link">A &amp; B</a>

Names of classes, runs and samples come from elsewhere: whoever passes them as text cannot forget to escape them.
"""

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_VOID = {"img", "input", "meta"}  # an element of SVG is closed like any other


class Html(str):
    """Text that is HTML."""

    __slots__ = ()


Child = str | None
Attribute = str | float | bool | None


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element.

    Args:
        children: text, which is escaped; `Html` as it is; None is left out.
        attributes: `class_` is class, `data_row` data-row; True is an attribute without a value, False and None none.
    """
    opening = "".join([f"<{name}", *_attributes(attributes), ">"])
    return Html(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Elements and text one after the other."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children if child))


def paragraphs(texts: Iterable[str], class_: str | None = None) -> Html:
    """Each text as a paragraph."""
    return join(*(tag("p", text, class_=class_) for text in texts))


def section(name: str, title: str, *children: Child, lead: Child = None) -> Html:
    """A part of the page that the contents lead to."""
    head = tag("h2", title, id=f"{name}-title")
    introduction = None if not lead else tag("p", lead, class_="lead")
    return tag("section", head, introduction, *children, id=name, aria_labelledby=f"{name}-title")


def scroll_box(label: str, child: Html) -> Html:
    """A box that scrolls by itself, by keyboard too, for contents wider than the page."""
    return tag("div", child, class_="scroll", role="region", aria_label=label, tabindex="0")


def simple_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Child]], class_: str = "") -> Html:
    """A table whose first column is the rows' name."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header)))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in cells)) for first, *cells in rows]
    table = tag("table", tag("caption", tag("span", caption)), head, tag("tbody", *body), class_=class_ or None)
    return scroll_box(caption, table)


def facts(pairs: Iterable[tuple[str, Child]], class_: str = "facts") -> Html:
    """Names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_=class_)


def json_block(name: str, value: Any) -> Html:
    """Data for programs; `<` cannot end the element, whatever the names hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


def data_uri(kind: str, content: bytes) -> str:
    """A file within the page. Args: kind: its media type, such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def number(value: float, digits: int = 2) -> str:
    """A number as text for attributes of drawings: few digits, and no exponent."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def points(value: float) -> str:
    """A difference of fractions in points, signed, with a real minus."""
    return "-" if math.isnan(value) else f"{100 * value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _attributes(attributes: Mapping[str, Attribute]) -> Iterable[str]:
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        yield f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
