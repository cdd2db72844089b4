"""Where the teacher is worse than a student without one: there it teaches its mistakes."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.report.audit import TeacherAudit, show_audit
from kdcache.analysis.report.render import quoted, render
from kdcache.analysis.report.summary import gap_words
from kdcache.metrics.tables import percent


def teacher(comparison: Comparison, audit: TeacherAudit | None) -> Markup | None:
    """Section on the teacher; None when there is neither a teacher's row nor an audit."""
    rows = comparison.teachers
    if not rows and audit is None:
        return None
    rival = strongest_baseline(comparison)
    students = [row for row in comparison.contestants if row.class_differences]
    lost = [] if rival is None else [(row, lost_classes(row, rival)) for row in rows]
    return render(
        "teacher.html",
        comparison=comparison,
        teachers=rows,
        rival=rival,
        students=students,
        weaknesses=[(row, _sentences(row, rival, places, students), places) for row, places in lost if rival],
        audit=None if audit is None else show_audit(audit),
    )


def strongest_baseline(comparison: Comparison) -> Row | None:
    """The row without a teacher that has the highest mIoU."""
    baselines = [row for row in comparison.contestants if row.baseline and not math.isnan(row.miou.mean)]
    return max(baselines, key=lambda row: row.miou.mean, default=None)


def lost_classes(teacher_row: Row, rival: Row) -> list[int]:
    """Classes in which the teacher has the lower IoU, the largest loss first; rounding is no loss."""
    gaps = [theirs.mean - own.mean for own, theirs in zip(teacher_row.iou, rival.iou, strict=True)]
    lost = [place for place, gap in enumerate(gaps) if gap > 5e-5]
    return sorted(lost, key=lambda place: -gaps[place])


def _sentences(row: Row, rival: Row, lost: Sequence[int], students: Sequence[Row]) -> str:
    many, gap = len(row.iou), row.miou.mean - rival.miou.mean
    name = "The teacher" if row.name == "teacher" else quoted(row.name)
    ahead = f"{name} reaches {percent(row.miou.mean)} % mIoU, {gap_words(gap)} {quoted(rival.name)}."
    if not lost:
        return f"{ahead} It is at least as good in every one of {many} classes."
    if gap <= 0:
        ahead += " It has nothing to teach on the whole."
    words = "one class" if len(lost) == 1 else f"{len(lost)} of {many} classes"
    return f"{ahead} It loses in {words}.{_copied(lost, students)}"


def _copied(lost: Sequence[int], students: Sequence[Row]) -> str:
    """Did students fall where the teacher is weak?"""
    gaps = [student.class_differences[place].mean for student in students for place in lost]
    finite_gaps = [gap for gap in gaps if not math.isnan(gap)]
    if not finite_gaps:
        return ""
    fell = sum(gap < 0 for gap in finite_gaps)
    verb = "is" if fell == 1 else "are"
    return f" Of the students' {len(finite_gaps)} IoUs in these classes {fell} {verb} below the baseline."
