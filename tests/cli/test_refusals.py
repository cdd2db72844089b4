"""Wrong input: exit code 2, the problem and the fix; nothing of the user's is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TEACHER = "train-teacher --data {w}/data --model kdcache:tiny --size 32x48 --iterations 1 --batch-size 2 --out {w}/new"
BUILD = "build-teacher-cache --data {w}/data --teacher {w}/teacher --shard-records 4 --views full --out {w}/new"
STUDENT = "train-student --cache {w}/store.zarr --model kdcache:tiny --iterations 1 --batch-size 2 --out {w}/new"
SOURCE = STUDENT.replace("store.zarr", "source.zarr")
FIRST = "data/images/train/train-000000.png"
VALUES = "targets/segmentation/values/c/0/0/0/0"


def nothing(w: Path) -> None:
    pass


def empty_data(w: Path) -> None:
    for split in ("train", "val"):
        for path in (w / "data/images" / split).iterdir():
            path.unlink()


def other_label(ids: np.ndarray):
    def write(w: Path) -> None:
        Image.fromarray(ids).save(w / FIRST.replace("images", "labels"))

    return write


def truncated_image(w: Path) -> None:
    (w / FIRST).write_bytes((w / FIRST).read_bytes()[:200])


def fewer_classes(w: Path) -> None:
    lines = (w / "data/classes.txt").read_text().splitlines()
    (w / "data/classes.txt").write_text("\n".join(lines[:-1]))


def renamed_classes(w: Path) -> None:
    lines = (w / "data/classes.txt").read_text().splitlines()
    (w / "data/classes.txt").write_text("\n".join(lines[::-1]))


def occupied(w: Path) -> None:
    (w / "new").mkdir()
    (w / "new/thesis.tex").write_text("thesis")


def half_built(w: Path) -> None:
    (w / "store.zarr/complete.json").unlink()
    (w / "store.zarr/ledger/00000001.json").unlink()


def other_version(w: Path) -> None:
    content = json.loads((w / "store.zarr/zarr.json").read_bytes())
    content["attributes"]["kdcache"]["version"] = 7
    (w / "store.zarr/zarr.json").write_text(json.dumps(content))
    (w / "store.zarr/manifest.json").unlink()  # whose word would be taken for the version


def flipped(w: Path) -> None:
    for record in range(2):  # of both shards, so that any sample finds one
        path = w / "store.zarr" / VALUES.replace("c/0", f"c/{record}")
        content = bytearray(path.read_bytes())
        for position in range(0, len(content) - 80, 40):
            content[position] ^= 4
        path.write_bytes(content)


def other_data(w: Path) -> None:
    for kind in ("images", "labels"):
        (w / "data" / kind / "train/train-000000.png").rename(w / "data" / kind / "train/zebra.png")


def no_weights(w: Path) -> None:
    for path in (w / "teacher").glob("*.safetensors"):
        path.unlink()


def recipe(text: str):
    def write(w: Path) -> None:
        (w / "recipe.toml").write_text(text)

    return write


CASES = {
    "no data folder": (nothing, TEACHER.replace("/data", "/nowhere"), "Data folder not found: {w}/nowhere"),
    "no data folder to check": (nothing, "data check {w}/nowhere", "Data folder not found: {w}/nowhere"),
    "no data folder to build from": (nothing, BUILD.replace("/data", "/nowhere"), "Data folder not found: {w}/nowhere"),
    "empty data folder": (empty_data, TEACHER, "No images in {w}/data/images/train"),
    "no such split": (nothing, BUILD + " --split test", "Unknown split 'test' in {w}/data, which has train, val"),
    "label of another size": (
        other_label(np.zeros((5, 5), np.uint8)), BUILD, "label 5 x 5, image 36 x 52"),
    "ids outside classes.txt": (other_label(np.full((36, 52), 77, np.uint8)), BUILD, "id 77 in 1872 pixels"),
    "truncated image": (truncated_image, BUILD, FIRST),
    "teacher of other classes": (fewer_classes, BUILD, "has 7 classes, but the data set has 6"),
    "teacher of other names": (renamed_classes, BUILD, "pedestrian, vehicle"),
    "teacher without weights": (
        nothing, BUILD.replace("{w}/teacher", "kdcache:tiny"), "Missing weights of 'kdcache:tiny'"),
    "teacher that is nowhere": (nothing, BUILD.replace("{w}/teacher", "{w}/none"), "Run not found: {w}/none"),
    "teacher not trained yet": (no_weights, BUILD, "has no weights"),
    "teacher without size": (
        nothing, BUILD.replace("{w}/teacher", "kdcache:tiny@{w}/teacher/best.safetensors"), "Missing --size"),
    "occupied out, build": (occupied, BUILD, "new holds something else"),
    "occupied out, train-teacher": (occupied, TEACHER, "Cannot train into {w}/new: it holds something else"),
    "occupied out, train-student": (occupied, STUDENT, "Cannot train into {w}/new: it holds something else"),
    "out is a file": (lambda w: (w / "new").write_text("thesis"), BUILD, "new is a file"),
    "out is a file, training": (lambda w: (w / "new").write_text("thesis"), STUDENT, "new"),
    "out below a file": (nothing, BUILD.replace("{w}/new", "{w}/data/classes.txt/new"), "classes.txt is a file"),
    "finished store asked for more views": (
        nothing, BUILD.replace("/new", "/store.zarr") + " --views 4", "build-teacher-cache --from"),
    "out is another build": (nothing, BUILD.replace("/new", "/store.zarr") + " --batch-size 3", "build.batch_size"),
    "run not overwritten": (
        nothing, TEACHER.replace("/new", "/teacher"), "Cannot train into {w}/teacher: it holds a run already"),
    "run resumed otherwise": (nothing, TEACHER.replace("/new", "/teacher") + " --resume --lr 0.5", "--lr 0.5"),
    "store that is nowhere": (nothing, STUDENT.replace("store.zarr", "none.zarr"), "Cache not found: {w}/none.zarr"),
    "store that is none": (nothing, STUDENT.replace("store.zarr", "data"), "Cache not found: {w}/data/zarr.json"),
    "half-built store": (half_built, STUDENT, "1 of 2 shards"),
    "half-built store, verify": (half_built, "verify {w}/store.zarr", "1 of 2 shards"),
    "store of another version": (other_version, STUDENT, "has format 7"),
    "store of another version, inspect": (other_version, "inspect {w}/store.zarr", "has format 7"),
    "store of another version, build": (other_version, BUILD.replace("/new", "/store.zarr"), "has format 7"),
    "validation of other classes": (renamed_classes, STUDENT + " --val {w}/data", "pedestrian, vehicle"),
    "store of another data set": (other_data, SOURCE + " --data {w}/data", "1 sample was added ('zebra')"),
    "store without pixels, no data": (nothing, SOURCE, "--pixels source"),
    "changed image": (
        lambda w: shutil.copy(w / FIRST.replace("000000", "000001"), w / FIRST),
        SOURCE + " --data {w}/data --batch-size 6", "1 image differs"),
    "flipped byte": (flipped, STUDENT + " --batch-size 6", "targets/segmentation/values"),
    "flipped byte, loader process": (flipped, STUDENT + " --batch-size 6 --workers 1", "targets/segmentation/values"),
    "run without checkpoint": (no_weights, "evaluate {w}/teacher --data {w}/data", "has no weights"),
    "run that is none": (nothing, "evaluate {w}/data --data {w}/data", "has no model.json"),
    "evaluated on other classes": (renamed_classes, "evaluate {w}/teacher --data {w}/data", "pedestrian, vehicle"),
    "verified against other data": (
        other_data, "verify {w}/source.zarr --teacher {w}/teacher --data {w}/data", "6 samples"),
    "--size 14x": (nothing, BUILD + " --size 14x", "'14x'"),
    "--size of training": (nothing, TEACHER + " --size 14x", "--size: '14x'"),
    "--top-k -3": (nothing, BUILD + " --top-k -3", "'-3'"),
    "--top-k 0": (nothing, BUILD + " --top-k 0", "0"),
    "--top-k 8": (nothing, BUILD + " --top-k 8", "8"),
    "--pixels foo": (nothing, BUILD + " --pixels foo", "'foo'"),
    "--codec foo": (nothing, BUILD + " --codec foo", "'foo'"),
    "--precision foo": (nothing, BUILD + " --precision foo", "'foo'"),
    "--mean 1,2": (nothing, BUILD + " --mean 1,2", "'1,2'"),
    "--features foo": (nothing, BUILD + " --features foo", "foo"),
    "--temperature 0": (nothing, STUDENT + " --temperature 0", "--temperature"),
    "--temperature nan": (nothing, STUDENT + " --temperature nan", "--temperature"),
    "--method foo": (nothing, STUDENT + " --method foo", "'foo'"),
    "--augment foo": (nothing, STUDENT + " --augment foo", "--augment: 'foo'"),
    "--scale 2:1": (nothing, STUDENT + " --scale 2:1", "2.0:1.0"),
    "--impl foo": (nothing, STUDENT + " --impl foo", "--impl: 'foo'"),
    "--impl triton without a GPU": (
        nothing, STUDENT + " --impl triton --device cpu", "triton runs on cuda, the tensors are on cpu"),
    "--step foo": (nothing, STUDENT + " --step foo", "--step: 'foo'"),
    "--step graphed without a GPU": (
        nothing, STUDENT + " --step graphed --device cpu", "--step graphed on the device cpu"),
    "--lr -1": (nothing, STUDENT + " --lr -1", "--lr"),
    "--iterations 0": (nothing, STUDENT + " --iterations 0", "--iterations"),
    "nothing to learn": (nothing, STUDENT + " --method kl --ce-weight 0 --kl-weight 0", "every loss weight is 0"),
    "unknown --model": (nothing, STUDENT.replace("kdcache:tiny", "kdcache:tinny"), "Did you mean kdcache:tiny"),
    "weights behind --model": (nothing, STUDENT.replace("kdcache:tiny", "kdcache:tiny@w.pth"), "by --init FILE"),
    "--weights foo": (nothing, "evaluate {w}/teacher --data {w}/data --weights foo", "best"),
    "recipe with an unknown key": (
        recipe("temprature = 2.0\n"), STUDENT + " --recipe {w}/recipe.toml", "Did you mean temperature?"),
    "recipe with one table where there may be several": (
        recipe('[stream]\nname = "a"\n'), STUDENT + " --recipe {w}/recipe.toml", "Write [[stream]] above each"),
    "recipe with a stream without a name": (
        recipe('[[stream]]\nshare = 1\n'), STUDENT + " --recipe {w}/recipe.toml", "Missing name in --stream"),
    "recipe of another verb": (
        nothing, STUDENT + " --recipe {w}/teacher/recipe.toml", "a recipe of train-teacher, with train-student"),
    "recipe of no training with a foreign key": (
        recipe("temperature = 2.0\n"), TEACHER + " --recipe {w}/recipe.toml", "'temperature' in"),
    "recipe of a run with an unknown key": (
        recipe('verb = "train-teacher"\nfoo = 1\n'), TEACHER + " --recipe {w}/recipe.toml", "'foo' in"),
    "recipe that is no TOML": (recipe("= 3"), STUDENT + " --recipe {w}/recipe.toml", "recipe.toml"),
    "recipe that is nowhere": (nothing, STUDENT + " --recipe {w}/none.toml", "none.toml"),
    "unknown method": (nothing, STUDENT + " --method kll", "'kll'"),
    "term that the store cannot serve": (nothing, STUDENT + " --method hint", "--features TAP"),
    "term without raw logits": (nothing, STUDENT + " --method kl+cwd", "--raw-logits"),
    "negative weight of a term": (nothing, STUDENT + " --term dist,weight=-1", "-1"),
    "weight of a term that is no number": (nothing, STUDENT + " --term dist,weight=nan", "nan"),
    "unknown option of a term": (nothing, STUDENT + " --term dist,temprature=2", "'temprature'"),
    "[[term]] of an unknown kind": (
        recipe('[[term]]\nkind = "dost"\n'), STUDENT + " --recipe {w}/recipe.toml", "'dost'"),
    "gate beyond its range": (nothing, STUDENT + " --gate confidence:1.5", "'confidence:1.5'"),
    "trust file that is nowhere": (nothing, STUDENT + " --class-trust {w}/none.toml", "none.toml"),
    "trust against nothing": (nothing, STUDENT + " --class-trust auto", "trust-against"),
    "trust against a run without a fold": (
        nothing, STUDENT + " --class-trust auto --trust-against {w}/teacher", "no --fold"),
    "more samples than there are": (nothing, STUDENT + " --limit-samples 70", "70 of 6 samples"),
    "fewer labels than the teacher had": (nothing, STUDENT + " --limit-labels 2", "trained on labels of 4 more"),
    "labels of a list that is nowhere": (nothing, STUDENT + " --labels-from {w}/none.txt", "none.txt"),
    "labels of a list and a number": (
        nothing, STUDENT + " --labels-from {w}/none.txt --limit-labels 2", "--labels-from or --limit-labels"),
    "more views than there are": (
        nothing, STUDENT + " --augment replay --limit-views 2", "--limit-views 2: the cache has 1 view"),
    "fold that cannot be": (nothing, STUDENT + " --fold 7/7", "'7/7'"),
    "folds by no pattern": (nothing, STUDENT + " --fold 0/2 --folds-by (", "--folds-by: '(' (missing )"),
    "folds by what is in no id": (nothing, STUDENT + " --fold 0/2 --folds-by x(.)", "names no sequence in 6 of 6 ids"),
    "folds of one sequence": (nothing, STUDENT + " --fold 0/2 --folds-by ^.", "Cannot deal 1 sequences"),
    "folds by a pattern alone": (nothing, STUDENT + " --folds-by ^.", "'^.' without folds"),
    "judged folds by a pattern alone": (
        nothing, "evaluate {w}/teacher --data {w}/data --folds-by ^.", "'^.' without folds"),
    "mixed odd batches": (nothing, STUDENT + " --mix cutmix --batch-size 5", "--batch-size 5"),
    "mix of nothing known": (nothing, STUDENT + " --mix mixup", "'mixup'"),
    "mix beside features": (nothing, STUDENT + " --mix cutmix --method dist", "with dist: it cannot"),
    "recipe with a wrong value": (
        recipe("temperature = -1.0\n"), STUDENT + " --recipe {w}/recipe.toml", "--temperature"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "command", "received"),
    [pytest.param(*case, id=name) for name, case in CASES.items()],
)
def test_wrong_input(world, cli, tree, prepare, command, received, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # tests of the kernels set it, and a CPU may do then
    prepare(world)
    before = tree(world)
    ended = cli(*command.format(w=world).split())
    assert ended.code == 2, (ended.out, ended.err)
    assert received.format(w=world) in ended.err
    assert ended.err.count("fix: ") == 1
    assert "Traceback" not in ended.err
    assert "should not have happened" not in ended.err
    after = tree(world)
    assert {name: after.get(name) for name in before} == before, "what was there is as it was"
    made = {Path(name).parts[0] for name in set(after) - set(before)}
    assert made <= {"new"}, "nothing beside --out"


@pytest.mark.parametrize(
    ("words", "remedy"),
    [("--qux", "--help"), ("--temprature 3", "--temperature?"), ("--iterations few", "--help"), ("--model", "--help")],
)
def test_wrong_flags(world, cli, words, remedy) -> None:
    """What the parser refuses, in the panel of every error."""
    ended = cli(*(STUDENT + " " + words).format(w=world).split())
    assert ended.code == 2
    assert words.split()[0] in ended.err
    assert remedy in ended.err
    assert [ended.err.count(part) for part in ("fix: ", "Traceback")] == [1, 0]
    assert not (world / "new").exists()


def test_missing_flags_and_unknown_verbs(cli) -> None:
    assert "--cache" in cli("train-student", "--model", "kdcache:tiny", "--out", "x").err
    ended = cli("trian-student")
    assert ended.code == 2
    assert "train-student" in ended.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that --device cuda is right")
@pytest.mark.parametrize("command", [TEACHER, BUILD, STUDENT, "evaluate {w}/teacher --data {w}/data"])
def test_no_gpu(world, cli, command) -> None:
    ended = cli(*(command + " --device cuda").format(w=world).split())
    assert ended.code == 2
    assert "no usable GPU" in ended.err
    assert not (world / "new").exists()


def test_a_damaged_store_fails_its_verification(world, cli, tree) -> None:
    """1, not 2: the command did what it was asked for."""
    flipped(world)
    before = tree(world)
    ended = cli("verify", world / "store.zarr")
    assert ended.code == 1
    assert f"{world}/store.zarr/{VALUES}" in ended.out
    assert "build-teacher-cache" in ended.out
    assert tree(world) == before
    repaired = cli(*BUILD.replace("/new", "/store.zarr").format(w=world).split())
    assert repaired.code == 0, repaired.err
    assert cli("verify", world / "store.zarr").code == 0


def test_another_teacher_fails_verification(world, cli) -> None:
    words = TEACHER.format(w=world) + " --seed 5"
    assert cli(*words.split()).code == 0
    ended = cli("verify", world / "store.zarr", "--teacher", world / "new")
    assert ended.code == 1
    assert "another teacher" in ended.out


def test_broken_data_fails_its_check(world, cli) -> None:
    truncated_image(world)
    ended = cli("data", "check", world / "data")
    assert ended.code == 1
    assert "1 samples cannot be read: 'train-000000'" in ended.out


def test_a_full_disk(world, cli, small_disk) -> None:
    disk = small_disk(120)
    words = BUILD.replace("{w}/new", f"{disk.path}/s.zarr").format(w=world).split()
    ended = cli(*words)
    assert ended.code == 2
    assert "No space left" in ended.err
    assert "should not have happened" not in ended.err
    disk.grow(8192)
    assert cli(*words).code == 0
    assert cli("verify", disk.path / "s.zarr").code == 0


@pytest.mark.parametrize(
    ("command", "size_kib"), [(TEACHER, 4), (TEACHER, 1500), (STUDENT, 4), (STUDENT, 400), (TEACHER, 400)]
)
def test_a_full_disk_while_training(world, cli, small_disk, command, size_kib) -> None:
    disk = small_disk(size_kib)
    ended = cli(*command.replace("{w}/new", f"{disk.path}/run").format(w=world).split())
    assert ended.code == 2
    assert "No space left" in ended.err
    assert "should not have happened" not in ended.err


@pytest.mark.parametrize("case", ["half-built store", "truncated image"])
def test_in_a_process_of_its_own(world, fork, tree, case) -> None:
    """The panel goes to stderr and the code to the shell."""
    prepare, command, received = CASES[case]
    prepare(world)
    before = tree(world)
    running = fork(*command.format(w=world).split())
    out, err = running.communicate(timeout=60)
    assert running.returncode == 2
    assert received in err
    assert "fix: " in err
    assert "Traceback" not in err
    assert out == ""
    after = tree(world)
    assert {name: after[name] for name in before} == before


def test_debug_shows_the_traceback(world, fork) -> None:
    running = fork("inspect", world / "nowhere", "--debug")
    _, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "Traceback" in err
    assert "StoreError" in err
