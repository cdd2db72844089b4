"""From runs to a folder of pictures and figures, for `kdcache visualise`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.analysis.banner import banner
from kdcache.analysis.compare import Progress, comparable_split
from kdcache.analysis.curves import draw_curves, read_curves
from kdcache.analysis.gallery import (
    SIDE_BY_SIDE,
    Case,
    Gallery,
    Shown,
    best_cases,
    folder_names,
    shorten,
    summary_json,
)
from kdcache.analysis.per_image import class_number, ranked, sample_numbers, score_images
from kdcache.analysis.runs import Entry, find_runs
from kdcache.analysis.score_figures import draw_distribution, metrics_text
from kdcache.analysis.stored_evaluations import Judging, memory_errors
from kdcache.data import Fold, Split, fold_alone
from kdcache.errors import RecipeError
from kdcache.files import check_own_folder
from kdcache.metrics.figures import draw_confusion, save_figure
from kdcache.metrics.tables import percent

SUMMARY = "visualise.json"
SIDE_BEST, SIDE_WORST = 2, 1


@dataclass(frozen=True)
class VisualiseOptions:
    """The choice of pictures.

    Attributes:
        best, worst: images per run, by mIoU or by the IoU of `class_name`.
        ids: samples to draw instead, the same for every run.
        teacher: a run or SPEC@FILE whose prediction is a panel of every picture.
        smoke: the runs are those of a recipe made small: every picture is marked.
        fold: only that fold of the split: what trainings with this --fold have not seen.
    """

    judging: Judging = field(default_factory=Judging)
    best: int = 10
    worst: int = 10
    ids: tuple[str, ...] = ()
    class_name: str | None = None
    teacher: str | None = None
    fold: Fold | None = None
    smoke: bool = False


@dataclass(frozen=True)
class Visualised:
    """The result: all runs by the names of their folders, and all files."""

    shown: dict[str, Shown]
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def visualise(
    runs: Sequence[str | Path],
    data: str | None,
    split: str | None,
    out: Path,
    options: VisualiseOptions | None = None,
    progress: Progress | None = None,
) -> Visualised:
    """Score every image with every run, and draw.

    Args:
        data, split: default: those that the runs' recipes validate on.
        out: new, empty, or what an earlier call made; its pictures of the same runs are replaced.
    Raises: RecipeError for runs, samples and classes that are none; MismatchError for other classes or data.
    """
    options = options or VisualiseOptions()
    report = progress or (lambda what, done, total: None)
    check_own_folder(out, SUMMARY, "pictures are drawn into a new or empty folder, or over earlier ones")
    entries = find_runs(runs, options.judging.which)
    teachers = find_runs([options.teacher], options.judging.which) if options.teacher else []
    source: Split = comparable_split(entries, data, split)
    if options.fold is not None:
        source = fold_alone(source, *options.fold)
    ranked_class = None if options.class_name is None else class_number(source, options.class_name)
    numbers = sample_numbers(source, options.ids)
    models = [score_run(run, source, options.judging, report) for run in entries]
    teacher = score_run(teachers[0], source, options.judging, report) if teachers else None
    gallery = Gallery(source, ranked_class, teacher, banner(source.data, options.smoke))
    shown = dict(zip(folder_names([run.text for run in entries]), models, strict=True))
    positions = {image.number: position for position, image in enumerate(models[0].scores.images)}
    listed = [positions[number] for number in numbers]
    files: list[Path] = []
    notes: list[str] = []
    with memory_errors(options.judging.device, 1):
        for run, (name, model) in zip(entries, shown.items(), strict=True):
            cases = _cases([model], options, listed, ranked_class, (options.best, options.worst))
            files += _draw_run(run, model, gallery, cases, out / name, report)
            notes += [] if (out / name / "curves.png").is_file() else [f"{run.text} keeps no metrics.jsonl: no curves"]
        report(f"drawing {SIDE_BY_SIDE}", 0, 1)
        several = len(models) > 1
        cases = _cases(models, options, listed, ranked_class, (SIDE_BEST, SIDE_WORST)) if several else []
        files += gallery.draw_side_by_side(models, cases, out)
    header = {"data": source.data, "split": source.split, "banner": gallery.above, "class": options.class_name}
    content = {**header, "runs": summary_json(shown)}
    (out / SUMMARY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return Visualised(shown, tuple(files), tuple(notes))


def score_run(run: Entry, split: Split, judging: Judging, progress: Progress) -> Shown:
    """Open a run, and score every labelled image with it.

    Raises: as `Entry.load`; ModelError when memory does not suffice.
    """
    model, description = run.load(split.classes, judging.which, judging.size)
    with memory_errors(judging.device, judging.batch_size):
        scores = score_images(
            model.to(judging.device),
            split,
            description.size,
            device=judging.device,
            batch_size=judging.batch_size,
            progress=lambda done, total: progress(f"scoring {run.name}", done, total),
        )
    return Shown(run.title, model, description.size, judging.device, scores)


def _cases(
    models: Sequence[Shown],
    options: VisualiseOptions,
    listed: Sequence[int],
    ranked_class: int | None,
    counts: tuple[int, int],
) -> list[Case]:
    """The listed images; else by rank. Raises: RecipeError when there is nothing to rank."""
    if listed:
        return best_cases([], *counts, chosen=listed)
    ranking = ranked([shown.scores for shown in models], ranked_class)
    if not ranking:
        raise RecipeError(
            "images are ranked by what is in their labels",
            received=f"no image with {options.class_name or 'a labelled pixel'}",
            remedy="name another --class, or other data",
        )
    return best_cases(ranking, *counts)


def _draw_run(
    run: Entry,
    shown: Shown,
    gallery: Gallery,
    cases: Sequence[Case],
    folder: Path,
    progress: Progress,
) -> list[Path]:
    """Everything about one run."""
    folder.mkdir(parents=True, exist_ok=True)
    split, ranked_class, above = gallery.split, gallery.ranked_class, gallery.above
    metrics, counts, name = shown.scores.metrics, shown.scores.confusion.counts, shorten(shown.name)
    title = f"{name} on {shorten(split.data, 40)}, {split.split}: mIoU {percent(metrics.miou)} %"
    figures = {
        "iou_distribution.png": draw_distribution(shown.scores, split.classes.colours, title, ranked_class),
        "confusion.png": draw_confusion(counts.numpy(), metrics.class_names, f"{name}: prediction per label, %"),
    }
    curves = None if run.run is None else read_curves(run.run)
    if curves is not None:
        batch_size = run.settings.get("batch-size")
        figures["curves.png"] = draw_curves(curves, f"The training of {name}", batch_size)
    (folder / "curves.png").unlink(missing_ok=True)
    for file, figure in figures.items():
        save_figure(figure, folder / file, above)
    header = [
        ("run", shown.name),
        ("data", f"{split.data}, split {split.split}"),
        ("images", f"{len(shown.scores.images)} labelled"),
        ("input", f"{shown.size[0]}x{shown.size[1]}; judged at the labels' own size"),
    ]
    header = [("note", above), *header] if above else header
    text = folder / "evaluation_metrics.txt"
    text.write_text(metrics_text(shown.scores, header, ranked_class), encoding="utf-8")
    pictures = gallery.draw_cases(
        shown, cases, folder, lambda done, total: progress(f"drawing {run.name}", done, total)
    )
    return [*(folder / file for file in figures), text, *pictures]
