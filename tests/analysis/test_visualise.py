"""Folders of pictures: which files there are, what is in them, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcache.analysis import gallery
from kdcache.analysis.compare import CompareOptions
from kdcache.analysis.comparison import Comparison, banner
from kdcache.analysis.gallery import folder_names, shorten
from kdcache.analysis.per_image import ImageScores
from kdcache.analysis.report import ReportOptions, make_report
from kdcache.analysis.runs import find_runs
from kdcache.analysis.stored_evaluations import EvalSettings
from kdcache.analysis.visualise import Drawing, score_run
from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.metrics import ConfusionMatrix
from kdcache.metrics.figures import (
    VOID_RGB,
    check_formats,
    colour_ids,
    draw_confusion,
    error_colour,
    file_part,
    panels,
    save_figure,
)

NAME = re.compile(r"(success_rank|failure_rank)(\d+)_([\w.-]+)_iou(\d\.\d{4})\.png")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Title and panels of every picture; nothing is drawn, which takes seconds."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def note(title: str, pictures: list[tuple[str, Any]], legend: list[tuple[str, Any]], layout: str = "grid") -> str:
        seen.append((title, {"legend": legend, **dict(pictures), "names": [name for name, _ in pictures]}))
        return title

    def touch(_: object, path: Path, above: str | None, formats: tuple[str, ...] = ("png",)) -> list[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        return [path]

    monkeypatch.setattr(gallery, "panels", note)
    for module in ("gallery", "visualise"):
        monkeypatch.setattr(f"kdcache.analysis.{module}.save_figure", touch)
    return seen


@pytest.fixture
def two(world: Path, derive: Callable[..., Path]) -> Path:
    """The world with a second row, of the run kl-0."""
    derive("kl-0", method="kl", noise=0.05)
    return world


def make(world: Path, *runs: str, compared: dict[str, Any] | None = None, **drawing: Any) -> Comparison:
    """Draw runs into out/, by a report."""
    options = ReportOptions(
        CompareOptions(repeats=0, **(compared or {})), samples=0, drawing=Drawing(world / "out", **drawing)
    )
    return make_report([world / "runs" / run for run in runs], None, None, world / "page.html", options)


def scores_of(world: Path, run: str = "none-0") -> ImageScores:
    (entry,) = find_runs([world / "runs" / run])
    return score_run(entry, run, open_split(world / "data", "val"), EvalSettings(), lambda *_: None).scores


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_real_pictures(world: Path) -> None:
    make(world, "none-0", num=1)
    made = [path for path in (world / "out").rglob("*.*") if path.name != "visualise.json"]
    names = {path.relative_to(world / "out").as_posix() for path in made}
    plain = {
        f"none-0/{name}" for name in ("confusion.png", "curves.png", "evaluation_metrics.txt", "iou_distribution.png")
    }
    assert names > plain
    assert len(names) == 7
    assert "out</code>" in (world / "page.html").read_text()
    for path in made:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert np.asarray(picture).std() > 5  # not an empty sheet


@pytest.mark.parametrize("smoke", [False, True])
def test_pictures_of_a_smoke_run_say_so(two: Path, monkeypatch: pytest.MonkeyPatch, smoke: bool) -> None:
    """Every picture, the text and the summary; none of them otherwise."""
    said: list[str | None] = []
    for module in ("gallery", "visualise"):
        monkeypatch.setattr(
            f"kdcache.analysis.{module}.save_figure", lambda figure, path, above, formats: said.append(above) or [path]
        )
    monkeypatch.setattr(gallery, "panels", lambda *given: None)
    make(two, "none-0", "kl-0", num=1, compared={"smoke": smoke})
    wanted = banner("data", smoke)
    assert said == [wanted] * (2 * (2 + 3 + 1) + 3)
    texts = [two / "out/none-0/evaluation_metrics.txt", two / "out/visualise.json"]
    assert [("Smoke run" in path.read_text()) for path in texts] == [smoke, smoke]


def test_a_banner_takes_room_of_its_own(tmp_path: Path) -> None:
    """The picture grows by red lines at its top; what was there stays as large."""

    def drawn(above: str | None) -> np.ndarray:
        figure = draw_confusion(np.eye(3, dtype=int), ["a", "b", "c"], "title")
        save_figure(figure, tmp_path / "x.png", above)
        with Image.open(tmp_path / "x.png") as picture:
            return np.asarray(picture.convert("RGB")).astype(int)

    plain, banned = drawn(None), drawn(banner("scenes", True))
    strip = len(banned) - len(plain)
    assert strip > 40
    assert banned.shape[1] == plain.shape[1]
    red = (banned[..., 0] - banned[..., 1:].max(2) > 100).any(1)
    assert red[:strip].any()
    assert not red[strip + 10 :].any()
    blue = [(picture[..., 2] - picture[..., 0] > 60).any(0).sum() for picture in (plain, banned)]
    assert abs(blue[0] - blue[1]) < 0.05 * blue[0]


def test_names_ranks_and_scores(world: Path, drawn: list) -> None:
    """As in the files' names: the best first, the worst first, and the scores those of the images."""
    make(world, "none-0", num=2)
    scores = {file_part(image.sample): image.miou for image in scores_of(world).images}
    order = sorted(scores, key=lambda sample: -scores[sample])
    for folder, expected in (("successful_cases", order[:2]), ("failure_cases", order[::-1][:2])):
        found = [NAME.fullmatch(name) for name in files(world / "out/none-0" / folder)]
        assert [match[3] for match in found if match] == expected
        assert [match[2] for match in found if match] == ["1", "2"]
        assert all(float(match[4]) == pytest.approx(scores[match[3]], abs=1e-4) for match in found if match)
    assert len(drawn) == 5  # and a contact sheet of them


