"""From real runs to the page: which images it shows, how small they are, what is refused before anything is written."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

from kdcache.analysis.compare import CompareOptions, compare
from kdcache.analysis.per_image import MIOU
from kdcache.analysis.report import ReportOptions, make_report, write_report
from kdcache.analysis.report.page import page
from kdcache.analysis.report.samples import (
    RowPrediction,
    Sample,
    choose_samples,
    encode_classes,
    encode_image,
    encode_wrong,
    score_first_runs,
    shown_size,
)
from kdcache.analysis.report.sections import pictures
from kdcache.analysis.report.stores import CacheSize
from kdcache.analysis.runs import find_runs
from kdcache.analysis.stored_evaluations import EvalSettings
from kdcache.analysis.visualise import Drawing
from kdcache.data import fold_alone, open_split
from kdcache.errors import KDCacheError, MismatchError, RecipeError
from kdcache.metrics.figures import VOID_RGB, error_colour

QUICK = CompareOptions(repeats=0)
COLOURS = ((128, 64, 128), (0, 0, 142))


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def three(world: Path, derive: Callable[..., Path]) -> Path:
    """runs/ of two rows, and teacher/ beside it."""
    derive("kl-0", method="kl", noise=0.05)
    derive("kl-1", of="none-1", method="kl", noise=0.05)
    shutil.move(derive("teacher", noise=0.02), world / "teacher")
    return world


def test_a_page_shows_a_figure(three: Path) -> None:
    path = three / "curve.png"
    Image.new("RGB", (8, 8), (10, 20, 30)).save(path)
    options = ReportOptions(QUICK, samples=0, figure=path)
    make_report([three / "runs"], None, None, three / "page.html", options)
    text = (three / "page.html").read_text(encoding="utf-8")
    (shown,) = re.findall(r'class="curve" src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(shown) == path.read_bytes()
    assert '<a href="#curve">' in text


@pytest.mark.parametrize(("content", "problem"), [(None, "Cannot read"), (b"GIF89a", "not a PNG")])
def test_a_figure_is_a_png(three: Path, content: bytes | None, problem: str) -> None:
    path = three / "curve.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=problem):
        make_report([three / "runs"], None, None, three / "page.html", ReportOptions(QUICK, figure=path))
    assert not (three / "page.html").exists()


def test_a_page_of_runs(three: Path) -> None:
    told: list[str] = []
    options = ReportOptions(
        replace(QUICK, teacher=str(three / "teacher")), title="Made <here>", samples=1, command="kdcache report runs"
    )
    out = three / "new" / "page.html"
    found = make_report([three / "runs"], None, None, out, options, lambda what, done, total: told.append(what))
    text = out.read_text(encoding="utf-8")
    assert [row.name for row in found.rows] == ["kl", "none", "teacher"]
    for part in ("<h1>Made &lt;here&gt;</h1>", "kdcache report runs", "Judged on", "2 runs"):
        assert part in text
    assert text.count('<article class="card sample"') >= 2
    assert text.count(' data-layer="row') == 3 * text.count(' data-layer="image"')
    assert "Validation mIoU" in text
    assert "writing the page" in told
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def rows_of(table: str) -> list[list[str]]:
    """Return the text of the cells of a table, line by line."""
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in line] for line in cells]


def section(text: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}".*?</section>', text, re.DOTALL)
    return str(found)


def test_a_page_says_what_training_cost_and_what_the_cache_saved(three: Path) -> None:
    asked: list[str] = []

    def size_of(place: str) -> CacheSize:
        asked.append(place)
        return CacheSize(12, 3 * 2**20)

    for name, seconds in {"kl-0": 100, "kl-1": 90, "none-0": 7, "none-1": 9}.items():
        folder = three / "runs" / name
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"iterations": 5, "seconds": seconds}))
        recipe = tomllib.loads((folder / "recipe.toml").read_text())
        (folder / "recipe.toml").write_text(tomli_w.dumps(recipe | {"batch-size": 4, "cache": "some/c.zarr"}))
    make_report([three / "runs"], None, None, three / "p.html", ReportOptions(QUICK, samples=0, size_of_cache=size_of))
    cost = section((three / "p.html").read_text(encoding="utf-8"), "cost")
    lines = {line[0]: line[1:] for line in rows_of(cost)[1:]}
    assert lines["kl"] == ["1 min 35 s", "20", "20"]
    assert lines["none"][2] == "0"
    assert "The cache c.zarr holds 12 records in 3.0 MiB, 256.0 KiB each." in cost
    assert "seen 40 images" in cost
    assert "12 images went through it once" in cost
    assert len(asked) == 1


def test_a_page_shows_which_class_is_taken_for_which(three: Path) -> None:
    found = make_report([three / "runs"], None, None, three / "p.html", ReportOptions(QUICK, samples=1))
    shown = section((three / "p.html").read_text(encoding="utf-8"), "confusion")
    runs = find_runs([three / "runs"])
    first = score_first_runs(found, runs, open_split(found.data, found.split), EvalSettings(), quiet)
    tables = re.findall(r"<table.*?</table>", shown, re.DOTALL)
    assert len(tables) == 2
    order = sorted(first.models, key=lambda model: -found.rows[model[0]].miou.mean)
    for table, (_, _, model) in zip(tables, order, strict=True):
        header, *lines = rows_of(table)
        counts = model.scores.confusion.counts.numpy()
        names = model.scores.confusion.class_names
        for name, *cells in lines:
            own = counts[names.index(name)]
            assert dict(zip(header[1:], map(float, cells), strict=True)) == pytest.approx(
                {other: 100 * own[names.index(other)] / own.sum() for other in header[1:]}, abs=0.051
            )


def test_images_are_the_same_through_all_rows(three: Path) -> None:
    found = compare([three / "runs"], options=QUICK)
    runs = find_runs([three / "runs"])
    split = open_split(found.data, found.split)
    samples = choose_samples(found, score_first_runs(found, runs, split, EvalSettings(), quiet), 2, quiet)
    assert [sample.why for sample in samples[:4]] == ["best 1", "best 2", "worst 1", "worst 2"]
    assert len({sample.sample for sample in samples}) == len(samples)
    assert samples[0].mean >= samples[1].mean >= samples[3].mean >= samples[2].mean
    for sample in samples:
        assert [one.place for one in sample.predictions] == [0, 1]
        assert sample.mean == pytest.approx(np.mean([one.miou for one in sample.predictions]))
        label = split.label(split.ids.index(sample.sample))
        assert label is not None
        assert set(sample.present) == set(np.unique(label).tolist()) - {255}
        shown = np.asarray(Image.open(io.BytesIO(sample.label)).convert("RGB"))
        table = np.array([*split.classes.colours, *[VOID_RGB] * (256 - len(split.classes))], np.uint8)
        assert (shown == table[label]).all()
        for one in sample.predictions:
            wrong = np.asarray(Image.open(io.BytesIO(one.wrong)).convert("RGBA"))
            predicted = np.asarray(Image.open(io.BytesIO(one.classes)).convert("RGB"))
            assert ((wrong[..., 3] > 0) == ((predicted != table[label]).any(-1) & (label != 255))).all()
            assert (wrong[wrong[..., 3] > 0][:, :3] == error_colour(split.classes.colours)).all()


def test_every_class_of_the_data_is_shown(three: Path) -> None:
    """As far as the count goes: a class in the label of no best or worst image gets an image of its own."""
    found = compare([three / "runs"], options=QUICK)
    split = open_split(found.data, found.split)
    labels = [set(np.unique(split.label(number)).tolist()) - {255} for number in range(len(split))]  # type: ignore[arg-type]
    first = score_first_runs(found, find_runs([three / "runs"]), split, EvalSettings(), quiet)
    samples = choose_samples(found, first, 3, quiet)
    assert {place for sample in samples for place in sample.present} == set().union(*labels)


def test_with_own_folds_no_image_was_trained_on(world: Path, derive: Callable[..., Path]) -> None:
    for fold in (0, 1):
        derive(f"kl-{fold}", method="kl", noise=0.05, fold=f"{fold}/2")
        derive(f"plain-{fold}", fold=f"{fold}/2")
    runs = [world / "runs" / name for name in ("kl-1", "kl-0", "plain-0", "plain-1")]
    found = compare(runs, str(world / "data"), "train", replace(QUICK, own_fold=True))
    split = open_split(found.data, "train")
    first = score_first_runs(found, find_runs(runs), split, EvalSettings(), quiet)
    samples = choose_samples(found, first, 6, quiet)
    assert {sample.sample for sample in samples} == set(fold_alone(split, 1, 2).ids)
    assert all(len(sample.predictions) == 2 for sample in samples)


def test_pictures_are_small_and_true() -> None:
    ids = np.zeros((700, 1000), np.uint8)
    ids[100:400, 200:600] = 1
    ids[:50] = 255
    assert shown_size(700, 1000) == (448, 640)
    assert shown_size(48, 64) == (48, 64)
    assert shown_size(1, 5000) == (1, 640)
    picture = encode_classes(ids, COLOURS, (448, 640))
    shown = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    assert shown.shape == (448, 640, 3)
    assert {tuple(colour) for colour in shown.reshape(-1, 3).tolist()} == {*COLOURS, VOID_RGB}
    assert len(picture) < 4000
    photo = encode_image(np.random.default_rng(0).integers(0, 255, (700, 1000, 3), dtype=np.uint8), (448, 640))
    assert Image.open(io.BytesIO(photo)).size == (640, 448)
    nothing = np.asarray(Image.open(io.BytesIO(encode_wrong(ids, ids, COLOURS, (448, 640)))).convert("RGBA"))
    assert not nothing[..., 3].any()


def test_five_rows_and_six_images_are_small(three: Path) -> None:
    """Photos of a street and ragged classes: the page stays far below 6 MB."""
    rng = np.random.default_rng(0)
    found = compare([three / "runs" / "kl-0"], options=QUICK)
    coarse = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(coarse).resize((1280, 960), Image.Resampling.BICUBIC))
    photo = np.clip(photo + rng.normal(0, 12, photo.shape), 0, 255).astype(np.uint8)
    ids = np.asarray(Image.fromarray(rng.integers(0, 7, (60, 80), dtype=np.uint8)).resize((1280, 960), 0))
    size = shown_size(960, 1280)
    classes, wrong = encode_classes(ids, COLOURS, size), encode_wrong(ids, np.roll(ids, 9), COLOURS, size)
    rows = tuple(replace(found.rows[0], name=f"row {place}") for place in range(5))
    predictions = tuple(RowPrediction(place, 0.5, (0.5,) * 7, classes, wrong) for place in range(5))
    samples = [
        Sample(f"s{n}", f"best {n}", MIOU, 0.5, size, (0, 1), encode_image(photo, size), classes, predictions)
        for n in range(6)
    ]
    text = page(replace(found, rows=rows), find_runs([three / "runs" / "kl-0"]), title="A", samples=samples)
    assert len(text.encode()) < 4_000_000


def test_the_first_slider_is_baseline_against_student_and_many_classes_fold(three: Path) -> None:
    found = compare([three / "runs"], options=QUICK)
    ids = np.zeros((4, 8), np.uint8)
    classes, wrong = encode_classes(ids, COLOURS, (4, 8)), encode_wrong(ids, ids, COLOURS, (4, 8))
    image = encode_image(np.zeros((4, 8, 3), np.uint8), (4, 8))
    names = tuple(f"class-{number}" for number in range(30))
    found = replace(found, class_names=names, class_colours=((1, 2, 3),) * 30)
    predictions = tuple(RowPrediction(place, 0.5, (0.5,) * 30, classes, wrong) for place in range(2))
    samples = [Sample("s", "best 1", MIOU, 0.5, (4, 8), tuple(range(30)), image, classes, predictions)]
    text = str(pictures(found, samples, None))
    places = {row.name: place for place, row in enumerate(found.rows)}
    checked = dict(re.findall(r'name="(left|right)" value="(\w+)" checked', text))
    assert checked == {"left": f"row{places['none']}", "right": f"row{places['kl']}"}
    shown, _, folded = text[: text.index('class="samples"')].partition("<summary>6 more classes</summary>")
    assert shown.count('data-class="') == 1 + 24
    assert folded.count('data-class="') == 6
    assert "more classes" not in str(pictures(found, [replace(samples[0], present=(0, 1))], None))


def test_a_page_is_written_whole_or_not_at_all(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare([three / "runs"], options=QUICK)
    out = three / "pages" / "page.html"
    out.parent.mkdir()
    out.write_text("an earlier page")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="No space"):
            write_report(found, [], out)
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert out.read_text() == "an earlier page"
    assert write_report(found, [], str(out)) == out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def other_suffix(root: Path) -> ReportOptions:
    return ReportOptions(QUICK)


def no_audit(root: Path) -> ReportOptions:
    return ReportOptions(QUICK, audits=(root / "nowhere.json",))


def pictures_over_data(root: Path) -> ReportOptions:
    return ReportOptions(QUICK, drawing=Drawing(root / "data"))


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (other_suffix, "page.pdf", "page.pdf"),
        (other_suffix, "data", "is a folder"),
        (no_audit, "page.html", "nowhere.json does not exist"),
        (pictures_over_data, "page.html", "data holds something else"),
    ],
)
def test_what_is_refused_before_anything_is_evaluated(
    world: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], ReportOptions], name: str, words: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("compared")

    monkeypatch.setattr("kdcache.analysis.report.build.compare", never)
    with pytest.raises(RecipeError, match=words):
        make_report([world / "runs"], None, None, world / name, make(world))
    assert not (world / "page.html").exists()


def test_an_audit_of_another_teacher(world: Path) -> None:
    classes = [{"name": "heaven"}]
    content = {"images": 1, "labelled": 0, "calibration": None, "confused": []}
    kept = [{"threshold": 0.5, "share": 1.0, "precision": None, "classes": classes}]
    (world / "audit.json").write_text(json.dumps({**content, "pseudo_labels": kept}))
    options = ReportOptions(QUICK, samples=0, audits=(world / "audit.json",))
    with pytest.raises(MismatchError, match="heaven"):
        make_report([world / "runs"], None, None, world / "page.html", options)
    assert not (world / "page.html").exists()


def test_a_log_that_is_none(world: Path) -> None:
    (world / "runs/none-0/metrics.jsonl").write_text("no JSON\n{}\n")
    with pytest.raises(KDCacheError, match=r"metrics\.jsonl"):
        make_report([world / "runs"], None, None, world / "page.html", ReportOptions(QUICK, samples=0))
    assert not (world / "page.html").exists()


def test_runs_of_which_only_weights_are_left(world: Path) -> None:
    """Neither log nor recipe: scores and pictures are all there is."""
    for run in (world / "runs").iterdir():
        for name in ("metrics.jsonl", "recipe.toml", "environment.json", "result.json"):
            (run / name).unlink()
    out = world / "page.html"
    make_report([world / "runs"], str(world / "data"), "val", out, ReportOptions(QUICK, samples=1))
    text = out.read_text(encoding="utf-8")
    assert "none-0" in text
    assert 'id="training"' not in text
    assert 'id="pictures"' in text
