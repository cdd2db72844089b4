"""benchmarks/step.py and turns.py: each contestant learns what its name says, from equal batches, and ratios are right.

No clock is read: what is learnt is watched, what is timed is made up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kdcache.distill import DistillLoss, pixels_of
from kdcache.errors import RecipeError
from kdcache.store import Cache, open_cache
from kdcache.training.input.loader import next_batch

KINDS = ("none", "kl", "two", "live")
TARGETS = {"targets/segmentation/values"}


@pytest.fixture
def step(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("step")


@pytest.fixture
def arguments(options) -> Any:
    fixed = {"student": "kdcache:tiny", "teacher": "kdcache:tiny", "size": (32, 48), "device": "cpu"}
    return options(batch_size=4, workers=0, steps=2, repeats=3, **fixed)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The arrays that are read of any cache from now on."""
    found: set[str] = set()
    for name in ("read", "read_into"):
        original = getattr(Cache, name)

        def watched(self: Cache, record: int, paths: Any, *rest: Any, original: Any = original) -> Any:
            found.update([paths] if isinstance(paths, str) else paths)
            return original(self, record, paths, *rest)

        monkeypatch.setattr(Cache, name, watched)
    return found


def taken(learner: Any) -> list[torch.Tensor]:
    """Batches that a learner takes from now on: a spy in place of its step."""
    batches: list[Any] = []
    step = learner.step
    learner.step = lambda batch: batches.append(batch) or step(batch)
    return batches


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_read_by_those_that_learn_from_them(step, store, arguments, reads, kind) -> None:
    step.learner(open_cache(store), kind, arguments)
    assert {path for path in reads if path.startswith("targets/")} == (TARGETS if kind in ("kl", "two") else set())
    assert {"pixels/image", "labels/segmentation"} <= reads


@pytest.mark.parametrize("kind", KINDS)
def test_every_contestant_learns_from_as_many_rows_of_one_size(step, store, arguments, kind) -> None:
    learner = step.learner(open_cache(store), kind, arguments)
    batches = taken(learner)
    learner(3)
    assert [tuple(pixels_of(batch).shape) for batch in batches] == 3 * [(4, 32, 48, 3)]
    assert learner.size == (4, 32, 48, 3)
    contestant = learner.contestant(kind, 5)
    assert (contestant.samples, contestant.size) == (5, learner.size)
    contestant.work()
    assert len(batches) == 3 + 5, "a turn is as many steps as its time is divided by"


@pytest.mark.parametrize("kind", KINDS)
def test_all_contestants_see_the_same_pixels_and_labels(step, store, arguments, kind) -> None:
    """Of the first stream: the second one of `two` has an order of its own."""
    plain, other = (next_batch(step.batches(open_cache(store), of, arguments)) for of in ("none", kind))
    (plain,), first = plain, other[0]
    rows = len(first.pixels)
    assert rows == (2 if kind == "two" else 4)
    assert torch.equal(first.pixels, plain.pixels[:rows])
    assert torch.equal(first.labels["segmentation"], plain.labels["segmentation"][:rows])
    assert (first.window is not None) or kind == "live"


def losses(step: ModuleType, store: Path, kind: str, arguments: Any) -> tuple[Any, Any, Any]:
    """The loss of a first step, its criterion's loss by hand, on the same batch and weights."""
    cache = open_cache(store)
    batch = next_batch(step.batches(cache, kind, arguments))
    made = step.make(cache, kind, batch, arguments)
    return made, batch, made.loss_inputs(made.to_device(batch))


@pytest.mark.parametrize(("kind", "weight"), [("none", 0.0), ("kl", 1.0), ("live", 1.0)])
def test_the_loss_is_cross_entropy_and_as_much_of_the_teacher(step, store, arguments, kind, weight) -> None:
    made, _, inputs = losses(step, store, kind, arguments)
    expected = DistillLoss(open_cache(store), ce_weight=1.0, kl_weight=weight, align_corners=made.model.align_corners)
    (batch,) = inputs.batch
    assert made.forward(inputs.batch).loss.item() == pytest.approx(expected(inputs.outputs, batch).loss.item())
    without = DistillLoss(open_cache(store), ce_weight=1.0, kl_weight=0.0, align_corners=made.model.align_corners)
    gap = made.forward(inputs.batch).loss.item() - without(inputs.outputs, batch).loss.item()
    assert (gap > 1e-4) == (weight > 0)