def test_what_a_picture_shows(world: Path, drawn: list) -> None:
    make(world, "none-0", num=1, compared={"teacher": str(world / "runs/none-1")})
    (title, panel), _, (_, sheet) = drawn
    assert sheet["names"][0] == f"best 1: {title.partition(': ')[2].partition(chr(10))[0]}"
    assert panel["names"] == ["image", "ground truth", "teacher", "prediction", "overlay", "errors"]
    split = open_split(world / "data", "val")
    image = max(scores_of(world).images, key=lambda image: image.miou)
    pixels, label = split.image(image.number), split.label(image.number)
    assert f"mIoU {100 * image.miou:.2f} %" in title
    assert np.array_equal(panel["image"], pixels)
    assert np.array_equal(panel["ground truth"], colour_ids(label, split.classes.colours))
    said = panel["prediction"]
    wrong = (said != panel["ground truth"]).any(2) & (label != 255)
    assert np.array_equal((panel["errors"] == error_colour(split.classes.colours)).all(2), wrong)
    assert (panel["errors"][label == 255] == VOID_RGB).all()
    assert np.abs(panel["overlay"] - (0.45 * pixels + 0.55 * said)).max() <= 0.51
    assert not np.array_equal(panel["teacher"], said)
    assert [name for name, _ in panel["legend"]][-2:] == ["void", "wrong"]


@pytest.mark.parametrize("baseline", ["none", "none-0"])
def test_a_row_for_a_paper(two: Path, drawn: list, baseline: str) -> None:
    """The baseline, by the name of its row or of its run, is a panel of every picture but its own."""
    compared = {"teacher": str(two / "runs/none-1"), "baseline": baseline}
    make(two, "none-0", "kl-0", num=1, layout="row", compared=compared)
    pictures = [panel for _, panel in drawn if panel["names"][0] == "image"]
    found = [panel["names"] for panel in pictures[::2]]
    beside = ["image", "ground truth", "teacher"]
    assert [*beside, "none"] in found
    assert [*beside, "none", "kl"] in found
    both = pictures[-1]["names"]
    assert (len(both), both[:3]) == (5, beside)
    assert all("wrong" not in dict(panel["legend"]) for _, panel in drawn)


def test_formats_for_a_paper_lie_beside_the_png(tmp_path: Path) -> None:
    """One picture in all of them: text of SVG and PDF stays text, and the same call writes the same bytes."""
    files: dict[str, bytes] = {}
    for _ in range(2):
        pictures = [(name, np.full((48, 64, 3), place, np.uint8)) for place, name in enumerate(("image", "runs/kl"))]
        figure = panels("a title", pictures, [("road", (1, 2, 3))], "row")
        made = save_figure(figure, tmp_path / "x_iou0.5.png", formats=check_formats(["pdf", "svg"]))
        assert [path.name for path in made] == ["x_iou0.5.png", "x_iou0.5.svg", "x_iou0.5.pdf"]
        assert not files or files == {path.name: path.read_bytes() for path in made}
        files = {path.name: path.read_bytes() for path in made}
    svg = files["x_iou0.5.svg"].decode()
    assert all(f">{name}<" in svg for name in ("image", "runs/kl", "road"))
    assert "a title" not in svg
    assert files["x_iou0.5.pdf"].startswith(b"%PDF")
    with pytest.raises(RecipeError, match="Choose from: png,svg,pdf"):
        check_formats(["png", "jpg"])


