"""Pictures of predictions: the best and the worst images, one model or several side by side.

    OUT/<run>/successful_cases/success_rank1_<sample>_iou0.9234.png
    OUT/<run>/failure_cases/failure_rank1_<sample>_iou0.1234.png
    OUT/<run>/chosen_cases/chosen1_<sample>_iou0.5000.png      instead of these, for samples named by --ids
    OUT/<run>/iou_distribution.png, confusion.png, curves.png, evaluation_metrics.txt
    OUT/side_by_side/                                          the same images through all models
    OUT/visualise.json                                         every score; marks the folder as one of these

Predictions are made at the label's own size, scored image by image and dropped; those that are shown are made again.
Memory does not grow with the number of images.
"""

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.analysis.per_image import ImageScores, best_and_worst
from kdcache.analysis.predict import overlay
from kdcache.data import DEPTH, IGNORE_INDEX, Split
from kdcache.metrics.depth_figures import DepthMap, absolute_error, bar_end
from kdcache.metrics.figures import VOID_RGB, WRONG_RGB, Array, colour_ids, file_part, mark_wrong, panels, save_figure
from kdcache.metrics.predictions import predicted_tasks, predictions
from kdcache.metrics.tables import percent
from kdcache.models import SegmentationModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPACITY = 0.55
SUCCESSES, FAILURES, CHOSEN = "successful_cases", "failure_cases", "chosen_cases"
SIDE_BY_SIDE = "side_by_side"


@dataclass(frozen=True)
class Shown:
    """A model whose predictions are drawn."""

    name: str
    model: SegmentationModel
    size: tuple[int, int]
    device: str
    scores: ImageScores

    def predict(self, split: Split, number: int) -> tuple[Array, Array]:
        """The argmax of one image, and the label; uint8 (H, W) of the label's size."""
        batches = predictions(self.model, split, [number], self.size, device=self.device, batch_size=1, threads=0)
        with closing(batches):
            prediction = next(batches)[0]
        return prediction.argmax.numpy(), prediction.label.numpy()

    def predict_depth(self, split: Split, number: int) -> tuple[Array, Array | None] | None:
        """Metres float32 (H, W) of one image, and its label, if it has one; None for a model without metric depth."""
        if DEPTH not in predicted_tasks(self.model):
            return None
        batches = predictions(
            self.model, split, [number], self.size, tasks=(DEPTH,), device=self.device, batch_size=1, threads=0
        )
        with closing(batches):
            prediction = next(batches)[0]
        label = prediction.labels.get(DEPTH)
        return prediction.answers[DEPTH].numpy(), None if label is None else label.numpy()


@dataclass(frozen=True)
class Case:
    """An image to draw: its position among the scored ones, the folder and the first part of the file's name."""

    position: int
    folder: str
    prefix: str


def best_cases(ranking: Sequence[tuple[int, float]], best: int, worst: int, chosen: Sequence[int] = ()) -> list[Case]:
    """The best and the worst of a ranking in the order of their ranks, then those that were chosen."""
    upper, lower = best_and_worst(ranking, best, worst)
    groups = ((upper, SUCCESSES, "success_rank"), (lower, FAILURES, "failure_rank"), (chosen, CHOSEN, "chosen"))
    return [
        Case(position, folder, f"{prefix}{rank}")
        for positions, folder, prefix in groups
        for rank, position in enumerate(positions, 1)
    ]


