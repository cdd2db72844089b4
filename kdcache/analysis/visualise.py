"""From runs to a folder of pictures and figures, for `kdcache visualise`."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from kdcache.analysis.banner import banner
from kdcache.analysis.compare import Progress, comparable_split, one_range
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
from kdcache.analysis.per_image import (
    MIOU,
    RMSE,
    Score,
    class_number,
    ranked,
    sample_numbers,
    score_images,
    shared_score,
)
from kdcache.analysis.runs import Entry, find_runs
from kdcache.analysis.score_figures import draw_distribution, draw_rmse, metrics_text
from kdcache.analysis.stored_evaluations import Judging, memory_errors
from kdcache.data import Fold, Split, fold_alone
from kdcache.errors import RecipeError
from kdcache.files import check_own_folder, replacing_in
from kdcache.heads import SEGMENTATION
from kdcache.metrics.figures import Format, Layout, draw_confusion, save_figure
from kdcache.shown import public, public_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "visualise.json"
SIDE_BEST, SIDE_WORST = 2, 1
_FIGURES = ("iou_distribution.png", "confusion.png", "rmse_distribution.png", "curves.png")


@dataclass(frozen=True)
class VisualiseOptions:
    """The choice of pictures.

    Attributes:
        best, worst: images per run, by mIoU or by the IoU of `class_name`; by rmse of a run of depth alone.
        ids: samples to draw instead, the same for every run.
        teacher, baseline: runs or SPEC@FILE whose predictions are panels of every picture.
        smoke: the runs are those of a recipe made small: every picture is marked.
        fold: only that fold of the split: what trainings with this --fold have not seen.
    """

    judging: Judging = field(default_factory=Judging)
    best: int = 10
    worst: int = 10
    ids: tuple[str, ...] = ()
    class_name: str | None = None
    teacher: str | None = None
    baseline: str | None = None
    layout: Layout = "grid"
    formats: tuple[Format, ...] = ("png",)
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
    beside = {}
    for name, text in (("teacher", options.teacher), ("baseline", options.baseline)):
        if text:
            beside[name] = find_runs([text], options.judging.which)[0]
    source: Split = comparable_split(entries, data, split)
    if options.fold is not None:
        source = fold_alone(source, *options.fold)
    by_class = None if options.class_name is None else _class_score(source, options.class_name)
    numbers = sample_numbers(source, options.ids)
    judging, _ = one_range(options.judging, [*entries, *beside.values()], source)
    models = [score_run(run, source, judging, report) for run in _named_apart(entries)]
    _check_class(by_class, entries, models)
    scored = {run.text: shown for run, shown in zip(entries, models, strict=True)}
    others = {name: scored.get(run.text) or score_run(run, source, judging, report) for name, run in beside.items()}
    above = banner(source.data, options.smoke)
    gallery = Gallery(source, above=above, layout=options.layout, formats=options.formats, **others)
    shown = dict(zip(folder_names([run.text for run in entries]), models, strict=True))
    with replacing_in(out, lambda: _earlier(out, shown)) as drawn:
        files, notes = _draw(entries, shown, by_class, numbers, gallery, options, drawn, report)
    return Visualised(shown, tuple(out / file.relative_to(drawn) for file in files), tuple(notes))


def _draw(
    entries: Sequence[Entry],
    shown: dict[str, Shown],
    by_class: Score | None,
    numbers: Sequence[int],
    gallery: Gallery,
    options: VisualiseOptions,
    out: Path,
    report: Progress,
) -> tuple[list[Path], list[str]]:
    """Draw everything into an empty folder. Returns: the files, and notes."""
    models, source = list(shown.values()), gallery.split
    positions = {image.number: position for position, image in enumerate(models[0].scores.images)}
    listed = [positions[number] for number in numbers]
    files: list[Path] = []
    notes: list[str] = []
    with memory_errors(options.judging.device, 1):
        for run, (name, model) in zip(entries, shown.items(), strict=True):
            score = by_class or shared_score([model.scores]) or MIOU
            cases = _cases([model], options, listed, score, (options.best, options.worst))
            files += _draw_run(run, model, gallery, cases, score, out / name, report)
            notes += [] if (out / name / "curves.png").is_file() else [f"{run.text} keeps no metrics.jsonl: no curves"]
        report(f"drawing {SIDE_BY_SIDE}", 0, 1)
        shared = by_class or shared_score([model.scores for model in models])
        several = len(models) > 1 and shared is not None
        cases = _cases(models, options, listed, shared, (SIDE_BEST, SIDE_WORST)) if several and shared else []
        if shared is None:
            notes.append("the runs share no task by which images are ranked: none are drawn side by side")
        files += gallery.draw_side_by_side(models, cases, out)
    header = {"data": public(source.data), "split": source.split, "banner": gallery.above, "class": options.class_name}
    content = {**header, "runs": summary_json(shown)}
    (out / SUMMARY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return files, notes


def _earlier(out: Path, runs: Iterable[str]) -> Iterator[Path]:
    """Yield what an earlier call drew of these runs."""
    yield from earlier_pictures(out, runs)
    for run, file, kind in itertools.product(runs, (*_FIGURES, SHEET), get_args(Format)):
        if (picture := (out / run / file).with_suffix(f".{kind}")).is_file():
            yield picture


def _named_apart(runs: Sequence[Entry]) -> list[Entry]:
    """Return the runs with the names that they have in pictures: their paths from one folder, their seeds if equal."""
    places = public_names([run.text for run in runs])
    names = [str(run.settings.get("name") or places[run.text]) for run in runs]
    shared = Counter(names)
    return [
        replace(run, settings={**run.settings, "name": _with_seed(name, run) if shared[name] > 1 else name})
        for run, name in zip(runs, names, strict=True)
    ]


def _with_seed(name: str, run: Entry) -> str:
    seed, _ = run.key
    return name if seed is None else f"{name}, seed {seed}"


def score_run(run: Entry, split: Split, judging: Judging, progress: Progress) -> Shown:
    """Open a run, and score every labelled image with it.

    Raises: as `Entry.load`; ModelError when memory does not suffice.
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
    return Shown(run.title, model, description.size, judging.device, scores, framing)