def test_two_streams_weigh_half_each_and_both_have_a_teacher(step, store, arguments) -> None:
    made, batch, inputs = losses(step, store, "two", arguments)
    parts = made.forward(inputs.batch)
    alone = []
    for place, stream in enumerate(batch):
        rows = inputs.outputs.logits[2 * place : 2 * place + 2]
        criterion = DistillLoss(open_cache(store), kl_weight=1.0, align_corners=made.model.align_corners)
        alone.append(criterion(rows, stream).loss.item())
    assert parts.loss.item() == pytest.approx(0.5 * alone[0] + 0.5 * alone[1], rel=1e-5)


def test_a_live_teacher_runs_on_the_pixels_of_the_step(step, store, arguments, monkeypatch) -> None:
    teacher = step.teacher_of("kdcache:tiny", open_cache(store).num_classes)
    monkeypatch.setattr(step, "teacher_of", lambda spec, classes: teacher)
    cache = open_cache(store)
    batch = next_batch(step.batches(cache, "live", arguments))
    made = step.make(cache, "live", batch, arguments)
    (taught,) = made.to_device(batch)
    (target,) = taught.targets.values()
    with torch.no_grad():
        logits = teacher(teacher.normalise(taught.pixels)).logits
    expected = logits - logits.logsumexp(1, keepdim=True)
    found = target.values.float() - target.values.float().logsumexp(1, keepdim=True)
    assert torch.allclose(found, expected, atol=2e-2)
    assert not teacher.training


@pytest.mark.parametrize("kind", KINDS)
def test_steps_change_weights_and_are_warm_before_the_first_turn(step, store, arguments, monkeypatch, kind) -> None:
    made, before = [], []
    original = step.make

    def watched(*given: Any) -> Any:
        made.append(original(*given))
        before.append([parameter.clone() for parameter in made[-1].model.parameters()])
        calls = made[-1].calls = []

        def counted(batch: Any) -> Any:
            calls.append(len(pixels_of(batch)))
            return made[-1](batch)

        return counted

    monkeypatch.setattr(step, "make", watched)
    step.learner(open_cache(store), kind, arguments)
    assert len(made[0].calls) >= 2, "the first steps compile and allocate"
    moved = [not torch.equal(old, new) for old, new in zip(before[0], made[0].model.parameters(), strict=True)]
    assert all(moved)


def test_the_race_is_of_the_named_kinds_and_turns(step, store, arguments, monkeypatch) -> None:
    seen = {}

    def turns(contestants: Any, rounds: int) -> str:
        seen.update({one.name: (one.samples, one.size) for one in contestants}, rounds=rounds)
        return "paces"

    monkeypatch.setattr(step, "in_turn", turns)
    assert step.race(store, ("none", "kl"), arguments) == "paces"
    assert seen == {"none": (2, (4, 32, 48, 3)), "kl": (2, (4, 32, 48, 3)), "rounds": 3}


def test_ratios_are_of_medians_and_of_two_streams_best(step, pace) -> None:
    paces = {
        "none": pace(100.0, 90, 400),
        "kl": pace(104.0, 50, 300),
        "two": pace(108.0, 51, 900),
        "live": pace(840.0, 800, 5000),
    }
    peaks = {"none": 10.0, "kl": 11.0, "two": 12.0, "live": 13.0}
    result = step.result(paces, peaks, 1.10)
    assert result["kl_over_none"] == 1.04
    assert result["live_over_none"] == 8.4
    assert result["live_over_kl"] == round(840 / 104, 3)
    assert result["two_streams_over_one"] == 1.02
    assert result["two_streams_over_one_by_medians"] == round(108 / 104, 4)
    assert result["peak_mib"] == peaks
    assert {kind: row["p50"] for kind, row in result["ms_per_step"].items()} == {
        "none": 100,
        "kl": 104,
        "two": 108,
        "live": 840,
    }
    faster = step.result({**paces, "kl": pace(80.0, 80, 80)}, peaks, 1.10)
    assert faster["kl_over_none"] == 0.8, "no ratio is clipped"


