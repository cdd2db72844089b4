"""The course of a training from its `metrics.jsonl`: loss, validation, speed, waiting for data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdcache.metrics.figures import dress, new_figure
from kdcache.run_folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("#1b6ca8", "#d1661f", "#3a8a4d", "#8a4a9e", "#7a6a4a", "#c23b5a")
_STYLES = ("-", "--", ":", "-.")
"""Styles of lines, of which another begins where the colours are used up."""
_SCORES = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc", "ema_miou": "mIoU of the EMA"}
_DEPTH = {"depth_rmse": "rmse of depth", "ema_depth_rmse": "rmse of the EMA's depth"}
_BESIDE = {"kind", "step", "tasks", "loss", "lr", "images_per_second", "wait_share", "weak_view_seconds"}
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """The curves of a training's log. Each curve is a list of (step, value). Values that are not finite are left out.

    Attributes:
        losses: the total loss ("loss") and each loss term, by name. Terms that are always 0 are left out.
        scores: validation scores by name, from 0 to 1.
        speed: images per second since the log's previous line.
        waiting: the share (0 to 1) of this time that the training waited for data.
        depth: validation metrics of depth by name, rmse in metres.
    """

    losses: dict[str, Points]
    scores: dict[str, Points]
    speed: Points
    waiting: Points
    depth: dict[str, Points] = field(default_factory=dict)


def read_curves(run: Run) -> Curves | None:
    """Return the curves of a run's log, or None if the run does not have a log.

    Raises: RecipeError for an invalid log.
    """
    if (rows := run.metrics) is None:
        return None
    training = [row for row in rows if row["kind"] == "train"]
    names = list(dict.fromkeys(name for row in training for name in row if name not in _BESIDE))
    losses = {name: _points(training, name) for name in ("loss", *names)}
    validations = [row for row in rows if row["kind"] == "validation"]
    scores, depth = ({name: _points(validations, name) for name in names} for names in (_SCORES, _DEPTH))
    speed, waiting = _between(training)
    return Curves(
        losses={name: points for name, points in losses.items() if name == "loss" or any(value for _, value in points)},
        scores={name: points for name, points in scores.items() if points},
        speed=speed,
        waiting=waiting,
        depth={name: points for name, points in depth.items() if points},
    )


def draw_curves(curves: Curves, title: str, batch_size: int | None = None) -> "Figure":
    """Return a figure of four charts over the steps: losses, validation, speed and waiting for data.

    If `batch_size` is given, the title of the speed chart also has milliseconds per step.
    """
    figure = new_figure(12, 8, title)
    losses, scores, speed, waiting = figure.subplots(2, 2).flat
    many = len(curves.losses) > 2  # the total of one part is that part
    lines = curves.losses if many else {"loss": curves.losses.get("loss", [])}
    _draw(dress(losses, "loss and its parts, unweighted" if many else "loss", "step"), lines)
    in_percent = {
        _SCORES[name]: [(step, 100 * value) for step, value in points] for name, points in curves.scores.items()
    }
    beside = {_DEPTH[name]: points for name, points in curves.depth.items()}
    _draw(dress(scores, "validation", "step", "%" if in_percent or not beside else "m"), in_percent or beside)
    if in_percent and beside:
        _draw_beside(scores, beside)
    _draw(dress(speed, _speed_title(curves.speed, batch_size), "step", "images/s"), {"images/s": curves.speed})
    _draw(
        dress(waiting, "waiting for data", "step", "% of the time"),
        {"waiting": [(step, 100 * share) for step, share in curves.waiting]},
    )
    for axes, values in ((speed, curves.speed), (waiting, curves.waiting)):
        factor = 1.0 if axes is speed else 100.0
        axes.set_ylim(0, 1.12 * factor * max((value for _, value in values), default=0.0) or 1)
    for axes in (losses, scores, speed, waiting):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw(axes: "Axes", lines: dict[str, Points]) -> None:
    drawn = {name: points for name, points in lines.items() if points}
    for number, (name, points) in enumerate(drawn.items()):
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 30 else ""
        again, colour = divmod(number, len(_LINES))
        style = _STYLES[again % len(_STYLES)]
        axes.plot(steps, values, style, color=_LINES[colour], marker=marker, markersize=3.5, label=name)
    if len(drawn) > 1:
        many = len(drawn) > len(_LINES)
        axes.legend(fontsize=7 if many else 9, ncols=2 if many else 1, handlelength=3, framealpha=0.8, edgecolor="none")
    if not drawn:
        axes.text(0.5, 0.5, "nothing was logged", ha="center", va="center", transform=axes.transAxes, fontsize=10)


def _draw_beside(axes: "Axes", lines: dict[str, Points]) -> None:
    """Draw lines in metres over the same steps on a second axis at the right, with one legend for all lines."""
    right = axes.twinx()
    for number, (name, points) in enumerate(lines.items()):
        steps, values = zip(*points, strict=True)
        right.plot(steps, values, color=_LINES[-1 - number], linestyle="--", label=name)
    right.set_ylabel("m", fontsize=10)
    right.tick_params(labelsize=9)
    if (covered := axes.get_legend()) is not None:
        covered.remove()
    lines_and_names = zip(axes.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True)
    right.legend(*(left + further for left, further in lines_and_names), fontsize=9, framealpha=0.8, edgecolor="none")


def _speed_title(speed: Points, batch_size: int | None) -> str:
    if not speed or batch_size is None:
        return "speed"
    middle = sorted(value for _, value in speed)[len(speed) // 2]
    return f"speed; {1000 * batch_size / middle:.1f} ms per step of {batch_size} images at the median"


def _between(training: Sequence[dict[str, Any]]) -> tuple[Points, Points]:
    """Convert the log's means since the start to means between two lines."""
    speed, waiting = [], []
    before = (0, 0.0, 0.0)
    for row in training:
        step, rate, share = row["step"], row.get("images_per_second"), row.get("wait_share")
        if not rate or share is None:
            continue
        spent = step / rate  # seconds for each image of a batch
        now = (step, spent, share * spent)
        steps, seconds, waited = (new - old for new, old in zip(now, before, strict=True))
        if steps > 0 and seconds > 0:
            speed.append((step, steps / seconds))
            waiting.append((step, min(max(waited / seconds, 0.0), 1.0)))
        before = now
    return speed, waiting


def _points(rows: Sequence[dict[str, Any]], name: str) -> Points:
    return [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