def _cases(
    models: Sequence[Shown],
    options: VisualiseOptions,
    listed: Sequence[int],
    score: Score,
    counts: tuple[int, int],
) -> list[Case]:
    """The listed images; else by rank. Raises: RecipeError when there is nothing to rank."""
    if listed:
        return best_cases([], *counts, chosen=listed, score=score)
    ranking = ranked([shown.scores for shown in models], score)
    if not ranking:
        raise RecipeError(
            "images are ranked by what is in their labels",
            received=f"no image with {options.class_name or 'a labelled pixel'}",
            remedy="name another --class, or other data",
        )
    return best_cases(ranking, *counts, score=score)


def _class_score(split: Split, name: str) -> Score:
    """The IoU of a class. Raises: RecipeError for a class that the data do not have."""
    return Score(f"IoU of {name}", place=class_number(split, name))


def _check_class(by_class: Score | None, runs: Sequence[Entry], models: Sequence[Shown]) -> None:
    """Refuse a ranking by a class for runs that predict none. Raises: RecipeError."""
    without = [run.text for run, shown in zip(runs, models, strict=True) if SEGMENTATION not in shown.scores.tasks]
    if by_class is not None and without:
        raise RecipeError(
            "--class ranks images of runs that are judged in segmentation",
            received=f"{', '.join(without[:3])}, judged in depth alone",
            remedy="leave out --class: images are ranked by the rmse of depth then",
        )


def _draw_run(
    run: Entry,
    shown: Shown,
    gallery: Gallery,
    cases: Sequence[Case],
    score: Score,
    folder: Path,
    progress: Progress,
) -> list[Path]:
    """Everything about one run."""
    folder.mkdir(parents=True, exist_ok=True)
    split, above, formats = gallery.split, gallery.above, gallery.formats
    figures = _score_figures(shown, split, score)
    curves = None if run.run is None else read_curves(run.run)
    if curves is not None:
        batch_size = run.settings.get("batch-size")
        figures["curves.png"] = draw_curves(curves, f"The training of {shorten(shown.name)}", batch_size)
    saved = [path for file, figure in figures.items() for path in save_figure(figure, folder / file, above, formats)]
    header = [
        ("run", shown.name),
        ("data", f"{public(split.data)}, split {split.split}"),
        ("heads", ", ".join(shown.heads)),
        ("images", f"{len(shown.scores.images)} labelled"),
        ("input", f"{shown.size[0]}x{shown.size[1]}; judged at the labels' own size"),
    ]
    header = [("note", above), *header] if above else header
    text = folder / "evaluation_metrics.txt"
    text.write_text(metrics_text(shown.scores, header, score), encoding="utf-8")
    pictures = gallery.draw_cases(
        shown, cases, folder, lambda done, total: progress(f"drawing {run.name}", done, total)
    )
    return [*saved, text, *pictures]


def _score_figures(shown: Shown, split: Split, score: Score) -> dict[str, "Figure"]:
    """How scores are spread over images, a picture for each task, and the confusion matrix; by their files."""
    scores, name = shown.scores, shorten(shown.name)
    title, figures = f"{name} on {shorten(public(split.data), 40)}, {split.split}", dict[str, "Figure"]()
    if SEGMENTATION in scores.tasks:
        metrics, counts = scores.metrics, scores.confusion.counts.numpy()
        spread = draw_distribution(scores, split.classes.colours, f"{title}: {MIOU.text(metrics.miou)}", score)
        confusion = draw_confusion(counts, metrics.class_names, f"{name}: prediction per label, %")
        figures |= {_FIGURES[0]: spread, _FIGURES[1]: confusion}
    if scores.depth is not None:
        figures[_FIGURES[2]] = draw_rmse(scores, f"{title}: {RMSE.text(scores.depth.rmse)}")
    return figures
