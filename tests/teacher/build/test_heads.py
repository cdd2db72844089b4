"""Builds of several heads and of none."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from safetensors.torch import save_file

import kdcache
from kdcache.data import ClassList, Window, open_split, render
from kdcache.errors import MismatchError, ModelError, RecipeError, StoreError
from kdcache.heads import RegressionHead
from kdcache.models import Tta, build_model
from kdcache.models.run import write_run_model, write_weights
from kdcache.run_folder import RunModel
from kdcache.sharing import build_command
from kdcache.store import CopyChanges, Records, copy_store, open_cache, summarise, verify_files
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache.teacher import (
    TeacherProbe,
    build_cache,
    compare_teacher,
    load_like,
    load_teachers,
    options_of,
    plan_manifest,
    score_cache,
)
from kdcache.teacher.build.cost_estimate import estimate
from kdcache.teacher.load.fingerprint import fingerprint

SIZE = (32, 48)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def origins(tmp_path_factory, split, model_of) -> dict[str, str]:
    """Weights of a model of classes, and of one of both tasks whose depth differs from cell to cell."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    both = build_model("kdcache:hydra,as=exp,max=20", len(split.classes))
    with torch.no_grad():
        both.depth_output.weight.normal_(std=0.3)
    models = {"classes": ("kdcache:tiny", model_of(len(split.classes))), "both": ("kdcache:hydra,as=exp,max=20", both)}
    found = {}
    for name, (spec, model) in models.items():
        save_file(dict(model.state_dict()), folder / f"{name}.safetensors")
        found[name] = f"{spec}@{folder / f'{name}.safetensors'}"
    return found


@pytest.fixture(scope="module")
def both_run(origins, split):
    """both_run(folder, head): the run of the model of both tasks that learnt nothing of a head."""

    def write(folder: Path, head: str) -> Path:
        spec, _, weights = origins["both"].partition("@")
        model = build_model(spec, len(split.classes), weights=weights)
        names, colours = split.classes.names, split.classes.colours
        model_json = RunModel(
            spec=spec, class_names=names, class_colours=colours, size=SIZE, mean=model.mean, std=model.std,
            heads=model.regressions, untrained=(head,),
        )  # fmt: skip
        folder.mkdir()
        write_run_model(folder, model_json)
        write_weights(folder, "best", model)
        return folder

    return write


def answers(teacher, split):
    """The teacher's depth on whole images, by nothing but the model's own interface."""
    pixels = [
        render(split.image(n), None, Window.full(*split.image(n).shape[:2]), flip=False, size=SIZE)[0]
        for n in range(len(split))
    ]
    with torch.inference_mode():
        return teacher.model(teacher.model.normalise(torch.from_numpy(np.stack(pixels))))


def shards(store: Path, folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in (store / folder).rglob("*") if p.is_file()}


def test_one_pass_stores_every_head(tmp_path, split, options, origins) -> None:
    teacher = load_teachers([origins["both"]], split.classes)
    result = build_cache(split, teacher, tmp_path / "both", options())
    cache = open_cache(tmp_path / "both")
    depth = cache.manifest.regressions["depth"]
    assert (list(result.manifest.heads), result.manifest.version) == (["segmentation", "depth"], 3)
    assert (depth.range, depth.parameterisation, depth.unit, depth.dtype) == ((0.0, 20.0), "exp", "m", "float16")
    outputs = answers(teacher, split)
    wanted = outputs.heads["depth"].double().exp().clamp(max=20)
    assert wanted.std() > 0.1
    for record in range(len(cache)):
        stored = Records(cache).target(record, "depth")["values"]
        np.testing.assert_allclose(stored.astype(np.float64), wanted[record].numpy(), rtol=2e-3)
    build_cache(split, teacher, tmp_path / "one", options(heads=("segmentation",)))
    alone = open_cache(tmp_path / "one").manifest
    assert (list(alone.heads), alone.version) == (["segmentation"], 3)
    assert shards(tmp_path / "one", "targets/segmentation") == shards(tmp_path / "both", "targets/segmentation")
    assert score_cache(Records(cache, split)) is not None


