"""Draw scored runs into a folder of pictures and figures, for `kdcache report --draw`."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from kdcache.analysis.compare import Progress
from kdcache.analysis.curves import draw_curves, read_curves
from kdcache.analysis.gallery import (
    SHEET,
    SIDE_BY_SIDE,
    Case,
    Gallery,
    Shown,
    best_cases,
    earlier_pictures,
    folder_names,
    shorten,
    summary_json,
)
from kdcache.analysis.per_image import MIOU, Score, ranked, score_images, shared_score
from kdcache.analysis.runs import Entry
from kdcache.analysis.score_figures import draw_distribution, draw_scores, metrics_text
from kdcache.analysis.stored_evaluations import EvalSettings, memory_errors
from kdcache.analysis.task_views import VIEWS
from kdcache.data import Split
from kdcache.display import public
from kdcache.files import check_own_folder, replacing_in
from kdcache.metrics.confusion import Metrics
from kdcache.metrics.figures import Format, Layout, draw_confusion, save_figure
from kdcache.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "visualise.json"
SIDE_BEST, SIDE_WORST = 2, 1
CONFUSION, CURVES = "confusion.png", "curves.png"
_FIGURES = (CONFUSION, CURVES, *(f"{view.stem}_distribution.png" for view in VIEWS.values()))


@dataclass(frozen=True)
class Drawing:
    """The pictures to draw of each run.

    Attributes:
        folder: a folder that is new, empty, or from an earlier call. Pictures of the same runs are replaced.
        num: number of best and of worst images of each run, by mIoU, or by rmse if there is only depth.
        layout: "grid" or "row", the arrangement of panels in a picture.
        formats: file formats of every picture.
    """

    folder: Path
    num: int = 10
    layout: Layout = "grid"
    formats: tuple[Format, ...] = ("png",)

    def check_folder(self) -> None:
        """Check that the folder for the pictures is new, empty, or was written by an earlier `--draw`.

        Raises: RecipeError if it holds something else.
        """
        check_own_folder(self.folder, SUMMARY, "Give another folder with --draw")


def draw(drawing: Drawing, models: Sequence[tuple[Entry, Shown]], gallery: Gallery, progress: Progress) -> list[str]:
    """Write pictures of each run, and of all runs next to each other, to a folder. Return warnings, one sentence each.

    Args:
        drawing: the folder, and what to draw.
        models: the runs with their models and scores, for all images of the gallery's split.
        gallery: how to draw an image.
        progress: called with (what is done, units done, units in total).
    """
    names = folder_names([run.text for run, _ in models])
    models_by_folder = {name: model for name, (_, model) in zip(names, models, strict=True)}
    with (
        replacing_in(drawing.folder, lambda: _earlier(drawing.folder, models_by_folder)) as folder,
        memory_errors(models[0][1].device, 1),
    ):
        notes = []
        for name, (run, model) in zip(names, models, strict=True):
            score = shared_score([model.scores]) or MIOU
            cases = best_cases(ranked([model.scores], score), drawing.num, drawing.num, score)
            _draw_run(run, model, gallery, cases, score, folder / name, progress)
            if not (folder / name / CURVES).is_file():
                notes.append(f"{run.text} keeps no metrics.jsonl: no curves")
        notes += _draw_side_by_side(list(models_by_folder.values()), gallery, folder, progress)
        header = {"data": public(gallery.split.data), "split": gallery.split.split, "banner": gallery.above}
        content = {**header, "runs": summary_json(models_by_folder)}
        (folder / SUMMARY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return notes


def _draw_side_by_side(models: Sequence[Shown], gallery: Gallery, folder: Path, progress: Progress) -> list[str]:
    """Draw the best and the worst images by the mean of several models. Returns: a note if they share no score."""
    if len(models) < 2:
        return []
    progress(f"drawing {SIDE_BY_SIDE}", 0, 1)
    scores = [model.scores for model in models]
    score = shared_score(scores)
    if score is None:
        return ["the runs share no task by which images are ranked: none are drawn side by side"]
    gallery.draw_side_by_side(models, best_cases(ranked(scores, score), SIDE_BEST, SIDE_WORST, score), folder)
    return []


def _earlier(out: Path, runs: Iterable[str]) -> Iterator[Path]:
    """Yield what an earlier call drew of these runs."""
    yield from earlier_pictures(out, runs)
    for run, file, kind in itertools.product(runs, (*_FIGURES, SHEET), get_args(Format)):
        if (picture := (out / run / file).with_suffix(f".{kind}")).is_file():
            yield picture


def score_run(run: Entry, name: str, split: Split, judging: EvalSettings, progress: Progress) -> Shown:
    """Load a run and score every labelled image of a split with its model. Return the model with its scores.

    Args:
        run: the run.
        name: the model's name in pictures.
        split: the images.
        judging: how to evaluate.
        progress: called with (what is done, images done, images in total).

    Raises: MismatchError if the model has other classes than the split. RecipeError if the run has no weights.
        ModelError if the weights do not fit the model, or memory is too small.
    """
    model, description = judging.load(run, split.classes)
    framing = judging.framing(description.fit)
    with memory_errors(judging.device, judging.batch_size):
        scores = score_images(
            model.to(judging.device),
            split,
            description.size,
            depth=judging.depth,
            device=judging.device,
            batch_size=judging.batch_size,
            framing=framing,
            progress=lambda done, total: progress(f"scoring {run.name}", done, total),
        )
    return Shown(name, model, description.size, judging.device, scores, framing)


def _draw_run(
    run: Entry,
    shown: Shown,
    gallery: Gallery,
    cases: Sequence[Case],
    score: Score,
    folder: Path,
    progress: Progress,
) -> None:
    """Draw everything about one run."""
    folder.mkdir(parents=True, exist_ok=True)
    split, above, formats = gallery.split, gallery.above, gallery.formats
    figures = _score_figures(shown, split)
    curves = None if run.run is None else read_curves(run.run)
    if curves is not None:
        batch_size = run.settings.get("batch-size")
        figures[CURVES] = draw_curves(curves, f"The training of {shorten(shown.name)}", batch_size)
    for file, figure in figures.items():
        save_figure(figure, folder / file, above, formats)
    header = [
        ("run", shown.name),
        ("data", f"{public(split.data)}, split {split.split}"),
        ("heads", ", ".join(shown.heads)),
        ("images", f"{len(shown.scores.images)} labelled"),
        ("input", f"{shown.size[0]}x{shown.size[1]}; judged at the labels' own size"),
    ]
    header = [("note", above), *header] if above else header
    (folder / "evaluation_metrics.txt").write_text(metrics_text(shown.scores, header, score), encoding="utf-8")
    gallery.draw_cases(shown, cases, folder, lambda done, total: progress(f"drawing {run.name}", done, total))


def _score_figures(shown: Shown, split: Split) -> dict[str, "Figure"]:
    """Return the distribution of scores per task and the confusion matrix, as figures by file name."""
    scores, name = shown.scores, shorten(shown.name)
    title, figures = f"{name} on {shorten(public(split.data), 40)}, {split.split}", dict[str, "Figure"]()
    for task, metrics in scores.by_task.items():
        score, file = Score(task), f"{VIEWS[task].stem}_distribution.png"
        titled = f"{title}: {score.text(getattr(metrics, TASKS[task].score))}"
        if isinstance(metrics, Metrics):
            counts = scores.confusion.counts.numpy()
            figures[file] = draw_distribution(scores, split.classes.colours, titled)
            figures[CONFUSION] = draw_confusion(counts, metrics.class_names, f"{name}: prediction per label, %")
        else:
            figures[file] = draw_scores(scores, score, titled)
    return figures
