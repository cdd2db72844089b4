"""The step's ways agree, leave no trace of their preparation, and give way with a reason. Graphs: test_graph.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdcache.distill import SEGMENTATION, Streams, rows_of
from kdcache.errors import RecipeError
from kdcache.training import Observer, TrainConfig, make_config, train, trainer
from kdcache.training.step.compiled import CompiledStep, choose_step, make_step
from kdcache.training.step.eager import EagerStep
from kdcache.training.step.optim import load_optimizer, make_optimizer
from kdcache_kernels import KernelError

WEIGHTS = "last.safetensors"
Read = Callable[..., list[dict[str, Any]]]


class Notes(Observer):
    """Keeps what a run noted; stops it, as a power cut would, after a step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.texts: list[str] = []
        self._stop_after = stop_after

    def note(self, text: str) -> None:
        if text.startswith("--step"):
            self.texts.append(text)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        if step == self._stop_after:
            raise KeyboardInterrupt


def go(settings: dict[str, Any], run: Path, observer: Observer | None = None, *, resume: bool = False) -> list[str]:
    """Train; returns the notes about the step."""
    observer = observer or Notes()
    train(make_config(**settings), run, observer=observer, resume=resume)
    return observer.texts if isinstance(observer, Notes) else []


def state_of(eager: EagerStep) -> list[torch.Tensor]:
    """Everything that training changes, copied."""
    moments = [value for state in eager.optimizer.state.values() for value in state.values()]
    tensors = [*eager.model.parameters(), *eager.model.buffers(), *moments, torch.get_rng_state()]
    return [tensor.detach().clone() for tensor in tensors]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# --- which way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "device", "kind"),
    [
        ("auto", "cpu", "eager"),
        ("auto", "cuda", "graphed"),
        ("auto", "cuda:1", "graphed"),
        ("eager", "cuda", "eager"),
        ("compiled", "cpu", "compiled"),
        ("compiled", "cuda", "compiled"),
        ("graphed", "cuda", "graphed"),
    ],
)
def test_the_way_depends_on_the_device(name: str, device: str, kind: str) -> None:
    assert choose_step(name, torch.device(device)) == kind


def test_a_graph_takes_a_gpu(student: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        go(student | {"step": "graphed"}, tmp_path / "run")
    assert caught.value.problem == "Cannot use --step graphed on the device cpu: it records a CUDA graph"
    assert "--step compiled" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_on_a_cpu_auto_is_eager_to_the_bit_and_says_nothing(student: dict[str, Any], tmp_path: Path) -> None:
    assert go(student, tmp_path / "auto") == go(student | {"step": "eager"}, tmp_path / "eager") == []
    assert (tmp_path / "auto" / WEIGHTS).read_bytes() == (tmp_path / "eager" / WEIGHTS).read_bytes()


# --- compiled is eager -------------------------------------------------------------------------------------


def agree(settings: dict[str, Any], folder: Path, read_metrics: Read, tolerance: float) -> None:
    """Eager and compiled runs log the same losses; the compiled one says that it was compiled."""
    assert go(settings | {"step": "eager"}, folder / "eager") == []
    notes = go(settings | {"step": "compiled"}, folder / "compiled")
    assert [note.split(" in ")[0] for note in notes] == ["--step compiled: prepared"]
    logs = [
        [(row["step"], row["loss"], row["ce"], row["kl"], row["lr"]) for row in read_metrics(folder / kind, "train")]
        for kind in ("eager", "compiled")
    ]
    assert len(logs[0]) == settings["iterations"]
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=tolerance)
    one, two = (load_file(folder / kind / WEIGHTS) for kind in ("eager", "compiled"))
    for name in one:
        error = (one[name].double() - two[name].double()).norm()
        assert error <= 10 * tolerance * one[name].double().norm() + 1e-12, name


@pytest.mark.parametrize(("store", "optimizer"), [("dense", "adamw"), ("top-k", "sgd"), ("labels alone", "adam")])
def test_a_compiled_step_is_the_eager_one(
    store: str,
    optimizer: str,
    student: dict[str, Any],
    settings: dict[str, Any],
    source_path: Path,
    scenes: str,
    tmp_path: Path,
    read_metrics: Read,
    backend: Any,
) -> None:
    training = {
        "dense": student,
        "top-k": student | {"cache": str(source_path), "data": scenes, "amp": "bf16"},
        "labels alone": settings,
    }[store]
    changes = {"optimizer": optimizer, "lr": 0.005, "gradients_every": 3, "clip_grad": 0.5, "class_weights": "sqrt"}
    agree(training | changes, tmp_path, read_metrics, 1e-6)
    assert backend.programs == 1


@pytest.mark.slow
def test_the_compiler_s_own_code_is_the_eager_step(student: dict[str, Any], tmp_path: Path, read_metrics: Read) -> None:
    agree(student | {"optimizer": "sgd", "lr": 0.01, "gradients_every": 0}, tmp_path, read_metrics, 1e-5)


