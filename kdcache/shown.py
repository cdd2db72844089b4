"""How objects show themselves: a line in a terminal, a small table in a notebook."""

import html
from collections.abc import Mapping, Sequence

Facts = Mapping[str, object]


def line(kind: str, facts: Facts) -> str:
    """'<Cache camvid.zarr: samples 367, views 4>': the first fact is the name, None is left out."""
    (_, name), *others = facts.items()
    shown = ", ".join(f"{fact} {value}" for fact, value in others if value is not None)
    return f"<{kind} {name}: {shown}>"


def facts_table(kind: str, facts: Facts) -> str:
    """The facts as an HTML table of two columns, headed by what they are of."""
    rows = [(fact, str(value)) for fact, value in facts.items() if value is not None]
    return html_table(kind, ("", ""), rows)


def html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts, which hold no markup."""
    cells = [f"<tr><th>{'</th><th>'.join(map(html.escape, header))}</th></tr>"] if any(header) else []
    for first, *others in rows:
        cells.append(f"<tr><th>{html.escape(first)}</th><td>{'</td><td>'.join(map(html.escape, others))}</td></tr>")
    return f"<table><caption>{html.escape(title)}</caption>{''.join(cells)}</table>"


def size_text(height_width: tuple[int, int]) -> str:
    """(288, 384) as '288x384'."""
    return f"{height_width[0]}x{height_width[1]}"
