"""A recorded step is the eager one. Without a GPU, what stands around the recording is run on a device of paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache.distill import Streams, rows_of
from kdcache.training import Observer, TrainConfig, make_config, train
from kdcache.training.step import cuda_graph
from kdcache.training.step.compiled import CompiledStep, make_step
from kdcache.training.step.cuda_graph import GraphedStep
from kdcache.training.step.eager import EagerStep
from kdcache.training.step.optim import Schedule

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Read = Callable[..., list[dict[str, Any]]]
Make = Callable[..., EagerStep]

_WAITS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, num_classes, 3, 4, 1)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        y = self.drop(self.body(x))
        return y * (1 if float(y.mean()) < 1e9 else 2)

def build(num_classes=7):
    return Net(num_classes)
"""


class Notes(Observer):
    """What a run noted about its step; stops it, as a power cut would, after a step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.texts: list[str] = []
        self._stop_after = stop_after

    def note(self, text: str) -> None:
        if text.startswith("--step"):
            self.texts.append(text)

    def stepped(self, step: int, values: dict[str, float]) -> None:
        if step == self._stop_after:
            raise KeyboardInterrupt


class Paper:
    """A stream or an event of a device that does everything at once."""

    def __init__(self, *_: object) -> None: ...
    def wait_stream(self, _: object) -> None: ...
    def wait(self) -> None: ...
    def record(self) -> None: ...


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """The CPU in CUDA's place: a replay runs anew what was recorded. Returns the synchronisation modes set."""
    modes: list[int | str] = []

    def record(run: Callable[[], Tensor], _: torch.device) -> tuple[Callable[[], object], Tensor]:
        result = torch.zeros(3)
        return lambda: result.copy_(run()), result

    for name, stand_in in {
        "Stream": Paper,
        "Event": Paper,
        "current_stream": Paper,
        "stream": nullcontext,
        "device": nullcontext,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": modes.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda_graph, "record", record)
    return modes


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def part_of(batch: Streams) -> Streams:
    """The first record of a batch."""
    return rows_of(batch, 1)


def state_of(eager: EagerStep) -> list[Tensor]:
    moments = [value for state in eager.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone().cpu() for tensor in (*eager.model.parameters(), *eager.model.buffers(), *moments)]


def losses_of(
    step: Callable[[Streams], Tensor], eager: EagerStep, batches: list[Streams], config: TrainConfig
) -> list[Tensor]:
    """Ten steps with a schedule, one batch of another size and two steps with gradient norms among them."""
    schedule = Schedule(eager.optimizer, config.optimizer)
    found = []
    for number in range(10):
        batch = batches[number % len(batches)]
        if number == 6:
            batch = part_of(batch)
        found.append(eager.with_norms(batch)[0] if number in (4, 8) else step(batch))
        schedule.after_step()
    return found


# --- around the recording ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_replay_gets_batch_rate_and_random_numbers_and_leaves_the_rest_alone(
    optimizer: str,
    eager_step: Make,
    batches: list[Streams],
    config: Callable[..., TrainConfig],
    model_file: Callable[[str], str],
    paper: list[int | str],
    backend: Any,
) -> None:
    options = {"optimizer": optimizer, "iterations": 10, "warmup": 3, "clip_grad": 0.5}
    plain, other = (eager_step(model_file("dropout"), capturable=True, **options) for _ in range(2))
    notes: list[str] = []
    torch.manual_seed(5)
    step = make_step("graphed", other, batches[0], notes.append)
    assert isinstance(step, GraphedStep)
    assert [note.split(" in ")[0] for note in notes] == ["--step graphed: prepared"]
    assert backend.programs == 1
    assert paper == ["error", 0], "the last warm-up, alone, may not wait for the device"
    found = losses_of(step, other, batches, config(lr=0.01, **options))
    torch.manual_seed(5)
    expected = losses_of(plain, plain, batches, config(lr=0.01, **options))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "also those that replays followed"
    assert all(torch.equal(a, b) for a, b in zip(state_of(other), state_of(plain), strict=True))
    assert len({float(losses[0]) for losses in found}) == 10