def test_a_batch_of_another_size_runs_eagerly_and_right(
    eager_step: Callable[..., EagerStep], batches: list[Streams], backend: Any
) -> None:
    def part(batch: Streams) -> Streams:
        return rows_of(batch, 1)

    mixed = [batches[0], part(batches[1]), batches[2], part(batches[3])]
    plain, other = eager_step(), eager_step()
    compiled = CompiledStep(other, batches[0])
    for batch in mixed:
        assert torch.equal(compiled(batch), plain(batch))
    assert same(state_of(plain), state_of(other))
    assert backend.programs == 1


def test_a_process_may_train_more_models_than_the_compiler_s_limit(
    eager_step: Callable[..., EagerStep], batches: list[Streams], backend: Any, model_file: Callable[[str], str]
) -> None:
    for _ in range(12):
        CompiledStep(eager_step(model_file("dropout")), batches[0])(batches[1])
    assert backend.programs == 12


# --- preparation leaves no trace ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_a_rehearsal_leaves_no_trace(
    fails: bool,
    trained: int,
    optimizer: str,
    eager_step: Callable[..., EagerStep],
    batches: list[Streams],
    model_file: Callable[[str], str],
) -> None:
    rehearsed, plain = (eager_step(model_file("dropout"), optimizer=optimizer) for _ in range(2))
    torch.manual_seed(5)
    for batch in batches[:trained]:
        rehearsed(batch)
    before = state_of(rehearsed)
    try:
        with rehearsed.rehearsal():
            rehearsed(batches[3])
            assert not same(state_of(rehearsed), before)
            rehearsed.forward(batches[4]).loss.backward()
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        pass
    after = state_of(rehearsed)
    if trained:
        assert same(after, before)
    assert all(parameter.grad is None for parameter in rehearsed.model.parameters())
    # What follows is what would have followed.
    losses = torch.stack([rehearsed(batch) for batch in batches[trained:]])
    torch.manual_seed(5)
    expected = torch.stack([plain(batch) for batch in batches])
    assert torch.equal(losses, expected[trained:])
    assert same(state_of(rehearsed), state_of(plain))


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_a_run_resumes_bitwise(
    kind: str,
    student: dict[str, Any],
    tmp_path: Path,
    read_metrics: Read,
    model_file: Callable[[str], str],
    backend: Any,
) -> None:
    changes = {"step": kind, "gradients_every": 4, "iterations": 9, "model": model_file("dropout")}
    resumes_bitwise(student | changes, tmp_path, read_metrics)


@pytest.mark.slow
def test_a_compiled_run_with_dropout_resumes_bitwise(
    student: dict[str, Any], tmp_path: Path, read_metrics: Read, model_file: Callable[[str], str]
) -> None:
    resumes_bitwise(student | {"step": "compiled", "model": model_file("dropout")}, tmp_path, read_metrics)


