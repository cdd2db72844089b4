"""Learning rates against closed forms; optimizers' groups."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kdcache.errors import RecipeError
from kdcache.training import TrainConfig
from kdcache.training.step.optim import Schedule, distill_weight_scale, make_optimizer


def new(config: TrainConfig) -> tuple[torch.optim.Optimizer, Schedule]:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(model, config.optimizer)
    return optimizer, Schedule(optimizer, config.optimizer)


def rates(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> list[float]:
    actual = []
    for _ in range(steps):
        actual.append(schedule.lr)
        optimizer.step()
        schedule.after_step()
    return actual


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_poly_is_its_formula_with_linear_warm_up(config: Callable[..., TrainConfig], warmup: int) -> None:
    actual = rates(*new(config(iterations=40, lr=0.02, warmup=warmup)), 40)
    expected = [0.02 * (step + 1) / warmup if step < warmup else 0.02 * (1 - step / 40) ** 0.9 for step in range(40)]
    assert actual == pytest.approx(expected, rel=1e-12)


def test_constant_stays_after_its_warm_up(config: Callable[..., TrainConfig]) -> None:
    actual = rates(*new(config(iterations=10, lr=0.5, schedule="constant", warmup=4)), 10)
    assert actual == pytest.approx([0.125, 0.25, 0.375] + [0.5] * 7)


def test_plateau_halves_when_the_score_has_not_risen_for_five_validations(
    config: Callable[..., TrainConfig],
) -> None:
    optimizer, schedule = new(config(iterations=10, lr=0.8, schedule="plateau"))
    seen = []
    for score in [0.1, 0.2, 0.3, *[0.3] * 5, 0.25, 0.3, 0.31, *[0.1] * 6]:
        rates(optimizer, schedule, 2)
        schedule.after_validation(score)
        seen.append(schedule.lr)
    assert seen == pytest.approx([0.8] * 8 + [0.4] * 8 + [0.2])


def test_the_teacher_fades_on_a_line(config: Callable[..., TrainConfig]) -> None:
    taught = {"verb": "train-student", "cache": "x.zarr", "data": None, "method": "kl", "iterations": 8}
    fading = config(**taught, distill_schedule="fade")
    scales = [distill_weight_scale(fading.loss.distill_schedule, step, 8) for step in range(9)]
    assert scales == pytest.approx([1 - step / 8 for step in range(9)])
    assert distill_weight_scale(config(**taught).loss.distill_schedule, 8, 8) == 1
    rising = config(**taught, distill_schedule="warmup:4")
    scales = [distill_weight_scale(rising.loss.distill_schedule, step, 8) for step in range(8)]
    assert scales == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["poly", "constant", "plateau"])
def test_the_state_goes_on_where_it_was_saved(config: Callable[..., TrainConfig], name: str) -> None:
    settings = config(iterations=40, lr=0.1, schedule=name, warmup=3, optimizer="sgd")
    scores = [0.5] * 40

    def go_on(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: range) -> list[float]:
        actual = []
        for step in steps:
            actual += rates(optimizer, schedule, 1)
            schedule.after_validation(scores[step])
        return actual

    whole = go_on(*new(settings), range(40))
    optimizer, schedule = new(settings)
    first = go_on(optimizer, schedule, range(17))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    optimizer, schedule = new(settings)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert first + go_on(optimizer, schedule, range(17, 40)) == whole
    assert len(set(whole)) > 1


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_biases_and_normalisations_are_not_decayed(
    config: Callable[..., TrainConfig], name: str, kind: type[torch.optim.Optimizer]
) -> None:
    optimizer, _ = new(config(optimizer=name, weight_decay=0.3))
    assert type(optimizer) is kind
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {4: 0.3, 1: 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    if name == "sgd":
        assert optimizer.param_groups[0]["momentum"] == 0.9


def test_rates_scale_by_the_beginning_of_names(config: Callable[..., TrainConfig]) -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"stem": nn.Conv2d(3, 4, 1), "body": nn.Conv2d(4, 4, 1)}),
                           "head": nn.Conv2d(4, 2, 1)})  # fmt: skip
    settings = config(iterations=10, lr=0.5, lr_scale=("encoder=0.1", "encoder.stem=0.01"), warmup=0)
    projection = nn.Linear(2, 2)
    optimizer = make_optimizer(model, settings.optimizer, projection)
    schedule = Schedule(optimizer, settings.optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    names |= {id(parameter): name for name, parameter in projection.named_parameters()}

    def scaled() -> dict[str, float]:
        return {names[id(p)]: group["lr"] / schedule.lr for group in optimizer.param_groups for p in group["params"]}

    expected = {name: 0.01 if "stem" in name else 0.1 if "encoder" in name else 1.0 for name in names.values()}
    assert scaled() == pytest.approx(expected)
    for parameter in (*model.parameters(), *projection.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.after_step()
    assert schedule.lr < 0.5
    assert scaled() == pytest.approx(expected)


def test_a_prefix_of_no_parameter_is_refused(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(RecipeError, match="No parameter begins with 'encoder', as --lr-scale asks"):
        make_optimizer(nn.Sequential(nn.Conv2d(3, 4, 1)), config(lr_scale="encoder=0.1").optimizer)
