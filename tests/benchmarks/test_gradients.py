"""benchmarks/gradients.py and equivalence.py: a planted error is found, and the reference is the reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.errors import RecipeError

# gradients.py


@pytest.fixture
def gradients(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("gradients")


def test_an_error_is_relative_to_its_layer_and_a_little_of_all(gradients) -> None:
    live = [torch.tensor([3.0, 4.0]), torch.tensor([0.0])]
    store = [torch.tensor([3.0, 4.5]), torch.tensor([0.001])]
    worst, where = gradients.compare(["a", "b"], store, live)
    assert (where, worst) == ("b", pytest.approx(0.001 / (1e-3 * 5)))
    worst, where = gradients.compare(["a"], store[:1], live[:1])
    assert (where, worst) == ("a", pytest.approx(0.5 / (5 + 5e-3)))
    assert gradients.compare(["a"], live[:1], live[:1])[0] == 0


@pytest.mark.parametrize("place", [0, 1])
def test_no_number_is_the_worst_error(gradients, place) -> None:
    live = [torch.ones(2), torch.ones(2)]
    store = [tensor.clone() for tensor in live]
    store[place][0] = math.nan
    store[1 - place][0] = 9.0
    worst, where = gradients.compare(["a", "b"], store, live)
    assert math.isnan(worst)
    assert where == "ab"[place]


@pytest.mark.parametrize(
    ("worst", "met"),
    [((1.9e-3, 4.9e-3), True), ((2.1e-3, 4.9e-3), False), ((1.9e-3, 5.1e-3), False), ((1e-4, math.nan), False)],
)
def test_the_bounds_of_gradients(gradients, worst, met) -> None:
    rows = [
        {"worst": error, "bound": gradients.TOLERANCE[state]}
        for state, error in zip(("initial", "trained"), worst, strict=True)
    ]
    assert gradients.is_met(rows) is met


def test_a_cache_has_the_gradients_of_its_teacher_and_a_planted_error_fails(
    gradients, call, store, scenes, teacher_run, runs, monkeypatch, tmp_path
) -> None:
    words = ["--data", scenes, "--cache", store, "--teacher", teacher_run, "--student", runs(6), "--batches", 2]
    words += ["--batch-size", 3, "--json", tmp_path / "gradients.json"]
    seen: list[tuple[int, float]] = []
    original = gradients.from_store

    def watched(student: Any, cache: Any, batch: Any, temperature: float) -> Any:
        seen.append((len(batch.pixels), temperature))
        return original(student, cache, batch, temperature)

    monkeypatch.setattr(gradients, "from_store", watched)
    assert call(gradients, *words) == 0
    rows = json.loads((tmp_path / "gradients.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["student"], row["temperature"]) for row in rows] == [
        (state, temperature) for state in ("initial", "trained") for temperature in (1.0, 2.0, 4.0)
    ]
    assert seen == [(3, temperature) for _ in range(2) for temperature in (1.0, 2.0, 4.0) for _ in range(2)]
    assert all(0 < row["worst"] < row["bound"] for row in rows)

    def wrong(student: Any, cache: Any, batch: Any, temperature: float) -> Any:
        found = original(student, cache, batch, temperature)
        return [*found[:-1], found[-1] * (1.01 if temperature == 4 else 1)]

    monkeypatch.setattr(gradients, "from_store", wrong)
    assert call(gradients, *words) == 1
    rows = json.loads((tmp_path / "gradients.json").read_text(encoding="utf-8"))["rows"]
    assert [row["worst"] > row["bound"] for row in rows] == [row["temperature"] == 4 for row in rows]
    assert {row["layer"] for row in rows if row["temperature"] == 4} == {"classifier.bias"}


# equivalence.py


@pytest.fixture
def equivalence(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("equivalence")


def row(impl: str, losses: list[float], miou: float) -> dict[str, Any]:
    return {"impl": impl, "weights": 0, "losses": losses, "miou": miou}


def others(*mious: float) -> list[dict[str, Any]]:
    return [row("reference", [1.0], miou) for miou in mious]


@pytest.mark.parametrize(
    ("loss", "miou", "met"),
    [
        (1.5 + 0.9e-4, 51.0, True),
        (1.5 - 0.9e-4, 50.0, True),
        (1.5 + 1.1e-4, 51.0, False),
        (1.5 - 1.1e-4, 51.0, False),
        (1.5, 49.9, False),
        (1.5, 53.1, False),
        (math.nan, 51.0, False),
    ],
)
def test_the_fused_run_is_near_the_reference_and_among_the_perturbed(equivalence, loss, miou, met) -> None:
    fused, plain = row("auto", [2.0, loss], miou), row("reference", [2.0, 1.5], 99.0)
    found = equivalence.verdict(fused, plain, others(52.0, 50.0, 53.0))
    assert found["miou_range"] == [50.0, 53.0]
    assert found["bound"] == 1e-4
    assert equivalence.is_met(found) is met


def test_runs_of_different_lengths(equivalence) -> None:
    with pytest.raises(RecipeError, match="different numbers of losses: auto 1, reference 2"):
        equivalence.verdict(row("auto", [1.0], 1), row("reference", [1.0, 2.0], 1), others(1, 1, 1))


def test_weights_move_by_one_rounding(equivalence) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64))
    same, moved, again, other = (equivalence.perturbed(model, seed) for seed in (0, 1, 1, 2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(same[name], tensor)
        assert torch.equal(moved[name], again[name])
        if not tensor.is_floating_point():
            assert torch.equal(moved[name], tensor)
            continue
        up, down = (torch.nextafter(tensor, torch.tensor(end)) for end in (torch.inf, -torch.inf))
        assert ((moved[name] == up) | (moved[name] == down)).all()
    assert (moved["0.weight"] > model[0].weight).any()
    assert (moved["0.weight"] < model[0].weight).any()
    assert not torch.equal(moved["0.weight"], other["0.weight"])


@pytest.fixture
def given(options, store, scenes) -> Any:
    return options(model="kdcache:tiny", cache=str(store), val=scenes, iterations=3, seed=4, device="cpu")


def test_a_run_trains_by_the_implementation_that_it_is_named_after(equivalence, given, tmp_path, monkeypatch) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(equivalence, "train", lambda config, out: configs.append((config, out)))
    lines = [{"kind": "train", "loss": 3.0 - n / 100} for n in range(25)]
    lines += [{"kind": "validation", "miou": 0.25}, {"kind": "validation", "miou": 0.125}]
    monkeypatch.setattr(equivalence.Run, "open", lambda out: SimpleNamespace(metrics=lines))
    found = {(impl, seed): equivalence.run(given, tmp_path, impl, seed) for impl, seed in RUNS}
    for (impl, seed), (config, _) in zip(RUNS, configs, strict=True):
        assert config.machine.impl == impl
        assert config.run.init == str(tmp_path / f"weights-{seed}.safetensors")
        assert (config.optimizer.batch_size, config.optimizer.lr, config.optimizer.warmup) == (8, 2e-3, 100)
        assert (config.loss.method, config.loss.class_weights, config.run.log_every) == ("kl", "sqrt", 1)
        assert (config.optimizer.seed, config.machine.step) == (4, "eager")
        told = found[impl, seed]
        assert (told["impl"], told["weights"], told["miou"]) == (impl, seed, 12.5)
        assert told["losses"] == [line["loss"] for line in lines[:20]]
    assert len({str(out) for _, out in configs}) == len(RUNS)


RUNS = [("auto", 0), ("reference", 0), ("reference", 1)]


@pytest.mark.parametrize(("miou", "code"), [(51.0, 0), (60.0, 1)])
def test_the_fused_run_is_judged_by_runs_of_the_reference(equivalence, call, monkeypatch, tmp_path, miou, code) -> None:
    trained: list[tuple[str, int]] = []

    def run(arguments: Any, folder: Path, impl: str, seed: int) -> dict[str, Any]:
        trained.append((impl, seed))
        return row(impl, [1.0], miou if impl == "auto" else 50.0 + seed)

    monkeypatch.setattr(equivalence, "run", run)
    words = ["--cache", "a.zarr", "--val", "camvid", "--runs", 4, "--json", tmp_path / "a.json"]
    assert call(equivalence, *words) == code
    assert trained == [("auto", 0), ("reference", 0), *(("reference", seed) for seed in range(1, 5))]
    told = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (told["inside"], told["miou_range"], len(told["rows"])) == (code == 0, [51, 54], 6)


def test_a_range_needs_runs(equivalence, call) -> None:
    with pytest.raises(RecipeError, match="Too few repeats for a median: 2") as caught:
        call(equivalence, "--cache", "a.zarr", "--val", "camvid", "--runs", 2)
    assert "--runs" in caught.value.fix