@pytest.mark.parametrize(("device", "bound"), [("cpu", 1.10), ("cuda", 1.05)])
@pytest.mark.parametrize("over", [-0.002, 0.002])
def test_the_bound_is_on_the_step_from_the_cache(step, pace, device, bound, over) -> None:
    one = pace(100.0, 100, 100)
    kl = pace(*3 * (100 * (bound + over),))
    result = step.result({"none": one, "kl": kl, "two": kl, "live": one}, {}, step.BOUNDS[device])
    assert (result["bound"], result["met"]) == (bound, over < 0)
    assert step.is_met(result) == (over < 0)


@pytest.mark.parametrize(("two", "met"), [(104.9, True), (105.1, False)])
def test_the_bound_of_two_streams(step, pace, two, met) -> None:
    found = step.compare_streams({"kl": pace(100.0, 200, 300), "two": pace(two, 200, 300)})
    assert (found["streams_bound"], found["streams_met"], step.is_met(found)) == (1.05, met, met)


@pytest.mark.parametrize(("no_bounds", "slow", "code"), [(False, True, 1), (False, False, 0), (True, True, 0)])
def test_a_missed_bound_is_an_exit_code(
    step, pace, store, scenes, call, monkeypatch, tmp_path, no_bounds, slow, code
) -> None:
    times = {"none": 100.0, "kl": 120.0 if slow else 101.0, "two": 101.0, "live": 300.0}
    monkeypatch.setattr(step, "race", lambda store, kinds, given: {kind: pace(*3 * [times[kind]]) for kind in kinds})
    monkeypatch.setattr(step, "peak_elsewhere", lambda store, kind: 1.0)
    words = ["--data", scenes, "--store", store, "--json", tmp_path / "step.json"]
    assert call(step, *words, *(["--no-bounds"] if no_bounds else [])) == code
    assert call(step, *words, "--streams-only", "--repeats", 4) == 0


def test_memory_is_of_a_whole_training_in_mib(step, store, arguments, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(step, "learner", lambda *given: seen.append(given[1]) or (lambda count: seen.append(count)))
    monkeypatch.setattr(step.memory, "peak_in_process", lambda work: work() or 12.34)
    assert step.peak_mib(open_cache(store), "kl", arguments) == 12.3
    assert seen[0] == "kl"
    assert seen[1] >= 1


def test_a_batch_without_halves_is_an_error(step, store, arguments) -> None:
    arguments.batch_size = 5
    with pytest.raises(RecipeError, match="Cannot share a batch of 5 rows") as caught:
        step.learner(open_cache(store), "two", arguments)
    assert "even --batch-size" in caught.value.fix


# turns.py


@pytest.fixture
def turns(script, clock, monkeypatch) -> ModuleType:
    module = script("turns")
    monkeypatch.setattr(module, "time", clock)
    return module


def test_a_turn_is_timed_by_the_sample_and_nothing_else_is(turns, clock) -> None:
    order: list[str] = []

    def contestant(name: str, ms: float, samples: int) -> Any:
        def work() -> None:
            order.append(name)
            clock.work(ms)

        return turns.Contestant(name, work, samples, before=lambda: clock.work(1000))

    paces = turns.in_turn([contestant("a", 10, 4), contestant("b", 30, 3)], 3)
    assert order == ["a", "b"] * 3
    assert [paces[name].time.p50 for name in "ab"] == pytest.approx([2.5, 10.0])
    assert paces["a"].cpu.p50 == pytest.approx(2.5)


def test_a_median_is_of_the_turns(turns, clock) -> None:
    times = iter([9.0, 1.0, 2.0, 50.0, 3.0])
    paces = turns.in_turn([turns.Contestant("a", lambda: clock.work(next(times)), 1)], 5)
    assert (paces["a"].time.p50, paces["a"].time.best) == pytest.approx((3.0, 1.0))


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_too_few_rounds_for_a_median(turns, rounds) -> None:
    with pytest.raises(RecipeError, match=f"Too few repeats for a median: {rounds}"):
        turns.in_turn([turns.Contestant("a", lambda: None, 1)], rounds)


def test_contestants_of_different_sizes(turns) -> None:
    ours, theirs = (turns.Contestant(f"b{rows}", lambda: None, 1, size=(rows, 32, 48, 3)) for rows in (4, 8))
    with pytest.raises(RecipeError, match="different sizes: b4") as caught:
        turns.in_turn([ours, theirs], 3)
    assert "the same sizes" in caught.value.fix
