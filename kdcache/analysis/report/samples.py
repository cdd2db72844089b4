"""The images that the page shows, the same for all rows: chosen by score, encoded small.

An image is a JPEG of at most 640 pixels. Each prediction is a PNG with a palette, a few KiB. Five rows and six images
take about a megabyte. Memory: the models of all rows, and one image at a time.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from kdcache.analysis.compare import Progress
from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.gallery import Shown
from kdcache.analysis.per_image import MIOU, Score, best_and_worst, ranked, shared_score
from kdcache.analysis.runs import Entry
from kdcache.analysis.stored_evaluations import EvalSettings, memory_errors
from kdcache.analysis.task_views import FURTHER, VIEWS, Picture
from kdcache.analysis.visualise import score_run
from kdcache.data import IGNORE_INDEX, ClassList, Split, fold_alone
from kdcache.metrics.depth_figures import DepthMap
from kdcache.metrics.figures import VOID_RGB, Array, error_colour
from kdcache.metrics.predictions import Predicted
from kdcache.tasks import SEGMENTATION

MOST_PIXELS = 640
_QUALITY = 85
_LABELS_READ = 50


@dataclass(frozen=True)
class RowPrediction:
    """The prediction of a row's first run for an image.

    Attributes:
        place: the row's index in `Comparison.rows`.
        miou: mIoU of this image, 0 to 1.
        iou: the IoU of each class, NaN if the class is not in the image.
        classes: a PNG of the predicted classes, or None without a segmentation label or prediction.
        wrong: a PNG of the wrong pixels, or None without a segmentation label or prediction.
    """

    place: int
    miou: float
    iou: tuple[float, ...]
    classes: bytes | None
    wrong: bytes | None


@dataclass(frozen=True)
class Sample:
    """An image on the report page, with the predictions of each row (not a sample of a data set).

    Attributes:
        sample: the image's id.
        why: why the image is shown: "best 1", "worst 2", or "for" and the name of a class.
        score: the score that ranks the images, mIoU or rmse.
        mean: the value of this score for this image, as the mean over all rows except the teacher's.
        size: (H, W) on the page, in pixels.
        present: ids of the classes in the label, the class with the most pixels first.
        image: the image as JPEG.
        label: the segmentation label as PNG, or None.
        predictions: the prediction of each row.
        maps: pairs (title, JPEG) for further tasks such as depth: the label, predictions and errors.
    """

    sample: str
    why: str
    score: Score
    mean: float
    size: tuple[int, int]
    present: tuple[int, ...]
    image: bytes
    label: bytes | None
    predictions: tuple[RowPrediction, ...]
    maps: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class FirstRuns:
    """The first run of each row of a comparison, with its scores for every image.

    Attributes:
        split: the images. If the comparison judges each run on the fold that it left out (`own_fold`), they are the
            fold of the first row's run.
        models: for each row: its index in `Comparison.rows`, the run, and the model with its scores.
    """

    split: Split
    models: tuple[tuple[int, Entry, Shown], ...]


def score_first_runs(
    comparison: Comparison, runs: Sequence[Entry], split: Split, judging: EvalSettings, progress: Progress
) -> FirstRuns:
    """Score every image of a split with the first run of each row.

    If runs are judged on the folds that they left out, only one fold is scored, by a run of each row that left it out.

    Args:
        comparison: the comparison of `runs`, with its rows.
        runs: all compared runs.
        split: the split of the comparison.
        judging: how the comparison evaluated the runs.
        progress: called with (what is done, units done, units in total).
    """
    first_runs = _first_runs(comparison, runs)
    fold = next((run.fold for row, run in first_runs if not row.teacher), None) if comparison.own_fold else None
    if fold is not None:
        # Images that a run was trained on are no test: only runs that left out this fold predict.
        first_runs = [(row, _of_fold(row, runs, fold) or run) for row, run in first_runs]
        first_runs = [(row, run) for row, run in first_runs if run.fold == fold or run.fold is None]
        part = next(run for _, run in first_runs if run.fold == fold)
        split = fold_alone(split, *part.own_fold())
    places = {id(row): place for place, row in enumerate(comparison.rows)}
    return FirstRuns(
        split,
        tuple(
            (places[id(row)], run, score_run(run, comparison.without_folders(row.name), split, judging, progress))
            for row, run in first_runs
        ),
    )


def choose_samples(comparison: Comparison, first: FirstRuns, count: int, progress: Progress) -> tuple[Sample, ...]:
    """Return the images to show: the best and the worst, then an image for each class that is not yet shown.

    Images are ranked by the mean score of all rows except the teacher's. If all these rows also predict depth, and no
    image so far has a depth label, the best and worst images for depth follow.

    Args:
        comparison: the comparison.
        first: the first run of each row, with its scores.
        count: the largest number of best images, of worst images, and of images for classes.
        progress: called with (what is done, units done, units in total).

    Returns: () if some rows have only classes and others only depth, so they do not share a score.
    """
    split, models = first.split, [(place, model) for place, _, model in first.models]
    contestants = [model for place, model in models if not comparison.rows[place].teacher]
    score = shared_score([model.scores for model in contestants])
    if score is None:
        return ()
    picked = _extremes(contestants, score, count)
    if score == MIOU:
        means = dict(ranked([model.scores for model in contestants], score))
        for position, name in _for_classes(contestants[0], split, means, [position for position, _ in picked], count):
            picked.append((position, (name, score, means[position])))
        numbers = [contestants[0].scores.images[position].number for position, _ in picked]
        for task in FURTHER:
            judged = all(task in model.scores.tasks for model in contestants)
            if judged and not any(split.has_label(number, task) for number in numbers):
                picked += _extremes(contestants, Score(task), count, f" in {task}")
    samples = []
    with memory_errors(models[0][1].device, 1):
        for done, (position, why) in enumerate(picked, 1):
            samples.append(_sample(models, comparison, split, position, why))
            progress("drawing images", done, len(picked))
    return tuple(samples)


def _extremes(
    contestants: Sequence[Shown], score: Score, count: int, of: str = ""
) -> list[tuple[int, tuple[str, Score, float]]]:
    """Return (position, why it is shown) of the best and the worst images by the mean of a score."""
    ranking = ranked([model.scores for model in contestants], score)
    best, worst = best_and_worst(ranking, count, count)
    means = dict(ranking)
    return [
        (position, (f"{word}{of} {rank}", score, means[position]))
        for word, positions in (("best", best), ("worst", worst))
        for rank, position in enumerate(positions, 1)
    ]


def encode_image(pixels_HW3: Array, size: tuple[int, int]) -> bytes:
    """Return an image, uint8 (H, W, 3), as the bytes of a JPEG, resized to `size` (H, W)."""
    height, width = size
    small = Image.fromarray(pixels_HW3).resize((width, height), Image.Resampling.LANCZOS)
    return _bytes(small, "JPEG", quality=_QUALITY, optimize=True)


def encode_classes(ids_HW: Array, colours: Sequence[tuple[int, int, int]], size: tuple[int, int]) -> bytes:
    """Return class ids (H, W) as the bytes of a PNG with the class colours, resized to `size` (H, W).

    Resizing takes the nearest pixel, so it never mixes classes.
    """
    palette = np.full((256, 3), VOID_RGB, np.uint8)
    palette[: len(colours)] = colours
    picture = _nearest(ids_HW, size)
    picture.putpalette(palette.tobytes())
    return _bytes(picture, "PNG", optimize=True)


def encode_wrong(
    label_HW: Array, predicted_HW: Array, colours: Sequence[tuple[int, int, int]], size: tuple[int, int]
) -> bytes:
    """Return the bytes of a PNG of wrong pixels in red on a transparent ground, resized to `size` (H, W).

    Wrong pixels are those where the class ids of `label_HW` and `predicted_HW` differ, except void. The red differs
    from all class colours, which are `colours`.
    """
    wrong = ((label_HW != predicted_HW) & (label_HW != IGNORE_INDEX)).astype(np.uint8)
    picture = _nearest(wrong, size)
    picture.putpalette(bytes([0, 0, 0, *error_colour(colours)]))
    return _bytes(picture, "PNG", optimize=True, transparency=0)


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Return the size (H, W) of an image on the page: at most 640 pixels at the longer side, never enlarged."""
    factor = min(1.0, MOST_PIXELS / max(height, width))
    return max(1, round(factor * height)), max(1, round(factor * width))


