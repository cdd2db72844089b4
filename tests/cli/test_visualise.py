"""`kdcache report --draw` on a run that the command line has made; its mistakes are in test_compare.py."""

from __future__ import annotations

import pytest


@pytest.fixture
def sketched(monkeypatch) -> None:
    """Pictures are not drawn: that takes seconds, and tests/analysis looks at them."""

    def sketch(_: object, path, above: str | None = None, formats=("png",)) -> list:
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_suffix(f".{name}") for name in formats]
        for file in files:
            file.write_bytes(b"")
        return files

    for module in ("gallery", "visualise"):
        monkeypatch.setattr(f"kdcache.analysis.{module}.save_figure", sketch)


def test_help(cli) -> None:
    shown = cli("report", "--help")
    assert shown.code == 0
    assert "--draw paper --layout row --format pdf" in " ".join(shown.out.split())


@pytest.mark.usefixtures("sketched")
def test_pictures(world, cli) -> None:
    """The files of the document, in every format, and a page that names their folder."""
    spec = f"kdcache:tiny@{world}/teacher/best.safetensors"
    words = ("--teacher", spec, "--size", "32x48", "--repeats", "0", "--out", world / "page.html")
    told = cli("report", world / "teacher", *words, "--num", "1", "--draw", world / "new", "--format", "pdf")
    assert told.code == 0, told.err
    names = [path.relative_to(world / "new").as_posix() for path in sorted((world / "new").rglob("*.*"))]
    assert f"new: {len([name for name in names if name.endswith('.png')])} pictures" in " ".join(told.out.split())
    for kind in ("png", "pdf"):
        cases = [name for name in names if name.startswith("teacher/successful_cases/success_rank1_val-00000")]
        assert sum(name.endswith(f".{kind}") for name in cases) == 1
    assert sum(name.startswith("teacher/failure_cases/failure_rank1_val-00000") for name in names) == 2
    for name in ("iou_distribution.png", "confusion.png", "curves.png", "evaluation_metrics.txt"):
        assert f"teacher/{name}" in names
    assert {name.split("/")[0] for name in names} == {"teacher", "visualise.json"}, "the teacher is only a panel"
    assert "new</code>" in (world / "page.html").read_text()