def test_a_step_that_waits_is_not_recorded_and_says_why(
    eager_step: Make, batches: list[Streams], paper: list[int | str], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = eager_step(capturable=True), eager_step(capturable=True)
    learn = other.learn

    def waits(parts: Any) -> Tensor:
        if paper[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation\nat length")
        return learn(parts)

    monkeypatch.setattr(other, "learn", waits)
    notes: list[str] = []
    step = make_step("graphed", other, batches[0], notes.append)
    assert isinstance(step, CompiledStep)
    assert len(notes) == 2
    assert notes[0] == (
        "--step graphed: the step is not recorded as a CUDA graph, it is launched anew "
        "(RuntimeError: called a synchronizing CUDA operation)"
    )
    assert paper[-1] == 0
    for batch in batches:
        assert torch.equal(step(batch), plain(batch))
    assert all(torch.equal(a, b) for a, b in zip(state_of(other), state_of(plain), strict=True))


# --- on a GPU ----------------------------------------------------------------------------------------------


@gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("optimizer", "compiled"), [("adamw", False), ("adam", False), ("sgd", False), ("sgd", True)])
def test_ten_replays_are_ten_eager_steps(
    optimizer: str, compiled: bool, eager_step: Make, batches: list[Streams], config: Callable[..., TrainConfig]
) -> None:
    options = {"optimizer": optimizer, "iterations": 10, "warmup": 3, "clip_grad": 0.5, "lr": 1e-3}
    plain, other = (eager_step(device="cuda", capturable=True, **options) for _ in range(2))
    forward = CompiledStep(other, batches[0]).forward if compiled else other.forward
    found = losses_of(GraphedStep(other, forward, batches[0]), other, batches, config(**options))
    expected = losses_of(plain, plain, batches, config(**options))
    tolerance = 2e-3 if compiled else 1e-4
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=tolerance, atol=tolerance)
    if optimizer == "sgd":  # Adam's first updates are signs, which rounding may turn
        for one, two in zip(state_of(other), state_of(plain), strict=True):
            assert (one.double() - two.double()).norm() <= 10 * tolerance * two.double().norm() + 1e-6


@gpu
@pytest.mark.usefixtures("deterministic")
def test_replays_draw_the_random_numbers_of_eager_steps(
    eager_step: Make, batches: list[Streams], config: Callable[..., TrainConfig], model_file: Callable[[str], str]
) -> None:
    plain, other = (eager_step(model_file("dropout"), "cuda", capturable=True) for _ in range(2))
    torch.cuda.manual_seed(5)
    step = GraphedStep(other, other.forward, batches[0])
    found = losses_of(step, other, batches, config())
    state = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(5)
    expected = losses_of(plain, plain, batches, config())
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(state, torch.cuda.get_rng_state())


@gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("workers", [0, 1])
def test_graphed_runs_are_eager_runs(
    workers: int, student: dict[str, Any], tmp_path: Path, read_metrics: Read, model_file: Callable[[str], str]
) -> None:
    settings = student | {"device": "cuda", "amp": "off", "iterations": 10, "gradients_every": 4, "workers": workers}
    logs = []
    for kind in ("eager", "auto"):
        notes = Notes()
        train(make_config(**settings, step=kind), tmp_path / kind, observer=notes)
        rows = read_metrics(tmp_path / kind, "train")
        logs.append([(row["loss"], row["ce"], row["kl"], row["lr"]) for row in rows])
        prepared = [text.split(" in ")[0] for text in notes.texts]
        assert prepared == ([] if kind == "eager" else ["--step graphed: prepared"])
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=5e-3, abs=1e-4)


@gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("resumed", ["graphed", "eager"])
def test_a_graphed_run_resumes(
    resumed: str, student: dict[str, Any], tmp_path: Path, read_metrics: Read, model_file: Callable[[str], str]
) -> None:
    """Bitwise by another graph, to rounding by another way; the checkpoint is the same."""
    settings = student | {"device": "cuda", "amp": "off", "iterations": 9, "model": model_file("dropout"), "val": None}
    train(make_config(**settings, step="graphed"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make_config(**settings, step="graphed"), tmp_path / "cut", observer=Notes(stop_after=5))
    train(make_config(**settings, step=resumed), tmp_path / "cut", resume=True)
    logs = [[row["loss"] for row in read_metrics(tmp_path / name, "train")] for name in ("whole", "cut")]
    if resumed == "graphed":
        assert logs[0] == logs[1]
        weights = [(tmp_path / name / "last.safetensors").read_bytes() for name in ("whole", "cut")]
        assert weights[0] == weights[1]
    else:
        # Dropout of compiled code draws other numbers than torch's: the losses are near, not equal.
        assert logs[0][:3] == logs[1][:3]
        assert logs[1] == pytest.approx(logs[0], rel=0.5)


@gpu
def test_a_graphed_run_resumes_on_a_cpu_and_back(student: dict[str, Any], tmp_path: Path) -> None:
    settings = student | {"iterations": 9, "amp": "off"}
    with pytest.raises(KeyboardInterrupt):
        train(make_config(**settings | {"device": "cuda"}), tmp_path, observer=Notes(stop_after=4))
    with pytest.raises(KeyboardInterrupt):
        train(make_config(**settings | {"device": "cpu"}), tmp_path, observer=Notes(stop_after=7), resume=True)
    result = train(make_config(**settings | {"device": "cuda"}), tmp_path, resume=True)
    assert result["iterations"] == 9


@gpu
@pytest.mark.parametrize("found", ["before", "while recording"])
def test_a_model_that_waits_for_the_device_is_launched_anew(
    found: str, student: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dropout goes on drawing, also after a recording that broke off."""
    (tmp_path / "waits.py").write_text(_WAITS)
    if found == "while recording":
        monkeypatch.setattr(cuda_graph, "refused_synchronisation", nullcontext)
    notes = Notes()
    settings = student | {"device": "cuda", "model": f"{tmp_path}/waits.py:build", "step": "graphed", "val": None}
    result = train(make_config(**settings), tmp_path / "run", observer=notes)
    assert result["iterations"] == 6
    assert any("not recorded as a CUDA graph" in text for text in notes.texts), notes.texts
