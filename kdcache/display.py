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
    """Return facts as one line of text, such as '<Cache camvid.zarr: samples 367, views 4>'.

    Args:
        kind: the first word, here Cache.
        facts: each fact's name -> its value. The first value becomes the title. Facts with the value None are left out.
    """
    (_, name), *others = facts.items()
    listed = ", ".join(f"{fact} {value}" for fact, value in others if value is not None)
    return f"<{kind} {name}: {listed}>"


def facts_table(kind: str, facts: Facts) -> str:
    """Return facts as an HTML table with two columns: names and values.

    Args:
        kind: the table's caption.
        facts: each fact's name -> its value. Facts with the value None are left out.
    """
    rows = [(fact, str(value)) for fact, value in facts.items() if value is not None]
    return html_table(kind, ("", ""), rows)


def html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table, with its texts escaped.

    Args:
        title: the table's caption.
        header: the title of each column. If all are empty, the table has no header.
        rows: the texts of each row. A row's first text is its name.
    """
    cells = [f"<tr><th>{'</th><th>'.join(map(html.escape, header))}</th></tr>"] if any(header) else []
    for first, *others in rows:
        cells.append(f"<tr><th>{html.escape(first)}</th><td>{'</td><td>'.join(map(html.escape, others))}</td></tr>")
    return f"<table><caption>{html.escape(title)}</caption>{''.join(cells)}</table>"


def size_text(height_width: tuple[int, int]) -> str:
    """Return a (height, width) as text: (288, 384) becomes '288x384'."""
    return f"{height_width[0]}x{height_width[1]}"


def public(place: str) -> str:
    """Return `place`, a path or a model spec, without the folders of this machine, so that it can be published.

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
    """Return a copy of `value` that can be published, without the folders of this machine.

    `value` is a text, or nested lists and dicts such as settings. `public` shortens every text in it, except keys.
    """
    return _each_text(value, public)


def public_names(runs: Sequence[str]) -> dict[str, str]:
    """Return a name without private folders for each run: the run's folder, as given -> its public name.

    Absolute paths are shortened to what follows their common folder: `seed0/kl` instead of
    `/home/ann/project/runs/seed0/kl`. The last part of a path would not do, because two runs may have the same one.
    """
    with_root = [run for run in runs if Path(run).is_absolute()]
    top = Path(os.path.commonpath([Path(run).parent for run in with_root])) if with_root else Path()
    below = len(top.parts) > _PRIVATE
    return {run: public(str(Path(run).relative_to(top)) if below and run in with_root else run) for run in runs}


def private_places(value: Any) -> dict[str, str]:
    """Return the private paths in `value`, a text or nested lists and dicts: path -> public name (see `public`).

    A path is private if it names a folder of this machine.
    """
    return {place: public(place) for place in _places(value) if public(place) not in ("", place)}


def without_places(value: Any, places: Mapping[str, str]) -> Any:
    """Return `value`, a text or nested lists and dicts, with private paths replaced by their public names.

    `places` is the result of `private_places`: path -> public name.
    """
    longest_first = sorted(places, key=len, reverse=True)

    def replaced(text: str) -> str:
        for place in longest_first:
            text = text.replace(place, places[place])
        return text

    return _each_text(value, replaced)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return nested lists and dicts with `change` applied to every text in them."""
    if isinstance(value, Mapping):
        return {name: _each_text(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def _places(value: Any) -> Iterator[str]:
    """Yield every text in nested lists and dicts, and then each of its words."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _places(part)
    elif isinstance(value, str | Path):
        yield from (str(value), *str(value).split())


def bare(spec: str) -> str:
    """Return a model spec without its folders, to compare specs on different machines.

    `nets/net.py:make` becomes `net.py:make`.
    """
    return re.sub(r"[^:@=,+ ][^:@=,+]*/|/", "", spec)
