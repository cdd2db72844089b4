"""What the caches of a page saved, and how good their teachers are."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.report.audit import TeacherAudit
from kdcache.analysis.report.render import render
from kdcache.analysis.runs import Entry
from kdcache.metrics.tables import percent
from kdcache.run_folder import Run

THRESHOLDS = (0.5, 0.7, 0.9)
HEADER = (
    "cache",
    "teacher's mIoU %",
    "calibration error, points",
    *(text for threshold in THRESHOLDS for text in (f"kept over {threshold:g} %", "of these right %")),
)


@dataclass(frozen=True)
class CacheSize:
    """The size of a cache.

    Attributes:
        records: number of records.
        bytes: size of its arrays on the disk.
    """

    records: int
    bytes: int


SizeOfCache = Callable[[str], CacheSize | None]
"""The size of the cache at a place, or None if it cannot be read there."""


def cost(comparison: Comparison, runs: Mapping[str, Entry], size_of: SizeOfCache) -> Markup | None:
    """Return the section on training time, teacher passes and cache sizes, or None if no training has ended.

    `runs` are the compared runs by name. `size_of` is a function from a cache's path to its `CacheSize`, or to None if
    it cannot be read.
    """
    trained = [(row, place, _runs_of(row, runs)) for place, row in enumerate(comparison.rows)]
    lines = [
        _cost_of(row, place, row_runs)
        for row, place, row_runs in trained
        if any("seconds" in run.result for run in row_runs)
    ]
    if not lines:
        return None
    saved = sum(_shown(run) for row, _, row_runs in trained if row.distilled for run in row_runs)
    caches = dict.fromkeys(
        place for row, _, row_runs in trained if row.distilled for run in row_runs for place in _caches(run)
    )
    sizes = {place: size for place in caches if (size := size_of(place)) is not None}
    sentences = [
        f"The cache {Path(place).name} holds {size.records:,} records in {size.bytes / 2**20:,.1f} MiB, "
        f"{size.bytes / 2**10 / max(size.records, 1):,.1f} KiB each."
        for place, size in sizes.items()
    ]
    if saved:
        records = sum(size.records for size in sizes.values())
        through = f"{records:,} images went through it once" if sizes else "it ran once for each record"
        sentences.append(
            f"A live teacher would have seen {saved:,} images in the distilled trainings of this page. "
            f"With the cache, {through}."
        )
    return render("cost.html", lines=lines, sentences=sentences)


def _runs_of(row: Row, runs: Mapping[str, Entry]) -> list[Run]:
    return [run for score in row.runs if (entry := runs.get(score.run)) and (run := entry.run)]


def _cost_of(row: Row, place: int, runs: Sequence[Run]) -> dict[str, Any]:
    seconds = statistics.median(run.result["seconds"] for run in runs if "seconds" in run.result)
    minutes, rest = divmod(round(seconds), 60)
    images = round(statistics.median(map(_shown, runs)))
    time = f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return {"row": row, "place": place, "time": time, "shown": images, "saved": images if row.distilled else 0}


def _shown(run: Run) -> int:
    """Return how many images a training has shown, 0 if its files do not tell."""
    batch = (run.recipe or {}).get("batch-size")
    return int(run.result.get("iterations", 0)) * batch if isinstance(batch, int) else 0


def _caches(run: Run) -> list[str]:
    found = (run.recipe or {}).get("cache") or []
    return [str(place) for place in (found if isinstance(found, list) else [found])]


def stores(audits: Sequence[TeacherAudit]) -> Markup | None:
    """Return the HTML of a section that compares pseudo labels of several caches. None for fewer than two audits."""
    if len(audits) < 2:
        return None
    rows = [
        (
            audit.path.parent.name,
            percent(audit.miou),
            percent(audit.ece),
            *(cell for threshold in THRESHOLDS for cell in _over(audit, threshold)),
        )
        for audit in audits
    ]
    return render("stores.html", header=HEADER, rows=rows, verdict=_verdict(audits))


def _over(audit: TeacherAudit, threshold: float) -> tuple[str, str]:
    """Return the pixels that a threshold keeps, and how many of these are right, in percent."""
    kept = {least: (share, right) for least, share, right, _ in audit.kept}
    share, right = kept.get(threshold, (math.nan, math.nan))
    return percent(share), percent(right)


def _verdict(audits: Sequence[TeacherAudit]) -> str:
    labelled = [audit for audit in audits if not math.isnan(audit.miou)]
    if not labelled:
        return "The caches have no labels, so it is unknown how often their teachers are right."
    best = max(labelled, key=lambda audit: audit.miou)
    return f"The best teacher is the one of {best.path.parent.name}, with a mIoU of {percent(best.miou)} %."
