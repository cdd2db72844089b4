"""`details.md` of a sweep: every run's best iteration and its scores, and the mean over folds and seeds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.files import MOST_CONTENTS, read_object, write_whole
from kdcache.metrics import markdown_table
from kdcache.run_folder import Run
from kdcache.sweep.plan import RUNS, TEACHERS

if TYPE_CHECKING:
    from kdcache.sweep.plan import Sweep

DETAILS = "details.md"


def write_details(sweep: "Sweep") -> None:
    """Write details.md into a sweep's folder: scores and best iteration of every run, and their mean for each arm.

    The scores come from the sweep's comparison.json. Without that file nothing is written.
    """
    content = read_object(sweep.out / "comparison.json", MOST_CONTENTS)
    if not content:
        return
    above = [f"> **{content['banner']}**", ""] if content.get("banner") else []
    parts = [f"# {sweep.recipe.title}", "", *above, sweep.recipe.about.strip(), ""]
    for row in content["rows"]:
        parts += [f"## {row['name']}", "", _table(row, _folders(sweep, row)), ""]
    write_whole(sweep.out / DETAILS, "\n".join(parts))


def _folders(sweep: "Sweep", row: dict[str, Any]) -> list[Path]:
    """Return the folders of the runs of one row in comparison.json, which has only their names."""
    spec = sweep.recipe.teacher.get("spec")
    if row["teacher"] and spec:
        return [Path(str(spec))]
    return [sweep.out / (TEACHERS if row["teacher"] else RUNS) / Path(run["run"]).name for run in row["runs"]]


def _table(row: dict[str, Any], folders: list[Path]) -> str:
    rows = [
        [_name(run), _iteration(folder), *(_percent(run[key]) for key in ("miou", "macc", "aacc"))]
        for run, folder in zip(row["runs"], folders, strict=True)
    ]
    mean = ["mean", "", *(_percent(row[key]["mean"]) for key in ("miou", "macc", "aacc"))]
    header = ["run", "best iteration", "mIoU %", "mAcc %", "aAcc %"]
    if "depth" in row:
        header.append("rmse m")
        for cells, run in zip(rows, row["runs"], strict=True):
            cells.append(_metres(run.get("depth", {}).get("rmse")))
        mean.append(_metres(row["depth"]["rmse"]["mean"]))
    return markdown_table(header, [*rows, mean])


def _name(run: dict[str, Any]) -> str:
    fold = "" if run["fold"] is None else f"fold {run['fold']}"
    seed = "" if run["seed"] is None else f"seed {run['seed']}"
    return ", ".join(filter(None, (fold, seed))) or run["run"]


def _iteration(run: Path) -> str:
    """Return the iteration of a run's best weights as text, or "-" for a teacher trained elsewhere."""
    return str(Run(run).result.get("best_step", "-"))


def _metres(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
