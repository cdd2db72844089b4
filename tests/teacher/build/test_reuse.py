"""A larger store of the same teacher: what an earlier one says is taken over, and the teacher is not asked again."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kdcache.data import Split, open_split, write_scenes
from kdcache.errors import CorruptError, MismatchError
from kdcache.store import CopyChanges, Worker, copy_store, open_cache, open_writer, round_targets, verify_files
from kdcache.teacher import TeacherProbe, build_cache, copied_fidelity, load_teacher, options_of, plan_manifest
from kdcache.teacher.build.render import render_records
from kdcache.teacher.build.reuse import Reuse

TAPS = ("stage2", "head")


@pytest.fixture
def taught(teacher):
    """Sizes of the teacher's batches, of rendered size alone: not those on which it is recognised."""
    sizes: list[int] = []
    handle = teacher.model.register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0])) if inputs[0].shape[-2:] == (32, 48) else None
    )
    yield sizes
    handle.remove()


@pytest.fixture
def old(tmp_path, teacher, folder_data, options):
    """A store of 7 samples in shards of 3, batch 1: then a row does not depend on who shared its batch."""
    build_cache(open_split(folder_data, "train"), teacher, tmp_path / "old", options(batch_size=1))
    return open_cache(tmp_path / "old")


def extended(old, split: Split, teacher, out: Path, **changes):
    return build_cache(split, teacher, out, like(old.manifest, **changes), reuse=old)


def like(old, **changes):
    """Options of a store like an earlier one; figures are measured only where a test asks for them."""
    return options_of(old, **{"render_threads": 1, "fidelity": False, **changes})


