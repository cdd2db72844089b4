"""Trainings that paste samples of one stream into those of another."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.data import open_split
from kdcache.distill import Streams
from kdcache.errors import KDCacheError, RecipeError
from kdcache.models import build_model
from kdcache.training import Interrupted, Observer, make_config, train
from kdcache.training.api import make_trainer
from kdcache.training.criterion import label_counts
from kdcache.training.distributed import World
from kdcache.training.input.loader import next_batch
from kdcache.training.input.streams import feed_streams
from kdcache.training.trainer import Trainer

GAME = "scenes:32x48,train=6,val=3"
Read = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def pasted(student: dict[str, Any], cache_path: Path) -> dict[str, Any]:
    """Labels of a game; pseudo labels of a camera, into whose images halves of the game's classes are pasted."""
    camera = f"camera,cache={cache_path},labels=none,method=kl+pseudo,paste=classmix,paste-from=game"
    own = {"cache": None, "method": "auto", "batch_size": 4, "size": "32x48", "val": None, "class_weights": "sqrt"}
    return student | own | {"stream": [f'game,"data={GAME}"', camera]}


def begun(settings: dict[str, Any], run: Path) -> Trainer:
    return make_trainer(make_config(**settings), run, World(), Observer(), resume=False)


def changed(settings: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The settings with another text in the camera's line."""
    game, camera = settings["stream"]
    assert old in camera
    return settings | {"stream": [game, camera.replace(old, new)]}


def first_batch(trainer: Trainer) -> Streams:
    """The first batch after pasting."""
    with_errors = feed_streams(trainer.streams, trainer.device, first=0, last=1, workers=0)
    return trainer.eager.mixed(next_batch(with_errors))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


def test_images_without_labels_get_labels_where_others_are_pasted(pasted: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(pasted, tmp_path / "run")
    game, camera = first_batch(trainer)
    assert game.own is None
    assert camera.own is not None
    assert game.pixels is not None
    assert camera.pixels is not None
    assert not camera.own.all()
    assert camera.own.any()
    assert torch.equal(camera.label, torch.where(camera.own, 255, game.label))
    assert torch.equal(camera.pixels[~camera.own], game.pixels[~camera.own])
    losses = trainer.criterion.losses
    assert losses[0].class_weight is not None
    assert losses[1].class_weight is not None  # of the labels that are pasted, for it has none of its own
    assert torch.equal(losses[0].class_weight, losses[1].class_weight)
    assert label_counts(trainer.streams[1].draws.dataset).sum() == 0


def test_the_weight_of_a_stream_reaches_what_is_pasted(
    pasted: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    """Loss, gradient and weights of the model: nothing of the mixed loss is computed and left out."""
    states = []
    for weight in (0, 0.5, 2):
        settings = changed(pasted, "labels=none", f"labels=none,weight={weight}") | {"iterations": 1}
        train(make_config(**settings | {"gradients_every": 1}), tmp_path / str(weight))
        (line,), (norms,) = (read_metrics(tmp_path / str(weight), kind) for kind in ("train", "gradients"))
        assert line["loss"] == pytest.approx(line["game/loss"] + weight * line["camera/loss"], rel=1e-6)
        parts = line["camera/ce"] + 0.3 * line["camera/kl"] + line["camera/pseudo"]
        assert line["camera/loss"] == pytest.approx(parts, rel=1e-6)
        assert min(line["camera/ce"], line["camera/kl"], line["camera/pseudo"]) > 0
        states.append(
            (line["camera/loss"], norms.get("camera/loss", 0) / (weight or 1), weights_of(tmp_path / str(weight)))
        )
    assert states[0][0] == states[1][0] == states[2][0]
    assert states[1][1] == pytest.approx(states[2][1], rel=1e-4)
    assert states[1][1] > 0
    assert not all(torch.equal(states[0][2][name], states[1][2][name]) for name in states[0][2])


@pytest.mark.parametrize("paste", ["classmix", "cutmix:0.7"])
def test_a_run_that_pastes_resumes_to_the_bit(paste: str, pasted: dict[str, Any], tmp_path: Path) -> None:
    settings = changed(pasted, "classmix", paste)

    class Stop(Observer):
        def stepped(self, step: int, values: dict[str, float]) -> None:
            if step == 3:
                signal.raise_signal(signal.SIGINT)

    train(make_config(**settings), tmp_path / "whole")
    with suppress(Interrupted):
        train(make_config(**settings), tmp_path / "stopped", observer=Stop())
    assert not (tmp_path / "stopped/result.json").exists()
    train(make_config(**settings), tmp_path / "stopped", resume=True)
    plain = changed(settings, f",paste={paste},paste-from=game", "")
    train(make_config(**plain), tmp_path / "plain")
    whole, stopped, without = (weights_of(tmp_path / name) for name in ("whole", "stopped", "plain"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not all(torch.equal(whole[name], without[name]) for name in whole)
    with pytest.raises(RecipeError, match="--stream"):
        train(make_config(**plain), tmp_path / "whole", resume=True)


def test_parts_of_a_batch_paste_as_the_whole(
    pasted: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path, read_metrics: Read
) -> None:
    """Rows 2 and 6 of 8: a row of the game is pasted three times."""
    settings = changed(pasted, "labels=none", "labels=none,share=0.75") | {"model": model_file("tied"), "lr": 0.01}
    for name, parts in (("whole", 1), ("parts", 2)):
        train(make_config(**settings | {"accumulate": parts, "batch_size": 8}), tmp_path / name)
    rows = [read_metrics(tmp_path / name, "train") for name in ("whole", "parts")]
    for one, two in zip(*rows, strict=True):
        for name in (name for name in one if "/" in name or name == "loss"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), (one["step"], name)


def test_a_compiled_step_pastes(pasted: dict[str, Any], tmp_path: Path, read_metrics: Read, backend: Any) -> None:
    for step in ("eager", "compiled"):
        train(make_config(**pasted | {"step": step, "gradients_every": 0, "lr": 0.005}), tmp_path / step)
    assert backend.programs > 0
    rows = [read_metrics(tmp_path / step, "train") for step in ("eager", "compiled")]
    for one, two in zip(*rows, strict=True):
        for name in (name for name in one if "/" in name):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


def test_stores_of_two_kinds_paste_into_each_other(
    pasted: dict[str, Any], depth_paths: dict[str, Path], source_path: Path, tmp_path: Path, read_metrics: Read
) -> None:
    """Logits of all classes and depth into a top-k store without pixels, whose labels teach alone there, and back."""
    one = f"one,cache={depth_paths['stored']},method=kl,paste=cutmix,paste-from=two"
    one += ',"term=depth-silog,reference=teacher",term=depth-l1,augment=warp,depth-zoom=divide,scale=1:2'
    two = f'two,cache={source_path},"data={GAME}",method=kl,paste=classmix:0.5,paste-from=one'
    settings = pasted | {"stream": [one, two], "model": "kdcache:hydra"}
    train(make_config(**settings), tmp_path / "run")
    for line in read_metrics(tmp_path / "run", "train"):
        assert min(line[name] for name in ("one/ce", "one/kl", "one/depth-silog", "two/ce", "two/kl")) > 0


def test_images_alone_learn_from_what_is_pasted(pasted: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    camera = f'camera,"data={GAME}",labels=none,method=none,paste=cutmix,paste-from=game'
    settings = pasted | {"stream": [f'game,"data={GAME}",weight=0', camera]}
    train(make_config(**settings), tmp_path / "run")
    assert all(line["camera/ce"] > 0 for line in read_metrics(tmp_path / "run", "train"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "paste-from=game",
            "paste-from=film",
            "camera: .*paste is classmix, and paste-from film, beside the streams game",
        ),
        ("paste-from=game", "paste-from=camera", "paste-from camera, which is itself"),
        (",paste-from=game", "", "paste-from left out"),
        ("paste=classmix,", "", "paste is left out, and paste-from game"),
        ("classmix", "mixup", "(?s)Invalid paste .*paste=cutmix"),
        ("classmix", "classmix:2", "Invalid paste"),
        ("kl+pseudo", "kl+dist", "paste classmix with dist"),
        ("paste-from", "paste-form", "Did you mean paste-from"),
    ],
)
def test_settings_that_cannot_paste_are_refused(old: str, new: str, words: str, pasted: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=words):
        make_config(**changed(pasted, old, new))


def test_pasting_within_and_between_streams_is_refused(pasted: dict[str, Any]) -> None:
    settings = changed(pasted, "kl+pseudo", "kl") | {"mix": "cutmix"}
    with pytest.raises(RecipeError, match="a pixel is pasted once"):
        make_config(**settings)


def test_sources_that_cannot_be_pasted_are_refused(
    pasted: dict[str, Any], cache_path: Path, depth_paths: dict[str, Path], tmp_path: Path
) -> None:
    camera = pasted["stream"][1]
    unlabelled = [f"game,cache={cache_path},labels=none,method=kl", camera]
    with pytest.raises(RecipeError, match="camera: Cannot use paste-from game: no sample of it has a label"):
        begun(pasted | {"stream": unlabelled}, tmp_path / "run")
    metres = '"data=scenes:32x48,train=6,val=3,depth=exact",labels=depth,method=depth-l1,ce-weight=0'
    settings = pasted | {"stream": [f"game,{metres}", camera], "model": "kdcache:hydra"}
    with pytest.raises(RecipeError, match="Cannot use paste-from game: its labels are of depth alone"):
        begun(settings, tmp_path / "run")
    (tmp_path / "map.txt").write_text("0 void\n")
    with pytest.raises(KDCacheError, match="game"):
        begun(pasted | {"stream": [f'game,"data={GAME}",class-map={tmp_path}/map.txt', camera]}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_targets_of_a_source_with_a_class_map_are_merged_before_they_are_pasted(
    pasted: dict[str, Any], cache_path: Path, tmp_path: Path, read_metrics: Read
) -> None:
    """A map of every class to itself changes nothing but the rounding."""
    names = open_split(GAME, "train").classes.names
    (tmp_path / "map.txt").write_text("\n".join(f"{number} {name}" for number, name in enumerate(names)))
    camera = f"camera,cache={cache_path},labels=none,method=kl,paste=cutmix,paste-from=game"
    losses = []
    for mapped in ("", f",class-map={tmp_path}/map.txt"):
        settings = pasted | {"stream": [f"game,cache={cache_path},method=kl{mapped}", camera], "iterations": 1}
        train(make_config(**settings), tmp_path / f"run{len(mapped)}")
        losses.append(read_metrics(tmp_path / f"run{len(mapped)}", "train")[0])
    assert losses[1]["camera/ce"] == losses[0]["camera/ce"]
    assert losses[1]["camera/kl"] == pytest.approx(losses[0]["camera/kl"], rel=2e-3)


def test_depth_of_another_kind_of_head_is_refused(
    pasted: dict[str, Any], depth_paths: dict[str, Path], make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_cache(
        "scenes:32x48,train=6,val=3,depth=exact", model=build_model("kdcache:hydra,as=softplus,max=50", 7)
    )
    terms = 'method=kl,"term=depth-silog,reference=teacher"'
    streams = [f"game,cache={other},{terms}", f"b,cache={depth_paths['stored']},{terms},paste=cutmix,paste-from=game"]
    with pytest.raises(RecipeError, match=r"(?s)stream b: Cannot use paste-from game: .*depth as .*50.*80"):
        begun(pasted | {"stream": streams, "model": "kdcache:hydra"}, tmp_path / "run")
