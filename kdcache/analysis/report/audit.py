"""The audit of a teacher, read from its `report.json`, and the part of the page that shows it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.analysis.report.html import Child, Html, number, simple_table, tag
from kdcache.errors import MismatchError, RecipeError
from kdcache.metrics.tables import percent

_SIZE, _EDGE, _MARGIN = 260, 40, 14


@dataclass(frozen=True)
class TeacherAudit:
    """The result of `inspect --teacher-report`.

    Attributes:
        ece: expected calibration error; NaN without labels.
        bins: (low, high, share, confidence, accuracy) of pixels by confidence.
        sure, right: mean confidence of the pixels predicted as each class, and the share of them that is right.
        confused: (label, prediction, share of the label's pixels, pixels), the largest share first.
        kept: (threshold, share of pixels, share of these that is right) of pseudo labels.
    """

    path: Path
    images: int
    labelled: int
    class_names: tuple[str, ...]
    ece: float
    bins: tuple[tuple[float, float, float, float, float], ...]
    sure: tuple[float, ...]
    right: tuple[float, ...]
    confused: tuple[tuple[str, str, float, int], ...]
    kept: tuple[tuple[float, float, float], ...]

    def check_classes(self, names: tuple[str, ...]) -> None:
        """Check the classes of the audit. Raises: MismatchError for other classes."""
        if names != self.class_names:
            raise MismatchError(
                "the audit is of a teacher of the same classes, in the same order",
                received=f"{', '.join(self.class_names)} in {self.path} against {', '.join(names)}",
                remedy="give the report.json of this data's store to --audit",
            )


def read_audit(path: Path) -> TeacherAudit:
    """Read an audit from its `report.json`. Raises: RecipeError for a file that is no audit."""
    try:
        return _parse(path, json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise RecipeError(
            "--audit is the report.json that kdcache inspect STORE --teacher-report writes",
            received=f"{path} {_failure(path, error)}",
            remedy=f"give {path / 'report.json'}" if path.is_dir() else "write it with inspect, or leave --audit out",
        ) from error


def _failure(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "is a folder"
    if not path.exists():
        return "does not exist"
    return f"has no {error}" if isinstance(error, KeyError) else f"has other content: {error}"


def show_audit(audit: TeacherAudit) -> list[Html | None]:
    """How sure the teacher is and how often it is right, what it confuses, what thresholds keep."""
    labelled = f"{audit.labelled} labelled images of {audit.images}"
    head = tag("h3", f"The audit of what it teaches: {labelled} of the store")
    if not audit.bins:
        return [head, tag("p", "The store has no labels, so it is not known how often it is right.")]
    surer = (
        math.isfinite(audit.ece) and sum(share * (sure - right) for _, _, share, sure, right in audit.bins if share) > 0
    )
    words = (
        f"Its expected calibration error is {percent(audit.ece)} points: on the whole it is "
        f"{'surer than it is right' if surer else 'right more often than it is sure'}."
    )
    figure = tag(
        "figure",
        tag("figcaption", "How often it is right, by how sure it is"),
        _reliability(audit),
        class_="reliability",
    )
    return [
        head,
        tag("p", words),
        tag("div", figure, _classes(audit), class_="two"),
        tag("div", _confused(audit), _kept(audit), class_="two"),
    ]


def _parse(path: Path, content: Mapping[str, Any]) -> TeacherAudit:
    calibration = content["calibration"] or {"ece": None, "bins": [], "confidence": [], "precision": []}
    keys = ("low", "high", "share", "confidence", "accuracy")
    return TeacherAudit(
        path=path,
        images=int(content["images"]),
        labelled=int(content["labelled"]),
        class_names=tuple(str(row["name"]) for row in content["pseudo_labels"][0]["classes"]),
        ece=_number(calibration["ece"]),
        bins=tuple(_five([_number(part[key]) for key in keys]) for part in calibration["bins"]),
        sure=tuple(map(_number, calibration["confidence"])),
        right=tuple(map(_number, calibration["precision"])),
        confused=tuple(
            (str(p["label"]), str(p["said"]), float(p["share"]), int(p["pixels"])) for p in content["confused"]
        ),
        kept=tuple(
            (float(p["threshold"]), _number(p["share"]), _number(p["precision"])) for p in content["pseudo_labels"]
        ),
    )


def _five(values: list[float]) -> tuple[float, float, float, float, float]:
    low, high, share, confidence, accuracy = values
    return low, high, share, confidence, accuracy


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _reliability(audit: TeacherAudit) -> Html:
    """Bars of accuracy over confidence; on the diagonal they are honest. What is seldom is faint."""
    inner = _SIZE - _EDGE - _MARGIN

    def across(value: float) -> float:
        return _EDGE + inner * value

    def up(value: float) -> float:
        return _MARGIN + inner * (1 - value)

    most = max((share for _, _, share, _, _ in audit.bins if share == share), default=1.0) or 1.0
    parts: list[Html] = []
    for value in (0, 0.5, 1):
        parts.append(tag("line", class_="grid", x1=_EDGE, x2=across(1), y1=number(up(value)), y2=number(up(value))))
        text = f"{100 * value:.0f}"
        parts.append(tag("text", text, class_="tick", x=_EDGE - 6, y=number(up(value)), dy="0.35em", text_anchor="end"))
        parts.append(tag("text", text, class_="tick", x=number(across(value)), y=_SIZE - 16, text_anchor="middle"))
    for low, high, share, sure, right in audit.bins:
        if math.isnan(right):
            continue
        title = f"{100 * share:.1f} % of pixels: sure {percent(sure)} %, right {percent(right)} %"
        parts.append(
            tag(
                "rect",
                tag("title", title),
                class_="bin",
                x=number(across(low) + 0.5),
                y=number(up(right)),
                width=number(inner * (high - low) - 1),
                height=number(inner * right),
                style=f"--share:{number(0.3 + 0.7 * math.sqrt(share / most))}",
            )
        )
    parts.append(tag("line", class_="diagonal", x1=_EDGE, y1=number(up(0)), x2=number(across(1)), y2=number(up(1))))
    parts.append(tag("text", "% sure", class_="axis-name", x=number(across(1)), y=_SIZE - 2, text_anchor="end"))
    label = f"Reliability diagram; expected calibration error {percent(audit.ece)} points"
    return tag("svg", *parts, viewBox=f"0 0 {_SIZE} {_SIZE}", role="img", aria_label=label)


def _classes(audit: TeacherAudit) -> Html:
    rows: list[tuple[Child, ...]] = []
    for name, sure, right in sorted(zip(audit.class_names, audit.sure, audit.right, strict=True), key=_surest):
        gap = "-" if math.isnan(sure - right) else f"{100 * (sure - right):+.1f}".replace("-", "\N{MINUS SIGN}")
        rows.append((name, percent(sure), percent(right), gap))
    return simple_table("Pixels that it predicts as each class", ("class", "sure %", "right %", "too sure by"), rows)


def _surest(row: tuple[str, float, float]) -> float:
    gap = row[1] - row[2]
    return math.inf if math.isnan(gap) else -gap


def _confused(audit: TeacherAudit) -> Html:
    rows = [(label, predicted, percent(share), f"{pixels:,}") for label, predicted, share, pixels in audit.confused]
    return simple_table("What it confuses most", ("label", "predicted", "% of the label", "pixels"), rows, "words")


def _kept(audit: TeacherAudit) -> Html:
    rows = [(f"{least:g}", percent(share), percent(right)) for least, share, right in audit.kept]
    return simple_table("Pseudo labels over a threshold", ("confidence", "pixels kept %", "of these right %"), rows)
