"""The site: it builds without a warning, fetches nothing, and its figures are those of the result files."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
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

FRONT = ("README.md", "docs/index.md")
BENCHMARKS = "docs/benchmarks.md"
STUDIES = ("docs/studies.md",)


def rival(row: int, name: str, what: str) -> Callable[[Any], float]:
    """A rival of the loss, in times of ours."""
    return lambda d: next(r for r in d["rows"][row]["rivals"] if r["name"] == name)["ratio"][what]  # type: ignore[no-any-return]


def pace(kind: str, name: str, over: str) -> Callable[[Any], float]:
    """A reader's or a loader's speed beside another's."""
    return lambda d: next(r for t in d["tables"] if t["kind"] == kind for r in t["rows"] if r["name"] == name)["ratio"][
        over
    ]  # type: ignore[no-any-return]


def apart(arm: str, over: str, end: str) -> Callable[[Any], float]:
    """A difference of mIoU, or an end of its interval; without its sign."""
    return lambda d: abs(d["differences"][f"{arm} - {over}"][end])


FIGURES: list[tuple[str, Callable[[Any], float], str, tuple[str, ...]]] = [
    ("step-cpu.json", lambda d: d["kl_over_none"], "1.015", (*FRONT, BENCHMARKS, "docs/bottleneck.md")),
    ("step-cpu.json", lambda d: d["live_over_none"], "7.5", (*FRONT, BENCHMARKS)),
    ("gradients-cpu.json", lambda d: max(row["worst"] for row in d["rows"]), "1.3e-4", (BENCHMARKS,)),
    (
        "camvid-cpu.json",
        lambda d: d["store"]["target_bytes_per_record"] / 1024,
        "30.0 KiB",
        (*FRONT, BENCHMARKS),
    ),
    (
        "camvid-cpu.json",
        lambda d: d["store"]["full_resolution_bytes"] / 1024,
        "594.0 KiB",
        (*FRONT, BENCHMARKS),
    ),
    *(
        ("study-cpu.json", lambda d, stage=stage, arm=arm: d["summary"][stage][arm]["mean"], text, STUDIES)
        for stage, arm, text in (
            ("E2", "lite0-large", "49.3"),
            ("E4", "plain, all labels", "36.8"),
            ("E4", "plain, 46-a", "18.6"),
            ("E4", "distilled, 46-a", "31.5"),
            ("E4", "distilled, 46-b", "35.7"),
            ("E4", "distilled, 92-c", "33.4"),
            ("E6", "plain, all", "56.36"),
            ("E6", "control, all", "55.34"),
            ("E6", "distilled, all", "57.11"),
            ("E6", "plain, apart", "40.47"),
            ("E6", "control, apart", "39.05"),
            ("E6", "distilled, apart", "39.55"),
        )
    ),
    *(
        ("study-cpu.json", apart(arm, over, end), text, STUDIES)
        for arm, over, texts in (
            ("E4 distilled, 46-a", "E4 plain, 46-a", {"mean": "12.9", "low": "8.0", "high": "17.9"}),
            ("E4 distilled, 46-b", "E4 plain, 46-b", {"mean": "2.3", "low": "0.7", "high": "3.9"}),
            ("E6 distilled, all", "E6 plain, all", {"mean": "0.74", "low": "0.16", "high": "1.64"}),
            ("E6 distilled, all", "E6 control, all", {"mean": "1.76", "low": "1.20", "high": "2.33"}),
            ("E6 distilled, apart", "E6 plain, apart", {"mean": "0.92", "low": "1.93", "high": "0.09"}),
        )
        for end, text in texts.items()
    ),
    *(
        ("live-replay-cpu.json", lambda d, end=end: abs(d["cached_minus_live"][end]), text, (*FRONT, *STUDIES))
        for end, text in (("mean", "0.03"), ("low", "1.13"), ("high", "1.19"))
    ),
    ("kernels-cpu.json", rival(0, "eager", "best"), "6.5", (*FRONT, BENCHMARKS, "docs/kernels.md")),
    ("kernels-cpu.json", rival(0, "chunked", "best"), "5.0", (BENCHMARKS, "docs/kernels.md")),
    ("kernels-cpu.json", rival(0, "compile", "best"), "8.3", (BENCHMARKS, "docs/kernels.md")),
    ("kernels-cpu.json", rival(2, "eager", "memory"), "11.9", (BENCHMARKS, "docs/kernels.md")),
    ("kernels-cpu.json", rival(2, "compile", "memory"), "5.6", (BENCHMARKS, "docs/kernels.md")),
    (
        "build-cpu.json",
        lambda d: d["builds"][0]["ratio"]["p50"],
        "0.94",
        (BENCHMARKS, "docs/bottleneck.md"),
    ),
    ("loader-cpu.json", pace("readers", "direct", "zarr"), "46", (BENCHMARKS,)),
    ("loader-cpu-python312.json", pace("readers", "direct", "zarr"), "51", (BENCHMARKS,)),
    ("loader-cpu-python312.json", pace("readers", "direct", "zarrs"), "17", (BENCHMARKS,)),
    ("loader-cpu-python312.json", pace("readers", "direct", "fused"), "30", (BENCHMARKS,)),
    ("loader-cpu-288.json", pace("readers", "direct", "zarrs"), "6.1", ("docs/bottleneck.md",)),
    ("loader-cpu.json", pace("loaders", "default", "inline"), "3.4", ("docs/bottleneck.md",)),
    (
        "loader-cpu.json",
        pace("steps", "default", "memory"),
        "1.02",
        (BENCHMARKS, "docs/bottleneck.md"),
    ),
    ("loader-cpu-288.json", pace("steps", "default", "memory"), "1.06", (BENCHMARKS, "docs/bottleneck.md")),
    ("crash-cpu.json", lambda d: len(d["builds"]["kills"]), "50 kills", (BENCHMARKS, "docs/scale.md")),
    ("crash-cpu.json", lambda d: d["builds"]["finished"], "14 stores", ("docs/scale.md",)),
    ("equivalence-cpu.json", lambda d: d["largest_difference"], "9.5e-7", ("docs/kernels.md",)),
    ("codecs-cpu.json", lambda d: d["codecs"][1]["target_bytes_per_record"], "15,288", ("docs/choosing.md",)),
    ("codecs-cpu.json", lambda d: d["codecs"][1]["fidelity"]["kl_t1"], "5.9e-6", ("docs/choosing.md",)),
    ("feature-bytes-cpu.json", lambda d: d["jobs"]["fp16"]["bytes_per_record"], "138,302", ("docs/choosing.md",)),
    ("feature-bytes-cpu.json", lambda d: d["jobs"]["uint8"]["bytes_per_record"], "76,727", ("docs/choosing.md",)),
    ("feature-bytes-cpu.json", lambda d: d["jobs"]["similarity"]["bytes_per_record"], "15,711", ("docs/choosing.md",)),
    ("steps-cpu.json", lambda d: 100 * d["profile"][1]["loss_share"], "26 %", ("docs/bottleneck.md",)),
]
"""Result file, where the figure is in it, how it is written, on which pages."""


@pytest.mark.parametrize(("file", "find", "text", "pages"), FIGURES, ids=[f"{f}-{t}" for f, _, t, _ in FIGURES])
def test_figures_are_the_results(file: str, find: Callable[[Any], float], text: str, pages: tuple[str, ...]) -> None:
    value = find(json.loads((RESULTS / file).read_text(encoding="utf-8")))
    written = float(re.match(r"[\d.,e-]+", text)[0].replace(",", ""))  # type: ignore[index]
    digits = len(re.sub(r"e.*|\D", "", text.split()[0]).lstrip("0"))
    assert float(f"{value:.{digits}g}") == written, f"{file} says {value}"
    for page in pages:
        assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d.]*\d)", TEXTS[page]), f"{page} does not say {text}"


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
    arms = {"cached": "distilled, all", "control": "control, all", "plain": "plain, all", "live": "live, all"}
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
    assert "open_cache" in (tmp_path / "site" / "api" / "store.html").read_text(encoding="utf-8")
    assert "--cache" in (tmp_path / "site" / "cli" / "train-student.html").read_text(encoding="utf-8")
    assert not (tmp_path / "site" / "dev").exists()
