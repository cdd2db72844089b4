"""The page of a comparison: what it says, what it escapes, that it is whole; judged by parsers that are not ours."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.analysis.comparison import Comparison, Gaps, Row, RunScore
from kdcache.analysis.report.charts import Line, line_chart, thin
from kdcache.analysis.report.page import page
from kdcache.analysis.report.sections import lost_classes
from kdcache.analysis.report.summary import headline, ticks
from kdcache.analysis.report.training import judge, read_norms
from kdcache.analysis.runs import Entry
from kdcache.analysis.statistics import Difference, Interval, Resampled, Spread, adjust
from kdcache.metrics import Metrics, TaskMetrics
from kdcache.metrics.cost import Cost, Latency
from kdcache.run_folder import Run
from kdcache.tasks import SEGMENTATION

CLASSES = ("road", "car", "sky")
NAN = math.nan
VOID = {"img", "input", "meta"}
HOSTILE = "</script><script>owned=1</script>\"'><img src=x onerror=owned=1>&amp;{0}%s"


class Parsed(HTMLParser):
    """Every element with its attributes, the text outside of scripts, and what was not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += self._open
        self.text = " ".join(self.words)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if len(dict(attributes)) < len(attributes):
            self.wrong.append(f"{name} has an attribute twice")
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        if not self._open or self._open.pop() != name:
            self.wrong.append(name)

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.words.append(data)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def row(
    name: str,
    iou: Sequence[float],
    gap: float | None = None,
    half: float = NAN,
    *,
    baseline: str = "none",
    **about: bool,
) -> Row:
    """A row of one run."""
    known = [value for value in iou if not math.isnan(value)]
    miou = sum(known) / len(known) if known else NAN
    metrics = Metrics(CLASSES, tuple(iou), tuple(iou), (60, 30, 10), miou, miou, 0.9)
    score = RunScore(f"runs/{name}", 0, None, TaskMetrics(metrics), reused=False)
    gaps = () if gap is None else tuple(Difference(gap, half, NAN, baseline, 2, paired=True) for _ in CLASSES)
    return Row(
        name=name,
        model="kdcache:tiny",
        differs={"method": name, "term": [{"kind": "at"}]},
        runs=(score,),
        scores={
            SEGMENTATION: {
                "miou": Spread(miou, NAN, 1),
                "macc": Spread(0.5, 0.01, 1),
                "aacc": Spread(0.9, NAN, 1),
            }
        },
        iou=tuple(Spread(value, NAN, 1) for value in iou),
        gaps={SEGMENTATION: Gaps(gaps[0] if gaps else None)},
        class_differences=gaps,
        cost=Cost((48, 64), 140_000, 2_000_000_000, Latency(3.0, 0.1, 2.9, 10, 2, "a processor", 1)),
        teacher=about.get("teacher", False),
        baseline=about.get("is_baseline", False),
    )


ROWS = (
    row("kl", (0.9, 0.5, 0.4), 0.02, 0.01),
    row("at", (0.8, 0.6, 0.3), -0.01, 0.05),
    row("none", (0.85, 0.45, 0.44), is_baseline=True),
    row("teacher", (0.95, 0.7, 0.41), 0.1, teacher=True),
)


def comparison(rows: Sequence[Row] = ROWS, **changes: object) -> Comparison:
    found = Comparison(
        data="streets",
        split="val",
        data_sha256="0123456789abcdef" * 4,
        images=16,
        own_fold=False,
        weights="best",
        class_names=CLASSES,
        class_colours=((128, 64, 128), (0, 0, 142), (70, 130, 180)),
        rows=tuple(rows),
        notes=(),
    )
    return replace(found, **changes)


def parsed(found: Comparison, runs: Sequence[Entry] = (), title: str = "A page") -> Parsed:
    return Parsed(page(found, runs, title=title))


def write_run(
    folder: Path, lines: Sequence[dict[str, object]] = (), settings: str = 'verb = "train-student"\n'
) -> Entry:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.toml").write_text(settings)
    (folder / "environment.json").write_text('{"python": "3.12.1", "packages": {"torch": "2.11.0"}}')
    return Entry(f"runs/{folder.name}", Run(folder), {"verb": "train-student", "seed": 0})


