"""What a plan says against what a build does."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdcache.data import open_split
from kdcache.errors import KDCacheError
from kdcache.models import EnsembleModel, Outputs, SegmentationModel
from kdcache.store import Cache, StoreWriter, open_cache, summarise
from kdcache.teacher import Teacher, TeacherProbe, build_cache
from kdcache.teacher.build import trial_store
from kdcache.teacher.build.cost_estimate import Cost, Estimate, Setting, estimate, student_seconds
from kdcache.teacher.build.trial_store import Seconds

MANY = "scenes:36x52,train=40,seed=5"
MOST_OFF = 0.15
SMALL = {"labels/segmentation"}  # of crops, whose records share chunks


@pytest.fixture(autouse=True)
def _in_memory(tmp_path, monkeypatch) -> None:
    """Small stores are synced, and a disk takes its time."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # else it makes a folder there


def built(split, teacher, options, out):
    """(bytes per array, bytes, files) of a real build."""
    build_cache(split, teacher, out, options)
    summary = summarise(open_cache(out))
    files = sum(len(names) for _, _, names in os.walk(out))
    return {array.path: array.bytes_on_disk for array in summary.arrays}, summary.bytes_on_disk, files


SETTINGS = {
    "small": {"codec": "small", "shard_records": 16},
    "none": {"codec": "none", "pixels": "source"},
    "features": {"features": ("head",), "codec": "small", "views": 2},
    "crops": {"views": 3, "crop": (16, 24), "view_scale": (0.7, 2.0)},
    "richer": {"raw_logits": True, "statistics": ("at:stage2", "at:head"), "teacher_size": (64, 96)},
}
QUICK = {"top-k, drawn views": {"top_k": 3, "views": 3, "shard_records": 32}}


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(c, id=name) for name, c in QUICK.items()),
        *(pytest.param(c, id=name, marks=pytest.mark.slow) for name, c in SETTINGS.items()),
    ],
)
def test_bytes_and_files_are_those_of_the_build(changes, teacher, options, tmp_path) -> None:
    """Within 15 %, also of every array that matters and is stored record by record; files to the last one."""
    chosen = options(**{"shard_records": 64, **changes})
    check_against_build(teacher, chosen, tmp_path)


@pytest.mark.parametrize(("folds", "views"), [(3, 1), (17, 2)])
def test_folds_are_those_of_all_samples(folds, views, model_of, options, tmp_path) -> None:
    """Also where they are more than the samples that are taught to find out."""
    split = open_split(MANY, "train")
    models = [model_of(len(split.classes), seed) for seed in range(folds)]
    teacher = Teacher(EnsembleModel(models).eval(), "one per fold", folds=folds)
    check_against_build(teacher, options(shard_records=64, views=views), tmp_path)


def check_against_build(teacher, chosen, tmp_path) -> None:
    split = open_split(MANY, "train")
    found = estimate(split, teacher, chosen, records=16).chosen
    arrays, total, files = built(split, teacher, chosen, tmp_path / "s.zarr")
    assert set(found.sizes) == set(arrays)
    assert found.bytes == pytest.approx(total, rel=MOST_OFF)
    for path, size in arrays.items():
        if size > 0.02 * total and not path.startswith("records/") and path not in SMALL:
            assert found.sizes[path] * found.records == pytest.approx(size, rel=MOST_OFF), path
    assert found.files == files
    assert found.records == 40 * chosen.views


class Priced:
    """In the place of a small store: an array of so many bytes, a record of three seconds."""

    taps, taught = ("stage1", "head"), 8

    def __init__(self, *_: object) -> None:
        pass

    def seconds(self, k: int, codec: str, dtype: str) -> Seconds:
        return Seconds(3.0, 0.5, 2.0, 0.4, 0.1)

    def sizes(self, k: int, codec: str, views: int, features: tuple[str, ...], dtype: str) -> dict[str, float]:
        target = 10 * k * {"default": 1, "small": 0.5, "none": 2}[codec] + views / 8
        fixed = {"targets/segmentation/values": target, "pixels/image": 100.0, "labels/segmentation": 7.0}
        return (
            fixed | {"records/sample": 8.0} | {f"features/{tap}": 50.0 if dtype == "fp16" else 26.0 for tap in features}
        )