def content(path: Path) -> dict[str, bytes]:
    """Every shard."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("c/*") if p.is_file()} | {
        p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("c/**/0") if p.is_file()
    }


def more_images(folder: Path, count: int) -> Split:
    """Further images, before and between those that were there."""
    other = write_scenes(folder.parent / "more", f"scenes:36x52,train={count},val=1,seed=9")
    for kind in ("images", "labels"):
        for number, path in enumerate(sorted((other / kind / "train").iterdir())):
            (folder / kind / "train" / f"{'atz'[number % 3]}rain-{number:06d}x.png").write_bytes(path.read_bytes())
    return open_split(folder, "train")


def test_more_samples(tmp_path, old, teacher, folder_data, taught, tree) -> None:
    before, split, seen = tree(old.path), more_images(folder_data, 5), []
    taught.clear()
    chosen = like(old.manifest)
    result = build_cache(split, teacher, tmp_path / "new", chosen, lambda *at: seen.append(at), reuse=old)
    assert (result.records, result.reused, result.kept) == (5, 7, 0)
    assert sum(taught) - 1 == 5  # one for the shapes
    assert seen[-1] == (12, 12)
    build_cache(split, teacher, tmp_path / "clean", chosen)
    assert content(tmp_path / "new") == content(tmp_path / "clean")
    ours, theirs = (open_cache(tmp_path / name).manifest for name in ("new", "clean"))
    assert ours.model_copy(update={"created": ""}) == theirs.model_copy(update={"created": ""})
    assert verify_files(tmp_path / "new").damaged == []
    assert tree(old.path) == before


def test_more_views(tmp_path, old, teacher, folder_data, taught) -> None:
    split = open_split(folder_data, "train")
    extended(old, split, teacher, tmp_path / "two", views=2, view_seed=4)
    taught.clear()
    result = extended(open_cache(tmp_path / "two"), split, teacher, tmp_path / "four", views=4)
    assert (result.records, result.reused) == (14, 14)
    assert sum(taught) - 1 == 14
    build_cache(split, teacher, tmp_path / "clean", like(result.manifest, render_threads=2))
    assert content(tmp_path / "four") == content(tmp_path / "clean")
    taught.clear()
    other = extended(open_cache(tmp_path / "two"), split, teacher, tmp_path / "other", views=2, view_seed=5)
    assert (other.records, other.reused) == (7, 7), "other crops are other records"


def test_more_taps(tmp_path, old, teacher, folder_data, taught) -> None:
    """Every record goes through the teacher for the new tap; targets and known taps are the stored ones."""
    split = open_split(folder_data, "train")
    extended(old, split, teacher, tmp_path / "one", features=TAPS[:1])
    marked = _marked(tmp_path / "one", tmp_path / "marked")
    taught.clear()
    result = extended(marked, split, teacher, tmp_path / "two", features=TAPS)
    assert (result.records, result.reused) == (7, 7)
    assert sum(taught) - 1 == 7
    build_cache(split, teacher, tmp_path / "clean", like(result.manifest, render_threads=2))
    new, clean = open_cache(tmp_path / "two"), open_cache(tmp_path / "clean")
    for record in range(7):
        row = new.read(record, list(new.specs))
        wanted = clean.read(record, list(clean.specs)) | marked.read(record, _said(marked))
        assert all(np.array_equal(row[path], wanted[path]) for path in row)
    fewer = extended(new, split, teacher, tmp_path / "fewer", features=TAPS[1:])
    assert (fewer.records, fewer.reused) == (0, 7)


def test_a_record_is_known_by_window_mirror_and_pixels(tmp_path, old, teacher, folder_data) -> None:
    """A picture of one colour has the same pixels wherever one looks."""
    split = open_split(folder_data, "train")
    extended(old, split, teacher, tmp_path / "two", views=2)
    two = open_cache(tmp_path / "two")
    known = Reuse(two, two.manifest)
    item = render_records(split, two.manifest.view, [7])[0]
    sample = split.ids[item.sample]
    assert known.find(item, sample) == 7
    moved = replace(item.window, y0=item.window.y0 + 0.5)
    for change in ({"window": moved}, {"flip": not item.flip}, {"checksum": item.checksum ^ 1}):
        assert known.find(replace(item, **change), sample) is None
    assert known.find(item, split.ids[item.sample - 1]) is None


@pytest.mark.parametrize("drawn", [{"view_scale": (0.5, 1.5)}, {"view_flip": False}, {"view_seed": 9}])
def test_views_go_on_as_they_were_drawn(tmp_path, teacher, split, options, drawn) -> None:
    build_cache(split, teacher, tmp_path / "two", options(views=2, **drawn))
    two = open_cache(tmp_path / "two")
    result = extended(two, split, teacher, tmp_path / "three", views=3)
    assert (result.records, result.reused) == (7, 14)
    assert result.manifest.view.drawn == two.manifest.view.drawn


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"views": 3, "view_seed": 5, "view_scale": (0.5, 1.5), "view_flip": False, "top_k": 3, "precision": "bf16"},
        {"crop": (16, 24), "view_scale": (0.7, 2.0), "statistics": ("at:head", "at:stage2"), "raw_logits": True},
        {"teacher_size": (64, 96), "teacher_grid": "view", "features": TAPS, "codec": "small", "pixels": "source"},
        {"batch_size": 3, "shard_records": 5, "statistics": ("at:head",)},
    ],
    ids=["default", "views", "crops", "larger", "batches"],
)
def test_options_of_a_store_are_those_that_it_was_built_with(teacher, split, options, changes) -> None:
    """All that shapes it: the same command would go on with it."""
    chosen = options(top_k=changes.get("top_k", 7), **{k: v for k, v in changes.items() if k != "top_k"})
    manifest = plan_manifest(TeacherProbe(split, teacher, chosen))
    again = options_of(manifest)
    assert manifest.differences(plan_manifest(TeacherProbe(split, teacher, replace(again, fidelity=False)))) == []
    mine, theirs = (asdict(replace(one, render_threads=1, fidelity=False)) for one in (chosen, again))
    if manifest.view.drawn is None:  # then nobody asked how views are drawn
        assert (again.views, again.crop) == (1, None)
    assert theirs == mine | {"heads": tuple(manifest.heads)}  # every head, by name


def _said(cache) -> list[str]:
    return [path for path in cache.specs if path.startswith(("targets/", "features/"))]


def _marked(path: Path, to: Path):
    """The same store, in which the teacher said other things: who takes them over is seen."""
    from kdcache.store import open_writer

    cache = open_cache(path)
    with open_writer(to, cache.manifest, cache.ids) as writer:
        for shard in writer.claimed():
            rows = [cache.read(record, list(cache.specs)) for record in range(*cache.manifest.shard_range(shard))]
            arrays = {name: np.stack([row[name] for row in rows]) for name in cache.specs}
            arrays |= {name: arrays[name] - np.float16(0.5) for name in _said(cache)}
            writer.write_shard(shard, arrays)
        writer.seal()
    return open_cache(to)


@settings(max_examples=10, deadline=None)
@given(
    kept=st.sets(st.integers(0, 6)),
    changed=st.sets(st.integers(0, 6), max_size=3),
    batch_size=st.integers(1, 5),
    shard_records=st.integers(1, 9),
    views=st.integers(1, 3),
)
def test_exactly_what_changed_is_taught(tmp_path_factory, kept, changed, batch_size, shard_records, views) -> None:
    """Samples that are new or render otherwise, views that are new; batches hold nothing else."""
    import torch

    from kdcache.models import build_model
    from kdcache.teacher import BuildOptions, Teacher

    folder = tmp_path_factory.mktemp("extend")
    data = write_scenes(folder / "data", "scenes:36x52,train=7,val=1")
    hidden = {path: path.read_bytes() for path in sorted((data / "images/train").iterdir())}
    for number, path in enumerate(hidden):
        if number not in kept | {0}:
            path.unlink()
            (data / "labels/train" / path.name).rename(folder / path.name)
    torch.manual_seed(0)
    teacher = Teacher(build_model("kdcache:tiny", 7).eval(), "tiny")
    options = BuildOptions(size=(32, 48), views=1, batch_size=2, shard_records=3, render_threads=0, fidelity=False)
    build_cache(open_split(data, "train"), teacher, folder / "old", options)
    for number, (path, picture) in enumerate(hidden.items()):
        if not path.exists():
            (folder / path.name).rename(data / "labels/train" / path.name)
        path.write_bytes(list(hidden.values())[(number + 1) % 7] if number in changed else picture)
    sizes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    options = replace(options, batch_size=batch_size, shard_records=shard_records, views=views)
    old = open_cache(folder / "old")
    result = build_cache(open_split(data, "train"), teacher, folder / "new", options, reuse=old)
    known = (kept | {0}) - changed
    assert (result.records, result.reused) == (7 * views - len(known), len(known))
    del sizes[:2]  # shapes, and the fixed images
    unknown = [record not in {views * number for number in known} for record in range(7 * views)]
    wanted = []
    for first in range(0, 7 * views, shard_records):
        count = sum(unknown[first : first + shard_records])
        wanted += [batch_size] * (count // batch_size) + [count % batch_size] * (count % batch_size > 0)
    assert sizes == wanted
    new = open_cache(folder / "new")
    for number in known:
        ours, theirs = new.read(views * number, _said(new)), old.read(sorted(kept | {0}).index(number), _said(old))
        assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


@pytest.mark.parametrize("top_k", [4, 7])
def test_into_the_small_codec(tmp_path, teacher, split, options, top_k) -> None:
    build_cache(split, teacher, tmp_path / "old", options(batch_size=1, top_k=top_k, fidelity=True))
    old = open_cache(tmp_path / "old")
    result = extended(old, split, teacher, tmp_path / "new", codec="small", fidelity=True)
    assert result.records == 0
    build_cache(split, teacher, tmp_path / "clean", options(batch_size=1, top_k=top_k, codec="small", fidelity=True))
    assert content(tmp_path / "new") == content(tmp_path / "clean")
    assert open_cache(tmp_path / "new").manifest.fidelity == open_cache(tmp_path / "clean").manifest.fidelity


def test_figures_stay_true(tmp_path, teacher, split, options, taught) -> None:
    """They are the earlier store's, which cost nothing, and tell of rounding that its codec no longer shows."""
    build_cache(split, teacher, tmp_path / "old", options(codec="small", fidelity=True))
    small = open_cache(tmp_path / "old")
    copy_store(small, tmp_path / "copy", CopyChanges(codec="default"))
    taught.clear()
    for codec in ("default", "none"):
        extended(open_cache(tmp_path / "copy"), split, teacher, tmp_path / codec, codec=codec, fidelity=True)
        assert open_cache(tmp_path / codec).manifest.fidelity == small.manifest.fidelity
    assert taught == [1, 1]


