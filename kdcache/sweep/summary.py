"""`details.md` of a sweep: of every run the best iteration and its scores, and the mean over folds and seeds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.evaluate import markdown_table

if TYPE_CHECKING:
    from kdcache.sweep.plan import Sweep

DETAILS = "details.md"


def write_details(sweep: "Sweep") -> None:
    """From comparison.json, whose class names came with the runs' own models, and the runs' results."""
    comparison = sweep.out / "comparison.json"
    if not comparison.is_file():
        return
    found = json.loads(comparison.read_text(encoding="utf-8"))
    parts = [f"# {sweep.recipe.title}", "", sweep.recipe.about.strip(), ""]
    for row in found["rows"]:
        parts += [f"## {row['name']}", "", _table(row), ""]
    (sweep.out / DETAILS).write_text("\n".join(parts), encoding="utf-8")


def _table(row: dict[str, Any]) -> str:
    rows = [
        [_name(run), _iteration(Path(run["run"])), *(_percent(run[key]) for key in ("miou", "macc", "aacc"))]
        for run in row["runs"]
    ]
    mean = ["mean", "", *(_percent(row[key]["mean"]) for key in ("miou", "macc", "aacc"))]
    return markdown_table(["run", "best iteration", "mIoU %", "mAcc %", "aAcc %"], [*rows, mean])


def _name(run: dict[str, Any]) -> str:
    fold = "" if run["fold"] is None else f"fold {run['fold']}"
    seed = "" if run["seed"] is None else f"seed {run['seed']}"
    return ", ".join(filter(None, (fold, seed))) or run["run"]


def _iteration(run: Path) -> str:
    """Of the weights that were judged; a teacher that was trained elsewhere has none."""
    path = run / "result.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["best_step"]) if path.is_file() else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