def test_sums_of_what_is_chosen_and_of_its_neighbours(teacher, split, options, monkeypatch) -> None:
    """7 samples in 4 views are 28 records: 3 classes, pixels and labels, and a tap."""
    monkeypatch.setattr("kdcache.teacher.build.cost_estimate.Trial", Priced)
    found = estimate(split, teacher, options(top_k=3, views=4, features=("head",), shard_records=8))
    chosen, each = found.chosen, 30.5 + 100 + 7 + 8 + 50
    assert (chosen.records, chosen.seconds, chosen.bytes) == (28, 84.0, 28 * each)
    costs = {cost.setting.flags(chosen.setting): cost for cost in found.neighbours}
    bytes_of = {
        "--top-k 2": 28 * (each - 10),
        "--top-k 4": 28 * (each + 10),
        "--top-k 7": 28 * (each + 40),
        "--codec small": 28 * (each - 15),
        "--codec none": 28 * (each + 30),
        "--views 1": 7 * (each - 0.375),
        "--views 2": 14 * (each - 0.25),
        "--views 8": 56 * (each + 0.5),
        "--feature-dtype uint8": 28 * (each - 24),
        "--features ''": 28 * (each - 50),
        "--features head,stage1": 28 * (each + 50),
        "--pixels source": 28 * (each - 107),
    }
    assert {flags: cost.bytes for flags, cost in costs.items()} == {k: round(v) for k, v in bytes_of.items()}
    for flags, cost in costs.items():
        assert cost.seconds == 3 * cost.records, flags
        assert cost.records == 7 * cost.setting.views, flags
    # 4 shards of 5 arrays: each has its files, its metadata and, alone in them, its folders.
    more = {flags: cost.files - chosen.files for flags, cost in costs.items()}
    assert more["--pixels source"] == -(2 * 4 + 4)
    assert more["--features ''"] == -(4 + 2)
    assert more["--features head,stage1"] == 4 + 1
    assert more["--views 8"] == 3 * (5 + 1)
    assert more["--views 1"] == -3 * (5 + 1)
    assert more["--codec small"] == 0
    content = found.to_json()
    assert content["chosen"]["array_bytes_per_record"]["pixels/image"] == 100
    assert content["chosen"]["bytes"] == chosen.bytes
    assert len(content["neighbours"]) == len(costs)
    for views, others in ((1, {1, 4, 16}), (2, {1, 2, 4}), (3, {1, 2, 3, 6})):
        found = estimate(split, teacher, options(top_k=7, views=views))
        assert {cost.setting.views for cost in found.neighbours} == others


def quiet(*_: object) -> None:
    """Progress that nobody watches."""


