"""Where the teacher is worse than a student without one: there it teaches its mistakes."""

import math
from collections.abc import Sequence

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.report.audit import TeacherAudit, show_audit
from kdcache.analysis.report.classes import class_swatch
from kdcache.analysis.report.html import Child, Html, join, points, section, simple_table, tag
from kdcache.analysis.report.summary import gap_words, quoted
from kdcache.metrics.tables import percent


def teacher(comparison: Comparison, audit: TeacherAudit | None) -> Html | None:
    """Section on the teacher; None when there is neither a teacher's row nor an audit."""
    rows = [row for row in comparison.rows if row.teacher]
    if not rows and audit is None:
        return None
    parts: list[Html | None] = []
    rival = strongest_baseline(comparison)
    if rows and rival is not None:
        for row in rows:
            parts += _weaknesses(comparison, row, rival)
    elif rows:
        parts.append(
            tag("p", "There is no baseline among the rows, so it is not known where the teacher has little to teach.")
        )
    if audit is not None:
        parts += show_audit(audit)
    lead = "A student copies its teacher, also where the labels alone would have taught it better."
    return section("teacher", "The teacher", *parts, lead=lead)


def strongest_baseline(comparison: Comparison) -> Row | None:
    """The row without a teacher that has the highest mIoU."""
    baselines = [row for row in comparison.rows if row.baseline and not row.teacher and not math.isnan(row.miou.mean)]
    return max(baselines, key=lambda row: row.miou.mean, default=None)


def lost_classes(teacher_row: Row, rival: Row) -> list[int]:
    """Classes in which the teacher has the lower IoU, the largest loss first; rounding is no loss."""
    gaps = [theirs.mean - own.mean for own, theirs in zip(teacher_row.iou, rival.iou, strict=True)]
    lost = [place for place, gap in enumerate(gaps) if gap > 5e-5]
    return sorted(lost, key=lambda place: -gaps[place])


def _weaknesses(comparison: Comparison, row: Row, rival: Row) -> list[Html | None]:
    lost = lost_classes(row, rival)
    many, gap = len(comparison.class_names), row.miou.mean - rival.miou.mean
    name = "The teacher" if row.name == "teacher" else quoted(row.name)
    ahead = f"{name} reaches {percent(row.miou.mean)} % mIoU, {gap_words(gap)} {quoted(rival.name)}."
    if not lost:
        return [tag("p", f"{ahead} It is at least as good in every one of {many} classes.")]
    words = "one class" if len(lost) == 1 else f"{len(lost)} of {many} classes"
    if gap <= 0:
        ahead += " It has nothing to teach on the whole."
    students = [student for student in comparison.rows if not student.teacher and student.class_differences]
    header = ("class", f"{row.name} %", f"{rival.name} %", "teacher loses", *(student.name for student in students))
    lines = [_line(comparison, place, row, rival, students) for place in lost]
    caption = "Where the teacher loses, and how far each student is there from its own baseline, points of IoU"
    copied = _copied(lost, students)
    return [tag("p", f"{ahead} It loses in {words}.", copied), simple_table(caption, header, lines)]


def _line(comparison: Comparison, place: int, row: Row, rival: Row, students: Sequence[Row]) -> tuple[Child, ...]:
    own, theirs = row.iou[place].mean, rival.iou[place].mean
    name = join(class_swatch(comparison.class_colours[place]), comparison.class_names[place])
    gaps = [points(student.class_differences[place].mean) for student in students]
    return (name, percent(own), percent(theirs), tag("strong", points(own - theirs)), *gaps)


def _copied(lost: Sequence[int], students: Sequence[Row]) -> str | None:
    """Did students fall where the teacher is weak?"""
    gaps = [student.class_differences[place].mean for student in students for place in lost]
    finite_gaps = [gap for gap in gaps if not math.isnan(gap)]
    if not finite_gaps:
        return None
    fell = sum(gap < 0 for gap in finite_gaps)
    verb = "is" if fell == 1 else "are"
    return f" Of the students' {len(finite_gaps)} IoUs in these classes {fell} {verb} below the baseline."
