"""Better teachers at build time: several, augmented, larger, cross-fitted; crops; statistics."""

from __future__ import annotations

import json
import shutil

import pytest

from kdcache.store import open_cache

BUILD = "build-teacher-cache --data {w}/data --teacher {w}/teacher --shard-records 4 --views 1 --out {w}/new"
TWO = BUILD + " --teacher {w}/other"


@pytest.fixture
def teachers(world):
    """The world, with a second teacher in `other`: the first one's last weights, moved."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "teacher", world / "other")
    weights = load_file(world / "other/best.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + weights["classifier.bias"].new_tensor([2.0, *[0.0] * 6])
    save_file(weights, world / "other/best.safetensors")
    return world


def manifest(store) -> dict:
    return json.loads((store / "zarr.json").read_text())["attributes"]["kdcache"]


def test_an_ensemble_from_one_command(teachers, cli) -> None:
    flags = "--teacher-weights 2,1 --tta flip,scales=1:1.5 --statistics at:head --raw-logits --teacher-size 64x96"
    built = cli(*f"{TWO} {flags}".format(w=teachers).split())
    assert built.code == 0, built.err
    about = manifest(teachers / "new")
    assert [round(member["share"], 3) for member in about["teacher"]["members"]] == [0.667, 0.333]
    assert about["teacher"]["tta"] == {"flip": True, "scales": [1.0, 1.5]}
    assert about["view"]["teacher_size"] == [64, 96]
    assert about["heads"]["segmentation"]["size"] == [24, 36]
    assert sorted(about["statistics"]) == ["at.head"]
    shown = cli("inspect", teachers / "new").out
    assert "kdcache:tiny + kdcache:tiny" in shown
    assert "statistics/at.head" in shown
    again = cli(*f"{TWO} {flags}".format(w=teachers).split())
    assert "6 records (6 from before)" in again.out
    extend = (
        "build-teacher-cache --from {w}/new --data {w}/data --teacher {w}/teacher --teacher {w}/other --out {w}/more"
    )
    more = cli(*f"{extend} --views 2 --statistics at:stage2".format(w=teachers).split())
    assert more.code == 0, more.err
    assert sorted(manifest(teachers / "more")["statistics"]) == ["at.head", "at.stage2"]
    student = "train-student --cache {w}/new --model kdcache:tiny --iterations 2 --batch-size 2 --out {w}/run"
    assert cli(*student.format(w=teachers).split()).code == 0


def test_crops_from_one_command(world, cli) -> None:
    built = cli(*f"{BUILD} --views 3 --crop 32x32 --view-scale 0.5:2".format(w=world).split())
    assert built.code == 0, built.err
    cache = open_cache(world / "new")
    assert (len(cache), cache.view_size, cache.manifest.view.kind) == (18, (32, 32), "crop")
    assert cli(*f"{BUILD.replace('/new', '/full')} --views full".format(w=world).split()).code == 0
    assert len(open_cache(world / "full")) == 6


def test_cross_fitting_from_one_command(world, cli) -> None:
    for fold in range(2):
        shutil.copytree(world / "teacher", world / f"fold{fold}")
        recipe = world / f"fold{fold}/recipe.toml"
        recipe.write_text(f'{recipe.read_text()}fold = "{fold}/2"\n')
    build = (
        "build-teacher-cache --data {w}/data --teacher {w}/fold0 --teacher {w}/fold1 --folds 2 --views 1 --out {w}/new"
    )
    built = cli(*build.format(w=world).split())
    assert built.code == 0, built.err
    planned = cli(*build.replace("build-teacher-cache", "plan").format(w=world).split())
    assert planned.code == 0, planned.err
    assert manifest(world / "new")["teacher"]["folds"] == 2
    assert [training["fold"] for training in manifest(world / "new")["teacher"]["trainings"]] == [[0, 2], [1, 2]]
    assert sorted(open_cache(world / "new").column("fold").tolist()) == [0, 0, 0, 1, 1, 1]
    swapped = cli(*build.replace("fold0", "x").replace("fold1", "fold0").replace("x", "fold1").format(w=world).split())
    assert (swapped.code, "has fold 1/2" in swapped.err) == (2, True)
    extend = f"build-teacher-cache --from {world}/new --data {world}/data --views 2 --out {world}/more".split()
    wrong = cli(*extend, "--teacher", world / "fold1", "--teacher", world / "fold0")
    assert (wrong.code, "has fold 1/2" in wrong.err, (world / "more").exists()) == (2, True, False)
    larger = cli(*extend, "--teacher", world / "fold0", "--teacher", world / "fold1")
    assert larger.code == 0, larger.err
    assert sorted(open_cache(world / "more").column("fold").tolist()) == [0] * 6 + [1] * 6


CASES = {
    "weights of another number": (TWO + " --teacher-weights 1", "1 for 2 teachers"),
    "negative weights": (TWO + " --teacher-weights=-1,2", "-1, 2 for 2 teachers"),
    "weights not finite": (TWO + " --teacher-weights inf,2", "inf, 2 for 2 teachers"),
    "weights that are none": (TWO + " --teacher-weights a,b", "'a,b'"),
    "unknown tta": (TWO + " --tta rotate", "'rotate'"),
    "tta misspelt": (TWO + " --tta flips", "Did you mean flip?"),
    "scales of 0": (TWO + " --tta scales=0:1", "'0:1'"),
    "removed statistic": (BUILD + " --statistics agreement", "agreement was removed"),
    "unknown statistic": (BUILD + " --statistics at", "--statistics at:head"),
    "unknown tap": (BUILD + " --statistics at:haed", "Unknown tap 'haed' of kdcache:tiny"),
    "folds of one": (BUILD + " --folds 1", "--folds 1 is too small"),
    "folds of fewer teachers": (TWO + " --folds 3", "--folds 3 needs 3 teachers, one for each fold, but 2 were given"),
    "folds that were seen": (TWO + " --folds 2", "has seen all folds"),
    "folds of other sequences": (TWO + " --folds 2 --folds-by (.)$", "--folds-by '(.)$', has seen all folds"),
    "sequences without folds": (TWO + " --folds-by (.)$", "'(.)$' without folds"),
    "weights of folds": (TWO + " --folds 2 --teacher-weights 1,2", "--teacher-weights 1,2 with --folds 2"),
    "teacher size": (BUILD + " --teacher-size 64", "'64'"),
    "teacher grid": (BUILD + " --teacher-grid coarse", "'coarse'"),
    "crop beyond": (BUILD + " --crop 65x32", "Crops of 65x32 do not fit into images of 32x48 times 2"),
    "crop of the whole": (
        BUILD + " --crop 32x32 --views full",
        "Cannot use --crop 32x32 with --views full",
    ),
    "no views": (BUILD + " --views 0", "'0'"),
    "views that are none": (BUILD + " --views all", "'all'"),
    "too many views": (BUILD + " --views 5000", "--views 5000"),
    "extended by more": (
        BUILD + " --from {w}/store.zarr --teacher {w}/other",
        "2 teachers were given, but the cache has 1: kdcache:tiny",
    ),
}


@pytest.mark.parametrize(("command", "received"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_wrong_input(teachers, cli, tree, command, received) -> None:
    before = tree(teachers)
    ended = cli(*command.format(w=teachers).split())
    assert ended.code == 2, (ended.out, ended.err)
    assert received in ended.err
    assert ended.err.count("fix: ") == 1
    assert "should not have happened" not in ended.err
    assert tree(teachers) == before


def test_teachers_of_other_classes(teachers, cli, tree) -> None:
    about = teachers / "other/model.json"
    content = json.loads(about.read_text())
    content["class_names"] = content["class_names"][::-1]
    about.write_text(json.dumps(content))
    before = tree(teachers)
    ended = cli(*TWO.format(w=teachers).split())
    assert (ended.code, "Classes in another order" in ended.err) == (2, True)
    assert tree(teachers) == before
