"""Rounds of self-training: which arms and stores they become, and that a sweep of them runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from kdcache.errors import RecipeError
from kdcache.sweep import Recipe, Sweep, plan_sweep
from kdcache.sweep.recipe import Arm
from kdcache.sweep.rounds import unrolled
from kdcache_cli.app import app
from kdcache_cli.verbs.sweep import flags_of

KNOWN = flags_of(typer.main.get_command(app))

STREAMS = [
    {"name": "game", "labels": "segmentation"},
    {"name": "camera", "cache": "@store", "labels": "none", "term": [{"kind": "pseudo", "threshold": 0.9}]},
]
ROUNDS = Recipe(
    name="r",
    title="R",
    about="",
    store={},
    teacher={"model": "kdcache:base", "stream": ["game"]},
    stream=({"name": "game", "data": "GAME"}, {"name": "camera", "data": "CAMERA"}),
    data={"val": "{camera}"},
    student={"model": "kdcache:tiny", "ema": 0.99},
    arms=(Arm("source only", {"stream": STREAMS[:1]}), Arm("self", {"stream": STREAMS, "rounds": 3})),
    rounds={"init": "last", "quantile": [0.2, 0.3], "audit": True},
)


def value(command: tuple[str, ...], flag: str) -> str:
    return command[command.index(flag) + 1]


def plan(**changes: Any) -> Sweep:
    return plan_sweep(replace(ROUNDS, **changes), None, Path("out"), KNOWN)


def test_each_round_is_taught_by_the_one_before() -> None:
    jobs = {job.name: job for job in plan().jobs}
    students = [jobs[f"self, round {number}"] for number in (1, 2, 3)]
    stores = [f"out/stores/camera{name}.zarr" for name in ("", "-self-round-2", "-self-round-3")]
    teachers = ["out/teachers/teacher", "out/runs/self-round-1@last-ema", "out/runs/self-round-2@last-ema"]
    names = ["store camera", "store camera self, round 2", "store camera self, round 3"]
    for number, (student, store, teacher, name) in enumerate(zip(students, stores, teachers, names, strict=True)):
        assert value(jobs[name].words, "--out") == store
        assert value(jobs[name].words, "--teacher") == teacher
        assert name in student.needs
        camera = student.words[student.words.index("--stream", student.words.index("--stream") + 1) + 1]
        assert f"cache={store}," in camera
        assert f"quantile={(0.2, 0.3, 0.3)[number]}" in camera
        assert "threshold" not in camera
        assert value(student.words, "--collapse") == "refuse"
        if number:
            assert value(student.words, "--init") == f"out/runs/self-round-{number}/last.safetensors"
            assert f"self, round {number}" in jobs[name].needs
        else:
            assert "--init" not in student.words
        audit = jobs[f"audit of {name}"]
        assert audit.needs == (name,)
        assert audit.done == Path(value(audit.words, "--out")) / "report.json"
    assert "--collapse" not in jobs["source only"].words
    words = jobs["report"].words
    shown = [words[at + 1] for at, word in enumerate(words) if word == "--audit"]
    assert shown == [f"out/audits/camera{name}/report.json" for name in ("", "-self-round-2", "-self-round-3")]


def test_seeds_have_stores_of_their_own_after_the_first_round() -> None:
    sweep = plan(seeds=(0, 1))
    stores = [value(job.words, "--out") for job in sweep.jobs if job.words[0] == "build-teacher-cache"]
    renewed = {f"out/stores/camera-self-round-{n}{seed}.zarr" for n in (2, 3) for seed in ("", "-seed1")}
    assert len(stores) == 5
    assert set(stores) == {"out/stores/camera.zarr", *renewed}
    assert len({job.name for job in sweep.jobs}) == len(sweep.jobs)
    assert len(sweep.runs["self, round 3"]) == 2


def test_an_arm_without_rounds_stays() -> None:
    plain = replace(ROUNDS, arms=ROUNDS.arms[:1])
    assert unrolled(plain) is plain
    forced = plan(student={"model": "kdcache:tiny", "collapse": "note"}, rounds={})
    words = next(job.words for job in forced.jobs if job.name == "self, round 2")
    assert value(words, "--collapse") == "note"
    assert "--init" not in words
    teacher = next(job.words for job in forced.jobs if job.name == "store camera self, round 2")
    assert value(teacher, "--teacher") == "out/runs/self-round-1@last"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arms": (Arm("self", {"stream": STREAMS, "rounds": 0}),)}, "whole number from 1"),
        ({"arms": (Arm("self", {"stream": STREAMS[:1], "rounds": 2}),)}, "no stream with cache"),
        ({"arms": (Arm("self", {"rounds": 2}),)}, "no stream with cache"),
        ({"rounds": {"init": "first"}}, "scratch or last"),
        ({"rounds": {"quantile": [1.5]}}, "a list of shares"),
        ({"rounds": {"weights": "worst"}}, "best-ema"),
        (
            {"stores": {"x": {"teacher": "@self"}}, "arms": (Arm("a", {"stream": [STREAMS[1] | {"cache": "@x"}]}),)},
            "arms",
        ),
    ],
)
def test_rounds_that_cannot_be_planned_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(**changes)
    assert named in f"{caught.value.rule} {caught.value.received}"
