"""The site: it builds without a warning, fetches nothing, and its search finds the right pages."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kdcache.analysis.statistics import t_quantile

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
USER_PAGES = [page for page in TEXTS if not page.startswith("docs/dev/")]

WITHDRAWN = (
    "published gains.{0,20} met|makes? seeds agree|teachers? adds? [0-9.]+ points|above those that had all labels"
)
"""Claims about quality that the study of CamVid does not support: no control, one judging clip, short runs."""


@pytest.mark.parametrize("page", TEXTS)
def test_no_page_repeats_a_withdrawn_claim(page: str) -> None:
    assert not re.search(WITHDRAWN, " ".join(TEXTS[page].split()))


def test_the_picture_of_the_study_is_of_its_rows() -> None:
    """What the picture holds as text is what the rows give: means over seeds, intervals, seconds of the fastest run."""
    rows = json.loads((RESULTS / "study-cpu.json").read_text(encoding="utf-8"))["rows"]
    drawn = json.loads(Image.open(ROOT / "docs" / "assets" / "study.png").text["Description"])
    arms = {"distilled": "distilled, all", "control": "control, all", "labels only": "plain, all", "live": "live, all"}
    assert [label.partition(":")[0] for label in drawn] == list(arms)
    for curve, arm in zip(drawn.values(), arms.values(), strict=True):
        runs = [row for row in rows if (row["stage"], row["arm"]) == ("E6", arm)]
        ends = [row["miou"] for row in runs]
        assert curve["seeds"] == len({row["seed"] for row in runs})
        assert curve["seconds"][-1] == min(row["seconds"] for row in runs)
        assert curve["miou"][-1] == pytest.approx(statistics.fmean(ends), abs=6e-4)
        if len(ends) < 3:
            assert curve["half"] is None
        else:
            half = t_quantile(len(ends) - 1) * statistics.stdev(ends) / len(ends) ** 0.5
            assert curve["half"][-1] == pytest.approx(half, abs=6e-4)
    assert len(next(curve for label, curve in drawn.items() if label.startswith("live"))["seconds"]) > 2


def test_the_picture_of_few_labels_is_of_its_rows() -> None:
    """It holds each run of labels only and distilled, by number of labels."""
    rows = json.loads((RESULTS / "few-labels-cpu.json").read_text(encoding="utf-8"))["rows"]
    drawn = json.loads(Image.open(ROOT / "docs" / "assets" / "few-labels.png").text["Description"])
    assert list(drawn) == ["distilled", "labels only"]
    for arm, points in drawn.items():
        assert list(points) == ["23", "46", "92", "184", "266"]
        for count, scores in points.items():
            name = f"{arm}, all" if count == "266" else f"{arm}, {count}-"
            runs = [row["miou"] for row in rows if row["stage"] in ("F1", "F3") and row["arm"].startswith(name)]
            assert sorted(scores) == sorted(runs)


@pytest.mark.parametrize("folder", ["kdcache/analysis/report/templates", "cli/kdcache_cli/verbs", "docs"])
def test_words_that_are_not_the_fields_are_gone(folder: str) -> None:
    """Of losses that speak and of tables whose header is a verb."""
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in (".md", ".py", ".html") and path.name != "changelog.md":
            text = path.read_text(encoding="utf-8")
            assert not re.search(
                r"\bis loud\b|>Mind<|\[red\]it does not|what the teacher (says|said)|\| is \|", text
            ), path


@pytest.mark.parametrize("page", TEXTS)
def test_pages_name_files_that_exist_and_no_machine(page: str) -> None:
    text = TEXTS[page]
    for name in re.findall(r"`([\w-]+-(?:cpu|gpu|sm\d\d)[\w-]*\.json)`", text):
        assert (RESULTS / name).is_file(), f"{page}: no result {name}"
    for name in re.findall(r"`((?:benchmarks|tests|examples|scripts)/[\w/.-]*\w)`", text):
        assert (ROOT / name).exists(), f"{page}: no file {name}"
    for link in re.findall(r"\]\(((?!https?://|cli/)[^)#]+)", text):  # cli/ is made with the site
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: no page {link}"
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp|mnt)/", text), f"{page} names a machine's path"


def test_pages_of_the_api_begin_with_what_they_are_about() -> None:
    """A class or function, and no list of files; analysis and bench export none, verbs is functions alone."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        if page.stem in ("index", "verbs", "analysis", "bench"):
            continue
        first = re.search(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert first is not None
        module, _, name = first[1].rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, page.name


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    committed = {f"docs/{name}" for name in listed if not name.startswith("cli/")}
    assert committed == set(USER_PAGES) - {"README.md"}


@pytest.mark.parametrize("page", USER_PAGES)
def test_user_pages_do_not_cite_what_is_written_for_developers(page: str) -> None:
    assert not re.search(r"NOTES\.md|CHANGELOG\.md(?!\"$)|decisions/|see docs|\bE-[a-z]+-[a-z]", TEXTS[page]), page


def test_the_picture_of_the_pipeline_has_the_words_of_its_block() -> None:
    names: dict[str, Any] = {}
    exec((ROOT / "scripts" / "mermaid.py").read_text(encoding="utf-8"), names)
    (block,) = re.findall(r"```mermaid\n(.*?)```", TEXTS["docs/how-a-cache-works.md"], re.DOTALL)
    said = names["words"](block)
    assert len(said) > 20
    picture = (ROOT / "docs" / "assets" / "pipeline.svg").read_text(encoding="utf-8")
    shown = " ".join(re.findall(r">([^<>]+)</text>", picture))
    assert [words for words in said if words not in shown] == []
    assert 'src="assets/pipeline.svg"' in names["picture"](block)


@pytest.mark.slow
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    where = Path(sys.executable).parent
    if shutil.which("mkdocs", path=str(where)) is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "docs", "--site-dir", tmp_path / "site"],
        env=os.environ | {"PATH": f"{where}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(USER_PAGES) - 2
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?(https?://[^\s\">]+)", text)
        fetched += re.findall(r"<link[^>]* href=\"?(https?://[^\s\">]+)[^>]*stylesheet", text)
        assert not fetched, f"{page.name} fetches {fetched}"
        assert "unpkg.com" not in text, f"{page.name} fetches from unpkg.com"
    signatures = re.sub(r"<[^<>]*>", "", (tmp_path / "site" / "api" / "verbs.html").read_text(encoding="utf-8"))
    assert re.search(r"(?s)build_cache\(\n +data.*\btrain\(\n +out.*\bcompare\(\n +runs", signatures), (
        "ruff wraps the signatures of the API"
    )
    assert "open_cache" in (tmp_path / "site" / "api" / "store.html").read_text(encoding="utf-8")
    assert "--cache" in (tmp_path / "site" / "cli" / "train-student.html").read_text(encoding="utf-8")
    tutorial = (tmp_path / "site" / "tutorial.html").read_text(encoding="utf-8")
    assert re.search(r'(?s)href="index.html".*load_teacher', tutorial), "the notebook is a page of the site"
    assert not (tmp_path / "site" / "dev").exists()
