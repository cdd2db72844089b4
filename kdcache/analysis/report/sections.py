"""Sections of the page: classes, pictures, teacher and recipes."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison, Row, RunScore
from kdcache.analysis.report.audit import TeacherAudit, show_audit
from kdcache.analysis.report.render import number, quoted, render
from kdcache.analysis.report.samples import Sample
from kdcache.analysis.report.scores import class_scores
from kdcache.analysis.report.summary import gap_words, measured
from kdcache.analysis.runs import Entry
from kdcache.analysis.task_views import VIEWS
from kdcache.metrics.tables import percent
from kdcache.run_folder import RECIPE, VERBS
from kdcache.settings.recipe import source_of
from kdcache.settings.streams import rows_of, shares_of
from kdcache.tasks import TASKS

_SHOWN = 24
"""Classes before the rest is folded away."""


def classes(comparison: Comparison) -> Markup:
    """Return the HTML of the section "Class by class": for each class, a bar with the IoU of each row.

    The reader can choose the order of the classes. A table repeats the numbers.
    """
    gaps = [gap for row in comparison.contestants for gap in row.class_differences]
    return render(
        "classes.html",
        contestants=comparison.contestants,
        teachers=comparison.teachers,
        comparisons=max((gap.comparisons for gap in gaps), default=1),
        cards=[_card(comparison, place) for place in range(len(comparison.class_names))],
        shown=_SHOWN,
        table=class_scores(comparison),
    )


def _card(comparison: Comparison, place: int) -> dict[str, Any]:
    """Return one class: how much of the labels it has, its best IoU, and what the list is ordered by."""
    rows = comparison.contestants
    ious = [row.iou[place].mean for row in rows if not math.isnan(row.iou[place].mean)]
    differences = [row.class_differences[place].mean for row in rows if row.class_differences]
    gaps = [gap for gap in differences if not math.isnan(gap)]
    orders = {"gap": max(gaps, default=None), "loss": min(gaps, default=None), "least": min(ious, default=None)}
    return {
        "place": place,
        "name": comparison.class_names[place],
        "colour": comparison.class_colours[place],
        "share": _share(comparison, place),
        "best": max(ious) if len(set(ious)) > 1 else None,  # where all are equal none is best
        "orders": {f"data-{key}": None if value is None else number(value, 6) for key, value in orders.items()},
    }


def _share(comparison: Comparison, place: int) -> str:
    """Return a class's share of the labelled pixels, because rare classes are noisy."""
    pixels = [score.metrics.label_pixels for row in comparison.rows for score in row.runs]
    total = sum(map(sum, pixels))
    if not total:
        return ""
    share = sum(counts[place] for counts in pixels) / total
    return "no pixel" if share == 0 else f"{100 * share:.1f} % of pixels" if share >= 0.001 else "< 0.1 % of pixels"


_SHOWN_CLASSES = 24
"""Classes that the images can be filtered by before the rest is folded away."""
NO_SHARED_IMAGE = (
    "No image is the best or the worst of all rows: some are judged in segmentation alone, others in depth alone. "
    "A page of either kind shows its images."
)


def pictures(comparison: Comparison, samples: Sequence[Sample] | None, folder: Path | None) -> Markup | None:
    """Return the section of images, or None if the user wants no images and no folder of pictures.

    Args:
        comparison: the comparison.
        samples: the images, or None if the user wants none.
        folder: a folder of further pictures to mention, or None.
    """
    if folder is None and samples is None:
        return None
    why_none = NO_SHARED_IMAGE if samples is not None else ""
    samples = samples or ()
    rows = comparison.rows
    drawn = sorted({one.place for sample in samples for one in sample.predictions if one.classes is not None})
    best, gap = max(measured(comparison), key=lambda pair: pair[0].miou.mean, default=(None, None))
    right = next((place for place in drawn if rows[place] is best), drawn[0] if drawn else None)
    left = next((place for place in drawn if gap is not None and rows[place].name == gap.baseline), None)
    counts = [sum(place in one.present for one in samples) for place in range(len(comparison.class_names))]
    classes = zip(comparison.class_names, comparison.class_colours, counts, strict=True)
    return render(
        "pictures.html",
        rows=rows,
        samples=samples,
        folder=folder,
        layers=[
            ("image", "image", None),
            ("label", "ground truth", None),
            *((f"row{place}", rows[place].name, place) for place in drawn),
        ],
        left="image" if left is None or left == right else f"row{left}",
        right="label" if right is None else f"row{right}",
        shown_classes=_SHOWN_CLASSES,
        has_classes=any(one.label is not None for one in samples) and bool(drawn),
        why_none=why_none,
        score=samples[0].score if samples else None,
        classes=[(place, *of_class) for place, of_class in enumerate(classes) if of_class[-1]],
    )


