"""The accuracy grid judges: it passes what is right and catches what is not."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from kdcache.bench.kernels import CheckSettings, accuracy, check, summary
from kdcache_kernels import LossParts, distill_loss

CPU = torch.device("cpu")
PART = {"strides": ("4",), "temperatures": (2.0,), "classes": (3, 33), "values": ("normal", "wide")}


def part(**options: object) -> CheckSettings:
    return CheckSettings(CPU, **{"impl": "reference", **PART, **options})  # type: ignore[arg-type]


def test_the_grid_is_the_product_of_its_factors() -> None:
    points = list(CheckSettings(CPU).points())
    assert len(points) == len(set(points)) == 3 * 5 * 6 * 5 * 5 * 3


def test_a_thinned_grid_pairs_every_value_with_every_other() -> None:
    axes = [field.name for field in fields(accuracy.Point)]
    all_points, some = (list(CheckSettings(CPU, every=every).points()) for every in (1, accuracy.EVERY))
    assert len(some) < len(all_points) / (accuracy.EVERY - 0.1)
    for a, b in itertools.combinations(axes, 2):
        pairs, found = ({(getattr(p, a), getattr(p, b)) for p in points} for points in (all_points, some))
        assert found == pairs


def test_the_reference_passes() -> None:
    judged = list(check(part()))
    assert len(judged) == 3 * 2 * 5 * 2
    assert all(one.passed for one in judged), [one for one in judged if not one.passed]
    assert any(one.gradient_error > 0 for one in judged), "float64 judges something narrower"


def test_every_dtype_gets_its_summary() -> None:
    judged = list(check(part(dtypes=("fp32", "bf16"))))
    rows = summary(judged)
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        among = [one for one in judged if one.point.dtype == row["dtype"]]
        assert (row["points"], row["missed"]) == (len(among), 0)
        assert row["gradient_error"] == max(one.gradient_error for one in among)
    assert rows[0]["gradient_error"] <= 2e-6


Change = Callable[[LossParts, torch.Tensor], torch.Tensor]
WRONG: dict[str, Change] = {
    "loss": lambda parts, z: parts.loss * (1 + 1e-5),
    "gradient": lambda parts, z: parts.loss + (1e-5 * (z - z.detach())).sum(),
    "NaN": lambda parts, z: parts.loss * torch.nan,
    "NaN in one gradient": lambda parts, z: parts.loss + 0 * (z - z.detach()).flatten()[0] / 0,
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_implementation_is_caught(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    def wrong(logits: torch.Tensor, *args: object, impl: str, **options: object) -> LossParts:
        parts = distill_loss(logits, *args, impl="reference", **options)  # type: ignore[arg-type]
        return parts if impl == "reference" else parts._replace(loss=change(parts, logits))

    monkeypatch.setattr(accuracy, "distill_loss", wrong)
    monkeypatch.setattr(accuracy, "resolved", lambda impl, device: "fused")
    settings = part(impl="auto", dtypes=("fp32",), values=("normal",), windows=("whole", "edge"))
    judged = list(check(settings))
    assert not any(one.passed for one in judged)
    assert all(row["missed"] == row["points"] for row in summary(judged))
    told = json.loads(json.dumps([one.to_json() for one in judged], allow_nan=False))
    assert all(one["passed"] is False for one in told)


def test_nan_is_the_worst() -> None:
    point = accuracy.Point("fp32", "4", 2.0, 3, "whole", "normal")
    judged = [accuracy.Judged(point, error, 1.0, error, 1.0) for error in (1.0, math.nan, 3.0)]
    assert math.isnan(summary(judged)[0]["loss_share"])
    assert summary(judged[::2])[0]["loss_share"] == 3


@pytest.mark.parametrize("window", accuracy.WINDOWS)
def test_windows_are_what_they_are_called(window: str) -> None:
    _, arguments = accuracy.draw(accuracy.Point("fp32", "4", 2.0, 3, window, "range"), CPU)
    target, edges, flip = arguments["target"], arguments["window_B4"], arguments["flip_B"]
    assert (edges is None) == (window in ("whole", "flip"))
    assert (flip is None) == (window in ("whole", "scale"))
    if edges is None:
        assert target.view_size == (20, 28)
        return
    height, width = target.view_size
    beyond = (edges[:, 0] < 0) | (edges[:, 1] < 0) | (edges[:, 2] > height) | (edges[:, 3] > width)
    assert beyond.tolist() == [window == "edge"] * 2
    aligned = (edges % 4 == 0).all().item() and torch.equal(edges[:, 2] - edges[:, 0], torch.full((2,), 20.0).double())
    assert aligned == (window == "crop")


def test_values_are_what_they_are_called() -> None:
    drawn = {
        values: accuracy.draw(accuracy.Point("fp32", "4", 2.0, 33, "whole", values), CPU)[0]
        for values in accuracy.VALUES
    }
    assert set(drawn["wide"].unique().tolist()) == {-6e4, 6e4}
    below, above = (drawn["range"].amax(1) - drawn["range"].amin(1)).flatten(1).amax(1).tolist()
    assert below < 80 < above
