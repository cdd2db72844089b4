"""`kdcache self-train`: its rules of pseudo labels, its first weights, its rounds, and a kill in the middle of one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.models.run import load_run
from kdcache.models.weights import read_state_dict, state_digest
from kdcache.run_folder import Run
from kdcache.store import open_cache

RULES = {
    "0.2,0.5": ("term=pseudo,quantile=0.2", "term=pseudo,quantile=0.5"),
    "confidence:0.3": ("term=pseudo,threshold=0.3", "term=pseudo,threshold=0.3"),
    "soft": ("method=kl", "method=kl"),
}
"""What a student learns from the target, in rounds 1 and 2."""
SCENES = [
    word
    for name, style, seed in (("source", "game", 0), ("target", "camera", 1))
    for word in (f"--{name}", f"scenes:48x64,train=16,val=4,style={style},seed={seed}")
]
FEW = [
    word
    for change in ("teacher.iterations=20", "teacher.val-every=20", "student.collapse=note", "show.num=1")
    for word in ("--set", change)
]


@pytest.mark.parametrize("init", ["scratch", "last"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_what_each_round_learns(rule: str, init: str, cli, tmp_path: Path) -> None:
    words = ["--pseudo-labels", rule, "--init", init, "--rounds", "2", "--size", "48x64", "--dry-run"]
    ended = cli("self-train", "--out", tmp_path / "out", *SCENES, *words)
    assert ended.code == 0, ended.err
    rounds = [line for line in ended.out.splitlines() if "train-student" in line and "self-training, round" in line]
    assert len(rounds) == 2
    for line, learnt in zip(rounds, RULES[rule], strict=True):
        assert learnt in line
        assert "labels=none" in line
        assert (("pseudo" in line), ("quantile" in line)) == (rule != "soft", "," in rule)
    assert ["--init" in line for line in rounds] == [False, init == "last"]


@pytest.mark.parametrize("rule", ["hard", "1.5", "confidence:", "0.2,soft", ""])
def test_a_rule_that_there_is_not_is_refused(rule: str, cli, tmp_path: Path) -> None:
    ended = cli("self-train", "--out", tmp_path, *SCENES, "--pseudo-labels", rule)
    assert ended.code == 2
    assert "0.2,0.25,0.3 or confidence:0.9" in ended.err


@pytest.mark.parametrize("rounds", [0, -1, 100])
def test_rounds_that_cannot_be_are_refused(rounds: int, cli, tmp_path: Path) -> None:
    refused = cli("self-train", "--out", tmp_path / "out", "--smoke", "--dry-run", "--rounds", rounds)
    assert refused.code == 2
    for part in ("--rounds is a whole number from 1 to 99", rf"received +{rounds} ", "use --rounds 1"):
        assert re.search(part, refused.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "init"), [("0.2,0.5", "scratch"), ("soft", "last")])
def test_a_kill_in_round_two_changes_nothing(rule: str, init: str, cli, spawn: Callable, tmp_path: Path) -> None:
    words = [*SCENES, *FEW, "--set", "student.val-every=5", "--size", "48x64", "--iterations", "60", "--rounds", "2"]
    words += ["--no-audit", "--pseudo-labels", rule, "--init", init]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    second = killed / "runs/self-training-round-2"
    process = spawn("self-train", "--out", killed, *words)
    while process.poll() is None and not (second / "checkpoint.pt").exists():
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert (second / "checkpoint.pt").exists()
    assert not (second / "result.json").exists(), "it ended before it was killed"
    for out in (killed, whole):
        ended = cli("self-train", "--out", out, *words)
        assert ended.code == 0, ended.err
    again = cli("self-train", "--out", killed, *words)
    assert again.err.count("done before") == 4  # its two caches are looked at again
    for run in ("self-training-round-1", "self-training-round-2"):
        for which in ("last", "last-ema"):
            one, other = (read_state_dict(out / "runs" / run / f"{which}.safetensors") for out in (killed, whole))
            assert one.keys() == other.keys()
            assert all((one[name] == other[name]).all() for name in one), (run, which)
    stores = [open_cache(killed / "stores" / f"target{name}.zarr") for name in ("", "-self-training-round-2")]
    assert stores[1].manifest.teacher.parents == (stores[0].ledger.completion.digest,)
    streams = [Run.open(killed / f"runs/self-training-round-{number}").recipe["stream"][1] for number in (1, 2)]
    learnt = [stream["method"] if rule == "soft" else stream["term"] for stream in streams]
    shares = [[{"kind": "pseudo", "quantile": share}] for share in (0.2, 0.5)]
    assert learnt == (["kl", "kl"] if rule == "soft" else shares)


@pytest.mark.slow
def test_self_training_leaves_every_round(cli, tmp_path: Path) -> None:
    data = [("source", "game", 0), ("target", "camera", 1)]
    flags = [
        word
        for name, style, seed in data
        for word in (f"--{name}", f"scenes:48x64,train=16,val=4,style={style},seed={seed}")
    ]
    changes = (
        "teacher.iterations=20",
        "teacher.val-every=20",
        "student.val-every=2",
        "student.collapse=note",
        "show.num=1",
    )
    flags += [word for change in changes for word in ("--set", change)]
    flags += ["--size", "48x64", "--iterations", "4", "--rounds", "2", "--init", "last"]
    for _ in range(2):  # the second time nothing is left to do but the page
        ended = cli("self-train", "--out", tmp_path / "out", *flags)
        assert ended.code == 0, ended.err
    assert ended.err.count("done before") == 6  # its two caches are looked at again
    found = json.loads((tmp_path / "out/comparison.json").read_text(encoding="utf-8"))
    rounds = [f"self-training, round {number}" for number in (1, 2)]
    assert [row["name"] for row in found["rows"]] == ["source alone", *rounds, "teacher"]
    stores = [open_cache(tmp_path / "out/stores" / f"target{name}.zarr") for name in ("", "-self-training-round-2")]
    student, _ = load_run(tmp_path / "out/runs/self-training-round-1", "last-ema")
    assert stores[1].manifest.teacher.weights == state_digest(student)
    assert stores[0].manifest.teacher.weights != stores[1].manifest.teacher.weights
    assert stores[0].manifest.teacher.parents == ()
    assert stores[1].manifest.teacher.parents == (stores[0].ledger.completion.digest,)
    assert (tmp_path / "out/audits/target-self-training-round-2/report.json").is_file()
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "What the teacher of each round gives" in page
    assert f"round 1 ({stores[0].ledger.completion.digest[:12]})" in page
