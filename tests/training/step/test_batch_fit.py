"""Out of memory: the error names a batch that fits, as measured; a run's last state is untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.distill import Streams
from kdcache.errors import ModelError
from kdcache.metrics.timing import is_out_of_memory
from kdcache.training import Observer, make_config, train
from kdcache.training.step.batch_fit import largest_fitting, requested_memory

CPU = torch.device("cpu")


@pytest.fixture
def hungry(
    student: dict[str, Any], model_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Settings of a run whose model has room for so many samples in training, and in validation."""

    def make(room: int, room_eval: int = 99, function: str = "cuda", **changes: Any) -> dict[str, Any]:
        monkeypatch.setenv("LIMIT", str(room))
        monkeypatch.setenv("LIMIT_EVAL", str(room_eval))
        return student | {"model": model_file("hungry", function), **changes}

    return make


def refused(settings: dict[str, Any], run: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        train(make_config(**settings), run, **options)
    assert caught.value.problem.startswith("Out of memory")
    assert "the last checkpoint is untouched" in caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("batch", "room", "changes", "remedy"),
    [
        (16, 8, {}, "Use --batch-size 8, or --accumulate 2 to keep the batch"),
        (16, 5, {}, "Use --batch-size 4, or --accumulate 4 to keep the batch"),
        (15, 7, {}, "Use --batch-size 7, or --accumulate 3 to keep the batch"),
        (8, 1, {}, "Use --batch-size 1, or --accumulate 8 to keep the batch"),
        (12, 3, {"mix": "cutmix"}, "Use --batch-size 2, or --accumulate 6 to keep the batch"),
        (16, 2, {"accumulate": 4}, "Use --batch-size 8 --accumulate 4, or --accumulate 8 to keep the batch"),
        (
            8,
            4,
            {"method": "dist"},
            "Use --batch-size 4, or --accumulate 2 with --method kl instead of dist to keep the batch",
        ),
        (8, 0, {}, "No smaller batch was found to fit: use a smaller --size or --model, or --device cpu"),
        (1, 0, {}, "No smaller batch was found to fit: use a smaller --size or --model, or --device cpu"),
    ],
)
@pytest.mark.parametrize("gradients_every", [0, 500])
def test_the_remedy_is_measured(
    batch: int, room: int, changes: dict[str, Any], remedy: str, gradients_every: int, hungry: Any, tmp_path: Path
) -> None:
    settings = hungry(room, batch_size=batch, gradients_every=gradients_every, **changes)
    error = refused(settings, tmp_path / "run")
    assert error.fix.startswith(remedy)
    parted = " --accumulate 4" if "accumulate" in changes else ""
    assert error.problem.endswith(f": --batch-size {batch}{parted} on the device cpu, which could not give 20.50 GiB")


def test_what_the_remedy_says_does_fit(hungry: Any, tmp_path: Path) -> None:
    settings = hungry(3, batch_size=8, val=None, iterations=2)
    assert "--batch-size 2, or --accumulate 4" in refused(settings, tmp_path / "run").fix
    train(make_config(**(settings | {"batch_size": 2})), tmp_path / "small")
    train(make_config(**(settings | {"accumulate": 4})), tmp_path / "parts")


@pytest.mark.parametrize(("function", "asked"), [("host", "more memory"), ("allocator", "8 GiB")])
def test_the_machine_s_own_memory(function: str, asked: str, hungry: Any, tmp_path: Path) -> None:
    error = refused(hungry(4, function=function, batch_size=8), tmp_path / "run")
    assert error.problem.endswith(f"could not give {asked}")
    assert error.fix.startswith("Use --batch-size 4, or --accumulate 2")


def test_another_error_is_none_of_ours(hungry: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Cannot run the network") as caught:
        train(make_config(**hungry(4, function="other", batch_size=8)), tmp_path / "run")
    assert "a fault of the model's own" in caught.value.problem


def test_a_validation_that_does_not_fit(hungry: Any, tmp_path: Path) -> None:
    error = refused(hungry(99, 1, batch_size=4, val="scenes:32x48,train=4,val=8"), tmp_path / "run")
    assert error.fix.startswith("Use --batch-size 1, or --accumulate 4 to keep the batch")
    train(make_config(**hungry(99, 1, batch_size=4, accumulate=4)), tmp_path / "parts")


def test_the_last_state_is_untouched(hungry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run = hungry(8, batch_size=4), tmp_path / "run"

    class Eating(Observer):
        def stepped(self, step: int, values: dict[str, float]) -> None:
            if step == 4:
                monkeypatch.setenv("LIMIT", "2")  # somebody else takes the rest

    assert "--accumulate 2" in refused(settings, run, observer=Eating()).fix
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == 3
    monkeypatch.setenv("LIMIT", "8")
    train(make_config(**settings), run, resume=True)
    train(make_config(**settings), tmp_path / "whole")
    one, two = ((folder / "last.safetensors").read_bytes() for folder in (run, tmp_path / "whole"))
    assert one == two


def test_real_errors_are_known() -> None:
    with pytest.raises(RuntimeError) as torch_s:
        torch.empty(2**50)
    with pytest.raises(MemoryError) as numpy_s:
        np.empty(2**57)
    assert requested_memory(torch_s.value) == "4.19e+06 GiB"
    assert requested_memory(numpy_s.value) == "1.00 EiB"
    assert all(is_out_of_memory(caught.value) for caught in (torch_s, numpy_s))
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid"))
    assert not is_out_of_memory(OSError("No space left on device"))


@pytest.mark.parametrize("norms", [False, True])
def test_an_attempt_leaves_no_trace(norms: bool, eager_step: Any, batches: list[Streams]) -> None:
    eager, same = eager_step(), eager_step()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    eager.attempt(batches[0], norms)
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(eager.model.state_dict().values(), same.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(eager(batches[1]), same(batches[1]))
    for one, two in zip(eager.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_halves_are_tried_until_one_fits() -> None:
    sizes: list[int] = []

    def attempt(size: int) -> None:
        sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError

    assert largest_fitting(attempt, 20, CPU) == 2
    assert sizes == [10, 5, 2]
    sizes.clear()
    assert largest_fitting(attempt, 20, CPU, together=2) == 2
    assert sizes == [10, 4, 2]

    def refuse(size: int) -> None:
        raise torch.OutOfMemoryError if size > 1 else ValueError("more than 1 value per channel")

    assert largest_fitting(refuse, 4, CPU) is None
