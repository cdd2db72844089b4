"""Networks without heads that learn features alone, from pictures without labels, judged by records held out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdcache.analysis.compare import compare
from kdcache.analysis.predict import predict_images
from kdcache.data import ClassList, open_split
from kdcache.errors import DataError, KDCacheError, ModelError, RecipeError
from kdcache.metrics import Inference, evaluate_tasks
from kdcache.models import build_model, trusting
from kdcache.models.export import export_model
from kdcache.models.run import load_run
from kdcache.run_folder import Run
from kdcache.store import open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache
from kdcache.training import CacheDataset, Observer, make_config, train
from kdcache.training.input.subset import Part, held_out
from kdcache.training.run.beginning import begin_model

NETS = """
import torch
from torch import nn

class Tokens(nn.Module):
    kdcache_heads = {}
    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 8, 8), nn.LayerNorm(12)
        self.cls = nn.Parameter(torch.ones(1, 2, 12))
    def forward(self, x):
        tokens = self.patch(x).flatten(2).mT
        return self.norm(torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1))

class Backbone(nn.Module):
    kdcache_heads = {}
    def __init__(self):
        super().__init__()
        self.s4, self.s8, self.s16 = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)
        self.norm = nn.BatchNorm2d(8)
    def forward(self, x):
        return self.s16(self.norm(self.s8(self.s4(x))).relu())

