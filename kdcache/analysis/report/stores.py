"""A table of the scores of several caches' teachers."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from kdcache.analysis.report.audit import TeacherAudit
from kdcache.analysis.report.render import render
from kdcache.metrics.tables import percent

THRESHOLDS = (0.5, 0.7, 0.9)
HEADER = (
    "store",
    "teacher's mIoU %",
    "calibration error, points",
    *(text for threshold in THRESHOLDS for text in (f"kept over {threshold:g} %", "of these right %")),
)


def stores(audits: Sequence[TeacherAudit]) -> Markup | None:
    """Return the section on the pseudo labels of every cache, in the audits' order, or None for fewer than two."""
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
        return "The stores have no labels, so it is not known how often the teachers are right."
    best = max(labelled, key=lambda audit: audit.miou)
    return f"The best teacher is the one of {best.path.parent.name}, with a mIoU of {percent(best.miou)} %."