def _first_runs(comparison: Comparison, runs: Sequence[Entry]) -> list[tuple[Row, Entry]]:
    by_text = {run.text: run for run in runs}
    return [(row, by_text[row.runs[0].run]) for row in comparison.rows if row.runs[0].run in by_text]


def _of_fold(row: Row, runs: Sequence[Entry], fold: str) -> Entry | None:
    members = {score.run for score in row.runs}
    return next((run for run in runs if run.text in members and run.fold == fold), None)


def _for_classes(
    model: Shown, split: Split, means: dict[int, float], taken: Sequence[int], most: int
) -> list[tuple[int, str]]:
    """Return images for classes that no image so far has in its label: the one with the best IoU for each."""
    images = model.scores.images
    covered = {place for position in taken for place in _present(split, images[position].number)}
    positions: list[tuple[int, str]] = []
    for place, name in enumerate(split.classes.names):
        having = [position for position in means if not math.isnan(images[position].iou[place])]
        # The class may be in their predictions alone; a rare class is in few labels.
        likely = sorted(having, key=lambda position: -images[position].iou[place])[:_LABELS_READ]
        if place in covered or len(positions) == most:
            continue
        for position in likely:
            if place in (present := _present(split, images[position].number)):
                positions.append((position, f"for {name}"))
                covered |= set(present)
                break
    return positions


