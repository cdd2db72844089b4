"""Trainings whose samples are drawn by rare classes."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdcache.data import open_split
from kdcache.errors import RecipeError
from kdcache.training import Interrupted, Observer, make_config, train
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World
from kdcache.training.trainer import Trainer

SCENES = "scenes:32x48,train=6,val=3"


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def begun(settings: dict[str, Any], run: Path, observer: Observer | None = None) -> Trainer:
    return make_trainer(make_config(**settings), run, World(), observer or Observer(), resume=False)


def expected(data: str, temperature: float) -> np.ndarray[Any, Any]:
    """How often each sample is drawn, from its labels."""
    split = open_split(data, "train")
    labels = [np.asarray(split.label(number)) for number in range(len(split))]
    counts = np.array([[(label == c).sum() for c in range(7)] for label in labels], np.float64)
    odds = np.exp((1 - counts.sum(0) / counts.sum()) / temperature) * (counts.sum(0) > 0)
    shows = counts > 3000 / (1914 * 1052) * 32 * 48
    return np.asarray((odds / odds.sum() * shows / shows.sum(0)).sum(1))


@pytest.mark.parametrize("source", ["data", "cache"])
def test_samples_with_rare_classes_are_drawn_more_often(
    source: str, settings: dict[str, Any], student: dict[str, Any], tmp_path: Path
) -> None:
    own = settings if source == "data" else student
    notes = Notes()
    trainer = begun(own | {"sampling": "rare:0.2", "seed": 5}, tmp_path / "run", notes)
    draws = trainer.streams[0].draws
    visits = np.bincount([draws.visit(draw)[0] for draw in range(20_000)], minlength=6) / 20_000
    p = expected(SCENES, 0.2)
    assert (np.abs(visits - p) <= 5 * np.sqrt(p * (1 - p) / 20_000)).all()
    assert p.max() > 1.2 * p.min()
    assert any(text.startswith("--sampling rare:0.2 draws samples by a class that they show: ") for text in notes.texts)


@pytest.mark.parametrize("streams", [False, True])
def test_a_run_by_rare_classes_resumes_to_the_bit(streams: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    if streams:
        lines = [f'game,"data={SCENES}",sampling=rare', f'b,"data={SCENES}",labels=none,paste=classmix,paste-from=game']
        settings |= {"data": None, "stream": lines, "verb": "train-student", "batch_size": 4}
    else:
        settings |= {"sampling": "rare"}

    class Stop(Observer):
        def stepped(self, step: int, values: dict[str, float]) -> None:
            if step == 3:
                signal.raise_signal(signal.SIGINT)

    train(make_config(**settings), tmp_path / "whole")
    with suppress(Interrupted):
        train(make_config(**settings), tmp_path / "stopped", observer=Stop())
    train(make_config(**settings), tmp_path / "stopped", resume=True)
    train(make_config(**settings | {"workers": 2}), tmp_path / "workers")
    weights = [load_file(tmp_path / name / "last.safetensors") for name in ("whole", "stopped", "workers")]
    assert all(torch.equal(weights[0][name], other[name]) for name in weights[0] for other in weights[1:])
    if not streams:
        with pytest.raises(RecipeError, match=r"--sampling rare:0.1 \(was rare\)"):
            train(make_config(**settings | {"sampling": "rare:0.1"}), tmp_path / "whole", resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": "rare", "labels": "none"}, "6 of 6 samples have no label of classes"),
        ({"sampling": "rare", "limit_labels": 2}, "4 of 6 samples have no label of classes"),
        ({"sampling": "rare", "shuffle": "window"}, "--sampling rare with --shuffle window"),
        (
            {"stream": ["a", "b,labels=none"], "sampling": "rare", "batch_size": 4},
            "stream b: Cannot use --sampling rare: 6 of 6 samples",
        ),
        (
            {"stream": ["a", "b,sampling=common"], "batch_size": 4},
            "(?s)stream b: .*--sampling: 'common'.*Give even, rare",
        ),
    ],
)
def test_samples_that_cannot_be_drawn_by_class_are_refused(
    changes: dict[str, Any], words: str, student: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        begun(student | changes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labelled_samples_alone_are_drawn_by_class(student: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(student | {"sampling": "rare", "limit_labels": 2, "distill_on": "labelled"}, tmp_path / "run")
    draws = trainer.streams[0].draws
    assert {draws.visit(draw)[0] for draw in range(50)} <= {0, 1}
