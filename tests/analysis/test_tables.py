"""Formats of a comparison: what is marked, what is empty, and that all say the same."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace

import pytest

from kdcache.analysis.comparison import Comparison, Gaps, Row, RunScore
from kdcache.analysis.statistics import Difference, Interval, Resampled, Spread, adjust, difference
from kdcache.analysis.tables import (
    class_table,
    cost_table,
    difference_table,
    legend,
    p_value,
    score_table,
    to_csv,
    to_markdown,
    to_text,
)
from kdcache.metrics import Metrics, TaskMetrics
from kdcache.metrics.cost import Cost, Latency
from kdcache.tasks import SEGMENTATION

NAMES = ("road", "car|bus", "never")
LATENCY = Latency(15.234, 1.2, 15.1, 50, 10, "a CPU", 2)
NAN = math.nan


def metrics(*iou: float) -> Metrics:
    known = [value for value in iou if not math.isnan(value)]
    mean = sum(known) / len(known)
    return Metrics(NAMES, iou, iou, (1, 1, 0), mean, mean, 0.9)


def row(name: str, *runs: Metrics, gap: Difference | None = None, latency: Latency | None = LATENCY, **more) -> Row:
    return Row(
        name=name,
        model="kdcache:tiny",
        differs={},
        runs=tuple(
            RunScore(f"{name}-{seed}", seed, None, TaskMetrics(one), reused=False) for seed, one in enumerate(runs)
        ),
        scores={
            SEGMENTATION: {name: Spread.of(getattr(one, name) for one in runs) for name in ("miou", "macc", "aacc")}
        },
        iou=tuple(Spread.of(one.iou[place] for one in runs) for place in range(3)),
        gaps={SEGMENTATION: Gaps(gap)},
        class_differences=(gap,) * 3 if gap else (),
        cost=Cost((48, 64), 2_520_000, 1_000_000_000, latency),
        **{"teacher": False, "baseline": False, **more},
    )


@pytest.fixture
def comparison() -> Comparison:
    gap = Difference(0.0178, 0.02, NAN, "none", 2, paired=True)
    rows = (
        row("none", metrics(0.8, 0.3668, NAN), baseline=True),
        row("kl", metrics(0.7, 0.4, NAN), metrics(0.9, 0.4, NAN), gap=gap),
        row("at", metrics(0.5, 0.1, NAN), gap=Difference(-0.2834, NAN, NAN, "none", 1, paired=True), latency=None),
        row("teacher", metrics(0.95, 0.9, NAN), teacher=True),
    )
    colours = ((1, 2, 3),) * 3
    return Comparison("camvid", "val", "ab" * 32, 233, False, "best", NAMES, colours, rows, ("a note",))


@pytest.mark.parametrize(
    ("data", "smoke", "first"),
    [
        ("scenes", False, "Procedural scenes, no"),
        ("scenes:64x96,train=4", True, "Smoke run on procedural scenes, no"),
        ("camvid", True, "Smoke run, a few"),
        ("camvid", False, None),
        ("./scenes", False, None),
    ],
)
def test_what_is_no_result_says_so_above_the_tables(comparison: Comparison, data: str, smoke: bool, first) -> None:
    found = replace(comparison, data=data, smoke=smoke)
    assert found.to_json()["banner"] == found.banner
    for text, table in ((to_markdown(found), "| row |"), (to_text(found), "Knowledge Distillation")):
        above = text.partition(table)[0]
        assert ("nothing about any data set, model or method" in above) == (first is not None)
        assert first is None or first in above
    assert found.banner is None or found.banner.startswith(str(first))


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_scores_and_distances(comparison: Comparison) -> None:
    header, rows = score_table(comparison)
    assert header[:5] == ["row", "runs", "mIoU %", "mAcc %", "aAcc %"]
    assert rows[0] == ["none (baseline)", "1", "58.34", "58.34", "90.00", "-", "-", "-"]
    kl = [
        "kl",
        "2",
        "**60.00 ± 7.07**",
        "**60.00 ± 7.07**",
        "90.00 ± 0.00",  # all have 90.00: none is best
        "+1.78",
        "-0.22 to +3.78",
        "within noise",
    ]
    assert rows[1] == kl
    assert rows[2][5:] == ["-28.34", "-", "one run: unknown"]
    assert rows[3][2:5] == ["92.50", "92.50", "90.00"]


def test_the_best_of_a_class_is_marked_and_never_the_teacher(comparison: Comparison) -> None:
    header, rows = class_table(comparison, ("<", ">"))
    assert header == ["row", *NAMES, "mIoU", "mAcc", "aAcc"]
    assert [one[1] for one in rows] == ["<80.00>", "<80.00>", "50.00", "95.00"]
    assert [one[2] for one in rows] == ["36.68", "<40.00>", "10.00", "90.00"]
    assert [one[3] for one in rows] == ["-"] * 4


def test_cost(comparison: Comparison) -> None:
    header, rows = cost_table(comparison)
    expected = ["none (baseline)", "48x64", "2.52 M", "1.000", "0.500", "15.23 ± 1.20", "15.10", "65.6"]
    assert rows[0] == expected
    assert rows[2][-3:] == ["-"] * 3
    assert len(header) == len(rows[0])


def test_markdown(comparison: Comparison) -> None:
    text = to_markdown(comparison)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    assert all(len(set(map(len, map(cells, table.splitlines())))) == 1 for table in tables)
    assert cells(tables[2].splitlines()[0])[2] == "car|bus"
    assert text.endswith("- a note\n")
    assert "a CPU, 2 threads, batch size 1, 50 calls after 10" in text
    assert "233 labelled images (sha256 abababababab)" in text


def test_the_small_table_is_that_of_a_report(comparison: Comparison) -> None:
    lines = to_text(comparison).splitlines()
    assert lines[1] == "COMPARISON TABLE"
    assert re.split(r"\s{2,}", lines[4]) == ["Knowledge Distillation", "mIoU", "# Parameters", "Inference Speed (ms)"]
    assert re.split(r"\s{2,}", lines[6]) == ["none (baseline)", "0.5834", "2.52M", "15.23 ± 1.20"]
    assert re.split(r"\s{2,}", lines[7]) == ["kl", "0.6000 ± 0.0707", "2.52M", "15.23 ± 1.20"]
    assert re.split(r"\s{2,}", lines[8])[-1] == "-"
    assert len({line.index("2.52M") for line in lines[6:10]}) == 1


def test_csv_has_what_json_has(comparison: Comparison) -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [one["row"] for one in read] == ["none", "kl", "at", "teacher"]
    for line, said in zip(read, comparison.to_json()["rows"], strict=True):
        assert float(line["miou_mean"]) == said["miou"]["mean"]
        assert line["teacher"] == str(int(said["teacher"]))
        assert int(line["macs"]) == said["cost"]["macs"]
        for one in said["classes"]:
            shown = line[f"iou_mean:{one['name']}"]
            assert (float(shown) if shown else None) == one["iou"]["mean"]
        latency = said["cost"]["latency"]
        for column, key in (("mean_ms", "mean_ms"), ("std_ms", "std_ms"), ("median_ms", "median_ms")):
            shown = line[f"latency_{column}"]
            assert (float(shown) if shown else None) == (latency and latency[key])
        gaps = [one["difference"] for one in said["classes"]]
        assert gaps == [said["difference"]] * 3
    assert read[1]["verdict"] == "within noise"
    assert float(read[1]["low"]) == pytest.approx(-0.0022)
    assert (read[0]["miou_std"], read[2]["low"], read[2]["fps"]) == ("", "", "")


def test_what_is_not_there_is_not_explained(comparison: Comparison) -> None:
    from dataclasses import replace

    alone = replace(comparison, rows=(row("none", metrics(0.8, 0.4, NAN), latency=None),), notes=())
    said = " ".join(legend(alone))
    assert "standard deviation" not in said
    assert "interval" not in said
    assert "calls after" not in said
    assert "own fold" not in said
    assert "fold that its training left out" in " ".join(legend(replace(alone, own_fold=True)))


def measured() -> Comparison:
    """Rows a, b, and one of a single run against a baseline of three seeds, adjusted together; the teacher apart."""

    def scores(*values: float) -> dict[tuple[int, None], float]:
        return {(seed, None): value for seed, value in enumerate(values)}

    none = scores(0.50, 0.52, 0.51)
    a, b, alone = adjust(
        [difference(scores(*values), none, "none") for values in ((0.56, 0.57, 0.575), (0.52, 0.51, 0.53), (0.6,))]
    )
    a = replace(a, resampled=Resampled("sequences", 4, 0.01, 0.09))
    teacher = difference(scores(0.7, 0.71), none, "none")
    one = metrics(0.8, 0.4, NAN)
    rows = (
        row("none", one, baseline=True),
        row("a", one, gap=a),
        row("b", one, gap=b),
        row("alone", one, gap=alone),
        row("teacher", one, gap=teacher, teacher=True),
    )
    return Comparison("camvid", "val", "ab" * 32, 6, False, "best", NAMES, ((1, 2, 3),) * 3, rows, ())


def test_distances_say_what_their_verdicts_stand_on() -> None:
    comparison = measured()
    gaps = {one.name: one.difference for one in comparison.rows if one.difference is not None}
    header, rows = difference_table(comparison)
    intervals = ["paired over seeds, 95 %", "unpaired over seeds, 95 %", "over sequences, 95 %"]
    assert header == ["row", "to", "points", *intervals, "correlation", "p", "p by Holm", "verdict"]
    assert [cells[0] for cells in rows] == ["a", "b", "alone", "teacher"]
    a, b = gaps["a"], gaps["b"]
    assert rows[0][1:4] == ["none", "+5.83", f"{100 * a.low:+.2f} to {100 * a.high:+.2f}"]
    assert rows[0][4] == f"{100 * a.unpaired.low:+.2f} to {100 * a.unpaired.high:+.2f}"
    assert [cells[5] for cells in rows] == ["+1.00 to +9.00", "-", "-", "-"]
    assert rows[0][6] == f"{a.correlation:+.2f}"
    assert rows[0][7:9] == [f"{a.p:.3f}", f"{2 * a.p:.3f}"]
    assert rows[1][7] == rows[1][8] == f"{b.p:.3f}"
    assert rows[2][2:] == ["+10.00", "-", "-", "-", "-", "-", "-", "one run: unknown"]
    unpaired = difference({(9, None): 0.6, (8, None): 0.62}, {(0, None): 0.5, (1, None): 0.51}, "none")
    (_, (cells,)) = difference_table(
        Comparison(**{**vars(comparison), "rows": (row("u", metrics(0.5, 0.5, NAN), gap=unpaired),)})
    )
    assert cells[3] == "-"
    assert cells[4] == f"{100 * unpaired.low:+.2f} to {100 * unpaired.high:+.2f}"


@pytest.mark.parametrize(
    ("p", "shown"), [(NAN, "-"), (0, "< 0.001"), (0.0004, "< 0.001"), (0.0006, "0.001"), (1, "1.000")]
)
def test_no_p_value_is_zero(p: float, shown: str) -> None:
    assert p_value(p) == shown


def test_all_tables_agree_on_the_verdicts() -> None:
    """Markdown, CSV and JSON: the same p-values, intervals and words."""
    comparison = measured()
    csv_rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    tables = re.findall(r"(?:^\|.*\n)+", to_markdown(comparison), re.MULTILINE)
    shown = {cells(line)[0]: cells(line) for line in tables[1].splitlines()[2:]}
    scores = {cells(line)[0]: cells(line) for line in tables[0].splitlines()[2:]}
    for line, said in zip(csv_rows, comparison.to_json()["rows"], strict=True):
        gap = said["difference"]
        if gap is None:
            assert {
                line[name] for name in ("p", "p_adjusted", "comparisons", "correlation", "unpaired", "verdict")
            } == {""}
            continue
        for column, value in (
            ("difference", gap["mean"]),
            ("low", gap["low"]),
            ("high", gap["high"]),
            ("p", gap["p"]),
            ("p_adjusted", gap["p_adjusted"]),
            ("correlation", gap["correlation"]),
            ("unpaired", gap["unpaired"]["mean"]),
            ("unpaired_low", gap["unpaired"]["low"]),
            ("unpaired_high", gap["unpaired"]["high"]),
            ("unpaired_p", gap["unpaired"]["p"]),
            *((f"resampled_{end}", (gap["resampled"] or {}).get(end)) for end in ("low", "high", "count")),
        ):
            assert (float(line[column]) if line[column] else None) == value, column
        assert (line["verdict"], int(line["comparisons"])) == (gap["verdict"], gap["comparisons"])
        assert shown[said["name"]][-1] == scores[said["name"]][-1] == gap["verdict"]
        assert line["resampled_over"] == ("" if gap["resampled"] is None else "sequences")
        assert (line["over"], gap["over"]) == ("seeds", "seeds")
        assert shown[said["name"]][7] == ("-" if gap["p"] is None else p_value(gap["p"]))
    assert [line["comparisons"] for line in csv_rows] == ["", "2", "2", "1", "1"]


def test_the_legend_says_how_many_comparisons_there_are() -> None:
    said = legend(measured())
    assert any(text.startswith("2 comparisons: verdicts are adjusted by Holm") for text in said)
    assert any("correlation of the pairs is about 0" in text for text in said)
    assert any("one run (or one pair) has no interval" in text for text in said)
    assert any("the interval over sequences is a bootstrap: 10,000 draws of the 4 sequences" in text for text in said)
    assert "4 sequences are few: the interval over them is too narrow" in said


def test_one_comparison_is_not_adjusted_and_not_said_to_be(comparison: Comparison) -> None:
    said = " ".join(legend(comparison))
    assert "Holm" not in said
    free = Difference(0.02, 0.01, NAN, "none", 6, paired=False, unpaired=Interval(0.02, 0.01, 0.01))
    alone = Comparison(**{**vars(comparison), "rows": (row("u", metrics(0.5, 0.5, NAN), gap=free),)})
    assert "paired by seed and fold where they pair" in " ".join(legend(alone))
    assert "correlation" not in " ".join(legend(alone))
    assert "one run" not in " ".join(legend(alone))
