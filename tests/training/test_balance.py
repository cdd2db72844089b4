"""The balance of two tasks in a training: its weights, its norms, its checkpoints, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.distill import SEGMENTATION
from kdcache.errors import KDCacheError, RecipeError
from kdcache.tasks import DEPTH
from kdcache.training import Observer, make_config, train
from kdcache.training.api import make_trainer
from kdcache.training.distributed import World
from kdcache.training.input.loader import next_batch
from kdcache.training.input.streams import feed_streams
from kdcache.training.run.monitor import Watch
from kdcache.training.term_setting import make_balance
from kdcache.training.trainer import Trainer

EXACT = "scenes:32x48,train=6,val=3,depth=exact"
Read = Callable[..., list[dict[str, Any]]]


class Seen(Observer):
    def __init__(self) -> None:
        self.tasks: list[tuple[int, dict[str, dict[str, float]]]] = []

    def balanced(self, step: int, tasks: dict[str, dict[str, float]]) -> None:
        self.tasks.append((step, tasks))


@pytest.fixture
def both(settings: dict[str, Any]) -> dict[str, Any]:
    changes = {"verb": "train-student", "model": "kdcache:tiny+depth", "data": EXACT, "method": "depth-silog"}
    return settings | changes | {"val": None, "lr": 0.01, "batch_size": 4}


@pytest.fixture
def streams(both: dict[str, Any]) -> dict[str, Any]:
    tables = [
        {"name": "classes", "data": "scenes:32x48,train=6,val=3", "weight": 2.0},
        {"name": "metres", "data": EXACT, "method": "depth-silog", "ce-weight": 0},
    ]
    return both | {"data": None, "method": "none", "stream": tables}


def begun(settings: dict[str, Any], run: Path) -> Trainer:
    return make_trainer(make_config(**settings), run, World(), Observer(), resume=False)


def first_step(trainer: Trainer) -> tuple[Any, Any]:
    """The inputs of the loss of the first step, as the eager step makes them."""
    batches = feed_streams(trainer.streams, torch.device("cpu"), first=0, last=1, workers=0)
    batch = next_batch(batches)
    batches.close()
    trainer.model.train()
    return trainer.eager.loss_inputs(batch), batch


@pytest.mark.parametrize("kind", ["fixed", "uncertainty"])
def test_the_balance_weighs_the_sum_of_each_task(kind: str, streams: dict[str, Any], tmp_path: Path) -> None:
    weights = {"task_weight": ["depth=0.25"]} if kind == "fixed" else {"balance": kind}
    trainer = begun(streams | weights, tmp_path / "run")
    criterion = trainer.criterion
    inputs, _ = first_step(trainer)
    losses = criterion(*inputs)
    segmentation, depth = 2.0 * losses.terms["classes/ce"], 0.1 * losses.terms["metres/depth-silog"]
    torch.testing.assert_close(dict(losses.tasks), {SEGMENTATION: segmentation.detach(), DEPTH: depth.detach()})
    if kind == "fixed":
        torch.testing.assert_close(losses.loss, 0.5 * segmentation + 0.25 * depth)
    else:  # log-variances of 0 add nothing
        torch.testing.assert_close(losses.loss, segmentation + depth)
        losses.loss.backward()
        learnt = dict(criterion.balance.named_parameters())  # type: ignore[union-attr]
        assert learnt["log_variance.segmentation"].grad == pytest.approx(0.5 - segmentation.item(), rel=1e-5)
        assert learnt["log_variance.depth"].grad == pytest.approx(1.0 - depth.item(), rel=1e-5)


def test_norms_are_over_the_parameters_that_both_tasks_reach(
    both: dict[str, Any], tmp_path: Path, read_metrics: Read
) -> None:
    trainer = begun(both, tmp_path / "begun")
    inputs, _ = first_step(trainer)
    parameters = list(trainer.model.parameters())
    losses = trainer.criterion(*inputs)
    parts = {SEGMENTATION: 0.5 * losses.ce, DEPTH: 0.05 * losses.terms["depth-silog"]}
    assert parts  # the parts are detached: their gradients come from the loss's own parts
    own = trainer.criterion.parts(*inputs)
    gradients = {
        task: torch.autograd.grad(own[name], parameters, retain_graph=True, allow_unused=True)
        for task, name in ((SEGMENTATION, "ce"), (DEPTH, "depth-silog"))
    }
    shared = [all(g is not None for g in pair) for pair in zip(*gradients.values(), strict=True)]
    assert 0 < sum(shared) < len(shared)
    norms = {
        task: torch.cat([g.flatten() for g, both in zip(of_task, shared, strict=True) if both]).norm().item()
        for task, of_task in gradients.items()
    }
    seen = Seen()
    train(make_config(**both | {"gradients_every": 3}), tmp_path / "run", observer=seen)
    line, later = (row["tasks"] for row in read_metrics(tmp_path / "run", "gradients"))
    for task, other in ((SEGMENTATION, DEPTH), (DEPTH, SEGMENTATION)):
        assert line[task]["norm"] == pytest.approx(norms[task], rel=1e-3)
        assert line[task]["ratio"] == pytest.approx(norms[task] / norms[other], rel=1e-3)
        assert line[task]["weight"] == later[task]["weight"] == 0.5
    assert line[DEPTH]["loss"] == pytest.approx(0.1 * losses.terms["depth-silog"].item(), rel=1e-4)
    assert seen.tasks[0] == (1, line)
    assert seen.tasks[1] == (1, read_metrics(tmp_path / "run", "train")[0]["tasks"])


def test_parts_of_a_batch_learn_the_same_balance(both: dict[str, Any], tmp_path: Path) -> None:
    learnt = []
    for parts in (1, 2):
        run = tmp_path / str(parts)
        train(make_config(**both | {"balance": "uncertainty", "accumulate": parts, "iterations": 2}), run)
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        learnt.append({name: s.item() for name, s in state["criterion"].items() if "log_variance" in name})
    assert learnt[0].keys() == {"balance.log_variance.segmentation", "balance.log_variance.depth"}
    assert learnt[1] == pytest.approx(learnt[0], rel=1e-2)  # BatchNorm sees a part alone
    assert all(s != 0 for s in learnt[0].values())


@pytest.mark.parametrize("source", ["both", "streams"])
def test_a_learnt_balance_resumes_to_the_bit(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    settings = request.getfixturevalue(source) | {"balance": "uncertainty", "iterations": 6, "gradients_every": 0}

    class StopError(Exception):
        pass

    class Stop(Observer):
        def stepped(self, step: int, values: dict[str, float]) -> None:
            if step == 4:
                raise StopError

    train(make_config(**settings), tmp_path / "whole")
    with pytest.raises(StopError):
        train(make_config(**settings), tmp_path / "resumed", observer=Stop())
    train(make_config(**settings), tmp_path / "resumed", resume=True)
    whole, resumed = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "resumed"))
    assert whole["criterion"] == resumed["criterion"]
    weights = [load_file(tmp_path / run / "last.safetensors") for run in ("whole", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_learnt_balance_is_trained_without_decay(both: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(both | {"balance": "uncertainty", "weight_decay": 0.5}, tmp_path / "run")
    own = {id(s) for s in trainer.criterion.parameters()}
    groups = [group for group in trainer.eager.optimizer.param_groups if own & {id(p) for p in group["params"]}]
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_a_compiled_step_learns_the_balance(
    both: dict[str, Any], tmp_path: Path, read_metrics: Read, backend: Any
) -> None:
    for step in ("eager", "compiled"):
        settings = both | {"balance": "uncertainty", "step": step, "gradients_every": 0}
        train(make_config(**settings), tmp_path / step)
    assert backend.programs > 0
    eager, compiled = (read_metrics(tmp_path / step, "train") for step in ("eager", "compiled"))
    for one, two in zip(eager, compiled, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_one_task_has_no_balance(settings: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    assert make_balance("fixed", (), (SEGMENTATION,)) is None
    train(make_config(**settings | {"val": None, "gradients_every": 3}), tmp_path / "run")
    assert all("tasks" not in row for kind in ("train", "gradients") for row in read_metrics(tmp_path / "run", kind))


# --- a head that starves -----------------------------------------------------------------------------------


def looks(*norms: tuple[float, float], weights: tuple[float, float] = (0.5, 0.5)) -> list[list[str]]:
    """Notes after each look at the norms of segmentation and depth."""
    watch = Watch(["loss"], World(), lambda step: [])
    notes = []
    for classes, metres in norms:
        ratios = (classes / metres if metres else math.nan, metres / classes if classes else math.nan)
        own = zip((classes, metres), ratios, weights, strict=True)
        lines = [{"loss": 1.0, "weight": weight, "norm": norm, "ratio": ratio} for norm, ratio, weight in own]
        notes.append(list(watch.starving(dict(zip((SEGMENTATION, DEPTH), lines, strict=True)))))
    return notes


def test_a_head_starves_at_two_looks_running() -> None:
    assert looks((1.0, 0.05), (1.0, 0.2), (1.0, 0.05)) == [[], [], []]
    first, (note,), third = looks((1.0, 0.05), (1.0, 0.05), (1.0, 0.05))
    assert (first, third) == ([], [])
    assert "the head depth hardly learns" in note
    assert "now 0.05 times" in note
    assert "Fix: balance them with --task-weight segmentation=0.048 --task-weight depth=0.95" in note


def test_the_weights_that_balance_take_the_present_ones_into_account() -> None:
    *_, (note,) = looks(*[(0.01, 0.9)] * 2, weights=(0.1, 0.9))
    assert "the head segmentation hardly learns" in note
    assert "segmentation=0.91 --task-weight depth=0.091" in note
    assert looks(*[(1.0, 0.0)] * 2, weights=(1.0, 0.0)) == [[], []]  # as it was asked for
    *_, (note,) = looks(*[(1.0, 0.0)] * 2)
    assert "depth has no gradient there" in note


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method": "none", "balance": "uncertainty"},
            "--balance uncertainty: segmentation alone is learnt, and a balance is one of two tasks",
        ),
        ({"method": "none", "task_weight": ["depth=0.3"]}, "a balance is one of two tasks"),
        ({"ce_weight": 0, "balance": "uncertainty"}, "depth alone"),
        ({"balance": "uncertainty", "task_weight": ["depth=0.3"]}, "learns the weights"),
        ({"task_weight": ["depth=0", "segmentation=0"]}, "Nothing to learn: --task-weight depth=0"),
        ({"task_weight": ["depth=-1"]}, r"--task-weight: 'depth=-1'.*TASK=X"),
        ({"task_weight": ["depht=1"]}, "segmentation, depth"),
        ({"task_weight": ["depth=1", "depth=2"]}, "each given once"),
        ({"task_weight": ["depth"]}, "TASK=X"),
        ({"task_weight": ["depth=nan"]}, "TASK=X"),
        ({"balance": "gradnorm"}, "fixed, uncertainty"),
    ],
)
def test_balances_that_cannot_be(changes: dict[str, Any], words: str, both: dict[str, Any]) -> None:
    with pytest.raises(KDCacheError) as error:
        make_config(**both | changes)
    assert re.search(words, str(error.value), flags=re.DOTALL)


def test_a_stream_has_no_balance_of_its_own(streams: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="setting of the whole training"):
        make_config(**streams | {"stream": [{**streams["stream"][0], "task-weight": ["depth=1"]}]})
    assert make_config(**streams | {"task_weight": ["depth=0.3"]}).tasks == (SEGMENTATION, DEPTH)
    with pytest.raises(RecipeError, match="a balance is one of two tasks"):
        make_config(**streams | {"stream": streams["stream"][:1], "balance": "uncertainty"})
