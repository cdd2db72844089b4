"""`kdcache report` as it is typed: the flags, the panel of an error, the audit of a real store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdcache.analysis.report.sections import again
from kdcache.analysis.runs import find_runs
from kdcache_cli.app import main


@pytest.fixture
def kdcache(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that succeeds, in the world's folder. Return what it printed, on one line."""
    monkeypatch.chdir(world)

    def run(*words: object) -> str:
        deterministic = torch.are_deterministic_algorithms_enabled()
        monkeypatch.setattr(sys, "argv", ["kdcache", *map(str, words)])  # the page shows it
        with pytest.raises(SystemExit) as ended:
            main()
        torch.use_deterministic_algorithms(deterministic)
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return " ".join(printed.out.split())

    return run


def test_wrong_input_ends_in_a_panel(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(world / "runs"), "--out", "page.txt"])
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--out needs an .html file: 'page.txt'" in told
    assert "Use --out page.html" in told


@pytest.mark.slow
def test_a_report_with_an_audit(world: Path, kdcache: Callable[..., str], derive: Callable[..., Path]) -> None:
    derive("kl-0", method="kl", noise=0.05)
    made = [
        ("build-teacher-cache", "--data", "data", "--teacher", "runs/none-1", "--out", "store.zarr"),
        ("inspect", "store.zarr", "--teacher-report", "--out", "audit"),
        ("report", "runs/none-0", "runs/kl-0", "--teacher", "runs/none-1", "--audit", "audit/report.json",
         "--draw", "drawn", "--title", "All of it", "--num", 1, "--repeats", 2, "--out", "page.html"),
    ]  # fmt: skip
    *_, told = [kdcache(*words) for words in made]
    assert "one run shows little" in told
    text = (world / "page.html").read_text(encoding="utf-8")
    for part in (
        "All of it",
        "expected calibration error",
        "<code>drawn</code>",
        "kdcache report runs/none-0 runs/kl-0",
    ):
        assert part in text


@pytest.mark.slow
def test_the_command_on_the_page_trains_the_run_again(world: Path, kdcache: Callable[..., str]) -> None:
    (run,) = find_runs([world / "runs/none-0"])
    command = again(run)
    assert command is not None
    kdcache(*command.split()[1:])
    one, two = (world / "runs" / name / "last.safetensors" for name in ("none-0", "none-0-again"))
    assert one.read_bytes() == two.read_bytes()