def test_seconds_are_of_one_record(teacher, split, options, monkeypatch, tmp_path) -> None:
    """By a clock that each stage moves: 5 to build a record, 1 to render, 2 to teach, 3 to write, 4 to read it."""
    clock = [0.0]
    render, teach, build = (getattr(trial_store, name) for name in ("render_records", "teach", "build_cache"))
    write, read = StoreWriter.write_shard, Cache.read

    def ticking(function, seconds):
        def call(*arguments, **others):
            clock[0] += seconds(*arguments)
            return function(*arguments, **others)

        return call

    def built(part, *others, **more):
        return replace(build(part, *others, **more), seconds=5.0 * len(part))

    monkeypatch.setattr(trial_store, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(trial_store, "build_cache", built)
    monkeypatch.setattr(trial_store, "render_records", ticking(render, lambda *_: 1.0))
    monkeypatch.setattr(trial_store, "teach", ticking(teach, lambda _, pixels, *others: 2.0 * len(pixels)))
    counted = ticking(write, lambda writer, shard, _: 3.0 * writer.manifest.shard_records(shard))
    monkeypatch.setattr(StoreWriter, "write_shard", counted)
    monkeypatch.setattr(Cache, "read", ticking(read, lambda *_: 4.0))
    trial = trial_store.Trial(TeacherProbe(split, teacher, options(batch_size=3)), 5, tmp_path, quiet)
    assert trial.seconds(3, "small") == pytest.approx(Seconds(build=5, render=1, teach=2, write=3, read=4))


def test_drawn_views_count_as_often_as_there_are(teacher, split, options, monkeypatch, tmp_path) -> None:
    """A store of both kinds takes 150 bytes per record, and one of whole images 100: a drawn view takes 200."""
    path = "targets/segmentation/values"

    def rewritten(_, cache, *__):
        return {path: 150.0 if cache.manifest.view.views_per_sample == 2 else 100.0}, 0.0

    monkeypatch.setattr(trial_store.Trial, "rewrite", rewritten)
    trial = trial_store.Trial(TeacherProbe(split, teacher, options(views=4)), 4, tmp_path, quiet)
    assert {views: trial.sizes(7, "default", views, ())[path] for views in (1, 2, 4)} == {1: 100, 2: 150, 4: 175}


@pytest.mark.slow
def test_neighbours_are_what_they_would_be(teacher, options, tmp_path) -> None:
    """Every other setting that is told is built for real."""
    split = open_split(MANY, "train")
    chosen = options(shard_records=64)
    found = estimate(split, teacher, chosen, records=16)
    told = {cost.setting.flags(found.chosen.setting): cost for cost in found.neighbours}
    assert {"--top-k 4", "--codec small", "--codec none", "--views 4", "--pixels source"} <= set(told)
    changes = {
        "--top-k 4": {"top_k": 4},
        "--codec small": {"codec": "small"},
        "--features head": {"features": ("head",)},
        "--pixels source": {"pixels": "source"},
    }
    for flags, change in changes.items():
        _, total, files = built(split, teacher, replace(chosen, **change), tmp_path / flags.replace(" ", ""))
        assert told[flags].bytes == pytest.approx(total, rel=MOST_OFF), flags
        assert told[flags].files == files, flags
    assert told["--views 4"].seconds == pytest.approx(4 * found.chosen.seconds)
    assert told["--views 4"].records == 160


@pytest.mark.slow
def test_what_is_chosen_has_neighbours_too(teacher, options) -> None:
    chosen = options(top_k=3, views=4, features=("head",), pixels="source", codec="none")
    found = estimate(open_split(MANY, "train"), teacher, chosen, records=8)
    assert found.chosen.setting == Setting(3, "none", 4, ("head",), "source")
    flags = {cost.setting.flags(found.chosen.setting) for cost in found.neighbours}
    assert {"--top-k 2", "--top-k 4", "--top-k 7", "--codec default", "--views 1", "--views 2", "--views 8"} <= flags
    assert {"--features ''", "--pixels stored"} <= flags
    assert found.taught == 8


def test_the_error_of_the_bytes_is_of_images_that_were_not_measured(teacher, options, tmp_path) -> None:
    split, chosen = open_split(MANY, "train"), options(shard_records=1)
    found = estimate(split, teacher, chosen, records=8)
    build_cache(split, teacher, tmp_path / "all", chosen)
    ledger = open_cache(tmp_path / "all").ledger
    sizes = np.array([sum(file.bytes for file in ledger.record(shard).files.values()) for shard in range(40)])
    expected = sizes.std() / sizes.mean() * (0.8 / 8) ** 0.5
    assert found.error == pytest.approx(expected, rel=0.7)


@pytest.mark.slow
def test_few_images_are_all_taught(teacher, split, options) -> None:
    found = estimate(split, teacher, options(), records=32)
    assert (found.taught, found.samples, found.classes) == (7, 7, 7)
    assert found.error == 0


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, None])
def test_nothing_is_left_behind(teacher, split, options, tmp_path, end) -> None:
    told, seen = [], []

    def tell(*what):
        told.append(what)
        seen.extend(tmp_path.glob("tmp/*"))
        if end is not None:
            raise end

    with contextlib.nullcontext() if end is None else pytest.raises(end):
        assert estimate(split, teacher, options(views=2), progress=tell).taught == 6, "of three images, two views each"
    assert seen
    assert not list((tmp_path / "tmp").iterdir())
    if end is None:
        assert ("teaching a few images", 3, 3) in told
        assert any(what.startswith("and views") for what, _, _ in told)


