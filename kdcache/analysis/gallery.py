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

from kdcache.analysis.per_image import MIOU, ImageScores, Score, best_and_worst
from kdcache.analysis.task_views import FURTHER, VIEWS, Legend, Panel
from kdcache.data import Split
from kdcache.metrics.depth_figures import DepthMap
from kdcache.metrics.figures import (
    Array,
    Format,
    Layout,
    colour_ids,
    file_part,
    panels,
    save_figure,
)
from kdcache.metrics.predictions import Inference, Predicted, predicted_tasks, predictions
from kdcache.metrics.sliding import Framing
from kdcache.models import SegmentationModel
from kdcache.tasks import SEGMENTATION, TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET = "contact_sheet.png"
_THUMB_WIDTH = 240
SUCCESSES, FAILURES = "successful_cases", "failure_cases"
SIDE_BY_SIDE = "side_by_side"


@dataclass(frozen=True)
class Shown:
    """A model whose predictions are drawn, with its scores.

    Attributes:
        name: its name in pictures.
        model: the model.
        size: (H, W) of its input, in pixels.
        device: the device that it is on.
        scores: its score for each labelled image.
        framing: how an image is fitted to `size`, or cut into windows.
    """

    name: str
    model: SegmentationModel
    size: tuple[int, int]
    device: str
    scores: ImageScores
    framing: Framing = Framing()

    @property
    def heads(self) -> tuple[str, ...]:
        """The tasks to draw: evaluated tasks, and numeric tasks such as depth even if there are no labels."""
        learnt = predicted_tasks(self.model)
        return tuple(task for task in learnt if task in FURTHER or task in self.scores.tasks)

    def predict(self, split: Split, number: int) -> Predicted:
        """Return the predictions and labels of one image of a split by task, at the size of the labels.

        `number` is the image's position in the split.
        """
        inference = Inference(self.size, self.device, batch_size=1, threads=0, framing=self.framing)
        with closing(predictions(self.model, split, [number], inference, self.heads)) as batches:
            return next(batches)[0]


@dataclass(frozen=True)
class Case:
    """An image to draw because of its rank.

    Attributes:
        position: its position in `ImageScores.images`.
        folder: name of the folder of its picture.
        prefix: beginning of the picture's file name, such as "success_rank1".
        score: the score by which it was ranked.
    """

    position: int
    folder: str
    prefix: str
    score: Score = MIOU


def best_cases(ranking: Sequence[tuple[int, float]], best: int, worst: int, score: Score = MIOU) -> list[Case]:
    """Return the images to draw from a ranking: the first `best` images, then the last `worst` images, the worst first.

    `ranking` has pairs (position, score), the best first, as `ranked` returns them. `score` is the score that ranks
    them.
    """
    upper, lower = best_and_worst(ranking, best, worst)
    groups = ((upper, SUCCESSES, "success_rank"), (lower, FAILURES, "failure_rank"))
    return [
        Case(position, folder, f"{prefix}{rank}", score)
        for positions, folder, prefix in groups
        for rank, position in enumerate(positions, 1)
    ]


