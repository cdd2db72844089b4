"""The teacher's pass: what it stores, and what is left when it is stopped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.data import Split, Window, open_split, pixel_checksum, render, short_digests
from kdcache.errors import DataError, KDCacheError, MismatchError, ModelError, RecipeError
from kdcache.models import Outputs
from kdcache.store import inspect_store, open_cache, verify_files
from kdcache.teacher import TeacherProbe, build_cache, load_teacher, plan_manifest
from kdcache.teacher.build import manifest, ray_engine
from kdcache_kernels import choose_k, pack

TAPS = ("stage2", "head")


def answers(teacher, split: Split, records: range, taps=()) -> Outputs:
    """The teacher on rendered records, by nothing but the model's own interface."""
    pixels = [
        render(split.image(r), None, Window.full(*split.image(r).shape[:2]), flip=False, size=(32, 48))[0]
        for r in records
    ]
    with torch.inference_mode():
        return teacher.model(teacher.model.normalise(torch.from_numpy(np.stack(pixels))), taps)


def same_but_created(a: dict[str, bytes], b: dict[str, bytes]) -> bool:
    """Stores are equal in every file; only the root's time stamp, and so digests of it and its spare, may differ."""
    stamp = re.compile(rb'"created": "[^"]*"')
    seal = re.compile(rb'(?<=\n  "zarr.json": ")[0-9a-f]{64}|(?<=\n  "manifest.json": ")[0-9a-f]{64}')
    assert stamp.search(a["zarr.json"])
    assert len(seal.findall(a["complete.json"])) == 2
    assert all(json.loads(x["manifest.json"])["zarr.json"].encode() == x["zarr.json"] for x in (a, b))
    a, b = (
        {**x, "zarr.json": stamp.sub(b"", x["zarr.json"]), "complete.json": seal.sub(b"", x["complete.json"])}
        for x in (a, b)
    )
    return {**a, "manifest.json": b""} == {**b, "manifest.json": b""}


@pytest.fixture
def calls(teacher, monkeypatch):
    """Batch sizes of every forward pass of `teacher`."""
    sizes: list[int] = []
    handle = teacher.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    yield sizes
    handle.remove()


class Broken:
    """A split whose `image` fails at one record, as long as it is broken."""

    def __init__(self, split: Split, record: int, error: BaseException) -> None:
        self.inner, self.record, self.error = split, record, error

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def image(self, index: int):
        if index == self.record:
            raise self.error
        return self.inner.image(index)


@pytest.mark.parametrize("k", [7, 4])
@pytest.mark.parametrize("pixels", ["stored", "source"])
@pytest.mark.parametrize("data", ["scenes", "folder"])
def test_the_store_holds_what_the_teacher_says(tmp_path, teacher, split, folder_data, options, k, pixels, data) -> None:
    source = split if data == "scenes" else open_split(folder_data, "train")
    seen = []
    result = build_cache(
        source,
        teacher,
        tmp_path / "s.zarr",
        options(top_k=k, features=TAPS, pixels=pixels),
        lambda done, total: seen.append((done, total)),
    )
    assert (result.records, result.kept) == (7, 0)
    assert seen == [(done, 7) for done in (0, 2, 3, 5, 6, 7)]
    cache = open_cache(tmp_path / "s.zarr")
    assert cache.ids == source.ids
    assert cache.manifest.dataset.labelled == 7
    assert cache.manifest.dataset.class_names == source.classes.names
    shards = [range(0, 2), range(2, 3), range(3, 5), range(5, 6), range(6, 7)]  # batches, cut at shards of 3
    for batch in shards:
        heads, features = answers(teacher, source, batch, TAPS)
        logits = heads["segmentation"]
        values, indices, tail = pack(logits, k)
        for row, record in enumerate(batch):
            wanted = {"targets/segmentation/values": values[row].numpy()}
            if k < 7:
                wanted["targets/segmentation/indices"] = indices[row].numpy()
                wanted["targets/segmentation/tail"] = tail[row].numpy()
            wanted |= {f"features/{tap}": features[tap][row].half().numpy() for tap in TAPS}
            image, label = source.image(record), source.label(record)
            window = Window.full(*image.shape[:2])
            view, small = render(image, label, window, flip=False, size=(32, 48))
            if pixels == "stored":
                wanted |= {"pixels/image": view, "labels/segmentation": small}
            wanted |= {
                "records/sample": np.int64(record),
                "records/view": np.int32(0),
                "records/window": np.array(window.as_tuple()),
                "records/flip": np.uint8(0),
                "records/pixel_checksum": np.uint64(pixel_checksum(view)),
                "records/labelled": np.uint8(1),
                "records/image_digest": short_digests(source, record)[0],
                "records/label_digest": short_digests(source, record)[1],
                "records/label_checksum": np.uint64(pixel_checksum(small)),
            }
            stored = cache.read(record, list(cache.specs))
            assert set(stored) == set(wanted)
            for path, array in wanted.items():
                assert stored[path].dtype == array.dtype, path
                assert np.array_equal(stored[path], array), (path, record)
    assert verify_files(tmp_path / "s.zarr").damaged == []