def test_a_teacher_of_one_head_is_a_removed_form(split, origins) -> None:
    with pytest.raises(RecipeError, match="--teacher HEAD=TEACHER was removed") as caught:
        load_teachers([origins["classes"], f"depth={origins['both']}"], split.classes)
    assert f"--teacher depth={origins['both']}" in str(caught.value)
    assert "--like a.zarr" in caught.value.fix
    assert "--cache a.zarr --cache NAME=b.zarr" in caught.value.fix


def test_caches_of_one_teacher_per_head_are_read_and_not_computed(
    tmp_path, split, options, origins, monkeypatch
) -> None:
    """The spec of their teacher, as earlier versions wrote it, is all that tells them apart."""
    from kdcache.training import TrainConfig, train

    teacher = load_teachers([origins["both"]], split.classes)
    spec = "kdcache:tiny, depth=kdcache:hydra,as=exp,max=20"
    with monkeypatch.context() as patched:
        earlier = lambda *about: fingerprint(*about).model_copy(update={"spec": spec})  # noqa: E731
        patched.setattr("kdcache.teacher.build.manifest.fingerprint", earlier)
        build_cache(split, teacher, tmp_path / "old", options())
    cache = open_cache(tmp_path / "old")
    assert cache.manifest.teacher.per_head == ("depth",)
    assert verify_files(tmp_path / "old").damaged == []
    settings = {"verb": "train-student", "cache": str(tmp_path / "old"), "model": "kdcache:hydra", "iterations": 2}
    settings |= {"batch_size": 2, "threads": 1, "method": "kl", "term": ["depth-silog,reference=teacher"]}
    assert train(TrainConfig.of(settings), tmp_path / "run")["iterations"] == 2
    with pytest.raises(MismatchError, match="cannot compute a cache of one teacher per head") as caught:
        load_like(cache.manifest.teacher, [origins["both"]], split.classes)
    assert "--like" in caught.value.fix
    with pytest.raises(MismatchError, match="cannot compute a cache of one teacher per head"):
        kdcache.build_cache(split, origins["both"], tmp_path / "old", size=SIZE, views=1, progress=False)
    with pytest.raises(MismatchError, match="cannot compute a cache of one teacher per head"):
        kdcache.build_cache(split, origins["both"], tmp_path / "new", reuse=tmp_path / "old", progress=False)
    assert build_command(cache.manifest).startswith("# This version of kdcache does not compute")
    assert not open_cache(tmp_path / "old").manifest.repairs
    plain = load_teachers([origins["both"], origins["both"]], split.classes)
    build_cache(split, plain, tmp_path / "ensemble", options())
    assert open_cache(tmp_path / "ensemble").manifest.teacher.per_head == ()


def test_a_teacher_of_another_depth_is_found(tmp_path, split, options, origins) -> None:
    teacher = load_teachers([origins["both"]], split.classes)
    build_cache(split, teacher, tmp_path / "store", options())
    records = Records.open(tmp_path / "store")
    assert compare_teacher(records, teacher, CPU, 2).ok
    with torch.no_grad():
        teacher.model.depth_output.bias += 0.2
    agreement = compare_teacher(records, teacher, CPU, 2)
    assert not agreement.ok
    assert agreement.values["targets/depth/values"] > 0.05
    assert agreement.argmax > 0.999
    assert any("probe" in line for line in agreement.fingerprint)


def test_features_alone(tmp_path, split, options, teacher) -> None:
    build_cache(split, teacher, tmp_path / "store", options(features=("stage2", "head"), features_only=True))
    cache = open_cache(tmp_path / "store")
    assert (cache.manifest.heads, list(cache.manifest.features)) == ({}, ["stage2", "head"])
    assert not (tmp_path / "store" / "targets").exists()
    assert verify_files(tmp_path / "store").damaged == []
    agreement = compare_teacher(Records(cache), teacher, CPU, 2)
    assert agreement.ok
    assert set(agreement.values) == {"features/stage2", "features/head"}
    assert score_cache(Records(cache)) is None


def test_an_extended_store_takes_over_every_head(tmp_path, split, options, origins) -> None:
    teacher = load_teachers([origins["both"]], split.classes)
    build_cache(split, teacher, tmp_path / "old", options())
    old = open_cache(tmp_path / "old")
    result = build_cache(split, teacher, tmp_path / "new", options_of(old.manifest, views=2, fidelity=False), reuse=old)
    new = open_cache(tmp_path / "new")
    assert result.reused == len(old)
    for sample in range(len(split)):
        path = "targets/depth/values"
        assert np.array_equal(new.read(2 * sample, [path])[path], old.read(sample, [path])[path])


