"""Pictures of predictions: the best and the worst images, one model or several side by side.

    OUT/<run>/successful_cases/success_rank1_<sample>_iou0.9234.png
    OUT/<run>/failure_cases/failure_rank1_<sample>_iou0.1234.png
    OUT/<run>/chosen_cases/chosen1_<sample>_iou0.5000.png      instead of these, for samples named by --ids
    OUT/<run>/iou_distribution.png, confusion.png, rmse_distribution.png, curves.png, evaluation_metrics.txt
    OUT/side_by_side/                                          the same images through all models
    OUT/visualise.json                                         every score; marks the folder as one of these

Of a run that predicts depth alone images are ranked by their rmse, `success_rank1_<sample>_rmse1.2345.png`.
Predictions are made at the label's own size, scored image by image and dropped; those that are shown are made again.
Memory does not grow with the number of images.
"""

import re
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kdcache.analysis.per_image import MIOU, RMSE, ImageScores, Score, best_and_worst
from kdcache.analysis.predict import overlay
from kdcache.data import DEPTH, IGNORE_INDEX, SEGMENTATION, Split
from kdcache.metrics.depth_figures import UNKNOWN_RGB, DepthMap, absolute_error, bar_end
from kdcache.metrics.figures import VOID_RGB, WRONG_RGB, Array, colour_ids, file_part, mark_wrong, panels, save_figure
from kdcache.metrics.predictions import Predicted, predicted_tasks, predictions
from kdcache.models import SegmentationModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPACITY = 0.55
SUCCESSES, FAILURES, CHOSEN = "successful_cases", "failure_cases", "chosen_cases"
SIDE_BY_SIDE = "side_by_side"
Panel = tuple[str, Array | DepthMap]
"""A picture, with its title."""


@dataclass(frozen=True)
class Shown:
    """A model whose predictions are drawn."""

    name: str
    model: SegmentationModel
    size: tuple[int, int]
    device: str
    scores: ImageScores

    @property
    def heads(self) -> tuple[str, ...]:
        """The tasks that are drawn: classes that are judged, and depth in metres, with a label or without."""
        own = predicted_tasks(self.model)
        return tuple(task for task in own if task == DEPTH or task in self.scores.tasks)

    def predict(self, split: Split, number: int) -> Predicted:
        """The prediction for one image, of the labels' own size, and its labels."""
        batches = predictions(
            self.model, split, [number], self.size, tasks=self.heads, device=self.device, batch_size=1, threads=0
        )
        with closing(batches):
            return next(batches)[0]


@dataclass(frozen=True)
class Case:
    """An image to draw: its position among the scored ones, the folder and the first part of the file's name.

    Attributes:
        score: the one that it was ranked by.
    """

    position: int
    folder: str
    prefix: str
    score: Score = MIOU


def best_cases(
    ranking: Sequence[tuple[int, float]], best: int, worst: int, chosen: Sequence[int] = (), score: Score = MIOU
) -> list[Case]:
    """The best and the worst of a ranking in the order of their ranks, then those that were chosen."""
    upper, lower = best_and_worst(ranking, best, worst)
    groups = ((upper, SUCCESSES, "success_rank"), (lower, FAILURES, "failure_rank"), (chosen, CHOSEN, "chosen"))
    return [
        Case(position, folder, f"{prefix}{rank}", score)
        for positions, folder, prefix in groups
        for rank, position in enumerate(positions, 1)
    ]


