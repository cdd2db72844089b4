"""Pictures of predictions: the best and the worst images, of one model or of several side by side.

    OUT/<run>/successful_cases/success_rank1_<sample>_iou0.9234.png
    OUT/<run>/failure_cases/failure_rank1_<sample>_iou0.1234.png
    OUT/<run>/contact_sheet.png                                all of them, small: image, ground truth, prediction
    OUT/<run>/iou_distribution.png, confusion.png, rmse_distribution.png, curves.png, evaluation_metrics.txt
    OUT/side_by_side/                                          the same images through all models
    OUT/visualise.json                                         every score; marks the folder as a gallery

If a run predicts only depth, images are ranked by their rmse, `success_rank1_<sample>_rmse1.2345.png`.
Next to each PNG lies the same picture in the other formats of `--format`.
Predictions have the label's size. Each image is scored and its prediction dropped, then images to show are predicted
again, so memory does not grow with their number.
"""

import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from kdcache.analysis.per_image import MIOU, RMSE, ImageScores, Score, best_and_worst
from kdcache.analysis.predict import overlay
from kdcache.data import IGNORE_INDEX, Split
from kdcache.metrics.depth_figures import UNKNOWN_RGB, DepthMap, absolute_error, bar_end
from kdcache.metrics.figures import (
    VOID_RGB,
    Array,
    Format,
    Layout,
    colour_ids,
    error_colour,
    file_part,
    mark_wrong,
    panels,
    save_figure,
)
from kdcache.metrics.predictions import Predicted, predicted_tasks, predictions
from kdcache.metrics.sliding import Framing
from kdcache.models import SegmentationModel
from kdcache.tasks import DEPTH, SEGMENTATION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPACITY = 0.55
SHEET = "contact_sheet.png"
_THUMB_WIDTH = 240
SUCCESSES, FAILURES = "successful_cases", "failure_cases"
SIDE_BY_SIDE = "side_by_side"
Panel = tuple[str, Array | DepthMap]
"""A picture, with its title."""
Legend = list[tuple[str, tuple[int, int, int]]]
"""Names and their colours."""


@dataclass(frozen=True)
class Shown:
    """A model whose predictions are drawn."""

    name: str
    model: SegmentationModel
    size: tuple[int, int]
    device: str
    scores: ImageScores
    framing: Framing = Framing()

    @property
    def heads(self) -> tuple[str, ...]:
        """The tasks to draw: judged classes, and depth in metres with or without a label."""
        own = predicted_tasks(self.model)
        return tuple(task for task in own if task == DEPTH or task in self.scores.tasks)

    def predict(self, split: Split, number: int) -> Predicted:
        """Return the prediction for one image, at its labels' size, and its labels."""
        batches = predictions(
            self.model,
            split,
            [number],
            self.size,
            tasks=self.heads,
            device=self.device,
            batch_size=1,
            threads=0,
            framing=self.framing,
        )
        with closing(batches):
            return next(batches)[0]


@dataclass(frozen=True)
class Case:
    """An image to draw: its position among the scored images, its folder and the first part of the file's name.

    Attributes:
        score: the score that ranked it.
    """

    position: int
    folder: str
    prefix: str
    score: Score = MIOU


def best_cases(ranking: Sequence[tuple[int, float]], best: int, worst: int, score: Score = MIOU) -> list[Case]:
    """Return the best and the worst cases of a ranking, in the order of their ranks."""
    upper, lower = best_and_worst(ranking, best, worst)
    groups = ((upper, SUCCESSES, "success_rank"), (lower, FAILURES, "failure_rank"))
    return [
        Case(position, folder, f"{prefix}{rank}", score)
        for positions, folder, prefix in groups
        for rank, position in enumerate(positions, 1)
    ]