def _present(split: Split, number: int) -> tuple[int, ...]:
    """Return classes in a label, the largest first."""
    label = split.label(number)
    counts = np.bincount([] if label is None else label.reshape(-1), minlength=256)[:IGNORE_INDEX]
    return tuple(sorted(np.flatnonzero(counts).tolist(), key=lambda place: -int(counts[place])))


def _sample(
    models: Sequence[tuple[int, Shown]],
    comparison: Comparison,
    split: Split,
    position: int,
    why: tuple[str, Score, float],
) -> Sample:
    first = models[0][1].scores.images[position]
    pixels, label = split.image(first.number), split.label(first.number)
    size = shown_size(*pixels.shape[:2])
    colours = split.classes.colours
    predictions, answers = list[RowPrediction](), list[tuple[str, Predicted]]()
    for place, model in models:
        predicted, score = model.predict(split, first.number), model.scores.images[position]
        answers.append((comparison.rows[place].name, predicted))
        classes = wrong = None
        if SEGMENTATION in predicted.answers and label is not None:
            argmax = predicted.argmax.numpy()
            classes, wrong = encode_classes(argmax, colours, size), encode_wrong(label, argmax, colours, size)
        predictions.append(RowPrediction(place, score.miou, score.iou, classes, wrong))
    return Sample(
        first.sample,
        *why,
        size,
        _present(split, first.number),
        encode_image(pixels, size),
        None if label is None else encode_classes(label, colours, size),
        tuple(predictions),
        tuple(map_ for task in FURTHER for map_ in _maps(task, answers, size, split.classes)),
    )


def _maps(
    task: str, answers: Sequence[tuple[str, Predicted]], size: tuple[int, int], classes: ClassList
) -> Iterator[tuple[str, bytes]]:
    """Yield the label of a task and each row's answer and error as JPEGs, at one scale for maps and one for errors."""
    view = VIEWS[task]
    maps = {name: predicted.answers[task].numpy() for name, predicted in answers if task in predicted.answers}
    label = next((predicted.labels[task].numpy() for _, predicted in answers if task in predicted.labels), None)
    scale = view.scale(maps.values() if label is None else [*maps.values(), label])
    worst = view.error_scale([] if label is None else [(answer, label) for answer in maps.values()])
    if label is not None and maps:
        yield f"{view.prefix}ground truth", encode_map(view.picture(label, classes, scale), size)
    for name, answer in maps.items():
        yield f"{view.prefix}{name}", encode_map(view.picture(answer, classes, scale), size)
        if label is not None:
            _, error = view.error(answer, answer, label, classes, worst)
            yield f"error of {task}, {name}", encode_map(error, size)


def encode_map(picture: Picture, size: tuple[int, int]) -> bytes:
    """Return a picture as the bytes of a JPEG, resized to `size` (H, W).

    `picture` is an image, uint8 (H, W, 3), or a `DepthMap`. This function draws the colour bar below a depth map.
    """
    return encode_depth(picture, size) if isinstance(picture, DepthMap) else encode_image(picture, size)


def encode_depth(depth: DepthMap, size: tuple[int, int]) -> bytes:
    """Return the bytes of a JPEG with a depth map, resized to `size` (H, W) in pixels, and a colour bar below it.

    If the colour bar is wider than W, H and W are multiplied by the smallest whole number that makes room for it.
    """
    factor = math.ceil(depth.bar(size[1]).width / size[1])
    enlarged = factor * size[1], factor * size[0]
    small = Image.fromarray(depth.values.astype(np.float32)).resize(enlarged, Image.Resampling.NEAREST)
    return _bytes(replace(depth, values=np.asarray(small)).picture(), "JPEG", quality=_QUALITY, optimize=True)


def _nearest(ids_HW: Array, size: tuple[int, int]) -> Image.Image:
    height, width = size
    # A palette image is resized without mixing its numbers.
    return Image.fromarray(np.ascontiguousarray(ids_HW)).resize((width, height), Image.Resampling.NEAREST).convert("P")


def _bytes(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