@dataclass(frozen=True)
class Gallery:
    """How images of a split are drawn.

    Attributes:
        teacher: a model whose prediction is a panel of every picture of one model.
        above: a note that stands over every picture.
    """

    split: Split
    teacher: Shown | None = None
    above: str | None = None

    def draw_cases(
        self,
        shown: Shown,
        cases: Sequence[Case],
        folder: Path,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Path]:
        """Draw images through one model: image, ground truth, teacher, prediction, overlay, difference; depth below.

        What an earlier call left in these folders is removed.
        """
        _clear(folder, (SUCCESSES, FAILURES, CHOSEN))
        written = []
        for done, case in enumerate(cases, 1):
            image = shown.scores.images[case.position]
            value = case.score.of(image)
            name = f"{shorten(shown.name, 40)}, {_rank(case)}: {case.score.text(value)}"
            figure = self._one_model(shown, image.number, f"{name}\n{shorten(image.sample, 90)}")
            written.append(self._save(figure, folder / case.folder, case, image.sample, value))
            if progress is not None:
                progress(done, len(cases))
        return written

    def draw_side_by_side(self, models: Sequence[Shown], cases: Sequence[Case], folder: Path) -> list[Path]:
        """Draw the same images through several models: predictions, and where they are wrong; scores are means."""
        _clear(folder, (SIDE_BY_SIDE,))
        written = []
        for case in cases:
            images = [shown.scores.images[case.position] for shown in models]
            values = [case.score.of(image) for image in images]
            figure = self._several(models, images[0].number, f"{_rank(case)}: {shorten(images[0].sample)}", case.score)
            mean = statistics.fmean(values)
            written.append(self._save(figure, folder / SIDE_BY_SIDE, case, images[0].sample, mean))
        return written

    def _one_model(self, shown: Shown, number: int, title: str) -> "Figure":
        pixels, own = self.split.image(number), shown.predict(self.split, number)
        taught = None if self.teacher is None else self.teacher.predict(self.split, number)
        pictures: list[Panel] = [("image", pixels)]
        if SEGMENTATION in own.answers:
            pictures += self._classes(pixels, own, taught)
        if DEPTH in own.answers:
            pictures += self._depth(own, taught)
        return panels(title, pictures, self._legend([own] if taught is None else [own, taught], own.answers))

    def _classes(self, pixels: Array, own: Predicted, taught: Predicted | None) -> list[Panel]:
        """Classes of one image: ground truth, teacher, prediction, overlay, difference, as far as they are known."""
        label, pictures = own.labels.get(SEGMENTATION), list[Panel]()
        if label is not None:
            pictures.append(("ground truth", self._coloured(label)))
        if taught is not None and SEGMENTATION in taught.answers:
            pictures.append(("teacher", self._coloured(taught.argmax)))
        pictures += [
            ("prediction", self._coloured(own.argmax)),
            ("overlay", overlay(pixels, own.argmax.numpy(), self.split.classes, OPACITY)),
        ]
        if label is not None:
            pictures.append(("where they differ", mark_wrong(pixels, label.numpy(), own.argmax.numpy())))
        return pictures

    def _depth(self, own: Predicted, taught: Predicted | None = None) -> list[Panel]:
        """Depth of one image: ground truth, teacher, prediction, error, as far as they are known; with one bar."""
        maps = {"depth, ground truth": own.labels.get(DEPTH)}
        maps["depth, teacher"] = None if taught is None else taught.answers.get(DEPTH)
        maps["depth, prediction"] = own.answers[DEPTH]
        known = {name: metres.numpy() for name, metres in maps.items() if metres is not None}
        high = bar_end(known.values())
        pictures: list[Panel] = [(name, DepthMap(metres, high)) for name, metres in known.items()]
        if (label := own.labels.get(DEPTH)) is not None:
            error = absolute_error(own.answers[DEPTH].numpy(), label.numpy())
            name = f"depth, absolute error: {_mean_error(error)}"
            pictures.append((name, DepthMap(error, bar_end([error]), "error")))
        return pictures

    def _several(self, models: Sequence[Shown], number: int, title: str, score: Score) -> "Figure":
        """The image, its labels, then a row of panels for each model and task; one bar for all depths and errors."""
        pixels = self.split.image(number)
        predicted = [shown.predict(self.split, number) for shown in models]
        labels = {task: label for own in predicted for task, label in own.labels.items()}
        metres = [own.answers[DEPTH].numpy() for own in predicted if DEPTH in own.answers]
        depth = labels[DEPTH].numpy() if DEPTH in labels else None
        high = bar_end(metres if depth is None else [*metres, depth])
        worst = bar_end([] if depth is None else [absolute_error(one, depth) for one in metres])
        pictures: list[Panel] = [("image", pixels)]
        if SEGMENTATION in labels:
            pictures.append(("ground truth", self._coloured(labels[SEGMENTATION])))
        if depth is not None:
            pictures.append(("depth, ground truth", DepthMap(depth, high)))
        pictures += [("", np.full_like(pixels, 255))] * (len(pictures) % 2)  # each model's two panels stand in one row
        for shown, own in zip(models, predicted, strict=True):
            position = next(image for image in shown.scores.images if image.number == number)
            name = shorten(shown.name, 40)
            if SEGMENTATION in own.answers:
                drawn = score if score.task == SEGMENTATION else MIOU
                pictures.append((f"{name}: {drawn.text(drawn.of(position))}", self._coloured(own.argmax)))
                pictures += self._wrong(pixels, own)
            if DEPTH in own.answers:
                judged = "depth" if depth is None else RMSE.text(RMSE.of(position))
                pictures.append((f"{name}: {judged}", DepthMap(own.answers[DEPTH].numpy(), high)))
                pictures.append(self._error(pixels, own, worst))
        return panels(title, pictures, self._legend(predicted, {task for own in predicted for task in own.answers}))

    def _wrong(self, pixels: Array, own: Predicted) -> list[Panel]:
        label = own.labels.get(SEGMENTATION)
        wrong = np.full_like(pixels, 255) if label is None else mark_wrong(pixels, label.numpy(), own.argmax.numpy())
        return [("no label" if label is None else "where it is wrong", wrong)]

    def _error(self, pixels: Array, own: Predicted, high: float) -> Panel:
        label = own.labels.get(DEPTH)
        if label is None:
            return "no label of depth", np.full_like(pixels, 255)
        error = absolute_error(own.answers[DEPTH].numpy(), label.numpy())
        return f"absolute error: {_mean_error(error)}", DepthMap(error, high, "error")

    def _coloured(self, ids: Tensor) -> Array:
        return colour_ids(ids.numpy(), self.split.classes.colours)

    def _legend(self, shown: Sequence[Predicted], tasks: Collection[str]) -> list[tuple[str, tuple[int, int, int]]]:
        """The classes that are to be seen, void and wrong; of depth the colour of what is unknown."""
        entries: list[tuple[str, tuple[int, int, int]]] = []
        if SEGMENTATION in tasks:
            maps = [own[SEGMENTATION] for one in shown for own in (one.answers, one.labels) if SEGMENTATION in own]
            present = sorted({int(number) for ids in maps for number in np.unique(ids)} - {IGNORE_INDEX})
            classes = self.split.classes
            entries += [(classes.names[number], classes.colours[number]) for number in present]
            entries += [("void", VOID_RGB), ("wrong", WRONG_RGB)]
        return [*entries, ("unknown depth", UNKNOWN_RGB)] if DEPTH in tasks else entries

    def _save(self, figure: "Figure", folder: Path, case: Case, sample: str, value: float) -> Path:
        path = folder / f"{case.prefix}_{file_part(sample)}_{case.score.stem(value)}.png"
        save_figure(figure, path, self.above)
        return path