def test_what_a_copy_lost_is_of_records_all_over_the_store(tmp_path, teacher, options) -> None:
    """The first sixteen of these lose nothing, for they are rounded already."""
    split = open_split("scenes:36x52,train=24", "train")
    build_cache(split, teacher, tmp_path / "s", options(fidelity=True, batch_size=8, shard_records=8))
    cache = open_cache(tmp_path / "s")
    with open_writer(tmp_path / "half", cache.manifest, cache.ids) as writer:
        for shard in writer.claimed():
            rows = [cache.read(record, list(cache.specs)) for record in range(*cache.manifest.shard_range(shard))]
            arrays = {name: np.stack([row[name] for row in rows]) for name in cache.specs}
            writer.write_shard(shard, round_targets(arrays, "small" if shard < 2 else "default"))
        writer.seal()
    whole, half = (copied_fidelity(open_cache(tmp_path / name), "small") for name in ("s", "half"))
    assert 0.1 * whole.kl_t1 < half.kl_t1 < 0.7 * whole.kl_t1


def test_what_a_copy_lost(tmp_path, teacher, split, options) -> None:
    """Measured beside the store it is what the build measures beside the teacher; unknown where nobody can tell."""
    build_cache(split, teacher, tmp_path / "old", options(fidelity=True))
    build_cache(split, teacher, tmp_path / "small", options(fidelity=True, codec="small"))
    build_cache(split, teacher, tmp_path / "topk", options(fidelity=True, top_k=4))
    old, small, topk = (open_cache(tmp_path / name) for name in ("old", "small", "topk"))
    for codec in (None, "default", "none"):
        assert copied_fidelity(old, codec) == old.manifest.fidelity
        assert copied_fidelity(small, codec) == small.manifest.fidelity
    found, wanted = copied_fidelity(old, "small"), small.manifest.fidelity
    assert found is not None
    assert found.kl_t1 == pytest.approx(wanted.kl_t1, rel=0.05)
    assert found.kl_t4 == pytest.approx(wanted.kl_t4, rel=0.05)
    assert copied_fidelity(topk, "small") is None
    sure = topk.manifest.fidelity.model_copy(
        update={"kl_t1": 0.0}
    )  # whose tail is empty: still no logits of all classes
    topk.manifest = topk.manifest.model_copy(update={"fidelity": sure})
    assert copied_fidelity(topk, "small") is None
    doubtful = old.manifest.fidelity.model_copy(update={"kl_t1": found.kl_t1})
    for figures in (None, doubtful):
        old.manifest = old.manifest.model_copy(update={"fidelity": figures})
        assert copied_fidelity(old, "small") is None
    copy_store(small, tmp_path / "back", CopyChanges(codec="none"))
    assert copied_fidelity(open_cache(tmp_path / "back"), "small") == small.manifest.fidelity


