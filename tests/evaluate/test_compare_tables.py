"""Formats of a comparison: what is marked, what is empty, and that all say the same."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest

from kdcache.evaluate import Metrics
from kdcache.evaluate.compare_tables import class_table, cost_table, legend, score_table, to_csv, to_markdown, to_text
from kdcache.evaluate.comparison import Comparison, Row, RunScore
from kdcache.evaluate.cost import Cost, Latency
from kdcache.evaluate.spread import Difference, Spread

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
        runs=tuple(RunScore(f"{name}-{seed}", seed, None, one, reused=False) for seed, one in enumerate(runs)),
        miou=Spread.of(one.miou for one in runs),
        macc=Spread.of(one.macc for one in runs),
        aacc=Spread.of(one.aacc for one in runs),
        iou=tuple(Spread.of(one.iou[place] for one in runs) for place in range(3)),
        difference=gap,
        class_differences=(gap,) * 3 if gap else (),
        cost=Cost((48, 64), 2_520_000, 1_000_000_000, latency),
        **{"teacher": False, "baseline": False, **more},
    )


@pytest.fixture
def comparison() -> Comparison:
    gap = Difference("none", 0.0178, 0.02, 2, paired=True)
    rows = (
        row("none", metrics(0.8, 0.3668, NAN), baseline=True),
        row("kl", metrics(0.7, 0.4, NAN), metrics(0.9, 0.4, NAN), gap=gap),
        row("at", metrics(0.5, 0.1, NAN), gap=Difference("none", -0.2834, NAN, 1, paired=True), latency=None),
        row("teacher", metrics(0.95, 0.9, NAN), teacher=True),
    )
    colours = ((1, 2, 3),) * 3
    return Comparison("camvid", "val", "ab" * 32, 233, False, "best", NAMES, colours, rows, ("a note",))


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_scores_and_distances(comparison: Comparison) -> None:
    header, rows = score_table(comparison)
    assert header[:5] == ["row", "runs", "mIoU %", "mAcc %", "aAcc %"]
    assert rows[0] == ["none (baseline)", "1", "58.34", "58.34", "**90.00**", "-", "-", "-"]
    kl = [
        "kl",
        "2",
        "**60.00 ± 7.07**",
        "**60.00 ± 7.07**",
        "**90.00 ± 0.00**",
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
    assert len(tables) == 3
    assert all(len(set(map(len, map(cells, table.splitlines())))) == 1 for table in tables)
    assert cells(tables[1].splitlines()[0])[2] == "car|bus"
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
