"""One HTML file: style and script in it, pictures in it, nothing fetched from anywhere.

The page's own policy forbids all else: a browser runs this script alone and opens no connection, whatever the names of
classes and runs contain.
"""

import base64
import datetime
import hashlib
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

from kdcache.analysis.comparison import Comparison
from kdcache.analysis.report.audit import TeacherAudit
from kdcache.analysis.report.classes import classes
from kdcache.analysis.report.html import Child, Html, join, json_block, tag
from kdcache.analysis.report.pictures import pictures as show_pictures
from kdcache.analysis.report.recipes import recipes
from kdcache.analysis.report.samples import Sample
from kdcache.analysis.report.scores import scores
from kdcache.analysis.report.summary import summary
from kdcache.analysis.report.teacher import teacher
from kdcache.analysis.report.training import curves, gradients, read_trainings
from kdcache.analysis.runs import Entry
from kdcache.errors import RecipeError
from kdcache.files import write_whole

SUFFIXES = (".html", ".htm")


def write_report(
    comparison: Comparison,
    runs: Sequence[Entry],
    out: str | Path,
    *,
    title: str | None = None,
    samples: Sequence[Sample] = (),
    audit: TeacherAudit | None = None,
    pictures: Path | None = None,
    device: str | None = None,
    command: str | None = None,
) -> Path:
    """Write the page, whole or not at all; returns its path.

    Args:
        runs: those that were compared; curves, recipes and versions are read from their folders.
        out: an .html file; one that is there is replaced.
        title: default of the data's name.
        samples: images to show (see `choose_samples`).
        pictures: a folder of further pictures, which is mentioned.
        device: where the runs were judged.
        command: what the user typed.
    Raises: RecipeError for another kind of file, and for a run's log that is none.
    """
    path = check_out(Path(out))
    content = page(
        comparison,
        runs,
        title=title or f"Distillation on {comparison.data}",
        samples=samples,
        audit=audit,
        pictures=pictures,
        device=device,
        command=command,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return path


def check_out(out: Path) -> Path:
    """Check the path of a page. Raises: RecipeError for a path that is no name of a page."""
    if out.suffix.lower() in SUFFIXES and not out.is_dir():
        return out
    raise RecipeError(
        "--out is an .html file",
        received=f"{out} is a folder" if out.is_dir() else repr(str(out)),
        remedy=f"use --out {out / 'report.html' if out.is_dir() else out.with_suffix('.html')}",
    )


def page(
    comparison: Comparison,
    runs: Sequence[Entry],
    *,
    title: str,
    samples: Sequence[Sample] = (),
    audit: TeacherAudit | None = None,
    pictures: Path | None = None,
    device: str | None = None,
    command: str | None = None,
) -> str:
    """The whole document."""
    by_text = {run.text: run for run in runs}
    trainings = read_trainings(comparison, by_text)
    parts: list[tuple[str, str, Html | None]] = [
        ("summary", "Summary", summary(comparison, device)),
        ("scores", "Scores", scores(comparison)),
        ("classes", "Classes", classes(comparison)),
        ("pictures", "Pictures", show_pictures(comparison, samples, pictures)),
        ("teacher", "Teacher", teacher(comparison, audit)),
        ("training", "Training", curves(trainings)),
        ("gradients", "Loss terms", gradients(trainings)),
        ("recipes", "What was run", recipes(comparison, by_text, command)),
    ]
    shown = [(name, word, part) for name, word, part in parts if part is not None]
    contents = tag("nav", *(tag("a", word, href=f"#{name}") for name, word, _ in shown), aria_label="Contents")
    above = None if comparison.banner is None else tag("p", comparison.banner, class_="banner", role="note")
    head = tag("header", tag("p", "kdcache report", class_="eyebrow"), tag("h1", title), above, contents)
    foot = tag("footer", tag("p", *_made()))
    body = join(head, tag("main", *(part for *_, part in shown)), foot, json_block("comparison", comparison.to_json()))
    return _document(title, body)


def _made() -> list[Child]:
    today = datetime.date.today().isoformat()
    return [
        f"Made on {today} by kdcache {metadata.version('kdcache')}. The numbers of this page are also in it as JSON: ",
        tag("code", "script#comparison"),
        ".",
    ]


def _document(title: str, body: Html) -> str:
    style, script = _file("page.css"), _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = join(
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}<script>{script}</script></body></html>\n'


def _file(name: str) -> str:
    return (resources.files("kdcache.analysis.report") / name).read_text(encoding="utf-8")
