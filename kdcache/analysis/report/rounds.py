"""The scores of the teachers of several stores, such as those of rounds of self-training, one after the other."""

import math
from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup

from kdcache.analysis.report.audit import TeacherAudit
from kdcache.analysis.report.render import render
from kdcache.metrics.tables import percent

THRESHOLDS = (0.5, 0.7, 0.9)


def rounds(audits: Sequence[TeacherAudit]) -> Markup | None:
    """Section on the pseudo labels of every store, by audits in their order; None for fewer than two."""
    if len(audits) < 2:
        return None
    chained = are_rounds(audits)
    what = "round" if chained else "store"
    rows = [
        (
            f"{number}: {audit.path.parent.name}",
            _short(audit.seal),
            _parents(audit, audits, what),
            percent(audit.miou),
            percent(audit.ece),
            *(cell for threshold in THRESHOLDS for cell in _over(audit, threshold)),
        )
        for number, audit in enumerate(audits, 1)
    ]
    header = [
        "round, store" if chained else "store",
        "its seal",
        "taught by a student of",
        "teacher's mIoU %",
        "calibration error, points",
    ]
    header += [text for t in THRESHOLDS for text in (f"kept over {t:g} %", "of these right %")]
    return render("rounds.html", what=what, header=header, rows=rows, verdict=_verdict(audits, chained=chained))


def are_rounds(audits: Sequence[TeacherAudit]) -> bool:
    """Whether each store but the first names the one before as its parent, or does not say what it is."""
    return all(not one.seal or before.seal in one.parents for before, one in pairwise(audits))


def _parents(audit: TeacherAudit, audits: Sequence[TeacherAudit], what: str) -> str:
    """The stores that a teacher learnt from: by their rounds, or by their seals where no round has these."""
    rounds_of = {other.seal: f"{what} {number}" for number, other in enumerate(audits, 1) if other.seal}
    named = (f"{rounds_of.get(parent, 'another store')} ({_short(parent)})" for parent in audit.parents)
    return ", ".join(named) or ("no store" if audit.seal else "unknown")


def _short(seal: str) -> str:
    return seal[:12] or "unknown"


def _over(audit: TeacherAudit, threshold: float) -> tuple[str, str]:
    """The pixels that a threshold keeps, and how many of these are right, in percent."""
    kept = {least: (share, right) for least, share, right, _ in audit.kept}
    share, right = kept.get(threshold, (math.nan, math.nan))
    return percent(share), percent(right)


def _verdict(audits: Sequence[TeacherAudit], *, chained: bool) -> str:
    first, last = audits[0].miou, audits[-1].miou
    if math.isnan(first) or math.isnan(last):
        return "The stores have no labels, so it is not known how often the teachers are right."
    best = max(range(len(audits)), key=lambda number: audits[number].miou)
    if not chained:
        return f"The best teacher is that of store {best + 1}, with a mIoU of {percent(audits[best].miou)} %."
    change = f"From the first teacher to the last, mIoU on these images went from {percent(first)} to {percent(last)} %"
    if last < first:
        return f"{change}: rounds amplified what the teacher gets wrong. The best teacher is that of round {best + 1}."
    return f"{change}. The best teacher is that of round {best + 1}."
