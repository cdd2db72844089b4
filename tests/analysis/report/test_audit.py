"""The teacher's audit on the page: what is read of report.json, what is refused."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.analysis.report.audit import read_audit, show_audit
from kdcache.analysis.report.stores import stores
from kdcache.errors import KDCacheError, MismatchError, RecipeError

CLASSES = ("road", "<b>car</b>")


def audit(**changes: Any) -> dict[str, Any]:
    """What Audit.to_json gives of a teacher of two classes."""
    classes = [{"name": name, "threshold": 0.5, "said": 10, "kept": 5} for name in CLASSES]
    bins = [
        {"low": 0.0, "high": 0.5, "share": 0.0, "confidence": None, "accuracy": None},
        {"low": 0.5, "high": 1.0, "share": 1.0, "confidence": 0.9, "accuracy": 0.7},
    ]
    beside = {"kept": 0.7, "precision": 0.9, "miou": 0.625}
    found: dict[str, Any] = {
        "images": 4,
        "labelled": 3,
        "calibration": {"ece": 0.2, "bins": bins, "confidence": [0.95, None], "precision": [0.75, None]},
        "confused": [{"label": "road", "said": "<b>car</b>", "share": 0.25, "pixels": 12345}],
        "pseudo_labels": [
            {"threshold": 0.5, "share": 0.8, "precision": 0.9, "classes": classes, "beside_labels": beside}
        ],
    }
    return {**found, **changes}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """written(key=value): a report.json with these changes."""

    def write(**changes: Any) -> Path:
        (tmp_path / "report.json").write_text(json.dumps(audit(**changes)))
        return tmp_path / "report.json"

    return write


def test_an_audit_is_read(written: Callable[..., Path]) -> None:
    found = read_audit(written())
    assert (found.images, found.labelled, found.class_names, found.ece) == (4, 3, CLASSES, 0.2)
    assert found.bins[1] == (0.5, 1.0, 1.0, 0.9, 0.7)
    assert math.isnan(found.bins[0][3])
    assert found.sure[0] == 0.95
    assert math.isnan(found.right[1])
    assert found.confused == (("road", "<b>car</b>", 0.25, 12345),)
    assert found.kept == ((0.5, 0.8, 0.9, 0.625),)
    assert math.isnan(
        read_audit(written(pseudo_labels=[{**audit()["pseudo_labels"][0], "beside_labels": None}])).kept[0][3]
    )


def test_an_audit_is_shown(written: Callable[..., Path]) -> None:
    shown = show_audit(read_audit(written()))
    for text in (
        "3 labelled images of 4",
        "20.00 points",
        "surer than it is right",
        "+20.0",
        "62.50",
        "12,345",
        "&lt;b&gt;car",
    ):
        assert text in shown
    assert "<b>" not in shown
    drawing = ElementTree.fromstring(shown[shown.index("<svg") : shown.index("</svg>") + len("</svg>")])
    (bar,) = [one for one in drawing.iter("rect") if one.get("class") == "bin"]  # the empty bin has none
    inner = 260 - 40 - 14
    assert float(bar.get("height", "")) == pytest.approx(0.7 * inner, abs=0.01)


def test_an_audit_without_labels(written: Callable[..., Path]) -> None:
    shown = show_audit(read_audit(written(calibration=None, confused=[], labelled=0)))
    assert "no labels" in shown
    assert "nan" not in shown


def nothing(path: Path) -> Path:
    path.unlink()
    return path


def folder(path: Path) -> Path:
    return path.parent


def no_json(path: Path) -> Path:
    path.write_text("{")
    return path


def a_list(path: Path) -> Path:
    path.write_text("[]")
    return path


def an_evaluation(path: Path) -> Path:
    path.write_text('{"miou": 0.5, "classes": []}')
    return path


def no_bins(path: Path) -> Path:
    path.write_text(json.dumps(audit(calibration={"ece": 0.1})))
    return path


def words_for_numbers(path: Path) -> Path:
    path.write_text(json.dumps(audit(images="many")))
    return path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (nothing, "does not exist"),
        (folder, "is a folder"),
        (no_json, "has other content: Expecting"),
        (a_list, "has other content: list"),
        (an_evaluation, "has no 'calibration'"),
        (no_bins, "has no 'bins'"),
        (words_for_numbers, "many"),
    ],
)
def test_what_is_no_audit(written: Callable[..., Path], damage: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        read_audit(damage(written()))
    assert ("report.json" if damage is folder else "--teacher-report") in caught.value.fix


def test_an_audit_of_other_classes(written: Callable[..., Path]) -> None:
    found = read_audit(written())
    found.check_classes(CLASSES)
    with pytest.raises(MismatchError, match="road, tree"):
        found.check_classes(("road", "tree"))
    assert issubclass(MismatchError, KDCacheError)


def test_the_teachers_of_several_stores_are_shown_one_below_the_other(tmp_path: Path) -> None:
    audits = []
    for number, miou in enumerate((0.4, 0.5, 0.3, None)):
        path = tmp_path / f"camera-round-{number}" / "report.json"
        path.parent.mkdir()
        path.write_text(json.dumps(audit(teacher={"miou": miou})))
        audits.append(read_audit(path))
    shown = str(stores(audits))
    assert "What the teacher of each cache gives" in shown
    assert "The best teacher is the one of camera-round-1, with a mIoU of 50.00 %" in shown
    table = shown[shown.index("<table") :]
    order = [table.index(f"camera-round-{number}") for number in range(4)]
    assert order == sorted(order)
    assert "<td>40.00</td><td>20.00</td><td>80.00</td><td>90.00</td>" in shown.replace("\n", "")
    assert stores(audits[:1]) is None
    assert "have no labels" in str(stores([audits[3], audits[3]]))


def test_an_audit_of_depth_alone(tmp_path: Path) -> None:
    names = ("rmse_log", "abs_rel", "sq_rel", "silog", "delta1", "delta2", "delta3")
    near = {"low": 0.0, "high": 5.0, "pixels": 1234, "rmse": None, "abs_rel": 0.5}
    judged = {
        "unit": "m",
        "images": 4,
        "labelled": 3,
        "range": "0.001 to 80 m",
        "teacher": {"rmse": 2.5, **dict.fromkeys(names, 0.5)},
        "by_distance": [near],
    }
    relative = {**judged, "unit": "relative", "teacher": None, "by_distance": []}
    path = tmp_path / "report.json"
    for depth, words in (
        (judged, ("rmse m", "2.500", "0 to 5 m", "1,234", "3 labelled images of 4")),
        (relative, ("in relative, not judged",)),
    ):
        path.write_text(json.dumps({"images": 4, "regressions": {"depth": depth}}))
        one = read_audit(path)
        one.check_classes(CLASSES)  # there are none to be other than these
        shown = show_audit(one)
        ElementTree.fromstring(f"<div>{shown}</div>")
        assert all(text in shown for text in (*words, "4 images of the cache"))
        assert not any(text in shown for text in ("calibration", "how often the teacher is right"))
    both = tmp_path / "both.json"
    both.write_text(json.dumps(audit(regressions={"depth": judged})))
    shown = show_audit(read_audit(both))
    assert "rmse m" in shown
    assert "expected calibration error" in shown
    path.write_text(json.dumps({"images": 4, "regressions": {}}))
    with pytest.raises(RecipeError):
        read_audit(path)
