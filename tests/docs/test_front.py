"""The front pages: what the project is in one line, and figures, table and picture that are those of the results."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest

import kdcache
from kdcache.data import parse_fold

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FRONT = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/index.md")}
LINE = "Offline knowledge distillation for semantic segmentation"
STUDY = json.loads((RESULTS / "study-cpu.json").read_text(encoding="utf-8"))
JUDGED = json.loads((RESULTS / "test-split.json").read_text(encoding="utf-8"))
IMAGES = 367
"""Of CamVid's train split."""
SVG = "{http://www.w3.org/2000/svg}"


def test_one_line_says_what_the_project_is() -> None:
    for text in FRONT.values():
        assert text.startswith(f"# kdcache\n\n**{LINE}.**")
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["description"] == LINE
    assert f"site_description: {LINE}\n" in (ROOT / "mkdocs.yml").read_text()
    assert (kdcache.__doc__ or "").startswith(f"{LINE}.")


@pytest.mark.parametrize("text", FRONT.values(), ids=FRONT)
def test_step_costs_stand_next_to_their_processor(text: str) -> None:
    machine = json.loads((RESULTS / "step-cpu.json").read_text(encoding="utf-8"))["machine"]
    (row,) = re.findall(r"^.*times a step on labels only.*$", text, re.MULTILINE)
    assert f"({machine['cpu']}, {machine['cores']} cores)" in row


@pytest.mark.parametrize("text", FRONT.values(), ids=FRONT)
def test_front_pages_name_the_control_and_no_winner(text: str) -> None:
    words = " ".join(text.split())
    assert "the same loss with the labels in the teacher's place" in words
    assert "Nothing is measured on a GPU yet" in words
    assert not re.search(r"\bbeats?\b", words)


@pytest.mark.parametrize("text", FRONT.values(), ids=FRONT)
def test_the_break_even_is_of_the_study(text: str) -> None:
    views, steps, batch = 16, 4500, 8
    assert {(row["store"], row["iterations"]) for row in _runs("live, all")} == {(f"final-{views}-raw", steps)}
    words = " ".join(text.split())
    assert re.search(rf"\b{views} views of each\b.*?\b{views * IMAGES:,}\b", words)
    assert re.search(rf"{steps:,} steps of {batch} images\b.*?\b{steps * batch:,}\b", words)
    assert f"{IMAGES} training images" in words


def _runs(arm: str) -> list[dict[str, Any]]:
    return [row for row in STUDY["rows"] if (row["stage"], row["arm"]) == ("E6", arm)]


def score(arm: str, drive: str, labels: str) -> list[float]:
    """mIoU of the weights of an arm on a drive, one by block or the mean of the seeds."""
    names = [name for name in JUDGED["weights"] if re.fullmatch(rf"e\d-{arm}-{labels}-\w+(?:-0)?", name)]
    assert len(names) == 3
    values = [JUDGED["weights"][name][drive] for name in names]
    return values if labels.isdecimal() else [fmean(values)]


def _shown(values: list[float]) -> str:
    return ", ".join(_signed(value).lstrip("+") for value in values)


def _signed(value: float) -> str:
    """One digit after the point, half up."""
    return f"{value + 1e-9:+.1f}".replace("-", "\N{MINUS SIGN}")


@pytest.mark.parametrize("labels", ["46", "92", "all"])
def test_the_table_of_few_labels_is_of_the_test_split(labels: str) -> None:
    beginning = f"| all {IMAGES} frames" if labels == "all" else f"| {labels} labelled frames"
    (row,) = (line for line in FRONT["README.md"].splitlines() if line.startswith(beginning))
    cells = [cell.strip(" *") for cell in row.strip("|").split("|")][1:]
    plain, distilled = (score(arm, "Seq05VD", labels) for arm in ("plain", "distilled"))
    gains = [[d - p for p, d in zip(score("plain", drive, labels), score("distilled", drive, labels), strict=True)]
             for drive in ("Seq05VD", "0001TP")]  # fmt: skip
    assert cells[:2] == [_shown(plain), _shown(distilled)]
    assert cells[2:] == [", ".join(map(_signed, values)) for values in gains]