def test_large_features_saturate(tmp_path, teacher, split, options) -> None:
    with torch.no_grad():
        for name, parameter in teacher.model.named_parameters():
            if name.startswith("smooth"):
                parameter.mul_(1e5)
        for parameter in teacher.model.get_submodule("classifier").parameters():
            parameter.mul_(1e-8)
    build_cache(split, teacher, tmp_path / "s.zarr", options(features=("head",)))
    found = open_cache(tmp_path / "s.zarr").read(0, ["features/head"])["features/head"]
    assert np.isfinite(found).all()
    assert found.max() == 65504


def test_a_split_without_labels(tmp_path, teacher, options) -> None:
    source = open_split("scenes:36x52,unlabelled=3", "unlabelled")
    build_cache(source, teacher, tmp_path / "s.zarr", options())
    cache = open_cache(tmp_path / "s.zarr")
    assert cache.manifest.dataset.labelled == 0
    assert not cache.column("labelled").any()
    assert (cache.read(1, ["labels/segmentation"])["labels/segmentation"] == 255).all()


def test_a_partly_labelled_split(tmp_path, teacher, folder_data, options) -> None:
    for name in ("train-000001.png", "train-000004.png"):
        (folder_data / "labels" / "train" / name).unlink()
    source = open_split(folder_data, "train")
    build_cache(source, teacher, tmp_path / "s.zarr", options())
    cache = open_cache(tmp_path / "s.zarr")
    assert cache.column("labelled").tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert cache.manifest.dataset.labelled == 5
    assert (cache.read(4, ["labels/segmentation"])["labels/segmentation"] == 255).all()


def test_a_batch_never_crosses_a_shard(tmp_path, teacher, split, options, calls) -> None:
    build_cache(split, teacher, tmp_path / "s.zarr", options(batch_size=2, shard_records=3))
    assert calls[-5:] == [2, 1, 2, 1, 1]
    assert len(calls) == 5 + 2  # shapes of the first record; the fingerprint
    calls.clear()
    build_cache(split, teacher, tmp_path / "t.zarr", options(batch_size=8, shard_records=3))
    assert calls[-3:] == [3, 3, 1]


def test_equal_builds_are_equal_in_every_byte(tmp_path, teacher, split, options, tree) -> None:
    for name, threads in (("a", 1), ("b", 0), ("c", 3)):
        build_cache(split, teacher, tmp_path / name, options(features=TAPS, top_k=4, render_threads=threads))
    assert same_but_created(tree(tmp_path / "a"), tree(tmp_path / "b"))
    assert same_but_created(tree(tmp_path / "a"), tree(tmp_path / "c"))