@dataclass(frozen=True)
class Gallery:
    """How images of a split are drawn.

    Attributes:
        ranked_class: class whose IoU ranks the images; None ranks them by mIoU.
        teacher: a model whose prediction is a panel of every picture of one model.
        above: a note that stands over every picture.
    """

    split: Split
    ranked_class: int | None = None
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
            score = image.score(self.ranked_class)
            name = f"{shorten(shown.name, 40)}, {_rank(case)}: {self._score_name} {percent(score)} %"
            figure = self._one_model(shown, image.number, f"{name}\n{shorten(image.sample, 90)}")
            written.append(self._save(figure, folder / case.folder, case, image.sample, score))
            if progress is not None:
                progress(done, len(cases))
        return written

    def draw_side_by_side(self, models: Sequence[Shown], cases: Sequence[Case], folder: Path) -> list[Path]:
        """Draw the same images through several models: predictions, and where they are wrong; scores are means."""
        _clear(folder, (SIDE_BY_SIDE,))
        written = []
        for case in cases:
            images = [shown.scores.images[case.position] for shown in models]
            scores = [image.score(self.ranked_class) for image in images]
            pixels = self.split.image(images[0].number)
            predicted = [(shown, *shown.predict(self.split, images[0].number)) for shown in models]
            label = predicted[0][2]
            pictures = [("image", pixels), ("ground truth", self._coloured(label))]
            for (shown, argmax, _), score in zip(predicted, scores, strict=True):
                name = f"{shorten(shown.name, 40)}: {self._score_name} {percent(score)} %"
                pictures += [(name, self._coloured(argmax)), ("where it is wrong", mark_wrong(pixels, label, argmax))]
            legend = self._legend([label, *(argmax for _, argmax, _ in predicted)])
            figure = panels(f"{_rank(case)}: {shorten(images[0].sample)}", pictures, legend)
            mean = statistics.fmean(scores)
            written.append(self._save(figure, folder / SIDE_BY_SIDE, case, images[0].sample, mean))
        return written

    @property
    def _score_name(self) -> str:
        return "mIoU" if self.ranked_class is None else f"IoU of {self.split.classes.names[self.ranked_class]}"

    def _one_model(self, shown: Shown, number: int, title: str) -> "Figure":
        pixels = self.split.image(number)
        argmax, label = shown.predict(self.split, number)
        pictures: list[tuple[str, Array]] = [("image", pixels), ("ground truth", self._coloured(label))]
        present = [label, argmax]
        if self.teacher is not None:
            taught, _ = self.teacher.predict(self.split, number)
            pictures.append(("teacher", self._coloured(taught)))
            present.append(taught)
        pictures += [
            ("prediction", self._coloured(argmax)),
            ("overlay", overlay(pixels, argmax, self.split.classes, OPACITY)),
            ("where they differ", mark_wrong(pixels, label, argmax)),
        ]
        return panels(title, [*pictures, *self._depth(shown, number)], self._legend(present))

    def _depth(self, shown: Shown, number: int) -> list[tuple[str, DepthMap]]:
        """Depth of one image: ground truth, prediction and error, as far as they are known; [] without a depth head."""
        predicted = shown.predict_depth(self.split, number)
        if predicted is None:
            return []
        metres, label = predicted
        high = bar_end([metres] if label is None else [metres, label])
        if label is None:
            return [("depth, prediction", DepthMap(metres, high))]
        error = absolute_error(metres, label)
        return [
            ("depth, ground truth", DepthMap(label, high)),
            ("depth, prediction", DepthMap(metres, high)),
            (f"depth, absolute error: {_mean_error(error)}", DepthMap(error, bar_end([error]), "error")),
        ]

    def _coloured(self, ids: Array) -> Array:
        return colour_ids(ids, self.split.classes.colours)

    def _legend(self, ids: Sequence[Array]) -> list[tuple[str, tuple[int, int, int]]]:
        """The classes that are to be seen, void and wrong."""
        present = sorted({int(number) for array in ids for number in np.unique(array)} - {IGNORE_INDEX})
        classes = [(self.split.classes.names[number], self.split.classes.colours[number]) for number in present]
        return [*classes, ("void", VOID_RGB), ("wrong", WRONG_RGB)]

    def _save(self, figure: "Figure", folder: Path, case: Case, sample: str, score: float) -> Path:
        path = folder / f"{case.prefix}_{file_part(sample)}_iou{score:.4f}.png"
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
        yield from sorted(folder.glob(f"{prefix}[0-9]*_iou*.png"))


def summary_json(shown: Mapping[str, Shown]) -> dict[str, object]:
    """Every score of every run, by the name of its folder."""
    return {name: {"run": model.name, **model.scores.to_json()} for name, model in shown.items()}
