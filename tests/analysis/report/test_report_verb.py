"""`kdcache report` as it is typed: the flags, the panel of an error, the audit of a real store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def kdcache(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    command = [sys.executable, "-m", "kdcache_cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_wrong_input_ends_in_a_panel(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kdcache_cli.app import main

    with pytest.raises(SystemExit) as ended:
        main(["report", str(world / "runs"), "--out", "page.txt"])
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--out needs an .html file: 'page.txt'" in told
    assert "Use --out page.html" in told


@pytest.mark.slow
def test_a_report_with_an_audit(world: Path, derive: Callable[..., Path]) -> None:
    derive("kl-0", method="kl", noise=0.05)
    made = [
        ("build-teacher-cache", "--data", "data", "--teacher", "runs/none-1", "--out", "store.zarr"),
        ("inspect", "store.zarr", "--teacher-report", "--out", "audit"),
        ("report", "runs/none-0", "runs/kl-0", "--teacher", "runs/none-1", "--audit", "audit/report.json",
         "--draw", "drawn", "--title", "All of it", "--num", 1, "--repeats", 2, "--out", "page.html"),
    ]  # fmt: skip
    for words in made:
        done = kdcache(*words, cwd=world)
        assert done.returncode == 0, done.stderr
    assert "one run shows little" in done.stdout
    text = (world / "page.html").read_text(encoding="utf-8")
    for part in (
        "All of it",
        "expected calibration error",
        "<code>drawn</code>",
        "kdcache report runs/none-0 runs/kl-0",
    ):
        assert part in text


@pytest.mark.slow
def test_the_command_on_the_page_trains_the_run_again(world: Path) -> None:
    from kdcache.analysis.report.sections import again
    from kdcache.analysis.runs import find_runs

    (run,) = find_runs([world / "runs/none-0"])
    command = again(run)
    assert command is not None
    done = kdcache(*command.split()[1:], cwd=world)
    assert done.returncode == 0, done.stderr
    one, two = (world / "runs" / name / "last.safetensors" for name in ("none-0", "none-0-again"))
    assert one.read_bytes() == two.read_bytes()
