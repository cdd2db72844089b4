"""`kdcache visualise` on a run that the command line has made; its mistakes are in test_compare.py."""

from __future__ import annotations

import pytest


@pytest.fixture
def sketched(monkeypatch) -> None:
    """Pictures are not drawn: that takes seconds, and tests/evaluate looks at them."""

    def sketch(_: object, path, above: str | None = None, formats=("png",)) -> list:
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_suffix(f".{name}") for name in formats]
        for file in files:
            file.write_bytes(b"")
        return files

    for module in ("gallery", "visualise"):
        monkeypatch.setattr(f"kdcache.analysis.{module}.save_figure", sketch)


def test_help(cli) -> None:
    shown = cli("visualise", "--help")
    assert shown.code == 0
    assert "kdcache visualise runs/none runs/kl --data camvid" in shown.out


@pytest.mark.usefixtures("sketched")
def test_pictures(world, cli) -> None:
    words = ("--num", "1", "--teacher", world / "teacher", "--out", world / "new")
    told = cli("visualise", world / "teacher", "--data", world / "data", *words)
    assert told.code == 0, told.err
    assert "mean of images" in told.out
    names = [path.relative_to(world / "new").as_posix() for path in sorted((world / "new").rglob("*.*"))]
    assert f"{len([name for name in names if name.endswith('.png')])} pictures" in told.out
    assert sum(name.startswith("teacher/successful_cases/success_rank1_val-00000") for name in names) == 1
    assert sum(name.startswith("teacher/failure_cases/failure_rank1_val-00000") for name in names) == 1
    for name in ("iou_distribution.png", "confusion.png", "curves.png", "evaluation_metrics.txt"):
        assert f"teacher/{name}" in names


@pytest.mark.usefixtures("sketched")
def test_chosen_samples_of_a_model_without_a_run(world, cli) -> None:
    spec = f"kdcache:tiny@{world}/teacher/best.safetensors"
    words = ("--data", world / "data", "--size", "32x48", "--ids", "val-000001", "--out", world / "new")
    told = cli("visualise", spec, *words)
    assert told.code == 0, told.err
    assert "no curves" in told.err
    assert [path.name[:18] for path in (world / "new").rglob("chosen1*")] == ["chosen1_val-000001"]


@pytest.mark.usefixtures("sketched")
def test_one_fold_alone(world, cli) -> None:
    drawn = {}
    for fold in ("0/2", "1/2"):
        out = world / f"new-{fold[0]}"
        told = cli("visualise", world / "teacher", "--data", world / "data", "--fold", fold, "--out", out)
        assert told.code == 0, told.err
        drawn[fold] = {path.name.split("_")[2] for path in out.rglob("success_*")}
    assert drawn["0/2"]
    assert drawn["1/2"]
    assert not drawn["0/2"] & drawn["1/2"]
