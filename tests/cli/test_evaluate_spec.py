"""`kdcache evaluate` of weights that are no run, and `kdcache models` without its extras."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SPEC = "kdcache:tiny@{w}/teacher/best.safetensors"
FLAGS = "--data {w}/data --size 32x48"


def words(command: str, world) -> list[str]:
    return command.format(w=world).split()


def test_a_run_and_its_weights_score_the_same(world, cli, monkeypatch) -> None:
    run = cli(*words("evaluate {w}/teacher --data {w}/data", world))
    assert run.code == 0, run.err
    (world / "here").mkdir()
    monkeypatch.chdir(world / "here")
    spec = cli(*words(f"evaluate {SPEC} {FLAGS}", world))
    assert spec.code == 0, spec.err
    assert "written: evaluation-val.json, evaluation-val.npz, evaluation-val.md" in spec.out
    one = json.loads((world / "teacher/evaluation-val.json").read_text())
    two = json.loads((world / "here/evaluation-val.json").read_text())
    assert one["miou"] == two["miou"]
    assert (one["run"], one["weights"], one["size"]) == ("teacher", "best", [32, 48])
    assert (two["run"], two["weights"]) == ("kdcache:tiny@best.safetensors", None)


def evaluations(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("evaluation-*.json")}


def test_every_kind_of_evaluation_has_its_own_file(world, cli, monkeypatch) -> None:
    """And says what it is: an mIoU of another kind looks like no other."""
    run, data = world / "teacher", world / "data"
    shutil.copy(run / "best.safetensors", run / "last.safetensors")
    names = [line.rsplit(maxsplit=3)[0] for line in (data / "classes.txt").read_text().splitlines()]
    (world / "map.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))
    kinds = {
        "evaluation-val": ("", {}),
        "evaluation-val-last": ("--weights last", {"weights": "last"}),
        "evaluation-val-at-size": ("--at-size", {"at_size": True}),
        "evaluation-val-16x24": ("--size 16x24", {"size": [16, 24]}),
        "evaluation-val-last-16x24-at-size": ("--weights last --size 16x24 --at-size", {"at_size": True}),
        "evaluation-train": ("--split train", {"split": "train"}),
        "evaluation-train-fold-1-of-2": ("--split train --fold 1/2", {"fold": "1/2", "split": "train"}),
        "evaluation-train-fold-1-of-2-by-1886a0ae": (
            "--split train --fold 1/2 --folds-by (.)$",
            {"fold": "1/2 by (.)$"},
        ),
    }
    for name, (flags, said) in kinds.items():
        before = evaluations(run)
        told = cli(*words(f"evaluate {{w}}/teacher --data {{w}}/data {flags}", world))
        assert told.code == 0, told.err
        assert f"{name}.json" in told.out.replace("\n", "")
        after = evaluations(run)
        assert after.keys() - before.keys() == {f"{name}.json"}, name
        assert {other: after[other] for other in before} == before
        assert {key: after[f"{name}.json"][key] for key in said} == said
        assert (run / f"{name}.md").is_file()
    mapped = cli(*words("evaluate {w}/teacher --data {w}/data --class-map {w}/map.txt", world))
    assert mapped.code == 0, mapped.err
    (new,) = evaluations(run).keys() - {f"{name}.json" for name in kinds}
    digest = hashlib.sha256((world / "map.txt").read_bytes()).hexdigest()
    assert new == f"evaluation-val-map-{digest[:8]}.json"
    found = evaluations(run)
    assert found[new]["class_map_sha256"] == digest
    assert found["evaluation-val.json"]["class_map_sha256"] is None
    assert found["evaluation-val.json"]["at_size"] is False
    assert len({one["data_sha256"] for one in found.values()}) == 4
    weights = hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()
    assert {one["weights_sha256"] for one in found.values()} == {weights}


def test_compare_and_evaluate_share_what_is_the_same_and_nothing_else(world, cli, monkeypatch) -> None:
    from kdcache.analysis.compare import CompareOptions, compare
    from kdcache.analysis.stored_evaluations import EvalSettings

    run = world / "teacher"

    def reused(**judging) -> bool:
        found = compare([run], str(world / "data"), "val", CompareOptions(EvalSettings(**judging), repeats=0))
        return found.rows[0].runs[0].reused

    assert not reused()
    kept = evaluations(run)
    # None of these is the evaluation that compare wants, and none takes its place.
    for flags in ("--at-size", "--size 16x24 --at-size", "--split train"):
        assert cli(*words(f"evaluate {{w}}/teacher --data {{w}}/data {flags}", world)).code == 0
    assert reused()
    assert kept.items() <= evaluations(run).items()
    assert not reused(size=(16, 24))
    # The same evaluation, by the other verb: it is taken, and it is the same file.
    (run / "evaluation-val.json").unlink()
    assert cli(*words("evaluate {w}/teacher --data {w}/data", world)).code == 0
    assert reused()
    assert evaluations(run)["evaluation-val.json"] == kept["evaluation-val.json"]


def test_evaluations_of_other_data_lie_beside_each_other(world, cli) -> None:
    run = world / "teacher"
    assert cli(*words("evaluate {w}/teacher --data {w}/data", world)).code == 0
    kept = evaluations(run)
    shutil.copytree(world / "data", world / "more")
    (label,) = sorted((world / "more/labels/val").iterdir())[:1]
    Image.fromarray(np.zeros_like(np.asarray(Image.open(label)))).save(label)
    for _ in range(2):
        assert cli(*words("evaluate {w}/teacher --data {w}/more", world)).code == 0
    found = evaluations(run)
    assert kept.items() <= found.items()
    (other,) = found.keys() - kept.keys()
    assert found[other]["data"] == "more"
    # The labels of the same data have changed: its evaluation is replaced.
    shutil.copy(label, world / "data/labels/val" / label.name)
    assert cli(*words("evaluate {w}/teacher --data {w}/data", world)).code == 0
    assert evaluations(run).keys() == found.keys()
    assert evaluations(run)["evaluation-val.json"]["data_sha256"] == found[other]["data_sha256"]


def test_models_without_a_run_do_not_overwrite_each_other(world, cli, monkeypatch) -> None:
    monkeypatch.chdir(world / "teacher")
    assert cli(*words("evaluate {w}/teacher --data {w}/data", world)).code == 0
    kept = evaluations(world / "teacher")
    for size in ("32x48", "16x24", "32x48"):
        assert cli(*words(f"evaluate {SPEC} --data {{w}}/data --size {size}", world)).code == 0
    found = evaluations(world / "teacher")
    assert kept.items() <= found.items()
    assert sorted(one["size"] for one in found.values()) == [[16, 24], [32, 48], [32, 48]]


def test_a_class_map(world, cli) -> None:
    names = [line.rsplit(maxsplit=3)[0] for line in (world / "data/classes.txt").read_text().splitlines()]
    (world / "map.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))
    command = f"evaluate {SPEC} {FLAGS} --json {{w}}/new.json --markdown {{w}}/new.md"
    plain = cli(*words(command, world))
    mapped = cli(*words(command + " --class-map {w}/map.txt", world))
    assert (plain.code, mapped.code) == (0, 0), mapped.err
    assert plain.out == mapped.out


CASES = {
    "no size": (f"evaluate {SPEC} --data {{w}}/data", "Missing the size"),
    "spec alone": ("evaluate kdcache:tiny --data {w}/data", "Missing weights of 'kdcache:tiny'"),
    "another model": (f"evaluate kdcache:base@{{w}}/teacher/best.safetensors {FLAGS}", "missing"),
    "no file": (f"evaluate kdcache:tiny@{{w}}/none.pth {FLAGS}", "none.pth"),
    "unknown model": (f"evaluate kdcache:tyni@{{w}}/teacher/best.safetensors {FLAGS}", "'kdcache:tyni'"),
    "class map that lacks classes": (
        f"evaluate {SPEC} {FLAGS} --class-map {{w}}/data/classes.txt",
        "Unknown teacher id",
    ),
    "unknown weights": ("evaluate {w}/teacher --data {w}/data --weights bset", "'bset'"),
    "no run": ("evaluate {w}/none --data {w}/data", "Run not found: {w}/none"),
}


@pytest.mark.parametrize(("command", "received"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_wrong_input(world, cli, tree, command, received) -> None:
    before = tree(world)
    ended = cli(*words(command, world))
    assert ended.code == 2, (ended.out, ended.err)
    assert received.format(w=world) in ended.err
    assert ended.err.count("fix: ") == 1
    assert "should not have happened" not in ended.err
    assert tree(world) == before


def test_fewer_classes_in_the_data(world, cli) -> None:
    lines = (world / "data/classes.txt").read_text().splitlines()
    (world / "data/classes.txt").write_text("\n".join(lines[:-1]))
    ended = cli(*words(f"evaluate {SPEC} {FLAGS}", world))
    assert ended.code == 2
    assert "The weights have 7 classes, and the data or their class map 6" in ended.err
    assert "--class-map" in ended.err


@pytest.mark.slow
def test_segformer_teaches_and_learns(world, cli) -> None:
    """The whole way with a model of an extra: train, build, distil a feature of it, evaluate its export."""
    small = "--size 32x48 --iterations 2 --batch-size 2"
    for command in (
        f"train-teacher --data {{w}}/data --model segformer:b0 {small} --out {{w}}/t",
        "build-teacher-cache --data {w}/data --teacher {w}/t --features stage4 --out {w}/t.zarr",
        "train-student --cache {w}/t.zarr --model kdcache:deeplab-mobilenet --method kl --iterations 2 --batch-size 2 "
        "--out {w}/s",
        "train-student --cache {w}/store.zarr --model segformer:b0 --method kl --iterations 2 --batch-size 2 "
        "--init {w}/t/best.safetensors --out {w}/s2",
        "export {w}/s2 --out {w}/s2.safetensors",
        "evaluate segformer:b0@{w}/s2.safetensors --data {w}/data --json {w}/e.json --markdown {w}/e.md",
        "verify {w}/t.zarr --teacher {w}/t",
    ):
        ended = cli(*words(command, world))
        assert ended.code == 0, (command, ended.err)
    assert json.loads((world / "e.json").read_text())["size"] == [32, 48]


@pytest.mark.slow
def test_models_without_the_extras_name_the_command() -> None:
    code = (
        "import importlib.util as u\nreal = u.find_spec\n"
        "gone = ('transformers', 'segmentation_models_pytorch')\n"
        "u.find_spec = lambda name, *a: None if name in gone else real(name, *a)\n"
        "from kdcache_cli.app import main\nmain({words})"
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", code.replace("{words}", repr(words))], capture_output=True, text=True, check=True
        ).stdout
        for words in (["models"], ["models", "--json"])
    ]
    assert "segformer:b0" in results[0]
    assert "pip install '.[segformer]'" in results[0]
    assert "pip install '.[smp]'" in results[0]
    rows = {row["spec"]: row for row in json.loads(results[1])}
    assert rows["segformer:b2"] == {"spec": "segformer:b2", "install": "pip install '.[segformer]'"}
    assert rows["kdcache:tiny"]["parameters"] == 142269


@pytest.mark.parametrize("command", ["evaluate {t} --data {w}/data", "export {t} --out {w}/out.onnx"])
def test_a_file_that_is_missing_is_named_before_a_size_is_asked_for(world, cli, command: str) -> None:
    done = cli(*words(command.replace("{t}", "kdcache:tiny@{w}/nothing.safetensors"), world))
    assert done.code == 2
    assert "Weights not found" in done.err
    assert "nothing.safetensors" in done.err


def test_a_folder_of_pseudo_labels_names_the_report_that_judges_them(world, cli) -> None:
    out = world / "pseudo"
    assert cli("export-pseudo-labels", world / "store.zarr", "--quantile", "0.5", "--out", out).code == 0
    ended = cli("evaluate", out, "--data", world / "data")
    assert ended.code == 2
    assert "--teacher-report" in ended.err
