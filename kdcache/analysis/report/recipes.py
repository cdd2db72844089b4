"""The runs: the settings of each row, the commands that run it again, versions and machines."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.analysis.comparison import Comparison, Row, RunScore
from kdcache.analysis.report.html import Child, Html, facts, join, section, simple_table, tag
from kdcache.analysis.report.scores import swatch
from kdcache.analysis.runs import Entry
from kdcache.metrics.tables import percent
from kdcache.run_folder import RECIPE

_MACHINE = (("platform", "system"), ("python", "Python"), ("cpus", "CPUs"), ("threads", "threads"), ("gpu", "GPU"))


def recipes(comparison: Comparison, runs: Mapping[str, Entry], command: str | None) -> Html:
    """Section with a part for each row."""
    page = None if command is None else join(tag("p", "This page is made by"), commands([command]))
    rows = [_row(place, row, runs) for place, row in enumerate(comparison.rows)]
    lead = (
        "Each run's folder holds its recipe with every setting; the command trains it again, into a folder beside it."
    )
    return section("recipes", "What was run", page, *rows, _machines(comparison, runs), lead=lead)


def code(text: str) -> Html:
    """Text with a button that copies it."""
    return _copied(text)


def commands(lines: Sequence[str]) -> Html:
    """Commands, each on its line, long ones continued with an indent."""
    return _copied(*(tag("span", f"{line}\n", class_="command") for line in lines))


def _copied(*parts: str) -> Html:
    button = tag("button", "Copy", type="button", class_="copy needs-script", aria_live="polite")
    return tag("div", tag("pre", tag("code", *parts), tabindex="0"), button, class_="code")


def again(entry: Entry) -> str | None:
    """The command that trains a run again; None for what no recipe describes."""
    verb = entry.settings.get("verb")
    if entry.run is None or not isinstance(verb, str):
        return None
    folder = str(entry.run.folder)
    return shlex.join(["kdcache", verb, "--recipe", f"{folder}/{RECIPE}", "--out", f"{folder}-again"])


def _row(place: int, row: Row, runs: Mapping[str, Entry]) -> Html:
    entries = [(score, runs[score.run]) for score in row.runs if score.run in runs]
    title = tag("summary", swatch(place, row), tag("strong", row.name), tag("small", f" {_count(row)}, {row.model}"))
    parts: list[Child] = []
    if row.differs:
        parts.append(facts([(key, setting(value)) for key, value in row.differs.items()], "facts small"))
    parts.append(
        simple_table(f"The runs of {row.name}", _HEADER, [_run(score, runs.get(score.run)) for score in row.runs])
    )
    lines = [text for _, run in entries if (text := again(run)) is not None]
    if lines:
        parts.append(commands(lines))
    text = entries[0][1].run.recipe_text if entries and entries[0][1].run else None
    if text is not None:
        name = f"The recipe of {entries[0][1].text}" if len(entries) > 1 else "The recipe"
        parts.append(tag("details", tag("summary", name), code(text)))
    return tag("details", title, *parts, class_="card recipe")


_HEADER = ("run", "seed", "fold", "mIoU %", "best at", "iterations", "seconds", "images/s")


def _run(score: RunScore, entry: Entry | None) -> tuple[Child, ...]:
    result = entry.run.result if entry is not None and entry.run is not None else {}
    results = [_plain(result.get(key)) for key in ("best_step", "iterations", "seconds", "images_per_second")]
    seed = "-" if score.seed is None else str(score.seed)
    return (tag("code", score.run), seed, score.fold or "-", percent(score.metrics.miou), *results)


def _count(row: Row) -> str:
    kind = "teacher, " if row.teacher else "baseline, " if row.baseline else ""
    return f"{kind}{len(row.runs)} run{'' if len(row.runs) == 1 else 's'}"


def setting(value: Any) -> str:
    """A setting as a person writes it."""
    if value is None or value == []:
        return "none"
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return "-" if value is None else str(value)


def _machines(comparison: Comparison, runs: Mapping[str, Entry]) -> Html | None:
    """Where the runs were trained; runs of one machine and the same versions stand together."""
    where: dict[str, list[str]] = {}
    for row in comparison.rows:
        for score in row.runs:
            entry = runs.get(score.run)
            environment = entry.run.environment if entry is not None and entry.run is not None else None
            if environment:
                where.setdefault(json.dumps(environment, sort_keys=True), []).append(score.run)
    if not where:
        return None
    parts: list[Html] = [tag("h3", "Machine and versions")]
    for text, names in where.items():
        if len(where) > 1:
            parts.append(tag("p", *_listed(names)))
        parts.append(facts(_about(json.loads(text)), "facts small"))
    return join(*parts)


def _listed(names: Sequence[str]) -> list[Child]:
    return [part for place, name in enumerate(names) for part in ((", " if place else ""), tag("code", name))]


def _about(environment: Mapping[str, Any]) -> list[tuple[str, Child]]:
    pairs: list[tuple[str, Child]] = [
        (name, str(environment[key])) for key, name in _MACHINE if environment.get(key) is not None
    ]
    packages = environment.get("packages")
    if isinstance(packages, dict):
        pairs += [(str(name), str(version)) for name, version in packages.items()]
    return pairs