def folder_names(paths: Sequence[str]) -> list[str]:
    """One folder per run: the last part of its path, with as many before it as make them unique."""
    parts = [[file_part(part) for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")] for path in paths]
    longest = max(map(len, parts), default=0)
    for count in range(1, longest + 1):
        names = ["-".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names) and SIDE_BY_SIDE not in names:
            return names
    return [f"{number}-{'-'.join(own[-1:])}" for number, own in enumerate(parts, 1)]


def shorten(text: str, most: int = 60) -> str:
    """The end of a long id or path: its beginning is what all have in common."""
    return text if len(text) <= most else "..." + text[3 - most :]


def _mean_error(error: Array) -> str:
    """The mean of the known errors in words."""
    known = error[np.isfinite(error)]
    return f"mean {known.mean():.3g} m" if known.size else "no label"


def _rank(case: Case) -> str:
    """`success_rank1` in words."""
    return case.prefix.replace("_", " ").replace("rank", "rank ").replace("chosen", "chosen ")


def _clear(folder: Path, names: Sequence[str]) -> None:
    """Remove the pictures of an earlier call, and no other file."""
    for name in names:
        for old in _pictures(folder / name):
            old.unlink()


def _pictures(folder: Path) -> Iterator[Path]:
    for prefix in ("success_rank", "failure_rank", "chosen"):
        for score in ("iou", "rmse"):
            yield from sorted(folder.glob(f"{prefix}[0-9]*_{score}*.png"))


def summary_json(shown: Mapping[str, Shown]) -> dict[str, object]:
    """Every score of every run, by the name of its folder, and the heads that are shown."""
    return {
        name: {"run": model.name, "heads": list(model.heads), **model.scores.to_json()} for name, model in shown.items()
    }
