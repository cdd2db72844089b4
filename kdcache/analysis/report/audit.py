"""The audit of a teacher, read from its `report.json`, and the part of the page that shows it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdcache.analysis.report.render import number, points, render
from kdcache.bounded import parse_json, read_bytes
from kdcache.errors import MismatchError, RecipeError
from kdcache.metrics.tables import DEPTH_HEADS, depth_figure, percent

_SIZE, _EDGE, _MARGIN = 260, 40, 14
_INNER = _SIZE - _EDGE - _MARGIN
"""Pixels of the diagram, of its left edge and of its margin, and of its axes."""


Table = tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]
"""Caption, header and rows."""


@dataclass(frozen=True)
class TeacherAudit:
    """The audit of a teacher (`inspect --teacher-report`). Without classes, all fields about classes are empty.

    Attributes:
        path: the file `report.json`.
        images, labelled: the number of images, and of those with a label.
        class_names: names of the classes.
        ece: expected calibration error, 0 to 1, or NaN without labels.
        bins: for each range of confidence: (low end, high end, share of all labelled pixels, their mean confidence,
            share of these pixels that is correct).
        sure: for each predicted class, the mean confidence of its pixels.
        right: for each predicted class, the share of its pixels that is correct.
        confused: (label, prediction, share of the label's pixels, pixels), the largest share first.
        kept: for each threshold on pseudo labels: (threshold, share of pixels kept, share of kept pixels that is
            correct, mIoU of kept pixels).
        miou: the teacher's mIoU, or NaN without labels.
        tables: tables of numeric heads, such as depth.
    """

    path: Path
    images: int
    labelled: int
    class_names: tuple[str, ...]
    ece: float
    bins: tuple[tuple[float, ...], ...]
    sure: tuple[float, ...]
    right: tuple[float, ...]
    confused: tuple[tuple[str, str, float, int], ...]
    kept: tuple[tuple[float, float, float, float], ...]
    miou: float = math.nan
    tables: tuple[Table, ...] = ()

    def check_classes(self, names: tuple[str, ...]) -> None:
        """Raise MismatchError if the audit has other classes than `names`. If either list is empty, do nothing."""
        if names and self.class_names and names != self.class_names:
            raise MismatchError(
                f"{self.path} has other classes ({', '.join(self.class_names)}) than the data ({', '.join(names)})",
                fix="Give --audit the report.json of this data's cache.",
            )


def read_audit(path: Path) -> TeacherAudit:
    """Read an audit from its file `report.json`. Raises: RecipeError for another kind of file."""
    try:
        return _parse(path, parse_json(read_bytes(path)))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise RecipeError(
            f"Cannot read --audit: {path} {_failure(path, error)}",
            fix=f"Give {path / 'report.json'}"
            if path.is_dir()
            else "Leave --audit out, or give the report.json of: kdcache inspect CACHE --teacher-report",
        ) from error


def _failure(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "is a folder"
    if not path.exists():
        return "does not exist"
    return f"has no {error}" if isinstance(error, KeyError) else f"has other content: {error}"


def show_audit(audit: TeacherAudit) -> Markup:
    """Return the HTML of an audit: how sure the teacher is, how often it is right, and what it confuses."""
    if not audit.bins:
        return render("audit.html", audit=audit)
    gap = sum(share * (sure - right) for _, _, share, sure, right in audit.bins if share)
    return render(
        "audit.html",
        audit=audit,
        surer=math.isfinite(audit.ece) and gap > 0,
        size=_SIZE,
        left=_EDGE,
        right=_EDGE + _INNER,
        top=_MARGIN,
        bottom=_MARGIN + _INNER,
        ticks=[(f"{100 * value:.0f}", number(_across(value)), number(_up(value))) for value in (0, 0.5, 1)],
        bars=_bars(audit),
        classes=[
            (name, percent(sure), percent(right), points(sure - right, 1))
            for name, sure, right in sorted(zip(audit.class_names, audit.sure, audit.right, strict=True), key=_surest)
        ],
        confused=[
            (label, predicted, percent(share), f"{pixels:,}") for label, predicted, share, pixels in audit.confused
        ],
        thresholds=[(f"{least:g}", *map(percent, figures)) for least, *figures in audit.kept],
    )


def _parse(path: Path, content: Mapping[str, Any]) -> TeacherAudit:
    others = tuple(_depth_tables(content)) if "regressions" in content else ()
    if "pseudo_labels" not in content and others:
        return TeacherAudit(path, int(content["images"]), 0, (), math.nan, (), (), (), (), (), tables=others)
    calibration = content["calibration"] or {"ece": None, "bins": [], "confidence": [], "precision": []}
    keys = ("low", "high", "share", "confidence", "accuracy")
    return TeacherAudit(
        path=path,
        images=int(content["images"]),
        labelled=int(content["labelled"]),
        class_names=tuple(str(row["name"]) for row in content["pseudo_labels"][0]["classes"]),
        ece=_number(calibration["ece"]),
        bins=tuple(tuple(_number(part[key]) for key in keys) for part in calibration["bins"]),
        sure=tuple(map(_number, calibration["confidence"])),
        right=tuple(map(_number, calibration["precision"])),
        confused=tuple(
            (str(p["label"]), str(p["said"]), float(p["share"]), int(p["pixels"])) for p in content["confused"]
        ),
        kept=tuple(
            (float(p["threshold"]), _number(p["share"]), _number(p["precision"]), _number(_of_labels(p).get("miou")))
            for p in content["pseudo_labels"]
        ),
        miou=_number((content.get("teacher") or {}).get("miou")),
        tables=others,
    )


def _of_labels(pseudo: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a threshold keeps of the labelled pixels, or {} without labels."""
    return pseudo.get("beside_labels") or {}


def _depth_tables(content: Mapping[str, Any]) -> Iterator[Table]:
    """Yield tables of the numeric heads: metrics, and errors by the label's distance if they were judged."""
    for name, head in content["regressions"].items():
        judged, images = head["teacher"], int(head["images"])
        if judged is None:
            unit = f"in {head['unit']}, not judged: it has no labels in metres"
            yield f"{name} of {images} images", ("unit",), ((unit,),)
            continue
        values = [(words, depth_figure(key, _number(judged[key]))) for key, words in DEPTH_HEADS.items()]
        where = f"{name}: {int(head['labelled'])} labelled images of {images}, labels of {head['range']}"
        yield where, ("metric", "mean of images"), tuple(values)
        rows = tuple(
            (
                f"{part['low']:g} to {part['high']:g} m",
                f"{int(part['pixels']):,}",
                depth_figure("rmse", _number(part["rmse"])),
                depth_figure("abs_rel", _number(part["abs_rel"])),
            )
            for part in head["by_distance"]
        )
        yield f"{name}: errors by the label's distance", ("distance", "pixels", "rmse m", "abs rel"), rows


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _across(value: float) -> float:
    return _EDGE + _INNER * value


def _up(value: float) -> float:
    return _MARGIN + _INNER * (1 - value)


def _bars(audit: TeacherAudit) -> list[dict[str, Any]]:
    """Return bars of accuracy over confidence. Bars with few pixels are faint."""
    most = max((share for _, _, share, _, _ in audit.bins if not math.isnan(share)), default=1.0) or 1.0
    return [
        {
            "title": f"{100 * share:.1f} % of pixels: sure {percent(sure)} %, right {percent(right)} %",
            "x": _across(low) + 0.5,
            "y": _up(right),
            "width": _INNER * (high - low) - 1,
            "height": _INNER * right,
            "share": 0.3 + 0.7 * math.sqrt(share / most),
        }
        for low, high, share, sure, right in audit.bins
        if not math.isnan(right)
    ]


def _surest(row: tuple[str, float, float]) -> float:
    gap = row[1] - row[2]
    return math.inf if math.isnan(gap) else -gap