def resumes_bitwise(settings: dict[str, Any], folder: Path, read_metrics: Read) -> None:
    go(settings, folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(settings, folder / "cut", Notes(stop_after=5))
    go(settings, folder / "cut", resume=True)
    assert (folder / "whole" / WEIGHTS).read_bytes() == (folder / "cut" / WEIGHTS).read_bytes()
    logs = [
        [(row["step"], row["loss"], row["lr"]) for row in read_metrics(folder / name, "train")]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


def test_preparing_is_no_training_time(
    student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(kind: str, eager: EagerStep, batch: Streams, note: Callable[[str], None]) -> EagerStep:
        time.sleep(3)
        return eager

    monkeypatch.setattr(trainer, "make_step", slow)
    result = train(make_config(**student | {"iterations": 2, "val": None}), tmp_path)
    assert result["prepared_seconds"] >= 3
    assert result["seconds"] < 2
    assert 0 < result["cpu_seconds"] < 3  # a sleep takes none


def test_the_way_may_change_on_resume(student: dict[str, Any], tmp_path: Path, backend: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(student, tmp_path, Notes(stop_after=5))
    recipe = (tmp_path / "recipe.toml").read_text()
    # As a version without the setting wrote it.
    (tmp_path / "recipe.toml").write_text("\n".join(line for line in recipe.splitlines() if line[:4] != "step"))
    assert 'step = "auto"' in recipe
    go(student | {"step": "compiled"}, tmp_path, resume=True)
    assert backend.programs == 1


# --- what cannot be compiled -------------------------------------------------------------------------------

_BRANCHES = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, num_classes, 3, 4, 1)

    def forward(self, x):
        y = self.body(x)
        if y.mean() > 1e9:
            y = -y
        return y

def build(num_classes=7):
    return Net(num_classes)
"""

_COUNTS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, num_classes, 3, 4, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * (1 if self.calls == 100 else 2)

def build(num_classes=7):
    return Net(num_classes)
"""


@pytest.mark.parametrize(("code", "reason"), [(_BRANCHES, "branching, at untraceable.py:11)"), (_COUNTS, "recompile")])
def test_what_cannot_be_compiled_runs_eagerly_and_says_why(
    code: str, reason: str, student: dict[str, Any], tmp_path: Path, backend: Any
) -> None:
    (tmp_path / "untraceable.py").write_text(code)
    training = student | {"model": f"{tmp_path}/untraceable.py:build", "val": None}
    go(training | {"step": "eager"}, tmp_path / "eager")
    notes = go(training | {"step": "compiled"}, tmp_path / "compiled")
    assert len(notes) == 1
    assert notes[0].startswith("--step compiled: the model is not compiled, its operations run one by one (")
    assert reason in notes[0]
    assert len(notes[0].splitlines()) == 1
    assert (tmp_path / "eager" / WEIGHTS).read_bytes() == (tmp_path / "compiled" / WEIGHTS).read_bytes()


def test_a_compiler_that_breaks_is_named(
    eager_step: Callable[..., EagerStep], batches: list[Streams], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("no such compiler: c++\nand 200 lines more")

    monkeypatch.setattr("kdcache.training.step.compiled.BACKEND", broken)
    notes: list[str] = []
    eager, plain = eager_step(), eager_step()
    made = make_step("compiled", eager, batches[0], notes.append)
    assert made is eager
    assert len(notes) == 1
    assert "no such compiler" in notes[0]
    assert "200 lines" not in notes[0]
    assert torch.equal(made(batches[0]), plain(batches[0]))


def test_a_faulty_batch_is_no_fault_of_the_compiler(
    eager_step: Callable[..., EagerStep], batches: list[Streams], backend: Any
) -> None:
    (batch,) = batches[0]
    wrong = (replace(batch, labels={SEGMENTATION: torch.full_like(batch.label, 77)}),)
    notes: list[str] = []
    with pytest.raises(KernelError, match="77"):
        make_step("compiled", eager_step(), wrong, notes.append)
    assert notes == []


# --- a learning rate on the device -------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("schedule", ["poly", "plateau"])
def test_a_rate_in_a_tensor_is_the_rate_in_a_number(
    schedule: str, optimizer: str, config: Callable[..., TrainConfig]
) -> None:
    from kdcache.training.step.optim import Schedule

    training = config(optimizer=optimizer, schedule=schedule, lr=0.1, warmup=3, iterations=20, weight_decay=0.1)
    actual = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        adam = make_optimizer(model, training.optimizer, capturable=capturable)
        tensors = [group["lr"] for group in adam.param_groups]
        assert all(isinstance(lr, torch.Tensor) == capturable for lr in tensors)
        plan = Schedule(adam, training.optimizer)
        rates = []
        for number in range(20):
            model(torch.full((1, 3, 5, 5), 0.1 * number)).square().sum().backward()
            adam.step()
            adam.zero_grad()
            plan.after_step()
            if number % 2:
                plan.after_validation(0.5)
            rates.append(plan.lr)
            assert all(float(group["lr"]) == pytest.approx(plan.lr, rel=1e-6) for group in adam.param_groups)
        # In place: a graph has recorded these very tensors.
        assert not capturable or all(a is b["lr"] for a, b in zip(tensors, adam.param_groups, strict=True))
        actual.append((rates, [p.detach().clone() for p in model.parameters()]))
    assert actual[0][0] == actual[1][0]
    assert len(set(actual[0][0])) > 1
    for one, two in zip(actual[0][1], actual[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("saved", [False, True])
def test_an_optimizer_s_state_fits_every_way(saved: bool, optimizer: str, config: Callable[..., TrainConfig]) -> None:
    """Saved by one way (earlier versions: a number as rate, and initial_lr), loaded by the other."""
    training = config(optimizer=optimizer, lr=0.1)
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)

    def learn(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        for number in range(3):
            optimizer.zero_grad()
            model(torch.full((1, 3, 5, 5), 0.1 * number)).square().sum().backward()
            optimizer.step()

    first = make_optimizer(model, training.optimizer, capturable=saved)
    learn(first, model)
    state = first.state_dict()
    for group in state["param_groups"]:
        group["initial_lr"] = 0.7
        group["lr"] = torch.tensor(0.7) if saved else 0.7
    results = []
    for capturable in (False, True):
        other = copy.deepcopy(model)
        second = make_optimizer(other, training.optimizer, capturable=capturable)
        load_optimizer(second, copy.deepcopy(state))
        for group in second.param_groups:
            assert isinstance(group["lr"], torch.Tensor) == capturable
            assert float(group["lr"]) == pytest.approx(0.1)
            assert bool(group.get("fused")) == capturable
        learn(second, other)
        results.append(list(other.parameters()))
        moments = list(second.state.values())
        assert len(moments) == 2
        assert optimizer == "sgd" or all(float(moment["step"]) == 6 for moment in moments)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
