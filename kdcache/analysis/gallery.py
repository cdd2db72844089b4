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
from kdcache.data import IGNORE_INDEX, Split
from kdcache.metrics.evaluate import predictions
from kdcache.metrics.figures import VOID_RGB, WRONG_RGB, Array, colour_ids, file_part, mark_wrong, panels, save_figure
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


def draw_cases(
    shown: Shown,
    split: Split,
    cases: Sequence[Case],
    folder: Path,
    *,
    teacher: Shown | None = None,
    ranked_class: int | None = None,
    above: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Draw images through one model: image, ground truth, prediction, overlay, where they differ, and the teacher.

    What an earlier call left in these folders is removed. `above` stands over every picture.
    """
    _clear(folder, (SUCCESSES, FAILURES, CHOSEN))
    written = []
    for done, case in enumerate(cases, 1):
        image = shown.scores.images[case.position]
        score = image.score(ranked_class)
        figure = _case(shown, split, image.number, _title(shown, case, split, ranked_class), teacher)
        path = folder / case.folder / f"{case.prefix}_{file_part(image.sample)}_iou{score:.4f}.png"
        save_figure(figure, path, above)
        written.append(path)
        if progress is not None:
            progress(done, len(cases))
    return written


def draw_side_by_side(
    models: Sequence[Shown],
    split: Split,
    cases: Sequence[Case],
    folder: Path,
    ranked_class: int | None = None,
    above: str | None = None,
) -> list[Path]:
    """Draw the same images through several models: predictions, and where they are wrong. Scores are their means."""
    _clear(folder, (SIDE_BY_SIDE,))
    written = []
    for case in cases:
        images = [shown.scores.images[case.position] for shown in models]
        scores = [image.score(ranked_class) for image in images]
        pixels = split.image(images[0].number)
        predicted = [(shown, *shown.predict(split, images[0].number)) for shown in models]
        label = predicted[0][2]
        colours = split.classes.colours
        what = _score_name(split, ranked_class)
        pictures = [("image", pixels), ("ground truth", colour_ids(label, colours))]
        for (shown, argmax, _), score in zip(predicted, scores, strict=True):
            name = f"{shorten(shown.name, 40)}: {what} {percent(score)} %"
            pictures += [(name, colour_ids(argmax, colours)), ("where it is wrong", mark_wrong(pixels, label, argmax))]
        legend = _legend(split, [label, *(argmax for _, argmax, _ in predicted)])
        figure = panels(f"{_rank(case)}: {shorten(images[0].sample)}", pictures, legend)
        mean = statistics.fmean(scores)
        path = folder / SIDE_BY_SIDE / f"{case.prefix}_{file_part(images[0].sample)}_iou{mean:.4f}.png"
        save_figure(figure, path, above)
        written.append(path)
    return written


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


def _case(shown: Shown, split: Split, number: int, title: str, teacher: Shown | None) -> "Figure":
    pixels = split.image(number)
    argmax, label = shown.predict(split, number)
    colours = split.classes.colours
    pictures = [("image", pixels), ("ground truth", colour_ids(label, colours))]
    seen = [label, argmax]
    if teacher is not None:
        taught, _ = teacher.predict(split, number)
        pictures.append(("teacher", colour_ids(taught, colours)))
        seen.append(taught)
    pictures += [
        ("prediction", colour_ids(argmax, colours)),
        ("overlay", overlay(pixels, argmax, split.classes, OPACITY)),
        ("where they differ", mark_wrong(pixels, label, argmax)),
    ]
    return panels(title, pictures, _legend(split, seen))


def _title(shown: Shown, case: Case, split: Split, ranked_class: int | None) -> str:
    image = shown.scores.images[case.position]
    what = _score_name(split, ranked_class)
    head = f"{shorten(shown.name, 40)}, {_rank(case)}: {what} {percent(image.score(ranked_class))} %"
    return f"{head}\n{shorten(image.sample, 90)}"


def _rank(case: Case) -> str:
    """`success_rank1` in words."""
    return case.prefix.replace("_", " ").replace("rank", "rank ").replace("chosen", "chosen ")


def _score_name(split: Split, ranked_class: int | None) -> str:
    return "mIoU" if ranked_class is None else f"IoU of {split.classes.names[ranked_class]}"


def _legend(split: Split, ids: Sequence[Array]) -> list[tuple[str, tuple[int, int, int]]]:
    """The classes that are to be seen, void and wrong."""
    present = sorted({int(number) for array in ids for number in np.unique(array)} - {IGNORE_INDEX})
    classes = [(split.classes.names[number], split.classes.colours[number]) for number in present]
    return [*classes, ("void", VOID_RGB), ("wrong", WRONG_RGB)]


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
