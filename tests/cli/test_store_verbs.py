"""`kdcache copy`, `build-teacher-cache --from`, and the views that build-teacher-cache stores."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time

import pytest
import torch

from kdcache.data import open_split, write_scenes
from kdcache.store import open_cache, verify_files
from kdcache.teacher import BuildOptions, Teacher, build_cache

FROM = "build-teacher-cache --from {w}/store.zarr --data {w}/data --teacher {w}/teacher --out {w}/new"
COPY = "copy {w}/store.zarr {w}/new"


def manifest(cli, store) -> dict:
    found = cli("inspect", store, "--json")
    assert found.code == 0, found.err
    return json.loads(found.out)["manifest"]


@pytest.mark.parametrize("words", ["copy camvid.zarr", "build-teacher-cache --from camvid.zarr"])
def test_help(cli, words) -> None:
    shown = cli(words.split()[0], "--help")
    assert shown.code == 0
    assert f"kdcache {words}" in shown.out


def test_a_copy(world, cli, tree) -> None:
    """Equal in every byte; continued, kept, and as good for a training."""
    copied = cli(*COPY.format(w=world).split())
    assert copied.code == 0, copied.err
    assert "6 records in" in copied.out
    assert "against the teacher: KL" in copied.out
    assert tree(world / "new") == tree(world / "store.zarr")
    again = cli(*COPY.format(w=world).split())
    assert "6 records (6 from before);" in again.out
    shutil.rmtree(world / "store.zarr")
    words = f"train-student --cache {world}/new --model kdcache:tiny --iterations 1 --batch-size 2 --out {world}/run"
    assert cli(*words.split()).code == 0


def test_copies_in_part_and_otherwise(world, cli) -> None:
    ids = open_cache(world / "store.zarr").ids
    words = COPY.format(w=world).split()
    assert cli(*words, "--samples", 2, "--codec", "small", "--shard-records", 1).code == 0
    cache = open_cache(world / "new")
    assert cache.ids == (ids[0], ids[5])
    about = manifest(cli, world / "new")
    assert (about["codec"], about["build"]["shard_records"], about["dataset"]["samples"]) == ("small", 1, 2)
    exact = manifest(cli, world / "store.zarr")["fidelity"]["kl_t1"]
    assert about["fidelity"]["kl_t1"] > 100 * exact
    back = cli("copy", world / "new", world / "back", "--codec", "none", "--samples", 1)
    assert f"KL {about['fidelity']['kl_t1']:.1e} nats" in back.out
    assert open_cache(world / "back").ids == (ids[0],)
    assert cli("verify", world / "back").code == 0
    assert cli("copy", world / "store.zarr", world / "bare", "--pixels", "source", "--features", "").code == 0
    trained = (
        f"train-student --cache {world}/bare --data {world}/data --model kdcache:tiny --iterations 1 --batch-size 2"
    )
    assert cli(*trained.split(), "--out", world / "run").code == 0


def test_what_a_copy_lost_may_be_unknown(world, cli) -> None:
    build = f"build-teacher-cache --data {world}/data --teacher {world}/teacher --top-k 3 --out {world}/topk"
    assert cli(*build.split()).code == 0
    copied = cli("copy", world / "topk", world / "new", "--codec", "small")
    assert "unknown" in copied.out
    assert manifest(cli, world / "new")["fidelity"] is None


def test_workers_copy_together(world, cli) -> None:
    words = COPY.format(w=world).split()
    first = cli(*words, "--worker", "0/2")
    assert (first.code, "the worker that ends last finishes the copy" in first.out) == (0, True)
    last = cli(*words, "--worker", "1/2")
    assert "6 records (" not in first.out
    assert "6 records" in last.out
    assert verify_files(world / "new").damaged == []


def test_a_build_from_an_earlier_one(world, cli, tree) -> None:
    """More samples, views and taps; OLD stays as it was, and the whole is what the teacher says."""
    before = tree(world / "store.zarr")
    more = write_scenes(world / "more", "scenes:36x52,train=3,val=1,seed=9")
    for kind in ("images", "labels"):
        for path in (more / kind / "train").iterdir():
            path.rename(world / "data" / kind / "train" / f"x-{path.name}")
    words = FROM.format(w=world).split()
    larger = cli(*words)
    assert larger.code == 0, larger.err
    assert "9 records (3 computed, 6 copied) in" in larger.out
    again = cli(*words)
    assert "9 records (9 from before) (0 computed, 0 copied)" in again.out
    words = FROM.replace("store.zarr", "new", 1).replace("--out {w}/new", "--out {w}/more.zarr").format(w=world).split()
    richer = cli(*words, "--views", 2, "--features", "head", "--codec", "small", "--batch-size", 5)
    assert richer.code == 0, richer.err
    assert "18 records (18 computed, 9 copied)" in richer.out
    about = manifest(cli, world / "more.zarr")
    assert (about["codec"], about["build"]["batch_size"], list(about["features"])) == ("small", 5, ["head"])
    assert about["view"]["drawn"] == {"seed": 0, "scale": [1.0, 2.0], "flip": True}
    other = cli(
        *FROM.replace("store.zarr", "more.zarr").replace("--out {w}/new", "--out {w}/taps").format(w=world).split(),
        "--features",
        "stage2",
        "--statistics",
        "at:stage1",
    )
    assert other.code == 0, other.err
    assert list(manifest(cli, world / "taps")["features"]) == ["head", "stage2"], "what OLD has, it keeps"
    checked = cli(
        "verify", world / "more.zarr", "--teacher", world / "teacher", "--data", world / "data", "--records", 18
    )
    assert checked.code == 0, checked.out
    assert tree(world / "store.zarr") == before


@pytest.mark.parametrize("pixels", ["stored", "source"])
def test_views(world, cli, pixels) -> None:
    """Built, inspected, trained on in turn; other augmentations say that they take whole images."""
    build = f"build-teacher-cache --data {world}/data --teacher {world}/teacher --pixels {pixels} --out {world}/views"
    scale, no_flip = ("--view-scale", "--no-view-flip") if pixels == "stored" else ("--scale", "--no-flip")
    built = cli(*build.split(), *["--views", "3", "--view-seed", "4", scale, "1.5:2", no_flip])
    assert built.code == 0, built.err
    assert "18 records" in built.out
    assert "3 per sample, crops zoomed 1.5 to 2 times, seed 4" in cli("inspect", world / "views").out
    student = f"train-student --cache {world}/views --model kdcache:tiny --iterations 9 --batch-size 2"
    data = f"--data {world}/data" if pixels == "source" else ""
    replayed = cli(*f"{student} {data} --augment replay --out {world}/replay".split())
    assert replayed.code == 0, replayed.err
    assert "3 views of a sample; with --augment replay an epoch shows one of each" in replayed.err
    warped = cli(*f"{student} {data} --augment warp --out {world}/warp".split())
    assert "only the whole images are used" in warped.err


def test_what_a_build_keeps_by_default_a_training_replays(world, cli) -> None:
    built = cli(*f"build-teacher-cache --data {world}/data --teacher {world}/teacher --out {world}/views".split())
    assert "24 records" in built.out, built.err
    assert "4 per sample, crops zoomed 1 to 2 times" in cli("inspect", world / "views").out
    trained = cli(*f"train-student --cache {world}/views --model kdcache:tiny --iterations 2 --out {world}/new".split())
    assert trained.code == 0, trained.err
    assert 'augment = "replay"' in (world / "new/recipe.toml").read_text()


CASES = {
    "copy of nothing": ("copy {w}/none.zarr {w}/new", "Cache not found: {w}/none.zarr"),
    "copy of what is none": ("copy {w}/data {w}/new", "Cache not found: {w}/data/zarr.json"),
    "copy into something else": ("copy {w}/store.zarr {w}/data", "data holds something else"),
    "copy onto another": ("copy {w}/store.zarr {w}/source.zarr", "source.zarr"),
    "copy onto itself": ("copy {w}/store.zarr {w}/./store.zarr", "are the same cache"),
    "copy --codec foo": (COPY + " --codec foo", "'foo'"),
    "copy --pixels foo": (COPY + " --pixels foo", "'foo'"),
    "copy --pixels stored": (
        "copy {w}/source.zarr {w}/new --pixels stored",
        "source.zarr was built with --pixels source",
    ),
    "copy --samples 7": (COPY + " --samples 7", "7 of 6 samples"),
    "copy --ids": (COPY + " --ids x", "--ids was removed"),
    "copy --features foo": (COPY + " --features foo", "has no taps"),
    "copy of some without pixels": ("copy {w}/source.zarr {w}/new --samples 2", "without pixels"),
    "copy --worker 2/2": (COPY + " --worker 2/2", "'2/2'"),
    "from nothing": (FROM.replace("store.zarr", "none.zarr"), "Cache not found: {w}/none.zarr"),
    "from itself": (FROM.replace("{w}/new", "{w}/./store.zarr"), "from itself"),
    "from another teacher": (FROM.replace("{w}/teacher", "kdcache:tiny"), "Missing weights of 'kdcache:tiny'"),
    "from --features foo": (FROM + " --features foo", "foo"),
    "from --view-scale 2": (FROM + " --views 2 --view-scale 2", "'2'"),
    "from --view-scale 0:2": (FROM + " --views 2 --view-scale 0:2", "0:2"),
    "from no such split": (FROM + " --split test", "Unknown split 'test'"),
    "from --size and --tta": (FROM + " --tta flip --size 32x48", "Cannot change --size, --tta with --from"),
}


@pytest.mark.parametrize(("command", "received"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_wrong_input(world, cli, tree, command, received) -> None:
    before = tree(world)
    ended = cli(*command.format(w=world).split())
    assert ended.code == 2, (ended.out, ended.err)
    assert received.format(w=world) in ended.err
    assert ended.err.count("fix: ") == 1
    assert "Traceback" not in ended.err
    assert "should not have happened" not in ended.err
    assert tree(world) == before


def test_half_a_store_is_not_copied(world, cli) -> None:
    (world / "store.zarr/complete.json").unlink()
    ended = cli(*COPY.format(w=world).split())
    assert (ended.code, "2 of 2 shards" in ended.err) == (2, True)
    assert not (world / "new").exists()


def test_a_damaged_source_is_named(world, cli) -> None:
    file = world / "store.zarr/targets/segmentation/values/c/1/0/0/0"
    file.write_bytes(file.read_bytes()[:-1])
    for codec in ("default", "none"):
        ended = cli("copy", world / "store.zarr", world / codec, "--codec", codec)
        assert ended.code == 2
        assert str(file) in ended.err
        assert "1 of 2 shards" in cli("verify", world / codec).err


def test_interrupted_at_the_keyboard(tmp_path, fork, cli, tree) -> None:
    """130, a sentence, and finished shards that the same command keeps."""
    from kdcache.models import build_model

    teacher = Teacher(build_model("kdcache:tiny", 7).eval(), "tiny")
    options = BuildOptions(
        size=(96, 128), views=1, batch_size=8, shard_records=2, device=torch.device("cpu"), fidelity=False
    )
    build_cache(open_split("scenes:96x128,train=120", "train"), teacher, tmp_path / "s", options)
    words = ["copy", tmp_path / "s", tmp_path / "c", "--codec", "none", "--shard-records", 1]
    running = fork(*words)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("c/ledger/*.json")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "run the same command again" in err
    ended = cli(*words)
    assert ended.code == 0
    assert "from before)" in ended.out
    cli("copy", tmp_path / "s", tmp_path / "clean", "--codec", "none", "--shard-records", 1)
    assert tree(tmp_path / "c") == tree(tmp_path / "clean")


def test_a_seal_that_was_published(cli, world) -> None:
    """`verify` and `inspect` say it, and `verify --seal` compares it."""
    shown = cli("verify", world / "store.zarr")
    seal = re.search(r"seal ([0-9a-f]{64})\n", shown.out)
    assert (shown.code, bool(seal)) == (0, True)
    assert seal[1] in cli("inspect", world / "store.zarr").out
    assert json.loads(cli("inspect", world / "store.zarr", "--json").out)["seal"] == seal[1]
    same = cli("verify", world / "store.zarr", "--seal", seal[1])
    assert (same.code, "as published" in same.out) == (0, True)
    other = cli("verify", world / "store.zarr", "--seal", "0" * 64)
    assert (other.code, seal[1] in other.err) == (2, True)
    assert cli("verify", world / "store.zarr", "--seal", "12ab").code == 2
