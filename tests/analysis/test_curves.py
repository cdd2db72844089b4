"""The log of a training as curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcache.analysis.curves import draw_curves, read_curves
from kdcache.errors import RecipeError
from kdcache.metrics.figures import save_figure
from kdcache.run_folder import Run

BATCH = 4
SECONDS = {10: 2.0, 20: 3.0, 30: 7.0}  # since the start
WAITED = {10: 1.0, 20: 1.0, 30: 3.0}


def log(run: Path, *, kl: float | None = 0.5, more: str = "") -> Path:
    lines = []
    for step, seconds in SECONDS.items():
        speed = {"images_per_second": BATCH * step / seconds, "wait_share": WAITED[step] / seconds}
        lines.append({"kind": "train", "step": step, "loss": 1 / step, "ce": 1.0, "kl": kl, "lr": 0.1, **speed})
    lines.append({"kind": "validation", "step": 30, "miou": 0.3, "macc": None, "aacc": 0.5, "classes": []})
    lines.append({"kind": "gradients", "step": 1, "ce": 2.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
    return run


def test_the_log_has_means_and_the_curves_what_is_between(tmp_path: Path) -> None:
    found = read_curves(Run(log(tmp_path)))
    assert found is not None
    assert found.speed == [(10, pytest.approx(20)), (20, pytest.approx(40)), (30, pytest.approx(10))]
    assert found.waiting == [(10, pytest.approx(0.5)), (20, pytest.approx(0)), (30, pytest.approx(0.5))]
    assert found.losses["loss"] == [(10, 0.1), (20, 0.05), (30, pytest.approx(1 / 30))]
    assert list(found.losses) == ["loss", "ce", "kl"]
    assert found.scores == {"miou": [(30, 0.3)], "aacc": [(30, 0.5)]}


@pytest.mark.parametrize("kl", [0.0, None])
def test_a_part_that_is_always_zero_is_no_curve(tmp_path: Path, kl: float | None) -> None:
    found = read_curves(Run(log(tmp_path, kl=kl)))
    assert found is not None
    assert list(found.losses) == ["loss", "ce"]


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    assert read_curves(Run(log(tmp_path, more='{"kind": "tra'))) == read_curves(Run(log(tmp_path)))


def test_no_log_is_no_error(tmp_path: Path) -> None:
    assert read_curves(Run(tmp_path)) is None


@pytest.mark.parametrize("bad", ["no json\n", '{"step": 3}\n', "[1]\n", '{"kind": "train", "step": null}\n'])
def test_a_malformed_log_is_named(tmp_path: Path, bad: str) -> None:
    run = log(tmp_path)
    path = run / "metrics.jsonl"
    path.write_text(bad + path.read_text())
    with pytest.raises(RecipeError, match="line 1"):
        read_curves(Run(run))


@pytest.mark.parametrize("text", ["", '{"kind": "train", "step": 5, "loss": null}\n'])
def test_a_log_of_little_is_drawn(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    found = read_curves(Run(tmp_path))
    assert found is not None
    save_figure(draw_curves(found, "little"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_what_is_drawn(tmp_path: Path) -> None:
    found = read_curves(Run(log(tmp_path)))
    assert found is not None
    losses, scores, speed, waiting = draw_curves(found, "a run", BATCH).axes
    assert [line.get_label() for line in losses.lines] == ["loss", "ce", "kl"]
    assert [line.get_label() for line in scores.lines] == ["mIoU", "aAcc"]
    assert speed.get_title() == "speed; 200.0 ms per step of 4 images at the median"
    assert list(waiting.lines[0].get_ydata()) == pytest.approx([50, 0, 50])
    assert speed.get_ylim()[1] > 40


def test_no_two_lines_look_alike(tmp_path: Path) -> None:
    parts = {f"stream{number}/ce": 1.0 + number for number in range(11)}
    lines = [{"kind": "train", "step": step, "loss": 1.0, **parts} for step in (10, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = read_curves(Run(tmp_path))
    assert curves is not None
    drawn = draw_curves(curves, "title", BATCH).axes[0].lines
    assert len(drawn) == 12
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 12


def test_one_legend_names_the_scores_of_both_tasks(tmp_path: Path) -> None:
    scores = {"miou": 0.3, "macc": 0.4, "aacc": 0.5, "depth_rmse": 9.0}
    lines = [{"kind": "train", "step": 1, "loss": 1.0}, {"kind": "validation", "step": 1, **scores}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = read_curves(Run(tmp_path))
    assert curves is not None
    figure = draw_curves(curves, "title", BATCH)
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == [
        ["mIoU", "mAcc", "aAcc", "rmse of depth"]
    ]
