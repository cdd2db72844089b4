"""`kdcache inspect --teacher-report`: the audit on the terminal."""

import json as json_module
import math
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from kdcache_cli.console import OUT, figure_table

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.teacher.audit.audit import Audit
    from kdcache.teacher.audit.depth_audit import RegressionAudit
    from kdcache.verbs.inspect import Audited


def print_audit(audited: "Audited", json: bool) -> None:
    """Print the audit of a teacher as tables. If `json` is True, print the content of report.json instead."""
    audit = audited.audit
    if json:
        typer.echo(json_module.dumps(audit.to_json(), indent=1))
        return
    if audit.classes is not None:
        _print_classes(audit.classes)
        _print_confused(audit.classes)
        _print_coverage(audit.classes)
        _print_gradient(audit.classes)
    for regression in audit.regressions:
        _print_regression(regression)
    if audit.parents:
        OUT.print(f"The teacher was trained from a cache: seal {', '.join(audit.parents)}", highlight=False)
    OUT.print(f"\n[bold]{escape(str(audited.folder))}[/]: report.json and {len(audited.pictures)} pictures")


def _print_classes(audit: "Audit") -> None:
    from kdcache.metrics import class_rows, percent

    if audit.metrics is None or audit.calibration is None:
        OUT.print(f"{audit.images} images and no label: IoU, confusion and calibration of the teacher are unknown")
        return
    metrics, calibration = audit.metrics, audit.calibration
    title = f"The teacher on {audit.labelled} labelled images of {audit.images}"
    table = figure_table("class", "IoU %", "Acc %", "pixels %", "right %", "sure %", "instead", title=title)
    order = sorted(
        range(len(metrics.iou)), key=lambda number: (metrics.iou[number] != metrics.iou[number], metrics.iou[number])
    )
    rows = class_rows(metrics)
    for number in order:
        confused = audit.confused_with(number)
        instead = "" if confused is None else f"{confused.predicted} {100 * confused.share:.0f} %"
        right, sure = calibration.precision[number], calibration.confidence[number]
        table.add_row(*rows[number], percent(right), percent(sure), instead)
    OUT.print(table)
    OUT.print(
        "[dim]right: of the pixels predicted as the class; sure: mean confidence there; instead: the commonest error[/]"
    )
    OUT.print(
        f"[bold]mIoU {percent(metrics.miou)}[/]  mAcc {percent(metrics.macc)}  aAcc {percent(metrics.aacc)}  "
        f"ECE {percent(calibration.ece)} (15 bins)"
    )


def _print_confused(audit: "Audit") -> None:
    from kdcache.metrics import percent

    if audit.confused:
        table = figure_table("label", "predicted", "% of the label's pixels", "pixels", title="Most confused")
        table.columns[1].justify = "left"
        for pair in audit.confused:
            table.add_row(pair.label, pair.predicted, percent(pair.share), f"{pair.pixels:,}")
        OUT.print(table)
    if audit.worst:
        table = figure_table("image", "mIoU %", title="Images where it loses most")
        for scored in audit.worst:
            table.add_row(scored.sample, percent(scored.miou))
        OUT.print(table)


def _print_coverage(audit: "Audit") -> None:
    from kdcache.metrics import percent
    from kdcache.teacher.audit.audit import THRESHOLDS

    header = ("confidence", "pixels kept %", "of these right %", "their mIoU %")
    table = figure_table(*header, title="Pseudo labels over thresholds")
    mious = [quality.metrics.miou for quality in audit.quality] or [math.nan] * len(THRESHOLDS)
    for threshold, coverage, miou in zip(THRESHOLDS, audit.coverage, mious, strict=True):
        table.add_row(f"{threshold:g}", percent(coverage.total_share), percent(coverage.total_precision), percent(miou))
    OUT.print(table)
    printed = [(THRESHOLDS.index(threshold), f"{threshold:g}") for threshold in (0.7, 0.9)]
    titles = [text for _, at in printed for text in (f"kept at {at} %", "right %", "IoU %")]
    table = figure_table("class", *titles, title="and of each class")
    for number, name in enumerate(audit.class_names):
        cells = []
        for place, _ in printed:
            part, iou = audit.coverage[place], math.nan
            if audit.quality:
                iou = audit.quality[place].metrics.iou[number]
            cells += [percent(part.shares[number]), percent(part.precision[number]), percent(iou)]
        table.add_row(name, *cells)
    OUT.print(table)


def _print_gradient(audit: "Audit") -> None:
    from kdcache.metrics import percent
    from kdcache.teacher.audit.topk_error import TEMPERATURES

    gradient = audit.gradient
    if not gradient.noisy:
        return
    title = (
        f"Error of the KL gradient with only k of {gradient.kept} classes, % of its norm ({gradient.records} images)"
    )
    students = (("uniform", gradient.uniform), ("noisy", gradient.noisy))
    table = figure_table("k", *(f"{name}\nT = {T:g}" for name, _ in students for T in TEMPERATURES), title=title)
    for k in gradient.noisy:
        table.add_row(str(k), *(percent(errors[k][T]) for _, errors in students for T in TEMPERATURES))
    OUT.print(table)
    OUT.print("[dim]uniform: a student that knows nothing; noisy: one that is its teacher plus unit noise[/]")


def _print_regression(audit: "RegressionAudit") -> None:
    from kdcache.metrics.evaluators import EVALUATORS
    from kdcache.metrics.tables import depth_figure, percent

    if audit.metrics is None:
        why = "no label" if audit.unit == "m" else f"values in {audit.unit!r}, which are known up to a scale"
        OUT.print(f"{audit.name}: {audit.images} images and {why}: its error is unknown", markup=False)
        return
    title = f"The teacher's {audit.name} on {audit.labelled} labelled images of {audit.images}, {audit.depth_range}"
    OUT.print(f"\n[bold]{escape(title)}[/]", highlight=False)
    table = figure_table("metric", "mean of images")
    _, (_, rows) = EVALUATORS[audit.name].table(audit.metrics)
    for cells in rows:
        table.add_row(*cells)
    OUT.print(table)
    total = sum(part.pixels for part in audit.ranges)
    table = figure_table("metres", "pixels %", "rmse m", "abs rel", title="By the label's distance")
    for part in audit.ranges:
        distance = f"{part.low:g} to {part.high:g}" if math.isfinite(part.high) else f"{part.low:g} and more"
        errors = depth_figure("rmse", part.rmse), depth_figure("abs_rel", part.abs_rel)
        table.add_row(distance, percent(part.pixels / total), *errors)
    OUT.print(table)
    if audit.worst:
        table = figure_table("image", "rmse m", title=f"Images where its {audit.name} errs most")
        for scored in audit.worst:
            table.add_row(scored.sample, depth_figure("rmse", scored.rmse))
        OUT.print(table)
