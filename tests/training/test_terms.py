"""Trainings with further terms, gates and mixing: what is logged, resumed, shared and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.errors import KDCacheError, RecipeError
from kdcache.training import Observer, make_config, read_config, train
from kdcache.training.distributed import World
from kdcache.training.run.monitor import Watch, measures_norms

Read = Callable[..., list[dict[str, Any]]]
TAPS = ("stage2", "head")


@pytest.fixture(scope="module")
def rich(make_cache: Callable[..., Path]) -> Path:
    """A store with features."""
    return make_cache(features=TAPS)


@pytest.fixture
def rich_student(rich: Path, student: dict[str, Any]) -> dict[str, Any]:
    return student | {
        "cache": str(rich),
        "val": None,
        "flip": True,
        "iterations": 4,
        "val_every": 2,
        "gradients_every": 2,
    }


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def go(settings: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    return train(make_config(**settings), out, **options)


@pytest.mark.parametrize("method", ["kl+at+sp", "hint+cosine", "dist+dkd+pseudo", "at"])
def test_every_term_is_logged_beside_the_labels(
    method: str, rich_student: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    go(rich_student | {"method": method}, tmp_path / "run")
    names = {"ce", *method.split("+")}
    lines = read_metrics(tmp_path / "run", "train")
    assert all(names <= set(line) for line in lines)
    assert all(line[name] > 0 for line in lines for name in names - {"pseudo"})
    norms = read_metrics(tmp_path / "run", "gradients")
    assert [set(line) - {"kind", "step"} for line in norms] == [names] * 2
    weights = load_file(tmp_path / "run" / "last.safetensors")
    assert not [name for name in weights if "project" in name]


def test_terms_of_a_kind_have_weights_and_taps_of_their_own(
    rich_student: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    terms = ["cosine,weight=0.1,teacher_tap=stage2,student_tap=stage2", {"kind": "cosine", "weight": 0.5}]
    go(rich_student | {"method": "none", "term": terms}, tmp_path / "run")
    line = read_metrics(tmp_path / "run", "train")[-1]
    assert line["loss"] == pytest.approx(line["ce"] + 0.1 * line["cosine"] + 0.5 * line["cosine_2"], rel=1e-5)
    assert (
        read_config(tmp_path / "run").terms == make_config(**(rich_student | {"method": "none", "term": terms})).terms
    )


def test_a_run_with_projections_resumes_to_the_bit(rich_student: dict[str, Any], tmp_path: Path) -> None:
    settings = rich_student | {"method": "kl+hint", "mix": None}
    go(settings, tmp_path / "whole")

    class StopError(Exception):
        pass

    class Stopping(Observer):
        def stepped(self, step: int, values: dict[str, float]) -> None:
            if step == 3:
                raise StopError

    with pytest.raises(StopError):
        go(settings, tmp_path / "parts", observer=Stopping())
    go(settings, tmp_path / "parts", resume=True)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("mix", ["cutmix", "classmix:0.5"])
def test_mixed_batches_are_learnt_and_repeat(mix: str, rich_student: dict[str, Any], tmp_path: Path) -> None:
    settings = rich_student | {"method": "kl", "mix": mix, "gate": "correct"}
    go(settings, tmp_path / "one")
    go(settings | {"workers": 2}, tmp_path / "two")
    go(rich_student | {"method": "kl", "gate": "correct"}, tmp_path / "plain")
    one, two, plain = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two", "plain"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], plain[name]) for name in one)


def test_weights_that_do_nothing_or_everything_are_told_once(rich_student: dict[str, Any], tmp_path: Path) -> None:
    notes = Notes()
    terms = ["at,weight=1e-6", "dkd,weight=1000"]
    go(rich_student | {"method": "none", "term": terms}, tmp_path / "run", observer=notes)
    assert sum("at hardly does anything" in text for text in notes.texts) == 1
    assert sum("dkd dominates the loss" in text for text in notes.texts) == 1


def test_ten_times_the_labels_is_told_after_a_second_look() -> None:
    watch = Watch(["loss"], World(), lambda step: [])
    norms = {"ce": 2.0, "dist": 50.0, "kl": 19.0, "at": 0.1, "cwd": 300.0}
    first = list(watch.lopsided(0, norms))
    assert [text.split(":")[0] for text in first] == ["cwd dominates the loss"]
    second = list(watch.lopsided(100, norms | {"kl": 21.0, "at": 0.01}))
    assert [text.split(":")[0] for text in second] == [
        "dist dominates the loss",
        "kl dominates the loss",
        "at hardly does anything",
    ]
    assert list(watch.lopsided(500, norms)) == []


@pytest.mark.parametrize(("every", "steps"), [(500, [0, 100, 500]), (7, [0, 7, 14]), (0, []), (1000, [0, 100, 1000])])
def test_norms_are_looked_at_again_soon(every: int, steps: list[int]) -> None:
    assert [step for step in range(1001) if measures_norms(step, every)][: len(steps)] == steps


def test_what_would_do_nothing_is_told_or_refused(rich_student: dict[str, Any], tmp_path: Path) -> None:
    notes = Notes()
    go(rich_student | {"method": "kl", "labelled_share": 0.5}, tmp_path / "run", observer=notes)
    assert any("--labelled-share has no effect" in text for text in notes.texts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "cwd"}, "--raw-logits"),
        ({"method": "at", "cache": "plain"}, "--statistics at:"),
        ({"method": "hint", "cache": "plain"}, "--features"),
        ({"term": ["hint,student_tap=nowhere"]}, "nowhere"),
        ({"method": "kl", "mix": "cutmix", "batch_size": 3}, "--batch-size"),
        ({"method": "kl+at", "mix": "cutmix"}, "mix"),
        ({"method": "kl", "class_trust": "auto"}, "trust-against"),
        ({"method": "kl", "limit_samples": 7}, "--limit-samples"),
        ({"method": "kl", "limit_views": 1, "augment": "warp"}, "--limit-views 1 with --augment warp"),
        ({"method": "hint", "augment": "warp", "flip": None}, "--no-flip"),
        ({"method": "kl", "fold": "0/9"}, "fold"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, rich_student: dict[str, Any], cache_path: Path, tmp_path: Path
) -> None:
    if changes.get("cache") == "plain":
        changes = changes | {"cache": str(cache_path)}
    with pytest.raises(KDCacheError) as caught:
        go(rich_student | changes, tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_gate_needs_labels(make_cache: Callable[..., Path], rich_student: dict[str, Any], tmp_path: Path) -> None:
    store = make_cache("scenes:32x48,train=6,val=3,unlabelled=4", "unlabelled")
    with pytest.raises(RecipeError, match="--gate correct"):
        go(rich_student | {"cache": str(store), "method": "kl", "gate": "correct"}, tmp_path / "run")


def test_a_discriminator_that_wins_is_noted_once() -> None:
    watch = Watch(["loss"], World(), lambda step: [])
    values = [0.005] * 9 + [0.3] + [0.005] * 10 + [0.001] * 20
    notes = [list(watch.won({"loss": 1.0, "camera/discriminator": value})) for value in values]
    assert [number for number, texts in enumerate(notes) if texts] == [19]
    assert "of the stream camera is too strong" in notes[19][0]
    assert not list(watch.won({"discriminator/ce": 0.0}))
    levels = {"camera/discriminator-auxiliary": 0.001, "camera/discriminator-auxiliary_2": 0.002}
    texts = [text for _ in range(10) for text in watch.won(levels)]
    start = "the discriminator of the auxiliary head of the stream camera is too strong: in 10 log lines"
    assert [text[: len(start)] for text in texts] == [start] * 2