def test_a_build_of_two_heads_goes_on(tmp_path, split, options, origins) -> None:
    teacher = load_teachers([origins["both"]], split.classes)
    build_cache(split, teacher, tmp_path / "whole", options())
    build_cache(split, teacher, tmp_path / "torn", options())
    victim = min(path for path in (tmp_path / "torn" / "targets" / "depth").rglob("0") if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-3])
    result = build_cache(split, teacher, tmp_path / "torn", options())
    assert 0 < result.records < len(split)
    assert shards(tmp_path / "whole", "targets") == shards(tmp_path / "torn", "targets")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ("depht",)}, r"--heads depht: [\s\S]*Did you mean depth"),
        ({"heads": ("depth",), "features_only": True, "features": ("head",)}, "either --heads or --features-only"),
        ({"features_only": True}, "--features-only needs --features"),
        ({"heads": ("depth",), "top_k": 3}, "--top-k needs a segmentation head"),
        ({"heads": ("depth",), "raw_logits": True}, "--raw-logits needs a segmentation head"),
        ({"teacher_grid": "view", "teacher_size": (64, 96)}, "--teacher-grid view needs a segmentation head"),
    ],
)
def test_heads_that_cannot_be_stored_are_refused(tmp_path, split, options, origins, changes, message) -> None:
    teacher = load_teachers([origins["both"]], split.classes)
    with pytest.raises(RecipeError, match=message):
        build_cache(split, teacher, tmp_path / "store", options(**changes))
    assert not (tmp_path / "store").exists()


def test_heads_of_which_a_run_learnt_nothing_are_not_stored(tmp_path, split, options, origins, both_run) -> None:
    """Neither of the run alone, nor beside other teachers; and they are refused where they are named."""
    runs = {name: both_run(tmp_path / name, name) for name in ("segmentation", "depth")}
    for lacking, left in (("segmentation", "depth"), ("depth", "segmentation")):
        teacher = load_teachers([str(runs[lacking])], split.classes)
        assert teacher.notes == (f"{runs[lacking]} learnt nothing of {lacking}: left out",)
        assert TeacherProbe(split, teacher, options()).heads == (left,)
        with pytest.raises(RecipeError, match=f"has {left}, and learnt nothing of {lacking}"):
            TeacherProbe(split, teacher, options(heads=(lacking,)))
        mirrored = load_teachers([str(runs[lacking])], split.classes, tta=Tta(flip=True))
        assert TeacherProbe(split, mirrored, options()).heads == (left,)
    build_cache(split, load_teachers([str(runs["depth"])], split.classes), tmp_path / "store", options())
    manifest = open_cache(tmp_path / "store").manifest
    assert (list(manifest.heads), manifest.version) == (["segmentation"], 3)
    # The mean of an ensemble is one of those that have learnt the head.
    whole = load_teachers([origins["both"]], split.classes)
    mean = load_teachers([str(runs["depth"]), origins["both"]], split.classes)
    x = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        raws = whole.model(whole.model.standardise(x)).heads["depth"], mean.model(x).heads["depth"]
    torch.testing.assert_close(*map(whole.model.regressions["depth"].values, raws))
    # Classes that are not learnt need not be the data's.
    others = ClassList(tuple(f"other {n}" for n in range(4)))
    assert load_teachers([str(runs["segmentation"])], others).model.learnt_heads == ("depth",)


def test_depth_that_is_no_number_or_outside_its_range_is_refused(tmp_path, split, options, origins) -> None:
    teacher = load_teachers([origins["both"]], split.classes)
    with torch.no_grad():
        teacher.model.depth_output.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"NaN or infinity in targets/depth/values of record 0"):
        build_cache(split, teacher, tmp_path / "nan", options())

    class Unbounded(RegressionHead):
        def values(self, raw):
            return torch.full_like(raw, 21.0)

    with torch.no_grad():
        teacher.model.depth_output.bias.fill_(0)
    teacher.model.head_kinds["depth"] = Unbounded(parameterisation="exp", max_depth=20)
    with pytest.raises(ModelError, match="Values beyond 0 to 20 m in depth of record"):
        build_cache(split, teacher, tmp_path / "far", options())