def log(kl: float) -> list[dict[str, object]]:
    """A log of 40 iterations whose KL gradient is so many times that of CE."""
    lines: list[dict[str, object]] = [{"kind": "gradients", "step": 1, "ce": 2.0, "kl": 2 * kl}]
    for step in (10, 20, 30, 40):
        rates = {"lr": 0.1, "images_per_second": 50.0, "wait_share": 0.1}
        lines.append({"kind": "train", "step": step, "loss": 2 / step, "ce": 1 / step, "kl": 1 / step, **rates})
        lines.append({"kind": "validation", "step": step, "miou": 0.01 * step, "macc": 0.5, "aacc": 0.9})
    return lines


def test_the_page_is_whole(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, log(0.5)) for name in ("kl", "at", "none", "teacher")]
    text = page(comparison(), runs, title="A page")
    found = Parsed(text)
    assert not found.wrong
    names = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert max(Counter(names).values()) == 1
    links = [str(link["href"]) for link in found.named("a")]
    assert {link.removeprefix("#") for link in links} <= set(names)
    assert len(links) == 7  # no pictures
    titles = {str(part["aria-labelledby"]) for part in found.named("section")}
    assert titles <= set(names)
    assert len(found.named("h1")) == 1
    assert all("alt" in image for image in found.named("img"))
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 5  # mIoU, loss, its two parts, speed
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).get("aria-label")
    for _, attributes in found.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:"))
    assert "url(" not in text
    assert "@import" not in text


def test_what_is_no_result_says_so_below_the_title() -> None:
    for data, smoke, wanted in (("camvid", False, 0), ("scenes", False, 1), ("camvid", True, 1)):
        found = parsed(comparison(data=data, smoke=smoke))
        notes = [attributes for attributes in found.named("p") if attributes.get("class") == "banner"]
        assert [note["role"] for note in notes] == ["note"] * wanted
        before, _, _ = found.text.partition("Did distillation help?")
        assert ("nothing about any data set, model or method" in before) == bool(wanted)


def test_numbers_for_programs() -> None:
    found = comparison((*ROWS, row("empty", (NAN, NAN, NAN))), notes=("</script>",))
    block = re.search(r'<script type="application/json" id="comparison">(.*?)</script>', page(found, [], title="A"))
    assert block is not None
    assert "<" not in block[1]
    assert json.loads(block[1]) == found.to_json()


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    line = log(0.5)[1]
    toml = f"note = {json.dumps(HOSTILE)}\n"
    run = write_run(
        tmp_path / "kl", [{**line, HOSTILE: 1.0}, {"kind": "gradients", "step": 1, "ce": 1, HOSTILE: 9e3}], toml
    )
    (tmp_path / "kl" / "environment.json").write_text(json.dumps({"python": HOSTILE, "packages": {HOSTILE: HOSTILE}}))
    run = replace(run, settings={"verb": HOSTILE})
    rows = [
        replace(one, name=HOSTILE + one.name, model=HOSTILE, differs={HOSTILE: HOSTILE, "list": [HOSTILE]})
        for one in ROWS
    ]
    rows[0] = rows[0].with_gaps(SEGMENTATION, baseline=replace(rows[0].difference, baseline=HOSTILE))
    rows[1] = replace(rows[1], runs=(replace(rows[1].runs[0], run=HOSTILE, fold=HOSTILE),))
    names = tuple(f"{HOSTILE}{number}" for number in range(3))
    found = comparison(rows, class_names=names, notes=(HOSTILE,), data=HOSTILE, split=HOSTILE)
    safe, plain = parsed(found, [run], title=HOSTILE), parsed(comparison(), [write_run(tmp_path / "plain", log(1))])
    assert not safe.wrong
    assert len(safe.named("script")) == len(plain.named("script")) == 2
    assert not safe.named("img")
    assert not [name for _, attributes in safe.elements for name in attributes if name.startswith("on")]
    assert safe.text.count(HOSTILE) > 60


