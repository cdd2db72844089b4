"""A batch learnt in parts gives the losses and gradients of the whole, whatever counts unevenly in its parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate

from kdcache.data import Augmentation
from kdcache.distill import Batch, Criterion, DistillLoss, Streams
from kdcache.errors import RecipeError
from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.training import CacheDataset, Observer, TrainConfig, make_config, train
from kdcache.training.criterion import make_criterion, needed_arrays
from kdcache.training.distributed import World
from kdcache.training.input.loader import Draws
from kdcache.training.input.mix import Mix
from kdcache.training.input.streams import StreamDraws
from kdcache.training.step.accumulate import AccumulatedStep
from kdcache.training.step.eager import EagerStep
from kdcache.training.trainer import Trainer

Read = Callable[..., list[dict[str, Any]]]
CPU = torch.device("cpu")


class Keeping(torch.optim.SGD):
    """Learns nothing; keeps the gradients that it was to learn from."""

    applied: list[torch.Tensor]

    def step(self, closure: Any = None) -> None:
        self.applied = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


@pytest.fixture(scope="module")
def rich(make_cache: Callable[..., Path]) -> Path:
    """A store with features and raw logits."""
    return make_cache(features=("stage2", "head"), raw_logits=True)


@pytest.fixture
def both(rich: Path, config: Callable[..., TrainConfig]) -> Callable[..., tuple[EagerStep, EagerStep, Streams]]:
    """(step of the whole, step in parts, batch of 4 of which one part has hardly a label) for settings of a run."""

    def make(parts: int, **changes: Any) -> tuple[EagerStep, EagerStep, Streams]:
        cache = open_cache(rich)
        chosen = config(verb="train-student", data=None, cache=str(rich), size="32x48", **changes)
        torch.manual_seed(5)
        model = build_model("kdcache:tiny", cache.num_classes).eval()  # BatchNorms with statistics of their own
        # Zooms out, too: windows that reach beyond the view count fewer pixels.
        dataset = CacheDataset(
            cache, extras=needed_arrays(chosen, cache, model), augmentation=Augmentation(scale=(0.3, 2.0))
        )
        criterion = Criterion([make_criterion(chosen, model, dataset, CPU, lambda _: None)])
        mix = None if chosen.augmentation.mix is None else Mix(chosen.augmentation.mix)
        dataset.dice = 0 if mix is None else mix.dice
        draws = Draws(dataset, 0)
        batch: Batch = default_collate([draws[number] for number in range(4)])
        batch.label[:2, 2:] = 255
        steps = []
        for kind, more in ((EagerStep, {}), (AccumulatedStep, {"parts": parts})):
            learning = torch.nn.ModuleList([model, criterion])
            optimizer = Keeping(learning.parameters(), lr=1.0)
            steps.append(kind(model, criterion, optimizer, device=CPU, mix=mix, **more))
        return steps[0], steps[1], (batch,)

    return make


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return bool((one - two).norm() <= 1e-5 * one.norm())


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "none"},
        {"method": "kl", "class_weights": "median", "ce_weight": 0.7},
        {"method": "kl", "distill_void": False, "gate": "confidence:0.5"},
        {"method": "kl", "distill_schedule": "fade"},
        {"method": "kl+at+hint+cosine+dkd+pseudo", "gate": "correct"},
        {"method": "cwd", "term": ["cwd,teacher_tap=head"]},
        {"method": "kl+dkd+cwd", "teacher": "labels", "label_smoothing": 0.1, "class_weights": "median"},
        {
            "method": "dice+lovasz",
            "label_smoothing": 0.2,
            "term": ["pseudo,threshold=0.3,normalise=share,class_weights=sqrt"],
        },
    ],
)
def test_parts_are_the_whole(changes: dict[str, Any], parts: int, norms: bool, both: Callable[..., Any]) -> None:
    whole, parted, batch = both(parts, **changes)
    for step in (whole, parted):
        step.criterion.set_distill_weight_scale(0.3)  # of those with a schedule
    agree(whole, parted, batch, norms)


@pytest.mark.parametrize("mix", ["cutmix", "classmix:0.7"])
def test_mixed_parts_are_the_whole(mix: str, both: Callable[..., Any]) -> None:
    agree(*both(2, method="kl", mix=mix, distill_void=False), True)


def agree(whole: EagerStep, parted: EagerStep, batch: Streams, norms: bool) -> None:
    if norms:
        (losses, own_norms), (expected, of_whole) = parted.with_norms(batch), whole.with_norms(batch)
        assert own_norms.terms == pytest.approx(of_whole.terms, rel=1e-5)
        assert len(own_norms.terms) > 0
    else:
        losses, expected = parted(batch), whole(batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)
    gradients, wanted = parted.optimizer.applied, whole.optimizer.applied
    assert len(gradients) == len(wanted) > 10
    assert close(torch.cat([g.flatten() for g in wanted]), torch.cat([g.flatten() for g in gradients]))
    assert all(p.grad is None for p in parted.model.parameters())


def test_a_mean_of_means_would_be_told_apart(both: Callable[..., Any]) -> None:
    """What the tests above could not see if the parts of the batch were alike."""
    whole, parted, batch = both(2, method="kl")
    naive = torch.stack([whole(parted.part_of(batch, number)) for number in range(2)]).mean(0)
    assert (naive - whole(batch)).abs().max() > 1e-3


def go(settings: dict[str, Any], run: Path, observer: Observer | None = None) -> dict[str, Any]:
    return train(make_config(**settings), run, observer=observer)


def test_a_run_in_parts_is_the_run(
    student: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path, read_metrics: Read
) -> None:
    settings = student | {"model": model_file("tied"), "batch_size": 4, "gradients_every": 2, "lr": 0.01}
    go(settings, tmp_path / "whole")
    go(settings | {"accumulate": 2}, tmp_path / "parts")
    for kind in ("train", "gradients", "validation"):
        rows = [read_metrics(tmp_path / name, kind) for name in ("whole", "parts")]
        assert len(rows[0]) == len(rows[1]) > 0
        for one, two in zip(*rows, strict=True):
            for name in {"loss", "ce", "kl", "miou"} & one.keys():
                assert two[name] == pytest.approx(one[name], rel=1e-4), (kind, one["step"], name)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_norms_change_nothing_and_a_run_resumes_to_the_bit(
    student: dict[str, Any], model_file: Callable[[str], str], tmp_path: Path
) -> None:
    """With dropout: the random numbers of parts are drawn once, in order."""
    settings = student | {"model": model_file("dropout"), "batch_size": 4, "accumulate": 2}
    go(settings | {"gradients_every": 0}, tmp_path / "plain")

    class StopError(Exception):
        pass

    class Stopping(Observer):
        def stepped(self, step: int, values: dict[str, float]) -> None:
            if step == 5:
                raise StopError

    measured = make_config(**settings, gradients_every=1)
    with pytest.raises(StopError):
        train(measured, tmp_path / "stopped", observer=Stopping())
    train(measured, tmp_path / "stopped", resume=True)
    one, two = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("plain", "stopped"))
    assert one == two


def test_no_part_holds_more_than_its_share(
    student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    from kdcache.models import SegmentationModel

    normalise = SegmentationModel.normalise
    monkeypatch.setattr(
        SegmentationModel,
        "normalise",
        lambda self, pixels: seen.append((self.training, len(pixels))) or normalise(self, pixels),
    )
    go(student | {"batch_size": 6, "accumulate": 3}, tmp_path / "run")
    assert {size for training, size in seen if training} == {2}
    assert {size for training, size in seen if not training} == {1, 2}  # three images to validate


def test_parts_are_eager_and_it_is_said(
    cache: Any, student: dict[str, Any], tmp_path: Path, config: Callable[..., TrainConfig]
) -> None:
    class Notes(Observer):
        texts: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.texts.append(text)

    go(student | {"batch_size": 4, "accumulate": 2, "step": "compiled"}, tmp_path / "run", Notes())
    assert [text for text in Notes.texts if "accumulate" in text] == [
        "--accumulate learns from the parts of a batch in eager steps, not compiled"
    ]
    assert not [text for text in Notes.texts if "prepared" in text]


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"method": "kl+sp"}, "sp"),
        ({"method": "dist"}, "dist"),
        ({"term": ["pseudo,quantile=0.5"]}, "pseudo"),
        ({"term": ["consistency,by=student,quantile=0.5"]}, "consistency"),
    ],
)
def test_terms_of_the_whole_batch_are_refused(changes: dict[str, Any], kind: str, student: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_config(**(student | {"accumulate": 2} | changes))
    assert caught.value.problem == f"Cannot use --accumulate 2 with {kind}: it compares the whole batch"
    assert "--method kl can accumulate" in caught.value.fix
    make_config(**(student | changes))


@pytest.mark.parametrize(
    ("batch", "size", "together", "parts", "remedy"),
    [(6, 1, 1, 4, "4 or 8"), (8, 2, 2, 4, "16"), (12, 1, 2, 4, "8 or 16"), (8, 1, 1, 3, "6 or 9")],
)
def test_parts_divide_the_batch(batch: int, size: int, together: int, parts: int, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        World(0, size).check_batch_size(batch, together, parts)
    assert f"--batch-size {remedy}, or" in caught.value.fix
    assert caught.value.problem.endswith(f"--accumulate {parts}")
    World(0, size).check_batch_size(size * together * parts, together, parts)


def test_an_uneven_batch_is_refused_before_anything_is_written(student: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Cannot share --batch-size"):
        go(student | {"batch_size": 4, "accumulate": 3}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_trainer_makes_the_step_that_was_asked_for(
    cache: Any, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    for parts, kind in ((1, EagerStep), (2, AccumulatedStep)):
        chosen = config(batch_size=4, accumulate=parts, val=None)
        made = Trainer(
            build_model("kdcache:tiny", cache.num_classes),
            [StreamDraws("", Draws(CacheDataset(cache), 0), 4)],
            Criterion([DistillLoss(cache)]),
            chosen,
            tmp_path,
            device=CPU,
        )
        assert type(made.eager) is kind