def test_the_table_of_methods_is_of_the_test_split() -> None:
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    table = page.partition("| labels | labels only, Seq05VD |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]]
    arms = [(drive, arm) for drive in ("Seq05VD", "0001TP") for arm in ("plain", "distilled")]
    expected = [[_shown(score(arm, drive, kept)) for drive, arm in arms] for kept in ("46", "92", "all", "apart")]
    assert rows == expected


def test_46_labels_with_distillation_equal_92_without() -> None:
    with_46, without_92 = fmean(score("distilled", "Seq05VD", "46")), fmean(score("plain", "Seq05VD", "92"))
    assert abs(with_46 - without_92) < 0.5
    words = " ".join(FRONT["README.md"].split())
    assert (
        f"with distillation scored {with_46:.1f} on average, and 92 labels without it scored {without_92:.1f}" in words
    )
    assert f"it scored {fmean(score('control', 'Seq05VD', 'all')):.1f}." in words
    words = " ".join(FRONT["docs/index.md"].split())
    assert f"With 46 labels, distillation scored {with_46:.1f}. Without it, 92 labels" in words
    assert f"the same score: {without_92:.1f} (" in words


def test_the_test_split_names_weights_and_commands_that_exist() -> None:
    weights = {path.stem for path in (RESULTS / "weights").glob("*.safetensors")}
    unseen = {name for name in weights if name.startswith("f1-")}  # kept for this drive, and not judged there yet
    assert len(unseen) == 2 * 6 * 3
    assert JUDGED["weights"].keys() == weights - unseen
    ids = [f"0001TP_{number:06}" for number in range(62)] + [f"Seq05VD_f{number:05}" for number in range(171)]
    for drive in ("Seq05VD", "0001TP"):
        words = shlex.split(JUDGED["commands"][drive])
        fold = parse_fold(words[words.index("--fold") + 1], words[words.index("--folds-by") + 1])
        judged = [sample for sample, held in zip(ids, fold.holds(ids), strict=True) if held]
        assert len(judged) == JUDGED["split"][drive]
        assert all(sample.startswith(drive) for sample in judged)


def test_the_picture_of_costs_is_of_the_results() -> None:
    """Its figures, and bars as long as they say."""
    root = ElementTree.parse(ROOT / "docs" / "assets" / "cost.svg").getroot()
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    bars = [float(bar.get("width", "0")) for bar in root.iter(f"{SVG}rect")][1:]
    seconds = [min(row["seconds"] for row in _runs(arm)) for arm in ("plain, all", "distilled, all", "live, all")]
    store = json.loads((RESULTS / "camvid-cpu.json").read_text(encoding="utf-8"))["store"]
    kib = [store[key] / 1024 for key in ("target_bytes_per_record", "full_resolution_bytes")]
    paired = json.loads((RESULTS / "live-replay-cpu.json").read_text(encoding="utf-8"))["cached_minus_live"]
    shown = [f"{value:,.0f}" for value in seconds] + [f"{value:.0f} KiB" for value in kib]
    assert [text for text in texts if re.fullmatch(r"[\d,]+(?: KiB)?", text)] == shown
    assert bars == pytest.approx([*(600 * s / seconds[2] for s in seconds), *(600 * k / kib[1] for k in kib)], abs=0.6)
    low, high = (f"{paired[end]:+.2f}".replace("-", "\N{MINUS SIGN}") for end in ("low", "high"))
    assert any(f"{paired['mean']:+.2f} points of mIoU" in text for text in texts)
    assert any(f"95 % interval {low} to {high} over five pairs" in text for text in texts)
    title = root.find(f"{SVG}title")
    assert title is not None
    for name, text in FRONT.items():
        assert f"![{title.text}](" in text, name
