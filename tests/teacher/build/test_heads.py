"""Builds of several heads: of one teacher, of two with one head each, of none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdcache.data import Window, render
from kdcache.errors import ModelError, RecipeError, StoreError
from kdcache.heads import RegressionHead
from kdcache.models import build_model
from kdcache.store import Records, open_cache, verify_files
from kdcache.teacher import build_cache, compare_teacher, load_like, load_teachers, score_cache
from kdcache.teacher.build.reuse import options_of

SIZE = (32, 48)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def origins(tmp_path_factory, split, model_of) -> dict[str, str]:
    """Weights of a model of classes, and of one of both tasks whose depth differs from cell to cell."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    both = build_model("kdcache:hydra,as=exp,max=20", len(split.classes))
    with torch.no_grad():
        both.depth_output.weight.normal_(std=0.5)
    models = {"classes": ("kdcache:tiny", model_of(len(split.classes))), "both": ("kdcache:hydra,as=exp,max=20", both)}
    found = {}
    for name, (spec, model) in models.items():
        save_file(dict(model.state_dict()), folder / f"{name}.safetensors")
        found[name] = f"{spec}@{folder / f'{name}.safetensors'}"
    return found


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
    assert (list(result.manifest.heads), result.manifest.version) == (["segmentation", "depth"], 2)
    assert (depth.range, depth.parameterisation, depth.unit, depth.dtype) == ((0.0, 20.0), "exp", "m", "float16")
    outputs = answers(teacher, split)
    wanted = outputs.heads["depth"].double().exp().clamp(max=20)
    assert wanted.std() > 0.1
    for record in range(len(cache)):
        stored = Records(cache).target(record, "depth")["values"]
        np.testing.assert_allclose(stored.astype(np.float64), wanted[record].numpy(), rtol=2e-3)
    build_cache(split, teacher, tmp_path / "one", options(heads=("segmentation",)))
    alone = open_cache(tmp_path / "one").manifest
    assert (list(alone.heads), alone.version) == (["segmentation"], 1)
    assert shards(tmp_path / "one", "targets/segmentation") == shards(tmp_path / "both", "targets/segmentation")
    assert score_cache(Records(cache, split)) is not None


def test_two_teachers_make_one_store(tmp_path, split, options, origins) -> None:
    """Each head's targets are those of a store of its teacher alone, each normalised in its own way."""
    given = [origins["classes"], f"depth={origins['both']}"]
    teacher = load_teachers(given, split.classes)
    teacher.model.parts[1].model.mean = (0.3, 0.4, 0.5)
    build_cache(split, teacher, tmp_path / "two", options(features=("stage2",)))
    for name, origin, mean in (("segmentation", "classes", None), ("depth", "both", (0.3, 0.4, 0.5))):
        alone = load_teachers([origins[origin]], split.classes, mean=mean)
        build_cache(split, alone, tmp_path / name, options(heads=(name,)))
        two, one = (open_cache(tmp_path / folder) for folder in ("two", name))
        for record in range(len(two)):
            path = f"targets/{name}/values"
            a, b = (cache.read(record, [path])[path].astype(np.float64) for cache in (two, one))
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-2)
    cache = open_cache(tmp_path / "two")
    assert list(cache.manifest.heads) == ["segmentation", "depth"]
    assert "depth=kdcache:hydra" in cache.manifest.teacher.spec
    agreement = compare_teacher(Records(cache, split), teacher, CPU, 2)
    assert agreement.ok, agreement
    assert agreement.values["targets/depth/values"] < 1e-3


def test_teachers_of_a_head_each_are_loaded_again_for_verify(tmp_path, split, options, origins) -> None:
    """Also where the first is an ensemble."""
    for number, plain in enumerate(([origins["classes"]], [origins["classes"], origins["both"]])):
        given = [*plain, f"depth={origins['both']}"]
        build_cache(split, load_teachers(given, split.classes), tmp_path / str(number), options())
        records = Records.open(tmp_path / str(number))
        again = load_like(records.cache.manifest.teacher, given, split.classes)
        assert [part.heads for part in again.model.parts] == [("segmentation",), ("depth",)]
        assert compare_teacher(records, again, CPU, 2).ok
    with pytest.raises(RecipeError, match="normalised as they were trained"):
        load_teachers(given, split.classes, mean=(0.3, 0.4, 0.5))


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
        ({"heads": ("depht",)}, "did you mean depth"),
        ({"heads": ("depth",), "features_only": True, "features": ("head",)}, "--features-only none"),
        ({"features_only": True}, "--features-only and no --features"),
        ({"heads": ("depth",), "top_k": 3}, "--top-k is of logits"),
        ({"heads": ("depth",), "raw_logits": True}, "--raw-logits is of logits"),
        ({"heads": ("depth",), "statistics": ("entropy",)}, "--statistics is of logits"),
        ({"teacher_grid": "view", "teacher_size": (64, 96)}, "--teacher-grid view is of logits"),
    ],
)
def test_heads_that_cannot_be_stored_are_refused(tmp_path, split, options, origins, changes, message) -> None:
    teacher = load_teachers([origins["both"]], split.classes)
    with pytest.raises(RecipeError, match=message):
        build_cache(split, teacher, tmp_path / "store", options(**changes))
    assert not (tmp_path / "store").exists()


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
    with pytest.raises(ModelError, match="lie in its range, 0 to 20 m"):
        build_cache(split, teacher, tmp_path / "far", options())


def test_teachers_by_head_are_told_apart(split, origins, tmp_path) -> None:
    with pytest.raises(RecipeError, match="a head is taken from one teacher"):
        load_teachers([f"depth={origins['both']}", f"depth={origins['both']}"], split.classes)
    with pytest.raises(ModelError, match="'normals' of kdcache:hydra"):
        load_teachers([origins["both"], f"normals={origins['both']}"], split.classes)
    with pytest.raises(ModelError, match="'depth' of kdcache:tiny"):
        load_teachers([f"depth={origins['classes']}"], split.classes)
    alone = load_teachers([f"depth={origins['both']}"], split.classes)
    assert list(alone.model.head_kinds) == ["depth"]


def test_features_alone_train_a_student(tmp_path, split, options, teacher) -> None:
    """With terms on features, and refused for those on classes before anything is written."""
    from kdcache.train import TrainConfig, train

    build_cache(split, teacher, tmp_path / "store", options(features=("stage2",), features_only=True))
    settings = {"verb": "train-student", "cache": str(tmp_path / "store"), "model": "kdcache:tiny"}
    settings |= {"iterations": 2, "batch_size": 2, "threads": 1, "augment": "replay"}
    with pytest.raises(StoreError, match="targets of classes are those of a head segmentation"):
        train(TrainConfig.model_validate({**settings, "method": "kl"}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    config = TrainConfig.model_validate({**settings, "method": "none", "term": ["hint"], "ce_weight": 0.0})
    result = train(config, tmp_path / "run")
    assert result["iterations"] == 2
