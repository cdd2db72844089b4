"""The demo: its page, what the cache saved, and commands that one may type."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from kdcache_cli.app import app


def test_the_demo_ends_with_what_the_cache_saved(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli("demo", "--iterations", 2)
    assert ended.code == 0, ended.err
    assert "dominates" not in ended.out + ended.err
    assert "kdcache demo" in (tmp_path / "kdcache-demo" / "report.html").read_text(encoding="utf-8")
    assert "Distillation changed the student's mIoU by" in ended.out

    one, ten, cost = ended.out.strip().splitlines()[-3:]  # 96 scenes in 4 views against 2 steps of 8 images
    assert re.fullmatch(r" *for 1 student +384 +16 +-368 \(-?\d+ s\) *", one)
    assert re.fullmatch(r" *for 10 students +384 +160 +-224 \(-?\d+ s\) *", ten)
    assert re.fullmatch(r"A teacher forward takes [\d.]+ ms per image \(.+\)\.", cost)

    verbs = typer.main.get_command(app).commands
    commands = [shlex.split(line) for line in ended.out.splitlines() if line.startswith("kdcache ")]
    assert [words[1] for words in commands] == [
        "train-teacher", "build-teacher-cache", "train-student", "train-student", "report",
    ]  # fmt: skip
    for _, verb, *words in commands:
        try:
            verbs[verb].make_context(verb, words)
        except Exception as error:
            pytest.fail(f"{verb}: {error!r}")