@pytest.mark.parametrize("before", [(False, True), (True, False), (False, False)])
def test_what_a_build_sets_of_cudnn_is_put_back(tmp_path, teacher, split, options, monkeypatch, before) -> None:
    """Whether it ends well or not; while it runs, its answers are the same every time."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", before[0])
    monkeypatch.setattr(cudnn, "benchmark", before[1])
    seen = set()
    build_cache(split, teacher, tmp_path / "a", options(), lambda *_: seen.add((cudnn.deterministic, cudnn.benchmark)))
    assert seen == {(True, False)}
    assert (cudnn.deterministic, cudnn.benchmark) == before
    with pytest.raises(KeyboardInterrupt):
        build_cache(Broken(split, 1, KeyboardInterrupt()), teacher, tmp_path / "b", options())
    assert (cudnn.deterministic, cudnn.benchmark) == before


def test_a_finished_store_is_kept(tmp_path, teacher, split, options, tree, calls) -> None:
    build_cache(split, teacher, tmp_path / "s.zarr", options())
    before = tree(tmp_path / "s.zarr")
    calls.clear()
    result = build_cache(split, teacher, tmp_path / "s.zarr", options())
    assert (result.records, result.kept) == (0, 7)
    assert len(calls) == 2  # to know that it is the same teacher
    assert tree(tmp_path / "s.zarr") == before


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("record", [0, 2, 4, 6])
def test_interrupted_it_goes_on(tmp_path, teacher, split, options, tree, calls, record, threads) -> None:
    """Ctrl-C while record n is rendered."""
    chosen = options(render_threads=threads)
    broken = Broken(split, record, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build_cache(broken, teacher, tmp_path / "s.zarr", chosen)
    if record == 0:
        assert not (tmp_path / "s.zarr").exists()  # the plan already needs it
    else:
        finished = inspect_store(tmp_path / "s.zarr").shards_written
        assert finished <= record // 3
        calls.clear()
        seen = []
        result = build_cache(split, teacher, tmp_path / "s.zarr", chosen, lambda *at: seen.append(at))
        assert result.kept == 3 * finished
        assert sum(calls[2:]) == result.records == 7 - 3 * finished
        assert seen[0] == (result.kept, 7)  # before the first image
        assert seen[-1] == (7, 7)
        build_cache(split, teacher, tmp_path / "clean", chosen)
        assert same_but_created(tree(tmp_path / "s.zarr"), tree(tmp_path / "clean"))


def test_finished_shards_survive_a_later_failure(tmp_path, teacher, split, options) -> None:
    """With nothing rendered ahead, all shards before the failing one are on disk."""
    broken = Broken(split, 6, RuntimeError("power"))
    with pytest.raises(RuntimeError, match="power"):
        build_cache(broken, teacher, tmp_path / "s.zarr", options(render_threads=0))
    assert inspect_store(tmp_path / "s.zarr").shards_written >= 1


def test_a_truncated_image_is_named_and_once_repaired_the_build_goes_on(
    tmp_path, teacher, folder_data, options, tree
) -> None:
    path = folder_data / "images" / "train" / "train-000005.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        build_cache(open_split(folder_data, "train"), teacher, tmp_path / "s.zarr", options())
    assert str(path) in caught.value.problem
    assert not inspect_store(tmp_path / "s.zarr").complete
    path.write_bytes(whole)
    build_cache(open_split(folder_data, "train"), teacher, tmp_path / "s.zarr", options())
    build_cache(open_split(folder_data, "train"), teacher, tmp_path / "clean", options())
    assert same_but_created(tree(tmp_path / "s.zarr"), tree(tmp_path / "clean"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["logits", "features"])
def test_an_answer_that_is_no_number(tmp_path, teacher, split, options, monkeypatch, value, where) -> None:
    """The record is named, and its shard does not count."""
    forward = type(teacher.model).forward
    marked = answers_input(teacher, split, 4)

    def poisoned(self, x, taps=()):
        heads, features = forward(self, x, taps)
        logits = heads["segmentation"]
        for row in range(len(x)):
            if x.shape[-2:] == marked.shape[-2:] and torch.equal(x[row], marked):
                (logits if where == "logits" else features["head"])[row, 0, 2, 3] = value
        return Outputs({"segmentation": logits}, features)

    with monkeypatch.context() as patch:
        patch.setattr(type(teacher.model), "forward", poisoned)
        with pytest.raises(ModelError) as caught:
            build_cache(split, teacher, tmp_path / "s.zarr", options(features=("head",)))
    assert re.search(r"\brecord 4\b", caught.value.problem)
    assert split.ids[4] in caught.value.problem
    assert [p.name for p in (tmp_path / "s.zarr" / "ledger").iterdir()] in ([], ["00000000.json"])
    build_cache(split, teacher, tmp_path / "s.zarr", options(features=("head",)))
    assert len(open_cache(tmp_path / "s.zarr")) == 7


def answers_input(teacher, split: Split, record: int) -> torch.Tensor:
    image = split.image(record)
    view, _ = render(image, None, Window.full(*image.shape[:2]), flip=False, size=(32, 48))
    return teacher.model.normalise(torch.from_numpy(view)[None])[0]


def test_top_k_auto_keeps_all_up_to_32_and_else_measures(tmp_path, folder_data, model_of, options) -> None:
    from safetensors.torch import save_file

    source = open_split(folder_data, "train")
    save_file(dict(model_of(7).state_dict()), tmp_path / "w7.safetensors")
    few = load_teacher(f"kdcache:tiny@{tmp_path}/w7.safetensors", source.classes)
    assert plan_manifest(TeacherProbe(source, few, options())).heads["segmentation"].dense
    (folder_data / "classes.txt").write_text("".join(f"class {i}\n" for i in range(40)))
    source = open_split(folder_data, "train")
    model = model_of(40)
    with torch.no_grad():  # a teacher that is sure of itself: a few classes carry the mass
        model.get_submodule("classifier").weight.mul_(5)
    save_file(dict(model.state_dict()), tmp_path / "w40.safetensors")
    many = load_teacher(f"kdcache:tiny@{tmp_path}/w40.safetensors", source.classes)
    logits = torch.cat([answers(many, source, range(r, r + 1)).logits for r in range(7)])
    wanted = choose_k(logits, (32, 48), 40)[0]
    assert 8 <= wanted < 40, "the case must tell something"
    assert plan_manifest(TeacherProbe(source, many, options())).heads["segmentation"].k == wanted


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"batch_size": 3}, "build.batch_size: 2 against 3"),
        ({"shard_records": 4}, "build.shard_records"),
        ({"size": (32, 52)}, "view.size"),
        ({"top_k": 3}, "heads"),
        ({"features": ("head",)}, "features"),
        ({"pixels": "source"}, "view.pixels"),
        ({"precision": "bf16"}, "precision"),
    ],
)
def test_a_build_is_resumed_as_it_was_begun(tmp_path, teacher, split, options, tree, change, field) -> None:
    with pytest.raises(RuntimeError):
        build_cache(Broken(split, 6, RuntimeError()), teacher, tmp_path / "s.zarr", options())
    before = tree(tmp_path / "s.zarr")
    with pytest.raises(MismatchError) as caught:
        build_cache(split, teacher, tmp_path / "s.zarr", options(**change))
    assert field in caught.value.problem
    assert tree(tmp_path / "s.zarr") == before


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"top_k": 0}, RecipeError, "--top-k: 0"),
        ({"top_k": 8}, RecipeError, "--top-k: 8"),
        ({"features": ("haed",)}, ModelError, "haed"),
    ],
)
def test_impossible_options_write_nothing(tmp_path, teacher, split, options, change, kind, named) -> None:
    with pytest.raises(KDCacheError) as caught:
        build_cache(split, teacher, tmp_path / "s.zarr", options(**change))
    assert type(caught.value) is kind
    assert named in str(caught.value)
    assert list(tmp_path.glob("*.zarr")) == []


def test_a_small_disk(teacher, split, options, small_disk, tree, tmp_path) -> None:
    build_cache(split, teacher, tmp_path / "clean", options())
    needed = sum(-(-len(content) // 4096) * 4 for content in tree(tmp_path / "clean").values())
    disk = small_disk(needed - 24)
    with pytest.raises(KDCacheError, match="No space left") as caught:
        build_cache(split, teacher, disk.path / "s.zarr", options())
    assert "space" in caught.value.fix
    disk.grow(needed * 10)
    assert build_cache(split, teacher, disk.path / "s.zarr", options()).kept > 0
    assert same_but_created(tree(disk.path / "s.zarr"), tree(tmp_path / "clean"))


MEMORY = """
import resource, sys, torch
from kdcache.data import open_split
from kdcache.data.scenes import generate as scenes
from kdcache.models import build_model
from kdcache.teacher import BuildOptions, Teacher, build_cache
torch.set_num_threads(1)
scenes.SCENES.limit_bytes = 0  # the data set's own cache is not the build's memory
torch.manual_seed(0)
teacher = Teacher(build_model("kdcache:tiny", 7).eval(), "tiny")
split = open_split(f"scenes:64x96,train={sys.argv[1]}", "train")
options = BuildOptions(size=(64, 96), views=1, batch_size=4, shard_records=8, features=("stage1", "head"))
build_cache(split, teacher, sys.argv[2], options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kib(records: int, out: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(records), str(out)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_records(tmp_path) -> None:
    """A record is 0.2 MiB here: 96 more of them, held, would be 20 MiB and more."""
    few = min(peak_kib(32, tmp_path / f"few{i}") for i in range(2))
    many = min(peak_kib(128, tmp_path / f"many{i}") for i in range(2))
    held = 96 * (64 * 96 * 4 + 16 * 24 * 2 * (7 + 16 + 32)) / 1024
    assert many - few < held / 2, (few, many, held)


@pytest.fixture
def clean(tmp_path, teacher, folder_data, options, tree):
    """A finished store of its own, and its files."""
    build_cache(open_split(folder_data, "train"), teacher, tmp_path / "s.zarr", options(fidelity=True))
    return tmp_path / "s.zarr", tree(tmp_path / "s.zarr")


VALUES = "targets/segmentation/values/c/1/0/0/0"


def test_any_damaged_file_is_what_it_was_after_one_more_build(clean, teacher, folder_data, options, tree) -> None:
    """Of each kind one file; the second build begins at another time."""
    store, before = clean
    split = open_split(folder_data, "train")
    names = ["zarr.json", "manifest.json", "complete.json", "ledger.jsonl", "ledger/00000001.json", VALUES]
    for name in [*names, "records/view/c/0", "samples/id_ends/c/0", "pixels/image/zarr.json", "targets/zarr.json"]:
        content = before[name]
        (store / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        build_cache(split, teacher, store, options(fidelity=True))
        assert tree(store) == before, name


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_damaged_records_are_not_taught_on_other_pixels(clean, teacher, folder_data, options, tree, how) -> None:
    """Refused before anything is given up: the rest of the store is read as before."""
    store, _ = clean
    (store / VALUES).write_bytes(b"")
    before = tree(store)
    images = sorted((folder_data / "images/train").iterdir())
    images[4].write_bytes(images[0].read_bytes() if how == "changed" else b"")
    with pytest.raises(MismatchError if how == "changed" else DataError):
        build_cache(open_split(folder_data, "train"), teacher, store, options())
    assert tree(store) == before


class TestAfterAnUpgrade:
    @pytest.fixture
    def upgraded(self, monkeypatch):
        """Pillow is another from here on."""
        version = manifest.version_of
        monkeypatch.setattr(
            manifest, "version_of", lambda name: f"99.{'0' * 60}" if name == "pillow" else version(name)
        )

    def test_a_node_of_a_cluster_needs_the_same_libraries(self, clean, request) -> None:
        manifest = open_cache(clean[0]).manifest
        ray_engine.check_libraries(manifest, "here")
        request.getfixturevalue("upgraded")
        with pytest.raises(MismatchError, match=r"Node here has pillow 99\."):
            ray_engine.check_libraries(manifest, "here")

    def test_damaged_records_are_taught_again(self, clean, teacher, folder_data, options, tree, request) -> None:
        store, before = clean
        (store / VALUES).write_bytes(b"")
        request.getfixturevalue("upgraded")
        split = open_split(folder_data, "train")
        result = build_cache(split, teacher, store, options())
        assert (result.records, result.kept) == (3, 4)
        assert result.repair is not None
        assert (result.repair.shards, result.repair.libraries["pillow"][:3]) == ((1,), "99.")
        assert verify_files(store).damaged == []
        assert open_cache(store).manifest.repairs == (result.repair,)
        changed = {name for name, content in tree(store).items() if before.get(name) != content}
        assert changed == {"zarr.json", "manifest.json", "complete.json"}
        assert build_cache(split, teacher, store, options()).repair is None

    def test_a_finished_store_is_left(self, clean, teacher, folder_data, options, tree, upgraded) -> None:
        store, before = clean
        assert build_cache(open_split(folder_data, "train"), teacher, store, options()).kept == 7
        assert tree(store) == before

    def test_other_pixels_are_refused(self, clean, teacher, folder_data, options, tree, upgraded, monkeypatch) -> None:
        """As when the new library resizes otherwise."""
        store, _ = clean
        (store / VALUES).write_bytes(b"")
        before = tree(store)
        monkeypatch.setattr("kdcache.teacher.build.render.pixel_checksum", lambda pixels: pixel_checksum(pixels) ^ 1)
        with pytest.raises(MismatchError, match="its images do not render as"):
            build_cache(open_split(folder_data, "train"), teacher, store, options())
        assert tree(store) == before

    def test_a_half_built_store_is_refused_with_the_whole_difference(
        self, tmp_path, teacher, split, options, tree, request
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            build_cache(Broken(split, 5, KeyboardInterrupt()), teacher, tmp_path / "s.zarr", options())
        before = tree(tmp_path / "s.zarr")
        request.getfixturevalue("upgraded")
        with pytest.raises(MismatchError) as caught:
            build_cache(split, teacher, tmp_path / "s.zarr", options())
        assert re.search(rf"build\.libraries: pillow \S+ against 99\.{'0' * 60}$", caught.value.problem)
        assert tree(tmp_path / "s.zarr") == before
