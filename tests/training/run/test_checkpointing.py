"""A checkpoint brings everything back, to each process its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcache.models import build_model
from kdcache.training import TrainConfig
from kdcache.training.distributed import World
from kdcache.training.run.checkpointing import Progress, RunState
from kdcache.training.step.eager import EagerStep
from kdcache.training.step.optim import Schedule, make_optimizer

CPU = torch.device("cpu")
OTHERS = [{"cpu": torch.full((5056,), number, dtype=torch.uint8)} for number in (1, 2)]


class Three(World):
    """The first of three processes, whose others have random states of their own."""

    def gather(self, thing: Any) -> list[Any]:
        return [thing, *OTHERS] if isinstance(thing, dict) else [thing]


def new(seed: int, config: TrainConfig, run: Path, world: World | None = None) -> tuple[RunState, list[Any]]:
    """The state of a training of a model and a projection, and what it owns."""
    torch.manual_seed(seed)
    model, criterion = build_model("kdcache:tiny", 7), torch.nn.Conv2d(3, 2, 1)
    optimizer = make_optimizer(torch.nn.ModuleList([model, criterion]), config.optimizer)
    schedule = Schedule(optimizer, config.optimizer)
    step = EagerStep.__new__(EagerStep)
    step.model, step.criterion, step.optimizer, step.device = model, criterion, optimizer, CPU  # type: ignore[assignment]
    return RunState(run, config, step, schedule, world or World()), [model, criterion, optimizer, schedule]


def tensors_of(owners: list[Any]) -> list[torch.Tensor]:
    model, criterion, optimizer, _ = owners
    moments = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return [*model.state_dict().values(), *criterion.state_dict().values(), *moments]


def test_everything_is_as_it_was_saved(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    settings = config(schedule="plateau", lr=0.1)
    saved, owners = new(1, settings, tmp_path, Three())
    model, criterion, optimizer, schedule = owners
    pixels = torch.rand(2, 3, 16, 16)
    for scale in (1.0, 3.0):
        (scale * model(pixels).logits.square().mean() + criterion(pixels).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for score in (0.5, *[0.4] * 8):
        schedule.after_validation(score)
    saved.now = Progress(step=7, best_score=0.5, best_step=3, seconds=12.5, waited=1.5, prepared=0.25)
    random = torch.get_rng_state()
    saved.save()

    for rank, expected in ((0, {"cpu": random}), (1, OTHERS[0]), (2, OTHERS[1]), (3, None)):
        restored, others = new(2, settings, tmp_path, World(rank, 4))
        assert not torch.equal(tensors_of(others)[0], tensors_of(owners)[0])
        random_state = restored.restore()
        assert (random_state is None) == (expected is None)
        assert random_state is None or torch.equal(random_state["cpu"], expected["cpu"])
        pairs = list(zip(tensors_of(others), tensors_of(owners), strict=True))
        assert len(pairs) > 50
        assert all(torch.equal(a, b) for a, b in pairs)
        assert restored.now == saved.now
        assert others[3].lr == schedule.lr == 0.05
        assert others[3].state_dict() == schedule.state_dict()


def test_nothing_saved_is_nothing_restored(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    restored, _ = new(1, config(), tmp_path)
    assert restored.restore() is None
    assert restored.now == Progress()