@dataclass(frozen=True)
class Gallery:
    """How to draw pictures of a split: its images with the predictions of models.

    Attributes:
        split: the images.
        teacher, baseline: models with a panel in the pictures of every other model, or None.
        above: a warning above every picture, or None.
        layout: "grid" or "row". A row leaves out the panels with the overlay and with the errors.
        formats: file formats of every picture.
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
        """Draw images with one model's predictions into a folder, and a contact sheet of them.

        A picture has the image, the ground truth, and the predictions of teacher, baseline and model. With the layout
        "grid", it also has an overlay and the errors. If the model predicts depth, panels of depth follow.

        Args:
            shown: the model.
            cases: the images, with one picture for each.
            folder: the folder for the contact sheet. A picture goes to its subfolder `Case.folder`.
            progress: called with (pictures done, pictures in total).
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
        """Write a picture of each image, its labels and the predictions of several models (see `side_by_side`).

        Args:
            models: the models.
            cases: the images.
            folder: the pictures go to its subfolder side_by_side.
        """
        for case in cases:
            images = [model.scores.images[case.position] for model in models]
            values = [case.score.of(image) for image in images]
            figure = self.side_by_side(models, images[0].number, f"{_rank(case)}: {shorten(images[0].sample)}")
            self._save(figure, folder / SIDE_BY_SIDE, case, images[0].sample, statistics.fmean(values))

    def one_model(self, shown: Shown, number: int) -> tuple[list[Panel], Legend]:
        """Return the pictures of an image with one model's predictions, and the legend of their colours.

        `shown` is the model, and `number` the image's position in the split. Each picture is a pair: a title, and an
        image (H, W, 3) or `DepthMap`. The teacher's and the baseline's predictions are among the pictures, if the
        gallery has these models.
        """
        pixels, predicted = self.split.image(number), shown.predict(self.split, number)
        others = {}
        if self.teacher is not None:
            others["teacher"] = self.teacher.predict(self.split, number)
        if self.baseline is not None and self.baseline is not shown:
            name = shorten(self.baseline.name, 40)
            others[name if self.layout == "row" else f"baseline: {name}"] = self.baseline.predict(self.split, number)
        name = shorten(shown.name, 40) if self.layout == "row" else "prediction"
        pictures: list[Panel] = [("image", pixels)]
        for task in predicted.answers:
            pictures += self._panels(task, pixels, predicted, others, name)
        return pictures, self._legend([predicted, *others.values()], predicted.answers)

    def _panels(
        self, task: str, pixels: Array, predicted: Predicted, others: Mapping[str, Predicted], name: str
    ) -> list[Panel]:
        """Return the panels of a task at one scale: ground truth, others, prediction, in a grid overlay and errors."""
        view, answer, label = VIEWS[task], predicted.answers[task].numpy(), predicted.labels.get(task)
        maps = {"ground truth": label} | {title: taught.answers.get(task) for title, taught in others.items()}
        known = {title: values.numpy() for title, values in maps.items() if values is not None} | {name: answer}
        scale, classes = view.scale(known.values()), self.split.classes
        panels = [(title, view.picture(values, classes, scale)) for title, values in known.items()]
        if self.layout == "grid":
            panels += view.overlay(pixels, answer, classes)
            if label is not None:
                panels.append(view.error(pixels, answer, label.numpy(), classes))
        return [(f"{view.prefix}{title}", picture) for title, picture in panels]

    def side_by_side(self, models: Sequence[Shown], number: int, title: str) -> "Figure":
        """Return a figure of an image, its labels, and the predictions of several models.

        If the gallery's layout is "grid", each model also has a picture of its errors. If it is "row", there are no
        errors, but the teacher's classes if the gallery has a teacher. All depths share one colour bar, and all errors
        of depth another one.

        Args:
            models: the models.
            number: the image's position in the split.
            title: the text above the figure.
        """
        pixels, in_row = self.split.image(number), self.layout == "row"
        predicted = [model.predict(self.split, number) for model in models]
        labels = {task: label for prediction in predicted for task, label in prediction.labels.items()}
        scales = {task: self._scales(task, predicted, labels.get(task)) for task in TASKS}
        pictures: list[Panel] = [("image", pixels)]
        for task in (task for task in TASKS if task in labels):
            truth = VIEWS[task].picture(labels[task].numpy(), self.split.classes, scales[task][0])
            pictures.append((f"{VIEWS[task].prefix}ground truth", truth))
        if in_row and self.teacher is not None and SEGMENTATION in self.teacher.heads:
            ids = self.teacher.predict(self.split, number).argmax.numpy()
            pictures.append(("teacher", colour_ids(ids, self.split.classes.colours)))
        if not in_row:  # each model's two panels stand in one row
            pictures += [("", np.full_like(pixels, 255))] * (len(pictures) % 2)
        for model, prediction in zip(models, predicted, strict=True):
            position = next(image for image in model.scores.images if image.number == number)
            for task, answer in prediction.answers.items():
                view, score, (scale, worst) = VIEWS[task], Score(task), scales[task]
                judged = score.text(score.of(position)) if task in labels else view.no_score
                picture = view.picture(answer.numpy(), self.split.classes, scale)
                pictures.append((f"{shorten(model.name, 40)}: {judged}", picture))
                pictures += [] if in_row else [self._error(task, pixels, prediction, worst)]
        legend = self._legend(predicted, {task for prediction in predicted for task in prediction.answers})
        return panels(title, pictures, legend, self.layout)

    def _scales(self, task: str, predicted: Sequence[Predicted], label: Tensor | None) -> tuple[float, float]:
        """Return the scale of all maps of a task, and of all its errors."""
        view, answers = (
            VIEWS[task],
            [prediction.answers[task].numpy() for prediction in predicted if task in prediction.answers],
        )
        if label is None:
            return view.scale(answers), 1.0
        truth = label.numpy()
        return view.scale([*answers, truth]), view.error_scale([(answer, truth) for answer in answers])

    def _error(self, task: str, pixels: Array, prediction: Predicted, scale: float) -> Panel:
        view, label = VIEWS[task], prediction.labels.get(task)
        if label is None:
            return view.no_label, np.full_like(pixels, 255)
        return view.error(pixels, prediction.answers[task].numpy(), label.numpy(), self.split.classes, scale)

    def _legend(self, all_predicted: Sequence[Predicted], tasks: Collection[str]) -> Legend:
        """Return the meaning of the colours of tasks, in their order."""
        entries: Legend = []
        for task in (task for task in TASKS if task in tasks):
            maps = [
                by_task[task].numpy()
                for predicted in all_predicted
                for by_task in (predicted.answers, predicted.labels)
                if task in by_task
            ]
            entries += VIEWS[task].legend(maps, self.split.classes, errors=self.layout == "grid")
        return entries

    def _save(self, figure: "Figure", folder: Path, case: Case, sample: str, value: float) -> None:
        path = folder / f"{case.prefix}_{file_part(sample)}_{case.score.stem(value)}.png"
        save_figure(figure, path, self.above, self.formats)