@pytest.mark.parametrize(
    ("changes", "said"), [({"top_k": 99}, "99"), ({"features": ("foo",)}, "foo"), ({"views": 0}, "0 views")]
)
def test_what_cannot_be_built_cannot_be_planned(teacher, split, options, changes, said) -> None:
    with pytest.raises(KDCacheError, match=said):
        estimate(split, teacher, options(**changes))


def priced(build: float, teach: float, read: float, views: int = 1) -> Estimate:
    cost = Cost(Setting(7, "default", views, (), "stored"), {"a": 3.0}, 10 * views, 1, 10 * views * build)
    return Estimate(cost, (), Seconds(build, 0, teach, 0, read), 8, 10, 7)


def test_it_pays_when_the_teacher_is_dearer_than_the_read() -> None:
    """10 images, 4 views of 3 s each: 120 s, of which every epoch saves 10 x (2.5 - 0.5) s."""
    found = priced(build=3.0, teach=2.5, read=0.5, views=4)
    assert found.payback_epochs == pytest.approx(6)
    live, cached = found.training_seconds(6, student=1.0)
    assert (live, cached) == (pytest.approx(60 * 3.5), pytest.approx(120 + 60 * 1.5))
    assert live == pytest.approx(cached)
    assert found.to_json()["payback_epochs"] == pytest.approx(6)
    never = priced(build=3.0, teach=0.5, read=0.5)
    assert never.payback_epochs == float("inf")
    assert never.to_json()["payback_epochs"] is None


@pytest.mark.slow
def test_times_are_those_of_this_machine(teacher, options, monkeypatch) -> None:
    """A teacher that is slowed down by 50 ms an image is seen to be."""
    import time

    plain = teacher.model.forward

    def slow(x, taps=()):
        time.sleep(0.05 * len(x))
        return plain(x, taps)

    monkeypatch.setattr(teacher.model, "forward", slow)
    found = estimate(open_split(MANY, "train"), teacher, options(), records=8)
    assert 0.05 < found.seconds.teach < 0.2
    assert found.seconds.build > 0.05
    assert found.chosen.seconds == pytest.approx(40 * found.seconds.build)
    assert 0 < found.seconds.read < 0.05
    assert found.payback_epochs >= 0.5


def test_a_student_is_timed(options) -> None:
    assert 0 < student_seconds("kdcache:tiny", 7, options(crop=(16, 24))) < 1
    with pytest.raises(KDCacheError):
        student_seconds("kdcache:none", 7, options())


@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize("crop", [None, (16, 24)])
def test_a_students_seconds_are_of_one_image(options, monkeypatch, batch_size, crop) -> None:
    """However many go through it at once; of the size that it will see, forward and backward, warm."""
    clock, seen = [0.0], []

    class Ticking(SegmentationModel):
        def __init__(self) -> None:
            super().__init__(spec="own:ticking", num_classes=7, stride=1, taps=())
            self.body = torch.nn.Conv2d(3, 7, 1)

        def forward(self, x, taps=()):
            seen.append((tuple(x.shape), self.training))
            clock[0] += (100 if len(seen) == 1 else 3) * len(x)  # the first pass compiles
            logits = self.body(x)
            logits.register_hook(lambda gradient: clock.__setitem__(0, clock[0] + 2 * len(gradient)))
            return Outputs({"segmentation": logits}, {})

    monkeypatch.setattr("kdcache.teacher.build.cost_estimate.build_model", lambda spec, classes: Ticking())
    monkeypatch.setattr("kdcache.teacher.build.cost_estimate.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = student_seconds("own:ticking", 7, options(batch_size=batch_size, crop=crop))
    assert found == pytest.approx(5.0)
    assert seen[-1] == ((batch_size, 3, *(crop or (32, 48))), True)