def test_several_rows_side_by_side(two: Path, drawn: list) -> None:
    make(two, "none-0", "kl-0", "none-1", num=1)
    assert sorted(path.name for path in (two / "out").iterdir() if path.is_dir()) == ["kl-0", "none-0", "side_by_side"]
    one, other = (scores_of(two, run).images for run in ("none-0", "kl-0"))
    means = {file_part(a.sample): (a.miou + b.miou) / 2 for a, b in zip(one, other, strict=True)}
    order = sorted(means, key=lambda sample: -means[sample])
    found = [NAME.fullmatch(name) for name in files(two / "out/side_by_side")]
    assert [match[3] for match in found if match] == [order[-1], order[0], order[1]]
    assert all(float(match[4]) == pytest.approx(means[match[3]], abs=1e-4) for match in found if match)
    _, panel = drawn[-1]
    assert len(panel["names"]) == 6
    assert {name.partition(":")[0] for name in panel["names"]} >= {"none", "kl"}
    make(two, "none-0", num=1)
    assert files(two / "out/side_by_side") == []


def test_earlier_pictures_are_replaced_and_nothing_else(world: Path, drawn: list) -> None:
    make(world, "none-0", num=3)
    (world / "out/none-0/successful_cases/notes.txt").write_text("mine")
    make(world, "none-0", num=1)
    assert len(files(world / "out/none-0/successful_cases")) == 2
    assert "notes.txt" in files(world / "out/none-0/successful_cases")
    (world / "mine").mkdir()
    (world / "mine/thesis.txt").write_text("")
    for out, words in ((world / "mine", "holds something else"), (world / "mine/thesis.txt", "is not a folder")):
        with pytest.raises(RecipeError, match=words):
            Drawing(out).check_folder()


def test_a_kill_leaves_a_place_to_draw_into(world: Path, drawn: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """No new picture is there after it, and earlier pictures stay as they were."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = world / "out"
    for before in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr("kdcache.analysis.visualise.summary_json", killed)
            with pytest.raises(KeyboardInterrupt):
                make(world, "none-0")
        assert out.exists() == before
        assert [path.name for path in world.iterdir() if "partial" in path.name] == []
        (world / ".out.partial" / "of a kill").mkdir(parents=True)  # which cleans up nothing
        make(world, "none-0")
        assert (out / "visualise.json").is_file()
        assert not (out / "of a kill").exists()


def test_the_summary_and_the_text_say_what_was_found(world: Path, drawn: list) -> None:
    make(world, "none-0", num=0)
    scores = scores_of(world)
    summary = json.loads((world / "out/visualise.json").read_text())["runs"]["none-0"]
    assert summary["miou"] == scores.metrics.miou
    assert [one["miou"] for one in summary["images"]] == scores.known()
    text = (world / "out/none-0/evaluation_metrics.txt").read_text()
    assert f"mIoU {100 * scores.metrics.miou:.2f} %" in text
    assert f"mean {100 * np.mean(scores.known()):.2f} %" in text
    best = max(scores.images, key=lambda image: image.miou)
    assert f"  {100 * best.miou:.2f}  {best.sample}" in text
    rows = {line.split()[0]: line.split()[1] for line in text.splitlines() if line.count("  ") >= 3}
    assert rows["road"] == f"{100 * scores.metrics.iou[scores.metrics.class_names.index('road')]:.2f}"


def test_a_run_without_a_log_has_no_curves(world: Path, drawn: list) -> None:
    (world / "runs/none-0/metrics.jsonl").unlink()
    made = make(world, "none-0", num=0)
    assert "no curves" in made.notes[-1]
    assert not (world / "out/none-0/curves.png").exists()


def test_the_matrix_is_normalised_by_labels() -> None:
    confusion = ConfusionMatrix(("road", "car", "never", "ghost"))
    confusion.counts[0, 0], confusion.counts[0, 1], confusion.counts[1, 3] = 3, 1, 5
    (axes,) = draw_confusion(confusion.counts.numpy(), confusion.class_names, "a matrix").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["road", "car"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["road", "car", "ghost"]
    assert [text.get_text() for text in axes.texts] == ["75", "25", "100"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/kl", "runs/none"], ["kl", "none"]),
        (["a/kl", "b/kl"], ["a-kl", "b-kl"]),
        (["x/a/kl", "y/a/kl", "y/b/kl"], ["x-a-kl", "y-a-kl", "y-b-kl"]),
        (["kl", "./kl"], ["1-kl", "2-kl"]),
        (["runs/side_by_side"], ["runs-side_by_side"]),
        (["smp:unet@/w/best.pt"], ["best.pt"]),
    ],
)
def test_folders_are_told_apart(paths: list[str], names: list[str]) -> None:
    assert folder_names(paths) == names


@pytest.mark.parametrize(
    ("sample", "part"),
    [("a/b c:d", "a-b-c-d"), ("../x", "x"), ("", "sample"), ("öl", "l"), ("日本", "sample"), ("x" * 300, "x" * 100)],
)
def test_any_id_makes_a_file_name(sample: str, part: str) -> None:
    assert file_part(sample) == part


def test_a_long_name_keeps_its_end() -> None:
    assert shorten("abc", 10) == "abc"
    assert shorten("a" * 20 + "b", 10) == "..." + "a" * 6 + "b"