def strip(pictures: Sequence[Panel]) -> Array:
    """Return a thumbnail, uint8 (H, W, 3): image, ground truth and prediction next to each other.

    It shows classes, or depth if there are no classes. `pictures` are all pictures of one image, as pairs (title,
    picture) that `Gallery.one_model` returns.
    """
    named = {name: picture for name, picture in pictures if name != "overlay" and not _is_error(name)}
    further = [name for name in named if name.startswith(tuple(VIEWS[task].prefix for task in FURTHER))]
    answers = [name for name in named if name != "image" and name not in further] or further
    titles = ["image", *(name for name in answers[:-1] if name.endswith("ground truth")), *answers[-1:]]
    arrays = [panel.rgb() if isinstance(panel := named[name], DepthMap) else panel for name in titles]
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
    """Return a unique folder name for each path, in the same order: its last part, with more parts if names repeat.

    If paths repeat, the names begin with numbers.
    """
    parts = [[file_part(part) for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")] for path in paths]
    longest = max(map(len, parts), default=0)
    for count in range(1, longest + 1):
        names = ["-".join(path_parts[-count:]) for path_parts in parts]
        if len(set(names)) == len(names) and SIDE_BY_SIDE not in names:
            return names
    return [f"{number}-{'-'.join(path_parts[-1:])}" for number, path_parts in enumerate(parts, 1)]


def shorten(text: str, most: int = 60) -> str:
    """Shorten an id or path to at most `most` characters: "..." and its end. Shorter texts stay unchanged."""
    return text if len(text) <= most else "..." + text[3 - most :]


def _rank(case: Case) -> str:
    """Return `success_rank1` in words: best 1."""
    for prefix, word in (("success_rank", "best "), ("failure_rank", "worst ")):
        if case.prefix.startswith(prefix):
            return word + case.prefix.removeprefix(prefix)
    return case.prefix


def earlier_pictures(out: Path, runs: Iterable[str]) -> Iterator[Path]:
    """Yield the paths of pictures that an earlier call drew into `out`, of these runs and of several runs side by side.

    `runs` are the names of the runs' folders in `out`.
    """
    for folder in (SIDE_BY_SIDE, *(f"{run}/{name}" for run in runs for name in (SUCCESSES, FAILURES))):
        yield from _pictures(out / folder)


def _pictures(folder: Path) -> Iterator[Path]:
    for prefix in ("success_rank", "failure_rank"):
        for view in VIEWS.values():
            files = (f"{prefix}[0-9]*_{view.stem}*.{kind}" for kind in get_args(Format))
            yield from (path for file in files for path in folder.glob(file))


def summary_json(shown: Mapping[str, Shown]) -> dict[str, object]:
    """Return a dict for JSON: folder name -> a dict about the model whose pictures are in that folder.

    It has the model's name as `run`, its heads as `heads`, and the entries of `ImageScores.to_json`. `shown` is folder
    name -> model.
    """
    return {
        name: {"run": model.name, "heads": list(model.heads), **model.scores.to_json()} for name, model in shown.items()
    }
