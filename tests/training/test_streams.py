"""Trainings from several streams: one forward, each stream's own loss, and the promises of one stream."""

from __future__ import annotations

import os
import random
import signal
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from kdcache.data import Augmentation, open_split, write_scenes
from kdcache.errors import KDCacheError, MismatchError, RecipeError
from kdcache.models import build_model
from kdcache.settings.recipe import settings_of
from kdcache.store import open_cache
from kdcache.training import CacheDataset, Interrupted, LabelledDataset, Observer, TrainConfig, make_config, train
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World
from kdcache.training.input.loader import Draws
from kdcache.training.input.streams import stream_seed
from kdcache.training.sources import open_sources
from kdcache.training.trainer import Trainer

SCENES, OTHERS = "scenes:32x48,train=6,val=3", "scenes:32x48,train=5,val=3"
Read = Callable[..., list[dict[str, Any]]]


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Two streams of labels, three rows and one of four, weights 1 and 0.5."""
    streams = [
        {"name": "a", "data": SCENES, "share": 0.75},
        {"name": "b", "data": OTHERS, "weight": 0.5, "scale": "0.5:1.5", "jitter": 0},
    ]
    return settings | {"verb": "train-student", "data": None, "batch_size": 4, "stream": streams}


@pytest.fixture
def taught(student: dict[str, Any], cache_path: Path) -> dict[str, Any]:
    """A stream that learns from the store, and one from labels of a data set."""
    streams = [f"a,cache={cache_path},share=0.5,method=kl+dist", f'b,"data={OTHERS}",weight=0.5']
    return student | {"cache": None, "method": "auto", "batch_size": 4, "size": "32x48", "stream": streams}


def begun(settings: dict[str, Any], run: Path, observer: Observer | None = None) -> Trainer:
    return make_trainer(make_config(**settings), run, World(), observer or Observer(), resume=False)


def test_the_first_step_is_one_forward_and_each_stream_s_mean(
    plain: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    train(make_config(**plain | {"iterations": 1, "val": None, "gradients_every": 1, "seed": 4}), tmp_path / "run")
    torch.manual_seed(4)
    model = build_model("kdcache:tiny", 7)
    parts = []
    for number, (data, rows, augmentation) in enumerate(
        [(SCENES, 3, Augmentation()), (OTHERS, 1, Augmentation(scale=(0.5, 1.5), jitter=0))]
    ):
        dataset = LabelledDataset(open_split(data, "train"), (32, 48), augmentation)
        draws = Draws(dataset, stream_seed(4, number))
        parts.append([draws[draw] for draw in range(rows)])
    samples = [sample for part in parts for sample in part]
    logits = model.train()(model.normalise(torch.stack([sample.pixels for sample in samples]))).logits
    z = F.interpolate(logits, (32, 48), mode="bilinear")
    label = torch.stack([sample.label for sample in samples]).long()
    losses = [F.cross_entropy(z[:3], label[:3], ignore_index=255), F.cross_entropy(z[3:], label[3:], ignore_index=255)]
    (row,) = read_metrics(tmp_path / "run", "train")
    assert row["a/ce"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert row["b/loss"] == pytest.approx(losses[1].item(), rel=1e-5)
    assert row["loss"] == pytest.approx((losses[0] + 0.5 * losses[1]).item(), rel=1e-5)
    (norms,) = read_metrics(tmp_path / "run", "gradients")
    for name, loss in (("a", losses[0]), ("b", 0.5 * losses[1])):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        assert norms[f"{name}/loss"] == norms[f"{name}/ce"] == pytest.approx(norm, rel=1e-3)


def test_each_stream_has_terms_notes_and_a_table_of_its_own(
    taught: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    notes = Notes()
    train(make_config(**taught), tmp_path / "run", observer=notes)
    names = [name for name in read_metrics(tmp_path / "run", "train")[0] if "/" in name]
    assert names == ["a/loss", "a/ce", "a/kl", "a/dist", "b/loss", "b/ce", "b/kl"]
    assert "stream a: 2 of 4 samples in every batch, from 6 samples, weight 1" in notes.texts
    assert "stream b: 2 of 4 samples in every batch, from 5 samples, weight 0.5" in notes.texts
    open_sources(make_config(**taught), 1, notes.note)[0].note(notes.note)("warning: it has few labels")
    assert notes.texts[-1] == "warning: stream a: it has few labels"
    recipe = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert [table["method"] for table in recipe["stream"]] == ["kl+dist", "none"]
    assert recipe["method"] == "kl+dist", "what the streams learn by"
    again = TrainConfig.of(settings_of(recipe))
    assert recipe.items() <= {**again.recipe, "format": 2}.items()
    assert [stream.config.augmentation.augment for stream in again.streams] == ["warp", "warp"]


def test_a_run_goes_on_where_its_stores_moved_but_not_with_other_shares(
    taught: dict[str, Any], cache_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(make_config(**taught), run)
    moved = tmp_path / "moved.zarr"
    moved.symlink_to(cache_path)
    streams = [taught["stream"][0].replace(str(cache_path), str(moved)), taught["stream"][1]]
    train(make_config(**taught | {"stream": streams}), run, resume=True)
    with pytest.raises(RecipeError, match="--stream"):
        train(make_config(**taught | {"stream": [f"{streams[0]},weight=2", streams[1]]}), run, resume=True)
    other = [streams[0], streams[1].replace("train=5", "train=4")]
    with pytest.raises(MismatchError, match=r"1 sample was removed \('32x48-seed0/train-000004'\)"):
        train(make_config(**taught | {"stream": other}), run, resume=True)


def test_parts_of_a_batch_have_rows_of_every_stream(
    taught: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path, read_metrics: Read
) -> None:
    streams = [taught["stream"][0].replace("kl+dist", "kl"), taught["stream"][1]]
    settings = taught | {"model": model_file("tied"), "gradients_every": 2, "lr": 0.01, "stream": streams, "val": None}
    for name, parts in (("whole", 1), ("parts", 2)):
        train(make_config(**settings | {"accumulate": parts}), tmp_path / name)
    for kind in ("train", "gradients"):
        rows = [read_metrics(tmp_path / name, kind) for name in ("whole", "parts")]
        for one, two in zip(*rows, strict=True):
            for name in (name for name in one if "/" in name or name == "loss"):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), (kind, one["step"], name)


def test_a_compiled_step_takes_streams(
    taught: dict[str, Any], tmp_path: Path, read_metrics: Read, backend: Any
) -> None:
    streams = [taught["stream"][0].replace("kl+dist", "kl"), taught["stream"][1]]
    settings = taught | {"stream": streams, "val": None, "gradients_every": 0, "lr": 0.005}
    for step in ("eager", "compiled"):
        train(make_config(**settings | {"step": step}), tmp_path / step)
    assert backend.programs > 0
    rows = [read_metrics(tmp_path / step, "train") for step in ("eager", "compiled")]
    for one, two in zip(*rows, strict=True):
        for name in (name for name in one if "/" in name):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


def test_samples_are_pasted_within_a_stream(taught: dict[str, Any], tmp_path: Path) -> None:
    streams = [taught["stream"][0].replace("kl+dist", "kl"), taught["stream"][1]]
    trainer = begun(taught | {"mix": "cutmix", "stream": streams, "val": None}, tmp_path / "run")
    assert [stream.draws.dataset.dice for stream in trainer.streams] == [4, 4]
    result = trainer.train(resume=False)
    assert result["iterations"] == 6


def killed_runs(kills: int, settings: dict[str, Any], nursery: Any, tmp_path: Path, read_metrics: Read) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(make_config(**settings), whole)
    rng = random.Random(kills)
    for attempt in range(kills):
        pid = nursery.start(settings, killed, resume=attempt > 0 and (killed / "recipe.toml").exists())
        time.sleep(rng.uniform(0.1, 1.0))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert nursery.wait() in (-signal.SIGKILL, 0)
    train(make_config(**settings), killed, resume=(killed / "recipe.toml").exists())
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    timing = ("images_per_second", "wait_share")
    rows = [[{k: v for k, v in row.items() if k not in timing} for row in read_metrics(run)] for run in (whole, killed)]
    assert rows[0] == rows[1]


def test_two_streams_killed_at_random_end_as_if_nothing_had_happened(
    taught: dict[str, Any], nursery: Any, model_file: Callable[[str], str], tmp_path: Path, read_metrics: Read
) -> None:
    settings = taught | {"model": model_file("dropout"), "iterations": 40, "val_every": 10, "gradients_every": 7}
    killed_runs(2, settings, nursery, tmp_path, read_metrics)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classes", "depth"])
def test_two_streams_killed_ten_times(
    kind: str,
    taught: dict[str, Any],
    depth_paths: dict[str, Path],
    nursery: Any,
    model_file: Callable[[str], str],
    tmp_path: Path,
    read_metrics: Read,
) -> None:
    """The stream of depth has stored targets and labels of depth, pasted and zoomed."""
    settings = taught | {"model": model_file("dropout"), "iterations": 200, "val_every": 10, "workers": 2}
    if kind == "depth":
        terms = '"term=depth-silog,reference=teacher",term=depth-l1,augment=warp,depth-zoom=divide,scale=1:2'
        depth = f"a,cache={depth_paths['stored']},share=0.5,method=kl,{terms}"
        settings |= {"model": "kdcache:hydra", "mix": "classmix", "stream": [depth, taught["stream"][1]]}
    killed_runs(10, settings, nursery, tmp_path, read_metrics)


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """A data folder of the scenes whose class list has the classes in the reverse order."""
    root = write_scenes(tmp_path / "renamed", OTHERS)
    path = next(root.glob("classes.*"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    return root


def test_labels_of_another_class_list_are_mapped(plain: dict[str, Any], renamed: Path, tmp_path: Path) -> None:
    names = open_split(OTHERS, "train").classes.names
    own = open_split(str(renamed), "train").classes.names
    assert own == names[::-1]
    lines = [f"{number} {name if number else 'void'}" for number, name in enumerate(own)]
    (tmp_path / "map.txt").write_text("\n".join(lines))
    streams = [plain["stream"][0], {"name": "b", "data": str(renamed)}]
    with pytest.raises(MismatchError, match="class-map"):
        begun(plain | {"stream": streams, "val": None}, tmp_path / "run")
    streams[1] |= {"class-map": str(tmp_path / "map.txt")}
    trainer = begun(plain | {"stream": streams, "val": SCENES}, tmp_path / "run")
    dataset = trainer.streams[1].draws.dataset
    assert dataset.classes.names == names
    mapped = np.array([names.index(name) if number else 255 for number, name in enumerate(own)], np.uint8)
    raw = LabelledDataset(open_split(str(renamed), "train"), (32, 48))
    for draw in range(3):
        label, wanted = (Draws(one, 5)[draw].label.numpy() for one in (dataset, raw))
        assert np.array_equal(label, np.append(mapped, np.full(249, 255, np.uint8))[wanted])
    counted, before = (np.bincount(np.concatenate([x.ravel() for x in one.labels()])) for one in (dataset, raw))
    assert counted[mapped[1]] == before[1]


def test_data_without_classes_teach_depth_beside_those_with_classes(plain: dict[str, Any], tmp_path: Path) -> None:
    far = {
        "name": "far",
        "data": f"depth:{OTHERS},depth=exact",
        "labels": "depth",
        "ce-weight": 0,
        "method": "depth-l1",
    }
    names = open_split(SCENES, "train").classes.names
    for streams in ([plain["stream"][0], far], [far, plain["stream"][0]]):
        trainer = begun(plain | {"model": "kdcache:hydra", "stream": streams, "val": SCENES}, tmp_path / "run")
        assert [stream.draws.dataset.classes.names for stream in trainer.streams] == [names] * 2


def test_other_classes_that_are_not_read_need_no_map(plain: dict[str, Any], renamed: Path, tmp_path: Path) -> None:
    near = {"name": "near", "data": str(renamed)}
    far = {"name": "far", "data": f"{OTHERS},depth=exact", "labels": "depth", "ce-weight": 0, "method": "depth-l1"}
    settings = plain | {"model": "kdcache:hydra", "val": None}
    for streams in ([near, far], [far, near]):
        trainer = begun(settings | {"stream": streams}, tmp_path / "run")
        datasets = {stream.name: stream.draws.dataset for stream in trainer.streams}
        assert datasets["far"].classes.names == open_split(str(renamed), "train").classes.names
        assert (Draws(datasets["far"], 5)[0].label == 255).all()
        assert (Draws(datasets["near"], 5)[0].label != 255).any()
    for labels in ("all", "segmentation+depth"):
        with pytest.raises(
            MismatchError, match=r"(?s)The streams have different classes: .* in far against .*class-map"
        ):
            begun(settings | {"stream": [near, far | {"labels": labels}]}, tmp_path / "run")


def test_classes_of_the_validation_data_reach_mapped_streams_and_those_without_classes(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    names = open_split(SCENES, "train").classes.names
    (tmp_path / "map.txt").write_text("\n".join(f"{number} {name}" for number, name in enumerate(names)))
    mapped = plain["stream"][0] | {"class-map": str(tmp_path / "map.txt")}
    far = {"name": "far", "data": f"depth:{OTHERS},depth=exact", "labels": "depth", "method": "depth-l1"}
    settings = plain | {"model": "kdcache:hydra", "stream": [far, mapped]}
    trainer = begun(settings | {"val": SCENES}, tmp_path / "run")
    assert [stream.draws.dataset.classes.names for stream in trainer.streams] == [names] * 2
    with pytest.raises(MismatchError, match="no --val"):
        begun(settings | {"val": None}, tmp_path / "other")


@pytest.mark.parametrize("store", [False, True])
def test_a_stream_of_data_without_classes_learns_depth_alone(
    plain: dict[str, Any],
    make_cache: Callable[..., Path],
    depth_teacher: torch.nn.Module,
    store: bool,
    tmp_path: Path,
    read_metrics: Read,
) -> None:
    """Depth is learnt from labels, and from a store of a teacher's depth, beside a stream with classes."""
    data = "depth:scenes:32x48,train=5,val=3,depth=exact,tasks=depth"
    far = {"name": "b", "data": data, "method": "depth-l1"}
    if store:
        path = make_cache(data, model=depth_teacher, heads=("depth",))
        far = {"name": "b", "cache": str(path), "method": "none", "term": ["depth-l1", "depth-silog,reference=teacher"]}
    settings = plain | {"model": "kdcache:hydra", "stream": [far, plain["stream"][0]], "size": "32x48"}
    train(make_config(**settings), tmp_path / "run")
    rows = read_metrics(tmp_path / "run", "train")
    assert len(rows) == 6
    for row in rows:
        assert row["b/ce"] == 0 < row["a/ce"]
        assert row["b/depth-l1"] > 0
        assert row.get("b/depth-silog", 1) > 0


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A data folder of the scenes with four classes, and the class that each of theirs is there; 255 is void."""
    root, table = write_scenes(tmp_path / "merged", OTHERS), np.array([2, 0, 3, 1, 1, 255, 0], np.uint8)
    path = next(root.glob("classes.*"))
    path.write_text("one\ntwo\nthree\nfour\n")
    whole = np.append(table, np.full(249, 255, np.uint8))
    for label in (root / "labels").rglob("*.png"):
        Image.fromarray(whole[np.asarray(Image.open(label))]).save(label)
    return root, table


def test_targets_of_another_class_list_are_merged(
    taught: dict[str, Any], merged: tuple[Path, np.ndarray], cache_path: Path, tmp_path: Path, read_metrics: Read
) -> None:
    """The first step beside probabilities that are summed and renormalised in float64."""
    root, table = merged
    names = open_split(str(root), "train").classes.names
    lines = [f"{number} {'void' if to == 255 else names[to]}" for number, to in enumerate(table.tolist())]
    (tmp_path / "map.txt").write_text("\n".join(lines))
    taught_of = f"b,cache={cache_path},augment=none,class-map={tmp_path / 'map.txt'}"
    settings = taught | {"stream": [f"a,data={root},augment=none,method=none,share=0.5", taught_of], "val": None}
    kl = ["method=kl,gate=confidence:0.3", "class-balance=sqrt"]
    settings["stream"][1] = ",".join([taught_of, *kl])
    train(make_config(**settings | {"iterations": 2}), tmp_path / "weighed")
    assert read_metrics(tmp_path / "weighed", "train")[0]["b/kl"] > 0
    settings["stream"][1] = f"{taught_of},method=kl"
    train(make_config(**settings | {"iterations": 1, "seed": 4}), tmp_path / "run")
    torch.manual_seed(4)
    model = build_model("kdcache:tiny", 4)
    cache = open_cache(cache_path)
    own = Draws(LabelledDataset(open_split(str(root), "train"), (32, 48), Augmentation.off()), 4)
    stored = Draws(CacheDataset(cache, augment="none"), stream_seed(4, 1))
    samples = [*(own[draw] for draw in range(2)), *(stored[draw] for draw in range(2))]
    outputs = model.train()(model.normalise(torch.stack([sample.pixels for sample in samples])))
    logits = F.interpolate(outputs.logits[2:].double(), (32, 48), mode="bilinear")
    values = torch.stack([sample.targets["segmentation"].values for sample in samples[2:]]).double()
    p = values.softmax(1)
    sums = torch.stack([p[:, np.flatnonzero(table == to)].sum(1) for to in range(4)], 1)
    z = F.interpolate(sums.log(), (32, 48), mode="bilinear")
    kl = (z / 2).softmax(1) * ((z / 2).log_softmax(1) - (logits / 2).log_softmax(1))
    label = torch.stack(
        [torch.from_numpy(np.append(table, [255] * 249))[sample.label.long()] for sample in samples[2:]]
    )
    (row,) = read_metrics(tmp_path / "run", "train")
    assert row["b/kl"] == pytest.approx(4 * kl.sum(1).mean().item(), rel=2e-3)
    assert row["b/ce"] == pytest.approx(F.cross_entropy(logits, label.long(), ignore_index=255).item(), rel=1e-4)


def test_a_stream_without_labels_learns_from_targets_alone(
    taught: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    streams = [taught["stream"][0].replace("kl+dist", "kl,labels=none"), taught["stream"][1]]
    train(make_config(**taught | {"stream": streams, "gradients_every": 1, "val": None}), tmp_path / "run")
    assert all(row["a/ce"] == 0 < row["a/kl"] for row in read_metrics(tmp_path / "run", "train"))
    assert all("a/ce" not in row and row["a/kl"] > 0 for row in read_metrics(tmp_path / "run", "gradients"))


def test_a_stream_inherits_the_training_s_store_and_drops_what_weighs_a_teacher(
    student: dict[str, Any], cache_path: Path
) -> None:
    config = make_config(
        **student | {"gate": "correct", "batch_size": 4, "stream": ["a,limit-samples=2", "b,method=none,labels=all"]}
    )
    a, b = (stream.config for stream in config.streams)
    assert a.data.cache == b.data.cache == (str(cache_path),)
    assert (a.loss.gate, a.loss.method, a.data.limit_samples) == ("correct", "kl", 2)
    assert (b.loss.gate, b.loss.method, b.data.limit_samples) == ("none", "none", None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 6, "accumulate": 2, "method": "kl", "stream": ["a", "b"]}, r"--batch-size 8"),
        ({"stream": ["a,share=0.01", "b"]}, r"--batch-size 50"),
        ({"stream": ["a,share=0.5", "b,share=0.6"]}, r"sum up to 1\.1, not 1"),
        ({"stream": ["a", "a"]}, "The stream name 'a' is used 2 times"),
        ({"stream": ["a", "b,wieght=2"]}, "Did you mean weight"),
        ({"stream": ["a", "b,weight=-2"]}, r"(?s)stream b: .*--weight: '-2'.*Give a number from 0"),
        ({"stream": ["a", "b,data=x,method=kl"]}, "stream b: Cannot learn kl without --cache"),
        ({"stream": ["a", "b,method=dice,labels=none"]}, "stream b: .*none of"),
        ({"stream": ["a", "b,method=kl+dice,labels=none"]}, "stream b: Cannot learn dice: no sample has a label"),
        ({"stream": ["a", "b,labels=depth"]}, "stream b: Cannot learn --labels depth: .*, and not of depth"),
        ({"stream": ["a", "b,augment=warp,limit-views=3"]}, "stream b: Cannot use --limit-views 3 with --augment warp"),
        ({"stream": ["a", "b,cache=nowhere.zarr"]}, "stream b: "),
        (
            {"stream": ["a,method=none,class-map=x", "b,method=none,class-map=y"], "val": None},
            "(?s)every stream .* has a class map, .*Add --val DATA",
        ),
        ({"stream": ["a", "b,class-map=y"]}, "stream b: Cannot read the class map y"),
        ({"stream": ["a", "b,class-map={w}/map.txt,term=cwd"]}, "cwd, which reads raw logits|--raw-logits"),
        (
            {"stream": ["a", "b,class-map={w}/map.txt,class-trust={w}/trust"]},
            "--class-trust .*, of the cache's classes",
        ),
        ({"stream": ["a,method=none", "b,method=none,class-map={w}/void.txt"]}, "makes void of all 7 classes"),
        ({"stream": ["a", "b,method=none,labels=none"]}, "none of 6 samples has a label that --labels none leaves"),
        ({"stream": ["a", "b,class-map={w}/merged.txt"]}, "No teacher class becomes"),
    ],
)
def test_bad_streams_are_refused(changes: dict[str, Any], words: str, student: dict[str, Any], tmp_path: Path) -> None:
    names = open_split(SCENES, "train").classes.names
    (tmp_path / "map.txt").write_text("\n".join(f"{number} {name}" for number, name in enumerate(names)))
    (tmp_path / "merged.txt").write_text("\n".join(f"{number} {names[number // 2]}" for number in range(len(names))))
    (tmp_path / "void.txt").write_text("\n".join(f"{number} void" for number in range(len(names))))
    streams = [line.replace("{w}", str(tmp_path)) for line in changes.get("stream", ())]
    changes = changes | ({"stream": streams} if streams else {})
    with pytest.raises(KDCacheError, match=words):
        begun(student | {"batch_size": 4} | changes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_stream_trains_as_a_training_without_streams(
    settings: dict[str, Any], plain: dict[str, Any], tmp_path: Path
) -> None:
    alone = plain | {"stream": [{"name": "a", "data": SCENES}], "gradients_every": 1}
    train(make_config(**alone), tmp_path / "stream")
    train(make_config(**settings | {"batch_size": 4}), tmp_path / "plain")
    of_stream, of_plain = (load_file(tmp_path / name / "last.safetensors") for name in ("stream", "plain"))
    assert all(torch.equal(of_stream[name], of_plain[name]) for name in of_plain)


@pytest.mark.parametrize("source", ["data", "cache"])
def test_a_stream_without_labels_teaches_by_its_entropy(
    plain: dict[str, Any], cache_path: Path, tmp_path: Path, read_metrics: Read, source: str
) -> None:
    """All of its images count, and the student decides on them."""
    unlabelled = {"name": "b", source: OTHERS if source == "data" else str(cache_path), "labels": "none"}
    unlabelled |= {"method": "none", "term": ["entropy,weight=1"]}
    settings = plain | {"val": None, "iterations": 60, "lr": 1e-2, "stream": [plain["stream"][0], unlabelled]}
    config = make_config(**settings)
    assert len(open_sources(config, 1, print)[1].dataset) == (5 if source == "data" else 6)
    train(config, tmp_path / "run")
    entropies = [line["b/entropy"] for line in read_metrics(tmp_path / "run", "train")]
    assert 0 < entropies[-1] < 0.7 * entropies[0] < 0.7
    alone = settings | {"stream": [unlabelled]}
    with pytest.raises(RecipeError, match="no stream of b has labels or a teacher"):
        begun(alone, tmp_path / "alone")


@pytest.fixture
def adversarial(plain: dict[str, Any]) -> dict[str, Any]:
    """Labels of one stream; predictions on the other are to pass for those on the first."""
    camera = {"name": "b", "data": OTHERS, "labels": "none", "method": "none", "term": ["adversarial,weight=0.1"]}
    return plain | {"val": None, "stream": [plain["stream"][0], camera], "clip_grad": 0.01, "gradients_every": 2}


def test_a_discriminator_learns_by_itself_and_resumes_to_the_bit(
    adversarial: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    config = make_config(**adversarial)
    train(config, tmp_path / "whole")
    losses = read_metrics(tmp_path / "whole", "train")
    assert losses[0]["b/discriminator"] == pytest.approx(0.69, abs=0.03)
    assert losses[-1]["b/discriminator"] < losses[0]["b/discriminator"]  # whatever the student's clipping
    assert "b/discriminator" not in read_metrics(tmp_path / "whole", "gradients")[0]

    class Stop(Observer):
        def stepped(self, step: int, values: dict[str, float]) -> None:
            if step == 3:
                signal.raise_signal(signal.SIGINT)

    with suppress(Interrupted):
        train(config, tmp_path / "stopped", observer=Stop())
    assert not (tmp_path / "stopped/result.json").exists()
    train(config, tmp_path / "stopped", resume=True)
    for name in ("model", "criterion"):
        whole, resumed = (
            torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)[name] for run in ("whole", "stopped")
        )
        assert any("discriminator" in key for key in whole) == (name == "criterion")
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    best = load_file(tmp_path / "whole/last.safetensors")
    assert not any("discriminator" in key for key in best)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "sgd"}, "trained by Adam"),
        (
            {"stream": ["a,data=scenes", "b,data=scenes,term=adversarial", "c,data=scenes"]},
            "(?s)the stream b has no `against`, beside a, c.*Add against=a",
        ),
        (
            {"stream": ["a,data=scenes", 'b,data=scenes,"term=adversarial,against=c"']},
            "(?s)the stream b has against=c, beside a.*Add against=a",
        ),
        (
            {"stream": (), "data": "scenes", "method": "none", "term": ["adversarial"], "size": "32x48"},
            "beside no other",
        ),
    ],
)
def test_an_adversary_without_its_stream_is_refused(
    adversarial: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        begun(adversarial | changes, tmp_path / "run")


@pytest.mark.parametrize(
    ("methods", "whole"),
    [(("none", "none"), "none"), (("none", "entropy"), "entropy"), (("kl+at", "none", "dist+at"), "kl+at+dist")],
)
def test_the_method_of_a_run_is_what_its_streams_learn_by(methods: tuple[str, ...], whole: str) -> None:
    base = {"verb": "train-student", "model": "kdcache:tiny", "size": "32x48", "batch_size": 4}
    streams = [f"s{number},cache=x,method={method}" for number, method in enumerate(methods)]
    for method in ("auto", "pseudo"):
        config = make_config(**base, stream=streams, method=method)
        assert config.loss.method == whole
        assert TrainConfig.of(settings_of(tomllib.loads(config.to_toml()))).to_toml() == config.to_toml()


def test_a_teacher_of_streams_learns_from_labels_alone() -> None:
    base = {"verb": "train-teacher", "model": "kdcache:tiny", "size": "32x48", "batch_size": 4}
    config = make_config(**base, stream=[f'a,"data={SCENES}"', "b,cache=x"])
    assert [stream.config.loss.method for stream in config.streams] == ["none", "none"]
    with pytest.raises(RecipeError, match="in train-teacher: it learns from labels only") as caught:
        make_config(**base, stream=[f'a,"data={SCENES}"', "b,cache=x,method=kl"])
    assert caught.value.problem.startswith("stream b: ")
    with pytest.raises(RecipeError, match="no --data and no --stream"):
        make_config(**base)