def test_features_alone_train_a_student(tmp_path, split, options, teacher) -> None:
    """With terms on features, and refused for those on classes before anything is written."""
    from kdcache.training import TrainConfig, train

    build_cache(split, teacher, tmp_path / "store", options(features=("stage2",), features_only=True))
    settings = {"verb": "train-student", "cache": str(tmp_path / "store"), "model": "kdcache:tiny"}
    settings |= {"iterations": 2, "batch_size": 2, "threads": 1, "augment": "replay"}
    with pytest.raises(StoreError, match="has no segmentation head, only features"):
        train(TrainConfig.of({**settings, "method": "kl"}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    config = TrainConfig.of({**settings, "method": "none", "term": ["hint"], "ce_weight": 0.0})
    result = train(config, tmp_path / "run")
    assert result["iterations"] == 2


DEPTHS = "scenes:32x48,train=5,val=2,depth=sparse,tasks=halves"
CROPS = {"size": (48, 72), "crop": SIZE, "views": 2, "view_scale": (0.5, 1.5)}
ZOOMS: dict[str, dict] = {
    "whole": {"views": 3},
    "divided": {"views": 3, "view_scale": (1.0, 2.5), "depth_zoom": "divide"},
    "kept": {"views": 3, "view_scale": (1.0, 2.5), "depth_zoom": "keep"},
    "crops": {**CROPS, "depth_zoom": "divide"},
}


def zoom_of_record(cache, record: int) -> float:
    """How many times larger than in the whole image things are."""
    row = cache.read(record, ["records/window"])["records/window"]
    shown = (row[2] - row[0]) * (row[3] - row[1])
    return math.sqrt(32 * 48 / shown * (4 / 9 if cache.manifest.view.kind == "crop" else 1))


@pytest.mark.parametrize("way", ZOOMS)
def test_labels_of_depth_are_stored(tmp_path, options, origins, way) -> None:
    """A store of a teacher of classes alone has them, too: it stands for its data set."""
    split = open_split(DEPTHS, "train")
    teacher = load_teachers([origins["classes"]], split.classes)
    build_cache(split, teacher, tmp_path / "store", options(**ZOOMS[way]))
    cache = open_cache(tmp_path / "store")
    manifest, views = cache.manifest, cache.manifest.view.views_per_sample
    how = {"whole": "none", "kept": "keep"}.get(way, "divide")
    assert (manifest.version, manifest.depth.labelled, manifest.depth.zoom) == (3, 2, how)
    assert manifest.dataset.labelled == 3
    assert manifest.view.drawn.scale == ((1.0, 1.0) if way == "whole" else ZOOMS[way]["view_scale"])
    assert cache.labelled[DEPTH].tolist() == [not flag for flag in cache.labelled[SEGMENTATION]]
    counted = 0
    for record in range(len(cache)):
        label = Records(cache).label(record, "depth")
        assert (label.shape, label.dtype) == (SIZE, np.float32)
        metres = split.label(record // views, "depth")
        known = label[np.isfinite(label)].astype(np.float64)
        if metres is None:
            assert len(known) == 0
            continue
        counted += len(known)
        zoom = 1.0 if how != "divide" else zoom_of_record(cache, record)
        values = metres[np.isfinite(metres)].astype(np.float64)
        nearest = values[np.abs(known[:, None] * zoom - values).argmin(1)] if len(known) else known
        np.testing.assert_allclose(known * zoom, nearest, rtol=1e-6)
    assert counted > 100
    assert verify_files(tmp_path / "store").damaged == []
    # The data set renders the same, and a store of its pixels' source is asked for it.
    build_cache(split, teacher, tmp_path / "source", options(**ZOOMS[way], pixels="source"))
    other = Records.open(tmp_path / "source", DEPTHS)
    assert "labels/depth" not in other.cache.specs
    assert (other.cache.manifest.depth, other.cache.labelled[DEPTH].tolist()) == (
        manifest.depth,
        cache.labelled[DEPTH].tolist(),
    )
    for record in range(len(cache)):
        np.testing.assert_array_equal(other.label(record, "depth"), Records(cache).label(record, "depth"))


def test_copies_and_extended_stores_have_the_labels_of_depth(tmp_path, options, origins) -> None:
    split = open_split(DEPTHS, "train")
    teacher = load_teachers([origins["both"]], split.classes)
    build_cache(split, teacher, tmp_path / "old", options(**ZOOMS["divided"]))
    old = open_cache(tmp_path / "old")
    numbers = [0, 1, 3]
    copy_store(old, tmp_path / "part", CopyChanges(samples=numbers, codec="small", shard_records=4))
    part = open_cache(tmp_path / "part")
    assert part.manifest.depth.labelled == int(old.labelled[DEPTH][numbers].sum()) == 2
    assert part.manifest.dataset.labelled == 1
    for place, number in enumerate(numbers):
        for view in range(3):
            mine, its = part.manifest.record(place, view), old.manifest.record(number, view)
            for path in ("labels/depth", "targets/depth/values"):
                np.testing.assert_array_equal(part.read(mine, [path])[path], old.read(its, [path])[path])
    none = [number for number in range(5) if not old.labelled[DEPTH][number]]
    copy_store(old, tmp_path / "none", CopyChanges(samples=none))
    assert "labels/depth" not in open_cache(tmp_path / "none").specs
    copy_store(old, tmp_path / "bare", CopyChanges(pixels="source"))
    bare = open_cache(tmp_path / "bare")
    assert "labels/depth" not in bare.specs
    assert bare.manifest.depth == old.manifest.depth
    chosen = options_of(bare.manifest, pixels="stored", views=4, fidelity=False)
    assert build_cache(split, teacher, tmp_path / "new", chosen, reuse=bare).reused == len(old)
    new = open_cache(tmp_path / "new")
    assert new.manifest.depth == old.manifest.depth
    for record in range(len(old)):
        mine = new.manifest.record(*divmod(record, 3))
        np.testing.assert_array_equal(Records(new).label(mine, "depth"), Records(old).label(record, "depth"))
    facts = dict(summarise(old).facts())
    assert facts["depth"] == "labels of 2 samples in metres, stored, divided by the zoom of each view"


def test_a_zoom_and_metres_want_a_rule(tmp_path, split, options, origins) -> None:
    both, classes = (load_teachers([origins[name]], split.classes) for name in ("both", "classes"))
    zoomed = {"views": 2, "view_scale": (1.0, 2.0)}
    for teacher, data in ((both, split), (classes, open_split(DEPTHS, "train"))):
        with pytest.raises(RecipeError, match="--depth-zoom divide, or keep"):
            build_cache(data, teacher, tmp_path / "store", options(**zoomed))
        manifest = plan_manifest(TeacherProbe(data, teacher, options(views=2)))
        assert manifest.view.drawn.scale == (1.0, 1.0)
        kept = plan_manifest(TeacherProbe(data, teacher, options(**zoomed, depth_zoom="keep")))
        assert kept.depth.zoom == "keep"
    with pytest.raises(RecipeError, match="no labels of depth and no stored head in metres"):
        build_cache(split, both, tmp_path / "store", options(**zoomed, depth_zoom="keep", heads=("segmentation",)))
    manifest = plan_manifest(TeacherProbe(split, both, options(views=2, heads=("segmentation",))))
    assert (manifest.version, manifest.depth, manifest.view.drawn.scale) == (3, None, (1.0, 2.0))
    assert "depth" not in manifest.to_json()
    assert not (tmp_path / "store").exists()


def test_zarr_libraries_read_depth_by_the_document_alone(tmp_path, options, origins) -> None:
    """The libraries read head and labels, as docs/format.md's own reader does; NaN is unknown."""
    split = open_split(DEPTHS, "train")
    teacher = load_teachers([origins["both"]], split.classes)
    build_cache(split, teacher, tmp_path / "store", options(views=2))
    cache = open_cache(tmp_path / "store")
    about = json.loads((tmp_path / "store" / "zarr.json").read_bytes())["attributes"]["kdcache"]
    head = about["heads"]["depth"]
    assert (head["kind"], head["unit"], head["parameterisation"]) == ("regression", "m", "exp")
    shape = (about["records"], head["channels"], *head["size"])
    paths = {"targets/depth/values": shape, "labels/depth": (about["records"], *about["view"]["size"])}
    group = zarr.open_group(tmp_path / "store", mode="r")
    for path, wanted_shape in paths.items():
        wanted = np.stack([cache.read(record, [path])[path] for record in range(len(cache))])
        assert wanted.shape == wanted_shape
        place = {"driver": "file", "path": str(tmp_path / "store" / path)}
        other = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result().read().result()
        for rows in (np.asarray(group[path][:]), other):
            assert rows.dtype == wanted.dtype
            assert rows.tobytes() == wanted.tobytes()
    labelled = np.asarray(group["records/labelled"][:])
    known = np.isfinite(np.asarray(group["labels/depth"][:])).any((1, 2))
    assert np.array_equal(labelled & 2 != 0, known)
    document = Path(__file__).parents[3] / "docs" / "format.md"
    script = re.search(r"<!-- reader -->\n```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    assert script is not None
    (tmp_path / "reader.py").write_text(script[1], encoding="utf-8")
    command = [sys.executable, str(tmp_path / "reader.py"), str(tmp_path / "store"), "3", "depth"]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    np.testing.assert_array_equal(np.float32(printed), Records(cache).target(3, "depth")["values"].astype(np.float32))


def test_data_without_classes_have_a_store_of_depth(tmp_path, options, origins) -> None:
    """The teacher has classes, too, and its head of classes is refused there."""
    split = open_split("depth:scenes:32x48,train=4,val=2,depth=exact,tasks=depth", "train")
    assert len(split.classes) == 0
    with pytest.raises(ModelError, match="classes, but the data set has 0"):
        load_teachers([origins["both"]], split.classes)
    teacher = load_teachers([origins["both"]], split.classes, classified=False)
    build_cache(split, teacher, tmp_path / "store", options(heads=("depth",), views=2))
    cache = open_cache(tmp_path / "store")
    assert (list(cache.manifest.heads), cache.manifest.dataset.class_names) == (["depth"], ())
    again = load_like(cache.manifest.teacher, [origins["both"]], split.classes, classified=False)
    assert compare_teacher(Records(cache), again, CPU, 2).ok
    assert verify_files(tmp_path / "store").damaged == []
    assert np.isfinite(Records(cache).label(0, "depth")).any()


@pytest.mark.parametrize("few", [range(1, 15, 2), [7]])
def test_a_plan_sees_labels_of_depth_that_only_some_samples_have(tmp_path, options, origins, few) -> None:
    whole = open_split("scenes:32x48,train=15,val=2,depth=exact", "train")
    classes_only = open_split("segmentation:scenes:32x48,train=15,val=2,depth=exact", "train")
    samples = (whole if number in few else classes_only for number in range(15))
    split = replace(whole, samples=tuple(of.samples[number] for number, of in enumerate(samples)))
    teacher = load_teachers([origins["classes"]], split.classes)
    planned = estimate(split, teacher, options(views=2, depth_zoom="divide", shard_records=4), records=8)
    build_cache(split, teacher, tmp_path / "store", options(views=2, depth_zoom="divide", shard_records=4))
    built = {array.path: array.bytes_on_disk for array in summarise(open_cache(tmp_path / "store")).arrays}
    assert planned.chosen.sizes.keys() == built.keys()
    if len(few) > 1:
        assert planned.chosen.sizes["labels/depth"] * 30 == pytest.approx(built["labels/depth"], rel=0.3)


@pytest.mark.parametrize("changes", [{"heads": ("depth",)}, {}, {"features_only": True, "features": ("stage2",)}])
def test_a_plan_of_any_heads_is_what_the_build_takes(tmp_path, options, origins, changes) -> None:
    split = open_split("scenes:32x48,train=9,val=2,depth=exact", "train")
    teacher = load_teachers([origins["both"]], split.classes)
    chosen = options(**{"shard_records": 4, **changes})
    planned = estimate(split, teacher, chosen, records=8)
    build_cache(split, teacher, tmp_path / "store", chosen)
    built = {array.path: array.bytes_on_disk for array in summarise(open_cache(tmp_path / "store")).arrays}
    assert planned.chosen.sizes.keys() == built.keys()
    for path in ("targets/depth/values", "labels/depth", "features/stage2"):
        if path in built:
            assert planned.chosen.sizes[path] * 9 == pytest.approx(built[path], rel=0.15)
    assert planned.chosen.files == sum(path.is_file() for path in (tmp_path / "store").rglob("*"))
    assert (planned.chosen.setting.k, planned.classes) == ((None, 0) if changes else (7, 7))
    assert all(cost.setting.features or not changes.get("features_only") for cost in planned.neighbours)
