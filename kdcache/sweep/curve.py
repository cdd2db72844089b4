"""`curve.png` of a sweep: scores of its arms over a number that differs, such as their numbers of labels."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.analysis.groups import CONTROL
from kdcache.files import MOST_CONTENTS, read_object
from kdcache.metrics.figures import dress, new_figure, save_figure

if TYPE_CHECKING:
    from kdcache.sweep.recipe import Arm, Recipe

CURVE = "curve.png"
_MARKERS = "osD^v"

Points = list[tuple[float, float, float]]
"""(value of the key, mean mIoU in percent, half of its range over runs)."""


def has_curve(recipe: "Recipe") -> bool:
    """Return True if a sweep has a curve to draw.

    The recipe's [show] table must name a key as `curve`. At least two arms must differ only in the value of that key.
    """
    rows: list[Mapping[str, Any]] = [{"name": arm.name, "runs": [{"miou": 0.0}]} for arm in recipe.arms]
    lines = read_lines(recipe.arms, str(recipe.show.get("curve", "")), rows)
    return any(len(points) > 1 for points in lines.values())


def write_curve(recipe: "Recipe", out: Path) -> None:
    """Draw mIoU over a setting, such as the number of labels, from a sweep's comparison.json, as curve.png.

    The recipe's [show] table names the setting. Each line connects arms that differ only in this setting. If the
    table names no setting, nothing is drawn.

    Args:
        recipe: the sweep's recipe.
        out: the sweep's folder.
    """
    key, content = recipe.show.get("curve"), read_object(out / "comparison.json", MOST_CONTENTS)
    if not key or not content:
        return
    lines = read_lines(recipe.arms, str(key), content["rows"])
    if not any(len(points) > 1 for points in lines.values()):
        return
    figure = new_figure(9, 6, f"mIoU over {key}")
    axes = dress(figure.subplots(), "", f"{key} (logarithmic)", "mIoU %")
    axes.set_xscale("log")
    for number, (name, points) in enumerate(lines.items()):
        values, means, ranges = zip(*sorted(points), strict=True)
        axes.errorbar(
            values,
            means,
            ranges if any(ranges) else None,
            marker=_MARKERS[number % len(_MARKERS)],
            capsize=3,
            label=name,
        )
    ticks = sorted({value for points in lines.values() for value, _, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    save_figure(figure, out / CURVE, above=content.get("banner"))


def read_lines(arms: "tuple[Arm, ...]", key: str, rows: list[Mapping[str, Any]]) -> dict[str, Points]:
    """Return the points of each line of a sweep's curve.

    A line connects arms whose names differ only in the value of `key`.

    Args:
        arms: the arms of the recipe.
        key: name of a flag, or STREAM.KEY for a key of a stream.
        rows: the list `rows` in comparison.json.
    Returns: name of each line -> points (value of the key, mean mIoU in percent, half of the range of mIoU over runs).
    """
    lines: dict[str, Points] = {}
    by_name = {
        row["name"].removesuffix(f", {CONTROL}"): [100 * run["miou"] for run in row["runs"] if run["miou"] is not None]
        for row in rows
    }
    for arm in arms:
        scores = by_name.get(arm.name, [])
        for value in _values(arm, key) if scores else ():
            name = re.sub(rf"(?<![\w.]){re.escape(f'{value:g}')}(?![\w.])", "N", arm.name)
            spread = (max(scores) - min(scores)) / 2
            lines.setdefault(name, []).append((float(value), math.fsum(scores) / len(scores), spread))
    return lines


def _values(arm: "Arm", key: str) -> Iterator[float]:
    """Yield an arm's values of `key`, which is a flag or STREAM.KEY.

    Yield nothing if it does not have a number above 0.
    """
    stream, dot, option = key.rpartition(".")
    tables = arm.flags.get("stream", ()) if dot else (arm.flags,)
    for table in tables:
        if not dot or table.get("name") == stream:
            value = table.get(option.replace("-", "_")) if dot else table.get(option)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                yield value