class Segmenter(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body, self.head = Backbone(), nn.Conv2d(8, classes, 1)
    def forward(self, x):
        return self.head(self.body(x))

def segmenter(num_classes):
    return Segmenter(num_classes)

def longer(num_classes):
    network = Segmenter(num_classes)
    network.body.more = nn.Conv2d(8, 8, 1)
    return network

def wider(num_classes):
    network = Segmenter(num_classes)
    network.body.s4, network.body.s8 = nn.Conv2d(3, 7, 4, 4), nn.Conv2d(7, 8, 2, 2)
    return network

def tokens():
    torch.manual_seed(5)
    return Tokens()

def backbone():
    return Backbone()
"""
SIZE = (32, 48)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 32)).save(root / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def features(nets: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tokens of twelve pictures."""
    teacher = Teacher(build_model(f"{nets}:tokens", 0).eval(), "tokens")
    out = tmp_path_factory.mktemp("cache") / "features.zarr"
    options = BuildOptions(size=SIZE, views=1, features_only=True, features=("last",), batch_size=4)
    build_cache(open_split(photos, "train"), teacher, out, options)
    return out


@pytest.fixture
def settings(features: Path, nets: Path) -> dict[str, Any]:
    given = {"verb": "train-student", "cache": str(features), "model": f"{nets}:backbone", "method": "cosine"}
    given |= {"ce_weight": 0.0, "val_share": 0.25, "iterations": 8, "val_every": 2, "batch_size": 4, "augment": "none"}
    return given | {"device": "cpu", "log_every": 1, "workers": 0, "jitter": 0.0}


def test_tokens_are_stored_as_a_grid_without_class_tokens(features: Path, nets: Path, photos: Path) -> None:
    cache = open_cache(features)
    assert cache.manifest.features["last"].size == (4, 6)
    network = build_model(f"{nets}:tokens", 0).eval()
    pixels = torch.from_numpy(open_split(photos, "train").image(3)[None])
    with torch.no_grad():
        tokens = network.network(network.normalise(pixels))
    expected = tokens[:, 2:].mT.reshape(12, 4, 6).half().numpy()
    assert np.array_equal(cache.read(3, ["features/last"])["features/last"], expected)


def test_a_backbone_learns_and_its_best_weights_have_the_least_loss(settings, tmp_path, read_metrics) -> None:
    result = train(make_config(**settings), tmp_path / "run")
    rows = read_metrics(tmp_path / "run", "validation")
    losses = {row["step"]: row["feature_loss"] for row in rows}
    assert list(losses) == [2, 4, 6, 8]
    assert result["best_feature_loss"] == min(losses.values()) == losses[result["best_step"]]
    assert losses[8] < losses[2]
    assert result["best_miou"] is None
    assert f"least feature loss {result['best_feature_loss']:.4g}" in repr(Run.open(tmp_path / "run"))
    assert all(row["feature_terms"] == {"cosine": row["feature_loss"]} and row["feature_samples"] > 0 for row in rows)
    assert Run.open(tmp_path / "run").model.class_names == ()
    expected = set(build_model(settings["model"], 0).state_dict())
    assert set(load_file(tmp_path / "run" / "best.safetensors")) == expected  # and no projector


def test_the_loss_of_held_out_records_is_the_formula_on_them(settings, features, tmp_path, read_metrics) -> None:
    train(make_config(**settings), tmp_path / "run")
    model = build_model(settings["model"], 0, weights=tmp_path / "run" / "last.safetensors", strict_head=True)
    state = torch.load(tmp_path / "run" / "checkpoint.pt")["criterion"]
    projector = torch.nn.Conv2d(8, 12, 1)
    projector.load_state_dict({name.rpartition(".")[2]: value for name, value in state.items()})
    cache = open_cache(features)
    held = [number for number, judge in enumerate(held_out(cache.ids, 0.25)) if judge]
    total = 0.0
    for number in held:
        pixels = torch.from_numpy(cache.read(number, ["pixels/image"])["pixels/image"][None])
        with torch.no_grad():
            student = projector(model.eval()(model.normalise(pixels), ["norm"]).features["norm"])
        teacher = torch.from_numpy(cache.read(number, ["features/last"])["features/last"][None]).float()
        total += 2 * float(1 - torch.cosine_similarity(student, teacher).mean())
    (row,) = read_metrics(tmp_path / "run", "validation")[-1:]
    assert row["feature_samples"] == len(held)
    assert row["feature_loss"] == pytest.approx(total / len(held), rel=1e-5)


def test_a_stopped_backbone_goes_on_to_the_same_weights(settings, tmp_path) -> None:
    class Stop(Observer):
        def advanced(self, step: int) -> None:
            if step == 5:
                raise RuntimeError("stop")

    train(make_config(**settings), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stop"):
        train(make_config(**settings), tmp_path / "stopped", observer=Stop())
    train(make_config(**settings), tmp_path / "stopped", resume=True)
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    with pytest.raises(RecipeError, match="Cannot resume with other settings"):
        train(make_config(**settings | {"val_share": 0.5}), tmp_path / "stopped", resume=True)


@pytest.fixture(scope="module")
def run(features: Path, nets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone that has learnt a little."""
    given = {"verb": "train-student", "cache": str(features), "model": f"{nets}:backbone", "method": "cosine"}
    given |= {"ce_weight": 0.0, "val_share": 0.25, "iterations": 2, "batch_size": 4, "device": "cpu", "workers": 0}
    given |= {"augment": "none"}
    out = tmp_path_factory.mktemp("runs") / "backbone"
    train(make_config(**given), out)
    return out


@pytest.mark.parametrize("which", ["run", "last", "exported"])
def test_a_task_starts_from_a_backbone_whole(which, run, nets, scenes, tmp_path) -> None:
    """Of a learning rate of nearly 0, every tensor of the backbone is the run's."""
    init, source = str(run), run / "best.safetensors"
    if which == "last":
        init, source = f"{run}@last", run / "last.safetensors"
    elif which == "exported":
        with trusting():
            export_model(*load_run(run), tmp_path / "backbone.safetensors")
        init = str(tmp_path / "backbone.safetensors")
    notes: list[str] = []
    watching = Observer()
    watching.note = notes.append  # type: ignore[method-assign]
    task = {"verb": "train-student", "model": f"{nets}:segmenter", "data": scenes, "size": "32x48", "method": "none"}
    task |= {"iterations": 1, "lr": 1e-30, "device": "cpu", "workers": 0, "init": init}
    train(make_config(**task), tmp_path / "task", observer=watching)
    state = load_file(tmp_path / "task" / "last.safetensors")
    for name, value in load_file(source).items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(state[f"body.{name}"], value), name
    assert "--init leaves at random: head.weight, head.bias" in notes


@pytest.mark.parametrize(
    ("model", "tensors"),
    [
        ("{nets}:longer", "2 missing: body.more.weight, body.more.bias"),
        ("{nets}:wider", "of another shape: body.s4.weight (6, 3, 4, 4) instead of (7, 3, 4, 4)"),
        ("kdcache:tiny", "65 missing: encoder.stem.0.0.weight"),
    ],
)
def test_a_partial_start_names_the_tensors(model, tensors, run, nets, scenes, tmp_path) -> None:
    task = {"verb": "train-student", "model": model.format(nets=nets), "data": scenes, "size": "32x48"}
    task |= {"method": "none", "iterations": 1, "device": "cpu", "init": str(run)}
    with pytest.raises(ModelError, match="Cannot start") as caught:
        train(make_config(**task), tmp_path / "task")
    assert tensors in caught.value.problem
    assert not (tmp_path / "task").exists()


@pytest.mark.parametrize("name", ["backbone.safetensors", "backbone.pt2"])
def test_an_exported_backbone_answers_with_its_features(name, run, tmp_path) -> None:
    with trusting():
        model, description = load_run(run)
        done = export_model(model, description, tmp_path / name)
    assert (done.checked_by is None, done.difference) == (False, 0)
    if name.endswith(".pt2"):
        image = torch.rand(1, 3, 32, 48)
        program = torch.export.load(tmp_path / name).module()
        features = model(
            (image - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1), ["s8"]
        )
        answers = dict(zip(model.taps, program(image), strict=True))
        assert torch.allclose(answers["s8"], features.features["s8"], atol=1e-5)


@pytest.mark.parametrize(
    ("verb", "sources", "distils"),
    [
        ("train-teacher", {"data": "photos"}, False),
        ("train-student", {"data": "photos"}, False),
        ("train-student", {"cache": "photos.zarr"}, True),
    ],
)
def test_it_is_advised_to_learn_features_only_from_a_cache(verb: str, sources: dict[str, Any], distils: bool) -> None:
    pytest.importorskip("timm")
    config = make_config(verb=verb, model="timm:resnet18", method="none", **sources)
    with pytest.raises(ModelError, match="Nothing to learn: timm:resnet18") as raised:
        begin_model(config, 3, ("segmentation",))
    assert ("--method" in str(raised.value)) == distils
    assert "--model smp:unet-tu-resnet18" in raised.value.fix


def test_labels_cannot_judge_it(run, scenes, tmp_path) -> None:
    for arguments in (([run],), ([run], scenes)):
        with pytest.raises(RecipeError, match="it learnt features only") as caught:
            compare(*arguments)
        assert f"{run}: {Run.open(run).result['best_feature_loss']:.4g}" in caught.value.problem
    with trusting():
        model, description = load_run(run)
    with pytest.raises(ModelError, match="Cannot predict"):
        predict_images(model, ClassList(()), [], tmp_path / "out", description.size)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="--init RUN"):
        evaluate_tasks(model, open_split(scenes, "val"), Inference(description.size))


def test_heads_that_learnt_nothing_beside_features_are_not_judged(settings, make_cache, tmp_path) -> None:
    cache = make_cache(features=("stage4",))
    tiny = settings | {"cache": str(cache), "model": "kdcache:tiny", "iterations": 1}
    train(make_config(**tiny), tmp_path / "run")
    assert Run.open(tmp_path / "run").model.untrained == ("segmentation",)
    with pytest.raises(KDCacheError, match="learnt nothing of segmentation"):
        train(make_config(**tiny | {"val_share": None, "val": "scenes:32x48,train=6,val=3"}), tmp_path / "judged")


def test_a_listed_model_is_a_backbone_where_data_have_no_classes(settings, tmp_path) -> None:
    train(make_config(**settings | {"model": "kdcache:tiny", "iterations": 1}), tmp_path / "run")
    assert (Run.open(tmp_path / "run").model.class_names, Run.open(tmp_path / "run").model.untrained) == ((), ())


def test_held_out_samples_depend_on_their_ids_alone_and_teach_nothing(features: Path) -> None:
    ids = [f"image {number}" for number in range(4000)]
    judges = held_out(ids, 0.1)
    assert 320 < sum(judges) < 480
    assert held_out(ids[::-1], 0.1) == judges[::-1]
    assert held_out(ids[:500], 0.1) == judges[:500]
    assert sum(held_out(ids[:5], 0.02)) == 1  # of few samples at least one
    cache = open_cache(features)
    learns = CacheDataset(cache, part=Part(held_out=0.25))
    judged = CacheDataset(cache, part=Part(held_out=0.25, judging=True))
    assert sorted([*learns.indices, *judged.indices]) == list(range(12))
    assert {*CacheDataset(cache, part=Part(held_out=0.25, samples=4)).indices} <= {*learns.indices}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kl on features": (
        {"method": "kl", "val_share": None},
        r"has no segmentation head, only features.*--method none with --term hint",
    ),
    "no tap of that name": ({"method": "none", "term": ("cosine,student_tap=s9",)}, "s4, s8, norm, s16"),
    "no term": ({"method": "none", "ce_weight": 1.0}, r"--val-share 0.25 has no feature loss.*--term cosine"),
    "labels judge": ({"val_share": None, "val": "scenes:32x48,train=6,val=3"}, r"has no head.*--val-share 0.02"),
    "two judges": ({"val": "scenes"}, r"Cannot use --val-share 0.25 with --val scenes"),
    "a share of 0": ({"val_share": 0.0}, "Invalid value of --val-share: "),
    "a share of 1": ({"val_share": 1.0}, "Invalid value of --val-share: "),
    "all held out": ({"val_share": 0.999999}, "No sample is left"),
}