def test_only_its_own_script_runs() -> None:
    """The policy names the digest of the script, as a browser computes it."""
    import base64
    import hashlib

    text = page(comparison(), [], title="A")
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(str(one["content"]) for one in Parsed(text).named("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "</" not in script


@pytest.mark.parametrize(
    ("gap", "half", "answer", "words"),
    [
        (0.02, 0.01, "Yes.", "2.00 points more than \u201cnone\u201d (95 % interval over seeds +1.00 to +3.00)"),
        (-0.02, 0.01, "No.", "2.00 points less than \u201cnone\u201d"),
        (0.02, 0.03, "Not shown.", "interval over seeds \u22121.00 to +5.00"),
        (0.02, NAN, "It looks so, but one run shows little.", "2.00 points more than \u201cnone\u201d."),
        (-0.02, NAN, "It does not look so, but one run shows little.", "2.00 points less"),
        (0.0, NAN, "No difference.", "as much as"),
        (0.00004, NAN, "No difference.", "as much as"),
        (-0.00004, 0.00001, "No difference.", "as much as"),
        (0.00001, 0.03, "No difference.", "as much as \u201cnone\u201d (95 % interval over seeds \u22123.00 to +3.00)"),
        (0.00006, NAN, "It looks so, but one run shows little.", "0.01 points more than"),
    ],
)
def test_the_headline_is_honest(gap: float, half: float, answer: str, words: str) -> None:
    rows = (row("kl", (0.9, 0.5, 0.4), gap, half), ROWS[2])
    found, sentence, _ = headline(comparison(rows))
    assert found == answer
    assert "The best row, \u201ckl\u201d, reaches 60.00 % mIoU" in sentence
    assert words in sentence


@pytest.mark.parametrize(
    ("low", "answer"),
    [
        (0.01, "It looks so, but one run shows little."),
        (-0.01, "Unknown: one run shows little, and the interval over images includes zero."),
    ],
)
def test_one_run_looks_like_nothing_where_other_images_may_turn_it_round(low: float, answer: str) -> None:
    kl = row("kl", (0.9, 0.5, 0.4), 0.02, NAN)
    gap = replace(kl.difference, resampled=Resampled("images", 30, low, 0.05))
    assert headline(comparison((kl.with_gaps(SEGMENTATION, baseline=gap), ROWS[2])))[0] == answer


def many(*gaps: tuple[float, float]) -> Comparison:
    """Rows kl0, kl1, ... of (difference, p), adjusted together; the first has the highest mIoU."""
    found = adjust(
        [
            Difference(
                gap, NAN if math.isnan(p) else abs(gap) * (0.5 if p < 0.05 else 2), p, "none", 3, True, adjusted=p
            )
            for gap, p in gaps
        ]
    )
    rows = [
        row(f"kl{place}", (0.9 - 0.01 * place, 0.5, 0.4), 0.0).with_gaps(SEGMENTATION, baseline=gap)
        for place, gap in enumerate(found)
    ]
    return comparison((*rows, ROWS[2]))


@pytest.mark.parametrize(
    ("gaps", "answer", "words"),
    [
        (((0.02, 0.01), (0.03, 0.02)), "Yes.", "2 above (2 comparisons, adjusted by Holm)."),
        (((0.02, 0.04), (0.03, 0.04)), "Not shown.", "2 within noise (2 comparisons"),
        (((0.02, 0.001), (0.01, 0.3), (-0.01, 0.4)), "Yes, in 1 of 3 rows.", "1 above, 2 within noise"),
        (((0.02, 0.3), (-0.03, 0.001)), "No, in 1 of 2 rows.", "1 below, 1 within noise"),
        (((-0.02, 0.001), (-0.03, 0.001)), "No.", "2 below"),
        (((0.02, 0.001), (-0.03, 0.001)), "For some rows.", "1 above, 1 below"),
        (((0.02, NAN), (0.03, NAN)), "It looks so, but one run shows little.", "2 of too few runs to tell."),
        (((-0.02, NAN), (-0.03, NAN)), "It does not look so, but one run shows little.", "2 of too few"),
        (((0.02, NAN), (-0.03, NAN)), "Unknown: the rows disagree, and one run shows little.", "2 of too few"),
        (((0.02, NAN), (0.0, NAN)), "Unknown: the rows disagree, and one run shows little.", "1 equal to it."),
        (((0.0, NAN), (0.00004, NAN)), "No difference.", "2 equal to it."),
        (((0.02, NAN), (0.01, 0.2)), "Not shown.", "1 within noise, 1 of too few"),
    ],
)
def test_the_answer_is_over_all_rows(gaps: tuple, answer: str, words: str) -> None:
    """A best row that is above noise by itself does not answer for the others."""
    found, sentence, _ = headline(many(*gaps))
    assert found == answer
    assert f"Of {len(gaps)} rows measured against a baseline: " in sentence
    assert words in sentence
    assert "The best row, \u201ckl0\u201d, reaches 60.00 % mIoU" in sentence


CONTROL = replace(row("control", (0.95, 0.6, 0.5), 0.06, 0.01), distilled=False)


@pytest.mark.parametrize(
    ("gap", "half", "answer", "words"),
    [
        (0.02, 0.01, "Yes.", "this much is the teacher's"),
        (0.005, 0.01, "Not shown.", "within noise, so that a gain may be the loss's own"),
        (-0.05, 0.01, "Not shown.", "the loss does better without the teacher"),
        (0.02, NAN, "Not shown.", "one run: unknown, so that"),
    ],
)
def test_a_gain_that_the_control_has_too_is_none_of_the_teacher(
    gap: float, half: float, answer: str, words: str
) -> None:
    best = ROWS[0].with_gaps(SEGMENTATION, control=Difference(gap, half, NAN, "control", 2, paired=True))
    found, sentence, more = headline(comparison((best, CONTROL, ROWS[2])))
    assert found == answer
    assert "\u201ckl\u201d, reaches" in sentence
    assert any(words in text for text in more)


def test_rows_above_their_baseline_but_not_their_control_are_counted() -> None:
    within = Difference(0.005, 0.01, NAN, "control", 2, paired=True)
    answer, sentence, _ = headline(
        comparison((ROWS[0].with_gaps(SEGMENTATION, control=within), row("at", (0.8, 0.6, 0.3), 0.02, 0.01), ROWS[2]))
    )
    assert answer == "Yes, in 1 of 2 rows."
    assert "2 above. Of those above, 1 is not above its control." in sentence


def test_a_control_does_not_answer_for_a_teacher() -> None:
    """Nor does a loss on labels: both are above the baseline here, and the one row with a teacher is not."""
    answer, sentence, _ = headline(comparison((ROWS[1], CONTROL, ROWS[2])))
    assert answer == "Not shown."
    assert "The best row, \u201cat\u201d" in sentence
    answer, sentence, _ = headline(comparison((CONTROL, ROWS[2])))
    assert answer == "Unknown."
    assert sentence.startswith("No row that has a baseline learnt from a teacher. The best row, \u201ccontrol\u201d")


def test_the_headline_speaks_of_the_best_row_and_its_company() -> None:
    _, sentence, more = headline(comparison())
    assert "\u201ckl\u201d" in sentence
    assert any("The best of several is chosen for its luck" in text for text in more)
    assert any("The teacher itself reaches 68.67 %, 8.67 points more" in text for text in more)


def collapsed(name: str, gap: float | None, place: int = 0, **about: bool) -> Row:
    """A row whose one run predicts one class alone, of 60, 30 and 10 labelled pixels."""
    counts = (60, 30, 10)
    iou = [0.0, 0.0, 0.0]
    iou[place] = counts[place] / 100
    acc = tuple(float(number == place) for number in range(3))
    metrics = Metrics(CLASSES, tuple(iou), acc, counts, sum(iou) / 3, 1 / 3, counts[place] / 100)
    found = row(name, iou, gap, **about)
    return replace(found, runs=(replace(found.runs[0], tasks=TaskMetrics(metrics)),))


@pytest.mark.parametrize(
    ("gap", "place", "answer"), [(0.0, 0, "No difference."), (-0.1, 1, "Unknown: nothing was learnt.")]
)
def test_two_collapsed_rows_are_said_to_be_collapsed(gap: float, place: int, answer: str) -> None:
    rows = (collapsed("kl", gap, place), collapsed("none", None, is_baseline=True))
    found, sentence, more = headline(comparison(rows))
    assert found == answer
    assert f"\u201ckl\u201d collapsed: it predicts {CLASSES[place]} alone (mIoU {(20, 10)[place]}.00 %)." in sentence
    assert "\u201cnone\u201d collapsed: it predicts road alone" in sentence
    assert "looks" not in found + sentence + " ".join(more)


def test_one_collapsed_row_is_named_beside_the_answer() -> None:
    found, sentence, more = headline(comparison((ROWS[0], collapsed("none", None, is_baseline=True))))
    assert found == "Yes."
    assert "collapsed" not in sentence
    assert more[0] == "\u201cnone\u201d collapsed: it predicts road alone (mIoU 20.00 %)."
    _, _, more = headline(comparison((collapsed("kl", -0.4), ROWS[0], ROWS[2])))
    assert more[0].startswith("\u201ckl\u201d collapsed")


def test_one_row_says_what_pairing_bought() -> None:
    free = Interval(0.02, 0.015, 0.03)
    gap = Difference(0.02, 0.01, 0.01, "none", 3, paired=True, correlation=0.1234, unpaired=free, adjusted=0.01)
    _, _, more = headline(comparison((ROWS[0].with_gaps(SEGMENTATION, baseline=gap), ROWS[2])))
    told = " ".join(more)
    assert "3 pairs of runs" in told
    assert "Not paired by seed, the interval is +0.50 to +3.50. The correlation of the pairs is 0.12" in told


def test_every_interval_says_what_it_spans() -> None:
    drawn = Resampled("sequences", 4, 0.005, 0.045)
    gap = Difference(0.02, 0.01, 0.01, "none", 3, paired=True, adjusted=0.01, over="seeds and folds", resampled=drawn)
    found = comparison((ROWS[0].with_gaps(SEGMENTATION, baseline=gap), ROWS[2]))
    _, sentence, _ = headline(found)
    assert "(95 % interval over seeds and folds +1.00 to +3.00, over sequences +0.50 to +4.50)" in sentence
    shown = parsed(found)
    for words in ("over sequences", "paired over seeds and folds, 95 %", "over sequences, 95 %", "4 sequences are few"):
        assert words in shown.text


def test_the_page_has_what_the_verdicts_stand_on() -> None:
    shown = parsed(many((0.02, 0.01), (0.03, 0.04)))
    for words in ("What the verdicts stand on", "p by Holm", "0.020", "2 comparisons", "verdicts are adjusted for 2"):
        assert words in shown.text


@pytest.mark.parametrize("rows", [ROWS[2:3], (ROWS[2], ROWS[3]), (row("kl", (NAN, NAN, NAN), NAN),)])
def test_without_a_baseline_nothing_is_claimed(rows: Sequence[Row]) -> None:
    found = comparison(rows)
    assert headline(found)[0] == "Unknown."
    shown = parsed(found)
    assert not shown.wrong
    assert "No row has a baseline" in shown.text


def test_one_row_without_teacher_and_log() -> None:
    found = parsed(comparison(ROWS[:1]))
    assert not found.wrong
    sections = [part["id"] for part in found.named("section")]
    assert sections == ["summary", "scores", "classes", "recipes"]
    assert "<strong>60.00" not in page(comparison(ROWS[:1]), [], title="A")  # a best of one says nothing


def test_what_is_not_known_is_not_a_number() -> None:
    rows = [row("kl", (0.9, NAN, NAN), NAN), row("none", (NAN, NAN, NAN), is_baseline=True), row("b", (0.9, NAN, 0.1))]
    rows[0] = replace(rows[0], cost=replace(rows[0].cost, latency=None))
    found = parsed(comparison(rows))
    assert not found.wrong
    assert found.text.count("does not occur") == 6
    for text in (found.text, json.dumps(found.elements)):
        assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)


def test_cells_sort_by_plain_numbers() -> None:
    text = page(comparison(), [], title="A")
    (table, *_) = re.findall(r'<table class="sortable">.*?</table>', text, re.DOTALL)
    lines = re.findall(r"<tr><th scope=\"row\".*?</tr>", table, re.DOTALL)
    values = [re.findall(r'<td data-value="([^"]+)"', line)[0] for line in lines]
    assert [float(value) for value in values] == pytest.approx([one.miou.mean for one in ROWS])
    assert [bool(re.search(r"<strong>60.00</strong>", line)) for line in lines] == [True, False, False, False]
    assert "<strong>68.67" not in table  # the teacher's
    assert table.count("<tbody") == 2
    as_good = replace(ROWS[0], name="teacher", teacher=True)
    text = page(comparison((*ROWS[:3], as_good)), [], title="A")
    (table, *_) = re.findall(r'<table class="sortable">.*?</table>', text, re.DOTALL)
    assert table.count("<strong>60.00</strong>") == 1


def test_where_the_teacher_loses() -> None:
    assert lost_classes(ROWS[3], ROWS[2]) == [2]
    found = parsed(comparison())
    assert "It loses in one class." in found.text
    assert "Of the students' 2 IoUs in these classes 1 is below the baseline." in found.text
    better = row("teacher", (0.95, 0.7, 0.9), 0.1, teacher=True)
    assert "at least as good in every one of 3 classes" in parsed(comparison((*ROWS[:3], better))).text
    unknown = row("teacher", (NAN, NAN, 0.1), teacher=True)
    assert lost_classes(unknown, ROWS[2]) == [2]


def test_terms_that_do_nothing_or_everything(tmp_path: Path) -> None:
    assert [judge(share) for share in (0.0099, 0.01, 10.0, 10.1)] == [
        "hardly does anything",
        None,
        None,
        "dominates the loss",
    ]
    runs = [write_run(tmp_path / name, log(share)) for name, share in (("kl", 0.004), ("at", 25.0), ("none", 0.5))]
    found = parsed(comparison(), runs)
    assert "kl: kl hardly does anything, for its gradient is 0.004 times that of cross-entropy" in found.text
    assert "at: kl dominates the loss, for its gradient is 25 times that of cross-entropy" in found.text
    assert found.text.count("in proportion") == 2  # the scale's name and the third row


def test_norms_without_cross_entropy(tmp_path: Path) -> None:
    lines = [
        {"kind": "gradients", "step": 1, "ce": 0.0, "kl": 1.0},
        {"kind": "gradients", "step": 2, "ce": None, "kl": 1.0},
    ]
    run = write_run(tmp_path / "kl", [*log(1.0)[1:], *lines])
    assert [step for step, _ in read_norms(Run(tmp_path / "kl"))] == [1, 2]
    assert "no cross-entropy beside it" in parsed(comparison(), [run]).text


def test_each_stream_has_curves_and_terms_of_its_own(tmp_path: Path) -> None:
    norms = {"a/loss": 2.5, "a/ce": 2.0, "a/kl": 1.0, "b/loss": 0.5, "b/ce": 0.5}
    losses = {"a/loss": 1.5, "a/ce": 1.0, "a/kl": 0.5, "b/loss": 0.3, "b/ce": 0.3}
    streams = [{"kind": "gradients", "step": 1, **norms}, {"kind": "train", "step": 10, "loss": 1.8, **losses}]
    text = parsed(comparison(), [write_run(tmp_path / "kl", streams)]).text
    for title in ("its part b/loss", "its part a/kl", "Gradient norm of a/loss", "Gradient norm of b/loss"):
        assert title in text
    assert "Gradient norm of a/kl" not in text
    assert "a/kl" in text.partition("What each term of the loss did")[2]
    assert "no cross-entropy beside it" not in text


def test_a_log_that_was_cut_short(tmp_path: Path) -> None:
    run = write_run(tmp_path / "kl", log(0.5))
    with (tmp_path / "kl" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "gradients", "ste')
    assert read_norms(Run(tmp_path / "kl")) == [(1, {"ce": 2.0, "kl": 1.0})]
    assert "What each term of the loss did" in parsed(comparison(), [run]).text


def test_the_command_that_runs_it_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a b" / "kl", log(0.5))
    found = parsed(comparison(), [run])
    assert "kdcache train-student --recipe 'kl/recipe.toml' --out 'kl-again'" in found.text
    assert str(tmp_path) not in found.text
    assert "2.11.0" in found.text


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-6, 1e6),
    most=st.integers(2, 8),
)
def test_ticks_are_few_and_round(low: float, span: float, most: int) -> None:
    found = ticks(low, low + span, most)
    assert len(found) <= most
    assert found == sorted(set(found))
    slack = 1e-6 * max(1.0, abs(low), span)
    assert all(low - slack <= value <= low + span + slack for value in found)


def test_long_lines_are_thinned_to_means() -> None:
    points = [(step, float(step % 2)) for step in range(1, 1001)]
    found = thin(points)
    assert len(found) == 200
    assert found[0] == (5, pytest.approx(0.6))
    assert found[-1][0] == 1000
    assert thin(points[:240]) == points[:240]


@pytest.mark.parametrize("points", [[(0, 0.0)], [(5, 3.0), (6, 3.0)], [(1, -1e-9), (2, 1e9)]])
def test_charts_of_hardly_anything(points: list[tuple[float, float]]) -> None:
    chart = line_chart("A line", [Line("one", "row-0", points)], "iteration", "%")
    drawing = ElementTree.fromstring(chart[chart.index("<svg") : chart.index("</svg>") + len("</svg>")])
    for line in drawing.iter("polyline"):
        for x, y in (map(float, at.split(",")) for at in line.get("points", "").split()):
            assert 0 <= x <= 420
            assert 0 <= y <= 250
    assert "nothing was logged" in line_chart("A line", [Line("one", "row-0", [])], "iteration")