def teacher(comparison: Comparison, audit: TeacherAudit | None) -> Markup | None:
    """Return the section on the teacher, or None if there is neither a teacher's row nor an audit."""
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
    """Return the baseline with the highest mIoU, or None if there is no baseline."""
    baselines = [row for row in comparison.contestants if row.baseline and not math.isnan(row.miou.mean)]
    return max(baselines, key=lambda row: row.miou.mean, default=None)


def lost_classes(teacher_row: Row, rival: Row) -> list[int]:
    """Return the ids of the classes in which the teacher's IoU is lower than the IoU of the row `rival`.

    The class with the largest loss comes first.
    """
    gaps = [theirs.mean - taught.mean for taught, theirs in zip(teacher_row.iou, rival.iou, strict=True)]
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
    """Describe whether students are worse in the classes where the teacher is weak."""
    gaps = [student.class_differences[place].mean for student in students for place in lost]
    finite_gaps = [gap for gap in gaps if not math.isnan(gap)]
    if not finite_gaps:
        return ""
    fell = sum(gap < 0 for gap in finite_gaps)
    verb = "is" if fell == 1 else "are"
    return f" Of the students' {len(finite_gaps)} IoUs in these classes {fell} {verb} below the baseline."


_MACHINE = {"platform": "system", "python": "Python", "cpus": "CPUs", "threads": "threads", "gpu": "GPU"}


def recipes(comparison: Comparison, runs: Mapping[str, Entry], command: str | None) -> Markup:
    """Return the section with the recipe of each row, and the command that the user typed.

    `runs` are the compared runs by name. `command` None shows no command.
    """
    return render(
        "recipes.html",
        command=command,
        rows=[(place, row, _row(row, runs, comparison.tasks)) for place, row in enumerate(comparison.rows)],
        machines=_machines(comparison, runs),
        tasks=[VIEWS[task].figures[TASKS[task].score].head for task in comparison.tasks],
    )


def again(entry: Entry) -> str | None:
    """Return the command that repeats the training of the run `entry`.

    Return None for weights without a run, and for a run that no training command of kdcache wrote.
    """
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
    """Return texts for each stream of a recipe: name, source, share of the batch in percent, samples, and weight.

    `settings` is the recipe: flag without its dashes -> value. Without streams the result is [].
    """
    tables, batch = settings.get("stream") or [], settings.get("batch-size")
    if not tables or not isinstance(batch, int):
        return []
    shares = shares_of({table["name"]: table.get("share") for table in tables})
    rows = rows_of(shares, batch, 1 if settings.get("mix") is None else 2)
    sources = [source_of(table) or source_of(settings) or "-" for table in tables]
    return [
        [table["name"], source, percent(share), str(count), f"{table.get('weight', 1.0):g}"]
        for table, source, share, count in zip(tables, sources, shares, rows, strict=True)
    ]


def _run(score: RunScore, entry: Entry | None, tasks: Sequence[str]) -> list[str]:
    result = entry.run.result if entry is not None and entry.run is not None else {}
    results = [result.get(key) for key in ("best_step", "iterations", "seconds", "images_per_second")]
    scores = [VIEWS[task].score_text(score.value(task)) for task in tasks]
    cells = [score.run, score.seed, score.fold or None, *scores, *results]
    return ["-" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]


def setting(value: Any) -> str:
    """Return the value of a setting as text. None and an empty list become "none", other lists and booleans JSON."""
    if value is None or value == []:
        return "none"
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)


def _machines(comparison: Comparison, runs: Mapping[str, Entry]) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Return where the runs were trained. One line has the runs of one machine and equal versions."""
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