@dataclass(frozen=True)
class Gallery:
    """How to draw images of a split.

    Attributes:
        teacher, baseline: models with a panel in every picture of another model.
        above: a note above every picture.
        layout: how a picture's panels are arranged. `row` has no overlay and no errors.
        formats: the formats of every picture.
    """

    split: Split
    teacher: Shown | None = None
    above: str | None = None
    baseline: Shown | None = None
    layout: Layout = "grid"
    formats: tuple[Format, ...] = ("png",)

    def draw_cases(
        self,
        shown: Shown,
        cases: Sequence[Case],
        folder: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        """Draw images through one model: image, ground truth, teacher, prediction, overlay, errors, and depth below.

        A contact sheet has all of them, small.
        """
        strips = list[Panel]()
        for done, case in enumerate(cases, 1):
            image = shown.scores.images[case.position]
            value = case.score.of(image)
            name = f"{shorten(shown.name, 40)}, {_rank(case)}: {case.score.text(value)}"
            pictures, legend = self.one_model(shown, image.number)
            figure = panels(f"{name}\n{shorten(image.sample, 90)}", pictures, legend, self.layout)
            self._save(figure, folder / case.folder, case, image.sample, value)
            strips.append((f"{_rank(case)}: {case.score.text(value)}", strip(pictures)))
            progress(done, len(cases))
        if strips:
            title = f"{shorten(shown.name)}: image, ground truth, prediction"
            save_figure(panels(title, strips, []), folder / SHEET, self.above, self.formats)

    def draw_side_by_side(self, models: Sequence[Shown], cases: Sequence[Case], folder: Path) -> None:
        """Draw the same images through several models: predictions, errors, and mean scores."""
        for case in cases:
            images = [shown.scores.images[case.position] for shown in models]
            values = [case.score.of(image) for image in images]
            figure = self.side_by_side(
                models, images[0].number, f"{_rank(case)}: {shorten(images[0].sample)}", case.score
            )
            self._save(figure, folder / SIDE_BY_SIDE, case, images[0].sample, statistics.fmean(values))

    def one_model(self, shown: Shown, number: int) -> tuple[list[Panel], Legend]:
        """Return the pictures of an image through one model, each with its title, and the classes' colours."""
        pixels, own = self.split.image(number), shown.predict(self.split, number)
        others = {}
        if self.teacher is not None:
            others["teacher"] = self.teacher.predict(self.split, number)
        if self.baseline is not None and self.baseline is not shown:
            name = shorten(self.baseline.name, 40)
            others[name if self.layout == "row" else f"baseline: {name}"] = self.baseline.predict(self.split, number)
        name = shorten(shown.name, 40) if self.layout == "row" else "prediction"
        pictures: list[Panel] = [("image", pixels)]
        if SEGMENTATION in own.answers:
            pictures += self._classes(pixels, own, others, name)
        if DEPTH in own.answers:
            pictures += self._depth(own, others, name)
        return pictures, self._legend([own, *others.values()], own.answers)

    def _classes(self, pixels: Array, own: Predicted, others: Mapping[str, Predicted], name: str) -> list[Panel]:
        """Return the class panels of one image: ground truth, others, prediction, in a grid overlay and errors."""
        label, pictures = own.labels.get(SEGMENTATION), list[Panel]()
        if label is not None:
            pictures.append(("ground truth", self._coloured(label)))
        pictures += [
            (other, self._coloured(taught.argmax)) for other, taught in others.items() if SEGMENTATION in taught.answers
        ]
        pictures.append((name, self._coloured(own.argmax)))
        if self.layout == "row":
            return pictures
        pictures.append(("overlay", overlay(pixels, own.argmax.numpy(), self.split.classes, OPACITY)))
        return pictures if label is None else [*pictures, *self._wrong(pixels, own)]

    def _depth(self, own: Predicted, others: Mapping[str, Predicted], name: str) -> list[Panel]:
        """Return the depth panels of one image with one bar: ground truth, others, prediction, in a grid the error."""
        maps = {"depth, ground truth": own.labels.get(DEPTH)}
        maps |= {f"depth, {other}": taught.answers.get(DEPTH) for other, taught in others.items()}
        maps[f"depth, {name}"] = own.answers[DEPTH]
        known = {title: metres.numpy() for title, metres in maps.items() if metres is not None}
        high = bar_end(known.values())
        pictures: list[Panel] = [(title, DepthMap(metres, high)) for title, metres in known.items()]
        if (label := own.labels.get(DEPTH)) is not None and self.layout == "grid":
            error = absolute_error(own.answers[DEPTH].numpy(), label.numpy())
            pictures.append(
                (f"depth, absolute error: {_mean_error(error)}", DepthMap(error, bar_end([error]), "error"))
            )
        return pictures

    def side_by_side(self, models: Sequence[Shown], number: int, title: str, score: Score) -> "Figure":
        """Draw the image, its labels, then panels for each model and task.

        A grid also has each model's errors, a row also has the teacher. One bar is for all depths, another for all
        errors.
        """
        pixels, in_row = self.split.image(number), self.layout == "row"
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
        if in_row and self.teacher is not None and SEGMENTATION in self.teacher.heads:
            pictures.append(("teacher", self._coloured(self.teacher.predict(self.split, number).argmax)))
        if not in_row:  # each model's two panels stand in one row
            pictures += [("", np.full_like(pixels, 255))] * (len(pictures) % 2)
        for shown, own in zip(models, predicted, strict=True):
            position = next(image for image in shown.scores.images if image.number == number)
            name = shorten(shown.name, 40)
            if SEGMENTATION in own.answers:
                drawn = score if score.task == SEGMENTATION else MIOU
                pictures.append((f"{name}: {drawn.text(drawn.of(position))}", self._coloured(own.argmax)))
                pictures += [] if in_row else self._wrong(pixels, own)
            if DEPTH in own.answers:
                judged = "depth" if depth is None else RMSE.text(RMSE.of(position))
                pictures.append((f"{name}: {judged}", DepthMap(own.answers[DEPTH].numpy(), high)))
                pictures += [] if in_row else [self._error(pixels, own, worst)]
        legend = self._legend(predicted, {task for own in predicted for task in own.answers})
        return panels(title, pictures, legend, self.layout)

    def _wrong(self, pixels: Array, own: Predicted) -> list[Panel]:
        label = own.labels.get(SEGMENTATION)
        if label is None:
            return [("no label", np.full_like(pixels, 255))]
        red = error_colour(self.split.classes.colours)
        return [("errors", mark_wrong(pixels, label.numpy(), own.argmax.numpy(), red))]

    def _error(self, pixels: Array, own: Predicted, high: float) -> Panel:
        label = own.labels.get(DEPTH)
        if label is None:
            return "no label of depth", np.full_like(pixels, 255)
        error = absolute_error(own.answers[DEPTH].numpy(), label.numpy())
        return f"absolute error: {_mean_error(error)}", DepthMap(error, high, "error")

    def _coloured(self, ids: Tensor) -> Array:
        return colour_ids(ids.numpy(), self.split.classes.colours)

    def _legend(self, shown: Sequence[Predicted], tasks: Collection[str]) -> Legend:
        """Return the visible classes, void and wrong, and the colour of unknown depth."""
        entries: Legend = []
        if SEGMENTATION in tasks:
            maps = [own[SEGMENTATION] for one in shown for own in (one.answers, one.labels) if SEGMENTATION in own]
            present = sorted({int(number) for ids in maps for number in np.unique(ids)} - {IGNORE_INDEX})
            classes = self.split.classes
            entries += [(classes.names[number], classes.colours[number]) for number in present]
            entries.append(("void", VOID_RGB))
            entries += [("wrong", error_colour(classes.colours))] if self.layout == "grid" else []
        return [*entries, ("unknown depth", UNKNOWN_RGB)] if DEPTH in tasks else entries

    def _save(self, figure: "Figure", folder: Path, case: Case, sample: str, value: float) -> None:
        path = folder / f"{case.prefix}_{file_part(sample)}_{case.score.stem(value)}.png"
        save_figure(figure, path, self.above, self.formats)


def strip(pictures: Sequence[Panel]) -> Array:
    """Return image, ground truth and last prediction (classes, else depth) side by side, small, uint8 (H, W, 3)."""
    named = {name: picture for name, picture in pictures if name != "overlay" and not _is_error(name)}
    of_depth = [name for name in named if name.startswith("depth, ")]
    answers = [name for name in named if name != "image" and name not in of_depth] or of_depth
    wanted = ["image", *(name for name in answers[:-1] if name.endswith("ground truth")), *answers[-1:]]
    arrays = [one.rgb() if isinstance(one := named[name], DepthMap) else one for name in wanted]
    small = []
    for place, array in enumerate(arrays):
        picture = Image.fromarray(array)
        size = (_THUMB_WIDTH, max(1, round(_THUMB_WIDTH * picture.height / picture.width)))
        how = Image.Resampling.NEAREST if place else Image.Resampling.LANCZOS
        small += [np.asarray(picture.resize(size, how)), np.full((size[1], 4, 3), 255, np.uint8)]
    return np.concatenate(small[:-1], axis=1)


def _is_error(name: str) -> bool:
    return name in ("errors", "no label") or "absolute error" in name


def folder_names(paths: Sequence[str]) -> list[str]:
    """Return a unique folder name per run: the last part of its path, with parents if needed."""
    parts = [[file_part(part) for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")] for path in paths]
    longest = max(map(len, parts), default=0)
    for count in range(1, longest + 1):
        names = ["-".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names) and SIDE_BY_SIDE not in names:
            return names
    return [f"{number}-{'-'.join(own[-1:])}" for number, own in enumerate(parts, 1)]


def shorten(text: str, most: int = 60) -> str:
    """Return the end of a long id or path, because the beginning is often common to all."""
    return text if len(text) <= most else "..." + text[3 - most :]


def _mean_error(error: Array) -> str:
    """Return the mean of the known errors in words."""
    known = error[np.isfinite(error)]
    return f"mean {known.mean():.3g} m" if known.size else "no label"


def _rank(case: Case) -> str:
    """Return `success_rank1` in words: best 1."""
    for prefix, word in (("success_rank", "best "), ("failure_rank", "worst ")):
        if case.prefix.startswith(prefix):
            return word + case.prefix.removeprefix(prefix)
    return case.prefix


def earlier_pictures(out: Path, runs: Iterable[str]) -> Iterator[Path]:
    """Yield the image pictures that an earlier call drew, of these runs and side by side."""
    for folder in (SIDE_BY_SIDE, *(f"{run}/{name}" for run in runs for name in (SUCCESSES, FAILURES))):
        yield from _pictures(out / folder)


def _pictures(folder: Path) -> Iterator[Path]:
    for prefix in ("success_rank", "failure_rank"):
        for score in ("iou", "rmse"):
            yield from (path for kind in get_args(Format) for path in folder.glob(f"{prefix}[0-9]*_{score}*.{kind}"))


def summary_json(shown: Mapping[str, Shown]) -> dict[str, object]:
    """Return every score of every run by the name of its folder, and the heads shown."""
    return {
        name: {"run": model.name, "heads": list(model.heads), **model.scores.to_json()} for name, model in shown.items()
    }