def test_a_student_without_heads_leaves_cross_entropy_out(settings, tmp_path) -> None:
    settings |= {"iterations": 2}
    train(make_config(**settings), tmp_path / "typed")
    del settings["ce_weight"]
    train(make_config(**settings), tmp_path / "run")
    typed, run = (load_file(tmp_path / name / "best.safetensors") for name in ("typed", "run"))
    assert all(torch.equal(value, run[name]) for name, value in typed.items())
    with pytest.raises(RecipeError, match="ce needs a categorical head segmentation"):
        train(make_config(**settings, label_smoothing=0.1, given={"label_smoothing"}), tmp_path / "smoothed")


def test_labels_that_a_student_without_heads_does_not_use_are_noted(nets, tmp_path) -> None:
    split = open_split("scenes:32x48,train=4,val=1", "train")
    teacher = Teacher(build_model(f"{nets}:tokens", 0).eval(), "tokens")
    build_cache(split, teacher, tmp_path / "cache", BuildOptions(size=SIZE, features_only=True, features=("last",)))
    notes = list[str]()
    observer = Observer()
    observer.note = notes.append
    given = {"verb": "train-student", "cache": str(tmp_path / "cache"), "model": f"{nets}:backbone", "augment": "none"}
    given |= {"iterations": 1, "batch_size": 2, "workers": 0, "device": "cpu", "method": "cosine"}
    train(make_config(**given), tmp_path / "run", observer=observer)
    assert "labels are not used: the student has no heads" in notes


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_written(case, settings, tmp_path) -> None:
    changes, text = WRONG[case]
    with pytest.raises(KDCacheError) as caught:
        train(make_config(**settings | changes), tmp_path / "run")
    shown = " ".join(str(caught.value).split())
    assert re.search(text, shown), shown
    assert not (tmp_path / "run").exists()
