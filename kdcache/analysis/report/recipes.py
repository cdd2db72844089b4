"""The runs: the settings of each row, the commands that run it again, versions and machines."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison, Row, RunScore
from kdcache.analysis.report.render import render
from kdcache.analysis.runs import Entry
from kdcache.heads import DEPTH, SEGMENTATION
from kdcache.metrics.tables import depth_figure, percent
from kdcache.run_folder import RECIPE, VERBS
from kdcache.settings.streams import rows_of, shares_of

_SCORES: dict[str, tuple[str, Callable[[RunScore], str]]] = {
    SEGMENTATION: ("mIoU %", lambda score: percent(score.metrics.miou)),
    DEPTH: ("rmse m", lambda score: depth_figure("rmse", score.depth("rmse"))),
}
"""The score of a run in a task: its header, and its text."""
_MACHINE = {"platform": "system", "python": "Python", "cpus": "CPUs", "threads": "threads", "gpu": "GPU"}


def recipes(comparison: Comparison, runs: Mapping[str, Entry], command: str | None) -> Markup:
    """Section with a part for each row."""
    return render(
        "recipes.html",
        command=command,
        rows=[(place, row, _row(row, runs, comparison.tasks)) for place, row in enumerate(comparison.rows)],
        machines=_machines(comparison, runs),
        tasks=[_SCORES[task][0] for task in comparison.tasks],
    )


def again(entry: Entry) -> str | None:
    """The command that trains a run again; None for what no recipe describes."""
    verb = entry.settings.get("verb")
    if entry.run is None or verb not in VERBS:
        return None
    folder = str(entry.run.folder)
    return shlex.join(["kdcache", verb, "--recipe", f"{folder}/{RECIPE}", "--out", f"{folder}-again"])


def _row(row: Row, runs: Mapping[str, Entry], tasks: Sequence[str]) -> dict[str, Any]:
    entries = [runs[score.run] for score in row.runs if score.run in runs]
    kind = "teacher, " if row.teacher else "baseline, " if row.baseline else ""
    return {
        "count": f"{kind}{len(row.runs)} run{'' if len(row.runs) == 1 else 's'}",
        "settings": [(key, setting(value)) for key, value in row.differs.items()],
        "runs": [_run(score, runs.get(score.run), tasks) for score in row.runs],
        "commands": [command for entry in entries if (command := again(entry)) is not None],
        "recipe": entries[0].run.recipe_text if entries and entries[0].run else None,
        "several": entries[0].text if len(entries) > 1 else None,
        "streams": streams(entries[0].settings) if entries else [],
    }


def streams(settings: Mapping[str, Any]) -> list[list[str]]:
    """The streams of a recipe: name, source, share of the batch in percent, rows of it, weight; [] without streams."""
    tables, batch = settings.get("stream") or [], settings.get("batch-size")
    if not tables or not isinstance(batch, int):
        return []
    shares = shares_of({table["name"]: table.get("share") for table in tables})
    rows = rows_of(shares, batch, 1 if settings.get("mix") is None else 2)
    sources = [str(table.get("cache") or table.get("data") or settings.get("cache") or "-") for table in tables]
    return [
        [table["name"], source, percent(share), str(own), f"{table.get('weight', 1.0):g}"]
        for table, source, share, own in zip(tables, sources, shares, rows, strict=True)
    ]


def _run(score: RunScore, entry: Entry | None, tasks: Sequence[str]) -> list[str]:
    result = entry.run.result if entry is not None and entry.run is not None else {}
    results = [result.get(key) for key in ("best_step", "iterations", "seconds", "images_per_second")]
    cells = [score.run, score.seed, score.fold or None, *(_SCORES[task][1](score) for task in tasks), *results]
    return ["-" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]


def setting(value: Any) -> str:
    """A setting as a person writes it."""
    if value is None or value == []:
        return "none"
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)


def _machines(comparison: Comparison, runs: Mapping[str, Entry]) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Where the runs were trained; runs of one machine and the same versions stand together."""
    machines: dict[str, list[str]] = {}
    for row in comparison.rows:
        for score in row.runs:
            entry = runs.get(score.run)
            environment = entry.run.environment if entry is not None and entry.run is not None else None
            if environment:
                machines.setdefault(json.dumps(environment, sort_keys=True), []).append(score.run)
    return [(names, _facts(json.loads(text))) for text, names in machines.items()]


def _facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = environment.get("packages")
    versions = packages if isinstance(packages, dict) else {}
    machine = {name: environment[key] for key, name in _MACHINE.items() if environment.get(key) is not None}
    return [(str(name), str(value)) for name, value in (*machine.items(), *versions.items())]
