"""One HTML file with its style, script and pictures, which fetches nothing.

The page's content security policy enforces this. A browser runs only this script and opens no connection, whatever the
names of classes and runs contain.
"""

import base64
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from kdcache.analysis.comparison import Comparison
from kdcache.analysis.report.audit import TeacherAudit
from kdcache.analysis.report.confusion import confusions
from kdcache.analysis.report.render import as_json, render
from kdcache.analysis.report.samples import Sample
from kdcache.analysis.report.scores import scores
from kdcache.analysis.report.sections import classes, recipes, teacher
from kdcache.analysis.report.sections import pictures as show_pictures
from kdcache.analysis.report.stores import SizeOfCache, cost, stores
from kdcache.analysis.report.summary import summary
from kdcache.analysis.report.training import curves, gradients, read_trainings
from kdcache.analysis.runs import Entry
from kdcache.bounded import read_bytes
from kdcache.display import private_places, public, public_names, without_places
from kdcache.errors import RecipeError
from kdcache.files import write_whole
from kdcache.metrics import ConfusionMatrix

SUFFIXES = (".html", ".htm")


def write_report(comparison: Comparison, runs: Sequence[Entry], out: str | Path, **contents: Any) -> Path:
    """Write the report page, completely or not at all. Return its path.

    Args:
        comparison: what to show.
        runs: the compared runs.
        out: the .html file, which is replaced.
        contents: further content of the page, as keyword arguments of `page`, such as `title` or `samples`.
    Raises: RecipeError for another kind of file, or an invalid log of a run.
    """
    path = check_out(Path(out))
    content = page(comparison, runs, **contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return path


def check_out(out: Path) -> Path:
    """Check that `out` can be the path of a page, and return it.

    Raises: RecipeError if it is a folder or does not end with .html.
    """
    if out.suffix.lower() in SUFFIXES and not out.is_dir():
        return out
    raise RecipeError(
        f"--out needs an .html file: {out} is a folder" if out.is_dir() else f"--out needs an .html file: {str(out)!r}",
        fix=f"Use --out {out / 'report.html' if out.is_dir() else out.with_suffix('.html')}",
    )


def read_figure(path: Path) -> bytes:
    """Return the content of the PNG file at `path`. Raises: RecipeError for another kind of file."""
    try:
        content = read_bytes(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"Cannot read --figure {path}", fix="Give a PNG file.", rule=str(error)) from error
    if not content.startswith(b"\x89PNG"):
        raise RecipeError(f"--figure {path} is not a PNG", fix="Give a PNG file.")
    return content


def page(
    comparison: Comparison,
    runs: Sequence[Entry],
    *,
    title: str | None = None,
    samples: Sequence[Sample] | None = None,
    matrices: Sequence[tuple[int, ConfusionMatrix]] = (),
    size_of_cache: SizeOfCache = lambda _: None,
    audits: Sequence[TeacherAudit] = (),
    figure: bytes | None = None,
    pictures: Path | None = None,
    device: str | None = None,
    command: str | None = None,
) -> str:
    """Return the whole page as HTML text.

    Args:
        comparison: what to show.
        runs: the compared runs. Curves, recipes and versions are read from their folders.
        title: the page's title. None makes one from the data's name.
        samples: images to show (see `choose_samples`), or None for a page without images.
        matrices: pairs of an index into `comparison.rows` and the confusion matrix of that row's first run.
        size_of_cache: function from a cache's path to its `CacheSize`, or to None if it cannot be read.
        audits: audits of the teachers.
        figure: a PNG of scores, such as the curve of a sweep, or None.
        pictures: a folder of further pictures to mention, or None.
        device: the name of the device on which the runs were evaluated, or None.
        command: the command that the user typed, or None.
    Raises: RecipeError for an invalid log of a run.
    """
    by_text = {run.text: run for run in runs}
    trainings = read_trainings(comparison, by_text)
    parts = [
        ("summary", "Summary", summary(comparison, device)),
        ("curve", "Curve", None if figure is None else curve(figure)),
        ("scores", "Scores", scores(comparison)),
        ("cost", "Cost", cost(comparison, by_text, size_of_cache)),
        ("classes", "Classes", classes(comparison)),
        ("confusion", "Confusion", confusions(comparison, matrices)),
        ("pictures", "Pictures", show_pictures(comparison, samples, pictures)),
        ("teacher", "Teacher", teacher(comparison, audits[0] if audits else None)),
        ("stores", "Caches", stores(audits)),
        ("training", "Training", curves(trainings)),
        ("gradients", "Loss terms", gradients(trainings)),
        ("recipes", "What was run", recipes(comparison, by_text, command)),
    ]
    style, script = _file("page.css"), _file("page.js")
    sources = [(run.text, run.run and run.run.folder, run.settings) for run in runs]
    places = private_places([comparison.data, command, pictures, *sources])
    places |= public_names([run.text for run in runs])
    return render(
        "page.html",
        comparison=replace(comparison, data=public(comparison.data)),
        title=title or _title(public(comparison.data)),
        parts=[(name, word, _without_folders(part, places)) for name, word, part in parts if part is not None],
        figures=_without_folders(as_json(comparison.to_json()), places),
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        today=datetime.date.today().isoformat(),
        version=metadata.version("kdcache"),
    )


def _title(data: str) -> str:
    """Return the title of a page on a data set, whose public name is `data`."""
    layout, _, place = data.rpartition(":")
    if data.startswith("scenes"):
        return "Distillation on procedural scenes"
    return f"Distillation on {Path(place).name or layout}"


def curve(png: bytes) -> Markup:
    """Return the section that shows a picture, such as the curve of a sweep. `png` is the content of the PNG file."""
    return render("curve.html", png=base64.b64encode(png).decode("ascii"))


def _without_folders(part: Markup, places: Mapping[str, str]) -> Markup:
    """Return a part of the page with paths that show no folder of this machine."""
    return Markup(without_places(str(part), {str(escape(place)): str(escape(name)) for place, name in places.items()}))


def _file(name: str) -> Markup:
    return Markup((resources.files(__package__) / name).read_text(encoding="utf-8"))
