"""How objects are displayed: a line in a terminal, a small table in a notebook, public names of places."""

import html
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Facts = Mapping[str, object]
_ABOVE = re.compile(r"(?:(?<=[=,+ ])|^)(?:~[^/]*)?(?:\.\./|/)")
"""The beginning of a path that leads out of the working folder."""
_PRIVATE = 3
"""Parts of a path that may end with a person's name: /home/ann, /mnt/home."""


def line(kind: str, facts: Facts) -> str:
    """Return '<Cache camvid.zarr: samples 367, views 4>'. The first fact is the name, and None is left out."""
    (_, name), *others = facts.items()
    shown = ", ".join(f"{fact} {value}" for fact, value in others if value is not None)
    return f"<{kind} {name}: {shown}>"


def facts_table(kind: str, facts: Facts) -> str:
    """Return the facts as an HTML table of two columns, with `kind` as its header."""
    rows = [(fact, str(value)) for fact, value in facts.items() if value is not None]
    return html_table(kind, ("", ""), rows)


def html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of texts, which are escaped."""
    cells = [f"<tr><th>{'</th><th>'.join(map(html.escape, header))}</th></tr>"] if any(header) else []
    for first, *others in rows:
        cells.append(f"<tr><th>{html.escape(first)}</th><td>{'</td><td>'.join(map(html.escape, others))}</td></tr>")
    return f"<table><caption>{html.escape(title)}</caption>{''.join(cells)}</table>"


def size_text(height_width: tuple[int, int]) -> str:
    """Return (288, 384) as '288x384'."""
    return f"{height_width[0]}x{height_width[1]}"


def public(place: str) -> str:
    """Return a path or a spec without the folders of this machine, so it can be published.

        public("/home/ann/nets/net.py:make@/tmp/w.pth")  # net.py:make@w.pth

    Relative paths and the addresses of remote caches stay unchanged.
    """
    if "://" in place:
        return place
    return "".join(map(_last_names, re.split("([:@])", place)))


def _last_names(text: str) -> str:
    starts = [match.start() for match in _ABOVE.finditer(text)]
    if not starts:
        return text
    paths = (text[start:end].rstrip("/") for start, end in zip(starts, [*starts[1:], len(text)], strict=True))
    return text[: starts[0]] + "".join(path.rpartition("/")[2] for path in paths)


def public_values(value: Any) -> Any:
    """Return settings with `public` applied to every text in them."""
    return _each_text(value, public)


def public_names(runs: Sequence[str]) -> dict[str, str]:
    """Return the names of runs for publication: absolute paths begin below their common folder.

    The last part of a path is not enough, because two runs may have the same one.
    """
    whole = [run for run in runs if Path(run).is_absolute()]
    top = Path(os.path.commonpath([Path(run).parent for run in whole])) if whole else Path()
    below = len(top.parts) > _PRIVATE
    return {run: public(str(Path(run).relative_to(top)) if below and run in whole else run) for run in runs}


def private_places(value: Any) -> dict[str, str]:
    """Return every path in texts that names a folder of this machine, with its public name."""
    return {place: public(place) for place in _places(value) if public(place) not in ("", place)}


def without_places(value: Any, places: Mapping[str, str]) -> Any:
    """Return texts, or values with texts, with each of these places replaced by its public name."""
    longest_first = sorted(places, key=len, reverse=True)

    def replaced(text: str) -> str:
        for place in longest_first:
            text = text.replace(place, places[place])
        return text

    return _each_text(value, replaced)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return values with every text in them changed."""
    if isinstance(value, Mapping):
        return {name: _each_text(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def _places(value: Any) -> Iterator[str]:
    """Yield every text, and every word of it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _places(part)
    elif isinstance(value, str | Path):
        yield from (str(value), *str(value).split())


def bare(spec: str) -> str:
    """Return a model's spec without any folder, to compare specs on different machines."""
    return re.sub(r"[^:@=,+ ][^:@=,+]*/|/", "", spec)