@pytest.mark.parametrize("threads", [0, 2])
def test_interrupted_it_goes_on(tmp_path, old, teacher, folder_data, threads, tree) -> None:
    split = more_images(folder_data, 5)

    class Broken:
        def __getattr__(self, name):
            return getattr(split, name)

        def __len__(self):
            return len(split)

        def image(self, index):
            if index == 10:
                raise KeyboardInterrupt
            return split.image(index)

    chosen = like(old.manifest, render_threads=threads)
    with pytest.raises(KeyboardInterrupt):
        build_cache(Broken(), teacher, tmp_path / "new", chosen, reuse=old)
    result = build_cache(split, teacher, tmp_path / "new", chosen, reuse=old)
    assert result.kept > 0
    assert result.kept + result.records + result.reused == 12
    build_cache(split, teacher, tmp_path / "clean", chosen)
    assert content(tmp_path / "new") == content(tmp_path / "clean")
    before = tree(tmp_path / "new")
    assert build_cache(split, teacher, tmp_path / "new", chosen).kept == 12, "what it says is a build's own"
    assert tree(tmp_path / "new") == before


KILLED = """
import os, signal, sys, torch
from kdcache.data import open_split
from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.store.backend import local
from kdcache.teacher import Teacher, build_cache, load_teacher, options_of
torch.set_num_threads(1)
names, publish = iter(range(10**6)), local.Folder.publish
def dying(self, key, content):
    if next(names) == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
    publish(self, key, content)
local.Folder.publish = dying
old, split = open_cache(sys.argv[1]), open_split(sys.argv[2], "train")
teacher = load_teacher("kdcache:tiny@" + sys.argv[3], split.classes)
build_cache(split, teacher, sys.argv[4], options_of(old.manifest, render_threads=0), reuse=old)
"""


@pytest.mark.parametrize("file", [2, 20])
def test_killed_it_goes_on(tmp_path, old, teacher, weights, folder_data, file) -> None:
    split = more_images(folder_data, 5)
    words = [str(old.path), str(folder_data), str(weights), str(tmp_path / "new"), str(file)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL
    extended(old, split, teacher, tmp_path / "new")
    build_cache(split, teacher, tmp_path / "clean", like(old.manifest))
    assert content(tmp_path / "new") == content(tmp_path / "clean")


def test_workers_share_it(tmp_path, old, teacher, folder_data) -> None:
    split = more_images(folder_data, 5)
    results = [
        build_cache(split, teacher, tmp_path / "new", like(old.manifest), worker=Worker(n, 2), reuse=old)
        for n in range(2)
    ]
    assert [result.complete for result in results] == [False, True]
    assert (sum(r.records for r in results), sum(r.reused for r in results)) == (5, 7)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"size": (32, 52)}, r"view\.size: \(32, 48\) against \(32, 52\)"),
        ({"top_k": 3}, "heads"),
        ({"precision": "bf16"}, "precision: float32 against bf16"),
    ],
)
def test_another_store_is_not_taken_over(tmp_path, old, teacher, split, change, field) -> None:
    with pytest.raises(MismatchError, match=field) as caught:
        extended(old, split, teacher, tmp_path / "new", **change)
    assert "leave --from out" in caught.value.fix
    assert not (tmp_path / "new").exists()


def test_another_teacher_is_not_taken_over(tmp_path, old, split, model_of) -> None:
    save_file(dict(model_of(7, seed=5).state_dict()), tmp_path / "other.safetensors")
    other = load_teacher(f"kdcache:tiny@{tmp_path}/other.safetensors", split.classes)
    with pytest.raises(MismatchError, match=r"weights: .*probe: "):
        extended(old, split, other, tmp_path / "new")


def test_other_classes_are_not_taken_over(tmp_path, old, teacher, folder_data) -> None:
    names = (folder_data / "classes.txt").read_text().splitlines()
    (folder_data / "classes.txt").write_text("\n".join(names[::-1]))
    with pytest.raises(MismatchError, match="classes: sky"):
        extended(old, open_split(folder_data, "train"), teacher, tmp_path / "new")


def test_rounded_targets_are_not_passed_off_as_exact(tmp_path, teacher, split, options) -> None:
    build_cache(split, teacher, tmp_path / "old", options(codec="small"))
    with pytest.raises(MismatchError, match="codec: small rounded"):
        extended(open_cache(tmp_path / "old"), split, teacher, tmp_path / "new", codec="default")


@pytest.mark.parametrize(
    ("file", "taught_again"),
    [("targets/segmentation/values/c/1/0/0/0", 3), ("records/pixel_checksum/c/0", 3), ("records/flip/c/2", 1)],
)
def test_damaged_records_are_taught_again(tmp_path, old, teacher, folder_data, file, taught_again) -> None:
    """Those that cannot be read, and no others; the result is that of a whole store."""
    split = open_split(folder_data, "train")
    (old.path / file).write_bytes(b"")
    result = extended(open_cache(old.path), split, teacher, tmp_path / "new")
    assert (result.records, result.reused, result.damaged) == (taught_again, 7 - taught_again, taught_again)
    build_cache(split, teacher, tmp_path / "clean", like(old.manifest))
    assert content(tmp_path / "new") == content(tmp_path / "clean")


def test_one_damaged_record_is_taught_again(tmp_path, old, teacher, folder_data) -> None:
    file = old.path / "targets/segmentation/values/c/0/0/0/0"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    result = extended(open_cache(old.path), open_split(folder_data, "train"), teacher, tmp_path / "new")
    assert (result.records, result.reused, result.damaged) == (1, 6, 1)


def test_a_damaged_ledger_stops_it(tmp_path, old, teacher, folder_data) -> None:
    """Nothing can be told of any record: that the teacher says all of them again is not what was asked for."""
    (old.path / "ledger.jsonl").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"ledger\.jsonl"):
        extended(open_cache(old.path), open_split(folder_data, "train"), teacher, tmp_path / "new")
    assert not (tmp_path / "new").exists()
